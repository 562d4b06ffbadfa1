"""The module `mutual_knn` against the package's function, the definition in sets, and the reference implementation."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import hera_trainer
from hera_trainer.evaluation import load_metric


def vectors(n: int, d: int, seed: int) -> np.ndarray:
    """Gaussian vectors of very different lengths, so that normalising them matters."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) * np.exp(4 * rng.random((n, 1)))).astype(np.float32)


def by_definition(x: np.ndarray, y: np.ndarray, k: int, normalize: bool) -> float:
    def neighbors(z: np.ndarray) -> list[set[int]]:
        z = z.astype(np.float64)
        if normalize:
            z = z / np.sqrt((z**2).sum(1, keepdims=True))
        table = []
        for i in range(len(z)):
            others = sorted((j for j in range(len(z)) if j != i), key=lambda j: -float(z[i] @ z[j]))
            table.append(set(others[:k]))
        return table

    return sum(len(a & b) for a, b in zip(neighbors(x), neighbors(y), strict=True)) / (len(x) * k)


def by_masks(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """The form of the Platonic Representation Hypothesis: product of 0/1 neighbour matrices of normalised vectors."""

    def mask(z: np.ndarray) -> torch.Tensor:
        features = torch.nn.functional.normalize(torch.from_numpy(z), dim=-1)
        similarity = (features @ features.T).fill_diagonal_(-1e8)
        return torch.zeros(len(z), len(z)).scatter_(1, similarity.argsort(1, descending=True)[:, :k], 1.0)

    return ((mask(x) * mask(y)).sum(1) / k).mean().item()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 4, 29])
def test_equals_the_definition_and_the_function_of_the_package(k: int, normalize: bool) -> None:
    x, y = vectors(30, 6, 0), vectors(30, 9, 1)
    y[:, :6] += x / 5  # something in common, so that the score is neither 0 nor that of chance
    score = load_metric("mutual_knn").compute(predictions=x, references=y, k=k, normalize=normalize)["mutual_knn"]
    assert score == pytest.approx(by_definition(x, y, k, normalize), abs=1e-12)
    assert score == pytest.approx(
        hera_trainer.mutual_knn(torch.from_numpy(x), torch.from_numpy(y), k, normalize), abs=1e-12
    )
    assert (score == 1.0) == (k == 29)


def test_equals_the_reference_implementation_with_ten_neighbors_by_default() -> None:
    x, y = vectors(60, 8, 2), vectors(60, 8, 3)
    score = load_metric("mutual_knn").compute(predictions=x, references=y)["mutual_knn"]
    assert score == pytest.approx(by_masks(x, y, 10), abs=1e-6)
    assert 0 < score < 1


def test_hand_worked() -> None:
    def circle(*degrees: float) -> np.ndarray:
        return np.array([[np.cos(np.radians(d)), np.sin(np.radians(d))] for d in degrees], dtype=np.float32)

    metric = load_metric("mutual_knn")
    # Nearest by index: 1, 0, 3, 2 in the first space, and 2, 3, 0, 1 where the two in the middle change places.
    first = circle(0, 10, 90, 100)
    assert metric.compute(predictions=first, references=first, k=1) == {"mutual_knn": 1.0}
    assert metric.compute(predictions=first, references=circle(0, 90, 10, 100), k=1) == {"mutual_knn": 0.0}
    # Nearest by index: 1, 2, 1, 2 and 1, 3, 3, 1. Of four, the first sample's neighbour is the same.
    score = metric.compute(predictions=circle(0, 11, 20, 120), references=circle(0, 11, 120, 20), k=1)
    assert score == {"mutual_knn": 0.25}


def test_batches_in_any_number_and_a_common_order_give_the_same() -> None:
    x, y = vectors(25, 5, 4), vectors(25, 5, 5)
    metric = load_metric("mutual_knn")
    whole = metric.compute(predictions=x, references=y, k=3)
    for start in range(0, 25, 7):
        metric.add_batch(predictions=x[start : start + 7], references=y[start : start + 7])
    assert metric.compute(k=3) == whole
    order = np.random.default_rng(0).permutation(25)
    assert metric.compute(predictions=x[order], references=y[order], k=3) == whole


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = vectors(40, 5, 6), vectors(40, 5, 7)
    metric = load_metric("mutual_knn")
    whole = metric.compute(predictions=x, references=y, k=3)
    monkeypatch.setattr(
        sys.modules[type(metric).__module__], "_MAX_SIMILARITIES", 40 * 7
    )  # 5 blocks of 7 rows, one of 5
    assert metric.compute(predictions=x, references=y, k=3) == whole


@pytest.mark.parametrize(
    ("x", "y", "k", "message"),
    [
        ([[1.0], [2.0]], [[1.0], [2.0]], 2, "k=2 nearest other samples do not exist among 2 samples"),
        ([[1.0], [2.0]], [[1.0], [2.0]], 0, "k must be between 1 and N - 1"),
        ([[1.0], [2.0, 3.0]], [[1.0], [2.0]], 1, r"`predictions` must be of one width, got widths \[1, 2\]"),
        ([[1.0], [2.0]], [[1.0], [float("nan")]], 1, "`references` contains NaN"),
        ([[1.0], [2.0]], [[1.0]], 1, "Mismatch in the number of predictions"),
    ],
)
def test_wrong_input_is_refused(x: list, y: list, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_metric("mutual_knn", keep_in_memory=True).compute(predictions=x, references=y, k=k)


def test_clipped_as_the_function_of_the_package_clips() -> None:
    x, y = vectors(40, 12, 8), vectors(40, 9, 9)
    x[:, 3] *= 50
    y[:, :5] += x[:, :5] / 5
    scores = {}
    for quantile in (None, 0.9):
        settings = {"k": 4, "clip_quantile": quantile}
        scores[quantile] = load_metric("mutual_knn").compute(predictions=x, references=y, **settings)["mutual_knn"]
        own = hera_trainer.mutual_knn(torch.from_numpy(x), torch.from_numpy(y), **settings)
        assert scores[quantile] == pytest.approx(own, abs=1e-12)
    assert scores[None] != scores[0.9]


def test_null_on_request() -> None:
    x, y, k, n = vectors(24, 5, 10), vectors(24, 7, 11), 3, 24
    metric = load_metric("mutual_knn")
    plain = metric.compute(predictions=x, references=y, k=k)
    found = metric.compute(predictions=x, references=y, k=k, permutations=40, seed=5)
    rng = np.random.default_rng(5)
    # Sample i of the second space is paired with sample order[i] of the first.
    expected = [by_definition(x[rng.permutation(n)], y, k, True) for _ in range(40)]
    assert found == {
        **plain,
        "null_mean": pytest.approx(np.mean(expected), abs=1e-12),
        "null_p95": pytest.approx(np.quantile(expected, 0.95), abs=1e-12),
    }
    # The package's function draws other permutations of the same distribution.
    own = hera_trainer.mutual_knn_null(
        *(hera_trainer.nearest_neighbors(torch.from_numpy(z), k) for z in (x, y)), permutations=3000
    )
    many = metric.compute(predictions=x, references=y, k=k, permutations=3000)
    assert many["null_mean"] == pytest.approx(own.mean, abs=0.003)
    assert many["null_p95"] == pytest.approx(own.p95, abs=1.5 / (n * k))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"clip_quantile": 95}, "above 0 and below 1, got 95"), ({"permutations": -1}, "must be at least 0, got -1")],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    x = vectors(12, 3, 0)
    with pytest.raises(ValueError, match=message):
        load_metric("mutual_knn", keep_in_memory=True).compute(predictions=x, references=x, k=2, **settings)
