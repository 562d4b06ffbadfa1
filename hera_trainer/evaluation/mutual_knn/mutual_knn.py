"""Mutual k-nearest-neighbour alignment of two representations, as a module for the `evaluate` library."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

_DESCRIPTION = """
Mutual k-nearest-neighbour alignment (MKNN) of two representations of the same samples: for each sample, its k nearest
other samples are found once in each space; the score is the mean share of neighbours that both spaces have in common.
1 says that the neighbourhoods are the same, k / (N - 1) is the mean score of unrelated spaces. Compare scores of the
same N and k only.
"""

_CITATION = """
@inproceedings{huh2024platonic,
    title = {Position: The Platonic Representation Hypothesis},
    author = {Huh, Minyoung and Cheung, Brian and Wang, Tongzhou and Isola, Phillip},
    booktitle = {International Conference on Machine Learning (ICML)},
    year = {2024}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `list` of `float`): Vectors of the samples in the first space, all of one width.
    references (`list` of `list` of `float`): Vectors of the same samples, in the same order, in the second space; its
        width may differ from that of the first.
    k (`int`, *optional*, defaults to `10`): Number of neighbours, at most one less than there are samples.
    normalize (`bool`, *optional*, defaults to `True`): L2-normalise the vectors first, so that similarity is the
        cosine. Without it, it is the dot product.
    clip_quantile (`float`, *optional*): Before that, clamp the values of each space to the mean over the samples of
        this quantile of a sample's absolute values. The reference code does, with 0.95.
    permutations (`int`, *optional*, defaults to `0`): Number of times that the samples of one side are permuted, to
        find what unrelated spaces score. 1000 are plenty.
    seed (`int`, *optional*, defaults to `0`): Seed of the permutations.
Returns:
    mutual_knn (`float`): Mean share of common neighbours, in [0, 1].
    null_mean (`float`): With `permutations`, the mean score of permuted pairs, an estimate of k / (N - 1).
    null_p95 (`float`): With `permutations`, their 95th percentile: one in twenty unrelated pairs scores higher.
Examples:
    >>> metric = evaluate.load("mutual_knn")
    >>> a = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]
    >>> metric.compute(predictions=a, references=a, k=1)
    {'mutual_knn': 1.0}
"""

# Similarities held at a time: 2**24 float32 numbers are 64 MiB, whatever the number of samples is.
_MAX_SIMILARITIES = 2**24


def _matrix(vectors: Any, name: str) -> NDArray[np.float32]:
    widths = {len(vector) for vector in vectors}
    if len(widths) != 1:
        raise ValueError(f"The vectors in `{name}` must be of one width, got widths {sorted(widths)}.")
    matrix = np.asarray(vectors, dtype=np.float32)
    if not np.isfinite(matrix).all():
        raise ValueError(f"`{name}` contains NaN or inf.")
    return matrix


def _neighbors(x: NDArray[np.float32], k: int, normalize: bool, clip_quantile: float | None) -> NDArray[np.int64]:
    if clip_quantile is not None:
        threshold = np.quantile(np.abs(x), clip_quantile, axis=1).mean()
        x = np.clip(x, -threshold, threshold)
    if normalize:
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    found = []
    rows = max(1, _MAX_SIMILARITIES // len(x))
    for start in range(0, len(x), rows):
        similarity = x[start : start + rows] @ x.T
        own = np.arange(len(similarity))
        similarity[own, own + start] = -np.inf
        found.append(np.argpartition(similarity, -k, axis=1)[:, -k:])
    return np.concatenate(found)


def _overlap(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Mean share of the neighbours `[N, k]` that are the same in both."""
    # A neighbour is written as the one number row * N + column, and a row names it once.
    rows = len(a) * np.arange(len(a))[:, None]
    return np.intersect1d((a + rows).ravel(), (b + rows).ravel(), assume_unique=True).size / a.size


class MutualKNN(evaluate.Metric):
    """Mean share of the k nearest neighbours that two representations of the same samples have in common."""

    def _info(self) -> evaluate.MetricInfo:
        vector = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": vector, "references": vector}),
            codebase_urls=["https://github.com/minyoungg/platonic-rep"],
            reference_urls=["https://arxiv.org/abs/2405.07987", "https://huggingface.co/papers/2606.23885"],
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        k: int = 10,
        normalize: bool = True,
        clip_quantile: float | None = None,
        permutations: int = 0,
        seed: int = 0,
    ) -> dict[str, float]:
        n = len(predictions)
        if not 1 <= k < n:
            raise ValueError(
                f"k={k} nearest other samples do not exist among {n} samples: k must be between 1 and N - 1."
            )
        if clip_quantile is not None and not 0 < clip_quantile < 1:
            raise ValueError(
                f"`clip_quantile` must be above 0 and below 1, got {clip_quantile}. Leave it out to clip nothing."
            )
        if permutations < 0:
            raise ValueError(f"`permutations` must be at least 0, got {permutations}.")
        a = _neighbors(_matrix(predictions, "predictions"), k, normalize, clip_quantile)
        b = _neighbors(_matrix(references, "references"), k, normalize, clip_quantile)
        scores = {"mutual_knn": _overlap(a, b)}
        if permutations:
            rng = np.random.default_rng(seed)
            orders = (rng.permutation(n) for _ in range(permutations))
            # Sample i of the second space is paired with sample order[i] of the first: neighbours change their numbers.
            null = [_overlap(a[order], order[b]) for order in orders]
            scores |= {"null_mean": float(np.mean(null)), "null_p95": float(np.quantile(null, 0.95))}
        return scores
