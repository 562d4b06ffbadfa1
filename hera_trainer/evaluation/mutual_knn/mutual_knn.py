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
1 says that the neighbourhoods are the same, k / (N - 1) is the score of unrelated spaces.
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
Returns:
    mutual_knn (`float`): Mean share of common neighbours, in [0, 1].
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


def _neighbors(x: NDArray[np.float32], k: int, normalize: bool) -> NDArray[np.int64]:
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

    def _compute(self, predictions: Any, references: Any, k: int = 10, normalize: bool = True) -> dict[str, float]:
        n = len(predictions)
        if not 1 <= k < n:
            raise ValueError(
                f"k={k} nearest other samples do not exist among {n} samples: k must be between 1 and N - 1."
            )
        # A neighbour is written as the one number row * N + column, and a row names it once.
        rows = n * np.arange(n)[:, None]
        a = _neighbors(_matrix(predictions, "predictions"), k, normalize) + rows
        b = _neighbors(_matrix(references, "references"), k, normalize) + rows
        return {"mutual_knn": np.intersect1d(a.ravel(), b.ravel(), assume_unique=True).size / (n * k)}
