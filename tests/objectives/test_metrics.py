"""Nearest neighbours and mutual k-NN against their definitions, written out with sorts and sets in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import hera_trainer.objectives.metrics as metrics
from hera_trainer.objectives.metrics import mutual_knn, nearest_neighbors, neighbor_overlap, top_neighbors


def samples(n: int, d: int, seed: int = 0) -> Tensor:
    """Gaussian vectors of very different lengths, so that normalising them matters."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.rand(n, 1, generator=generator).mul(4).exp()


def similarities(x: Tensor, normalize: bool) -> list[list[float]]:
    x = x.double()
    if normalize:
        x = x / x.pow(2).sum(1, keepdim=True).sqrt()
    return (x[:, None] * x[None]).sum(-1).tolist()


def sorted_neighbors(x: Tensor, k: int, normalize: bool) -> list[list[int]]:
    table = []
    for i, row in enumerate(similarities(x, normalize)):
        others = [j for j in range(len(row)) if j != i]
        table.append(sorted(others, key=lambda j, row=row: -row[j])[:k])
    return table


def on_circle(*degrees: float) -> Tensor:
    return torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in degrees])


# --- nearest_neighbors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 5, 39])
def test_neighbors_are_those_of_a_full_sort(k: int, normalize: bool) -> None:
    x = samples(40, 7)
    found = nearest_neighbors(x, k, normalize)
    assert found.dtype == torch.long
    assert found.shape == (40, k)
    assert found.tolist() == sorted_neighbors(x, k, normalize)


def test_normalizing_is_the_default_and_changes_the_neighbors() -> None:
    x = samples(40, 7)
    assert nearest_neighbors(x, 5).tolist() == sorted_neighbors(x, 5, True) != sorted_neighbors(x, 5, False)


def test_unnormalized_neighbors_go_to_the_longest_vectors() -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 0.1], [9.0, 4.0]])
    assert nearest_neighbors(x, 1, normalize=False).flatten().tolist() == [2, 2, 1]
    assert nearest_neighbors(x, 1, normalize=True).flatten().tolist() == [1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_precision_input_is_compared_in_float32(dtype: torch.dtype) -> None:
    x = samples(40, 7).to(dtype)  # the similarities of the rounded vectors, not rounded similarities
    assert nearest_neighbors(x, 6).tolist() == sorted_neighbors(x, 6, True)


def test_autocast_around_it_changes_nothing() -> None:
    x, y = samples(40, 7), samples(40, 9, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nearest_neighbors(x, 6).tolist() == sorted_neighbors(x, 6, True)
        score = mutual_knn(x, y)
    assert score == mutual_knn(x, y)


def test_float64_is_kept() -> None:
    # At 1 + 1e-9 the two candidates of sample 0 differ in float64 only.
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0 + 1e-9, 1.0]], dtype=torch.float64)
    assert nearest_neighbors(x, 1, normalize=False)[0].item() == 2
    x[1, 0], x[2, 0] = x[2, 0].item(), x[1, 0].item()
    assert nearest_neighbors(x, 1, normalize=False)[0].item() == 1


@pytest.mark.parametrize("normalize", [True, False])
def test_duplicate_rows(normalize: bool) -> None:
    x = samples(8, 3).repeat(3, 1)  # each vector three times: equal similarities everywhere
    table = nearest_neighbors(x, 4, normalize).tolist()
    expected = similarities(x, normalize)
    for i, (row, similarity) in enumerate(zip(table, expected, strict=True)):
        assert i not in row
        assert len(set(row)) == 4
        best = sorted((s for j, s in enumerate(similarity) if j != i), reverse=True)[:4]
        assert [similarity[j] for j in row] == pytest.approx(best, rel=1e-5)
        if normalize:  # the two copies come first
            assert {j % 8 for j in row[:2]} == {i % 8}


def test_all_rows_equal() -> None:
    table = nearest_neighbors(torch.ones(6, 3), 5).tolist()
    assert [sorted(row) for row in table] == [[j for j in range(6) if j != i] for i in range(6)]


@pytest.mark.parametrize("bound", [1, 50 * 3, 50 * 25, 50 * 49])
def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch, bound: int) -> None:
    x = samples(50, 7)
    whole = nearest_neighbors(x, 6)
    monkeypatch.setattr(metrics, "_MAX_SIMILARITIES", bound)
    with LargestTensor() as seen:
        chunked = nearest_neighbors(x, 6)
    assert seen.largest <= max(bound, 50 * 7)  # the input itself has 50 * 7 numbers
    assert torch.equal(chunked, whole)


def test_memory_does_not_grow_with_the_square_of_n() -> None:
    # Fake tensors have shapes and no values, so 100,000 samples cost nothing.
    with FakeTensorMode(), LargestTensor() as seen:
        found = top_neighbors(torch.empty(100_000, 32), 10, normalize=True)
    assert found.shape == (100_000, 10)
    assert 100_000 * 100 < seen.largest <= 2**24


def test_many_samples_at_the_real_bound() -> None:
    n = 6000  # three chunks
    assert n * n > 2 * metrics._MAX_SIMILARITIES
    angles = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * (math.pi / 2)
    x = torch.stack([angles.cos(), angles.sin()], 1)
    with LargestTensor() as seen:
        found = nearest_neighbors(x, 1, normalize=False).flatten()
    assert seen.largest <= 2**24
    # On a circle the nearest other sample is the next one to the left or to the right.
    order = angles.argsort()
    gaps = angles[order].diff()
    left = torch.cat([torch.tensor([math.inf], dtype=torch.float64), gaps])
    right = torch.cat([gaps, torch.tensor([math.inf], dtype=torch.float64)])
    place = torch.arange(n) + torch.where(left < right, -1, 1)
    # Cosines near 1 cannot tell gaps below 1e-8 apart even in float64, so the similarity is compared, not the index.
    expected = torch.empty_like(order)
    expected[order] = order[place]
    torch.testing.assert_close((x * x[found]).sum(1), (x * x[expected]).sum(1), rtol=0, atol=1e-15)
    assert (found == expected).float().mean() > 0.999


@pytest.mark.parametrize("k", [1, 10, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_find_what_a_full_sort_finds(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, k: int) -> None:
    x = samples(203, 9).to(
        dtype
    )  # 203 is no multiple of the tiles' 32 rows, and 64 neighbours are more than a tile has
    monkeypatch.setattr(metrics, "_MAX_SIMILARITIES", 32 * 32 + 5)
    with LargestTensor() as seen:
        found = nearest_neighbors(x, k)
    assert seen.largest <= max(32 * 32 + 5, 203 * k, 203 * 9)
    exact = F.normalize(x.double(), dim=-1)
    expected = (exact @ exact.T).fill_diagonal_(-math.inf).sort(descending=True).indices[:, :k]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bound", [1, 203 * 50, 203 * 202])
def test_rows_of_a_small_matrix_find_what_a_full_sort_finds(monkeypatch: pytest.MonkeyPatch, bound: int) -> None:
    x = samples(203, 9)
    monkeypatch.setattr(metrics, "_CACHED_SIMILARITIES", bound)
    exact = F.normalize(x.double(), dim=-1)
    expected = (exact @ exact.T).fill_diagonal_(-math.inf).sort(descending=True).indices[:, :10]
    assert torch.equal(nearest_neighbors(x, 10), expected)


def test_ties_across_tiles_are_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x = samples(20, 4).round().repeat(4, 1)  # integers: equal similarities are equal to the bit
    monkeypatch.setattr(metrics, "_MAX_SIMILARITIES", 16 * 16)
    found = nearest_neighbors(x, 7, normalize=False)
    assert torch.equal(found, nearest_neighbors(x, 7, normalize=False))
    similarity = (x @ x.T).fill_diagonal_(-math.inf)
    assert torch.equal(similarity.gather(1, found), similarity.sort(descending=True).values[:, :7])
    assert all(len(set(row)) == 7 for row in found.tolist())
    assert not (found == torch.arange(80)[:, None]).any()


def test_overlap_of_many_neighbors_is_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = nearest_neighbors(samples(50, 7), 20), nearest_neighbors(samples(50, 7, seed=1), 20)
    expected = sum(len(set(x) & set(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)) / (50 * 20)
    for bound in (1, 7 * 20 * 20, 2**24):
        monkeypatch.setattr(metrics, "_MAX_SIMILARITIES", bound)
        with LargestTensor() as seen:
            assert neighbor_overlap(a, b) == pytest.approx(expected, abs=1e-12)
        assert seen.largest <= max(bound, 20 * 20)


def test_gradients_and_the_input_are_left_alone() -> None:
    x = samples(10, 3).requires_grad_()
    before = x.detach().clone()
    assert not nearest_neighbors(x, 2).requires_grad
    assert torch.equal(x.detach(), before)


# --- mutual_knn ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_mutual_knn_is_the_mean_share_of_common_neighbors(k: int, normalize: bool) -> None:
    x = samples(30, 6)
    y = torch.cat([x[:, :3] + 0.5 * samples(30, 3, seed=1), samples(30, 2, seed=2)], 1)  # related, another width
    pairs = zip(sorted_neighbors(x, k, normalize), sorted_neighbors(y, k, normalize), strict=True)
    expected = sum(len(set(a) & set(b)) / k for a, b in pairs) / 30
    assert 0 < expected < 1
    score = mutual_knn(x, y, k=k, normalize=normalize)
    assert isinstance(score, float)
    assert score == pytest.approx(expected, abs=1e-12)


def test_worked_by_hand() -> None:
    x = on_circle(0, 10, 30, 70)  # nearest: 1, 0, 1, 2; second: 2, 2, 0, 1
    y = on_circle(0, 40, 30, 10)  # nearest: 3, 2, 1, 0; second: 2, 3, 3, 2
    assert nearest_neighbors(x, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert nearest_neighbors(y, 2).tolist() == [[3, 2], [2, 3], [1, 3], [0, 2]]
    assert mutual_knn(x, y, k=1) == 1 / 4
    assert mutual_knn(x, y, k=2) == 4 / 8
    assert mutual_knn(x, y, k=3) == 1.0  # all others are neighbours


def test_the_order_of_common_neighbors_does_not_count() -> None:
    assert neighbor_overlap(torch.tensor([[1, 2, 3]]), torch.tensor([[3, 1, 2]])) == 1.0
    assert neighbor_overlap(torch.tensor([[1, 2, 3]]), torch.tensor([[4, 1, 5]])) == pytest.approx(1 / 3)


def test_range_and_defaults() -> None:
    x = samples(60, 8)
    assert mutual_knn(x, x) == 1.0
    assert mutual_knn(x, 3.0 * x) == 1.0
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    assert mutual_knn(x.double(), x.double() @ rotation) == 1.0
    # A space where nobody keeps a neighbour: within a group of three in one, across groups in the other.
    group = torch.eye(4).repeat_interleave(3, 0) + 1e-3 * samples(12, 4)
    member = torch.eye(3).repeat(4, 1) + 1e-3 * samples(12, 3, seed=1)
    assert mutual_knn(group, member, k=2) == 0.0
    y = samples(60, 8, seed=1)
    assert mutual_knn(x, y) == mutual_knn(x, y, k=10, normalize=True) == mutual_knn(y, x)


def test_unrelated_spaces_score_at_chance() -> None:
    n, k, draws = 200, 20, 20
    generator = torch.Generator().manual_seed(0)
    scores = [mutual_knn(*torch.randn(2, n, 16, generator=generator), k=k) for _ in range(draws)]
    assert sum(scores) / draws == pytest.approx(k / (n - 1), rel=0.03)


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 5, 6])
def test_k_out_of_range(k: int) -> None:
    x = samples(5, 3)
    with pytest.raises(ValueError, match=f"k={k} .*5 samples.*between 1 and N - 1"):
        nearest_neighbors(x, k)
    with pytest.raises(ValueError, match=f"k={k} .*5 samples"):
        mutual_knn(x, x, k=k)


def test_mutual_knn_refuses_too_few_samples_for_its_default_k() -> None:
    with pytest.raises(ValueError, match=r"k=10 .*10 samples"):
        mutual_knn(samples(10, 3), samples(10, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value: float) -> None:
    good, bad = samples(6, 3), samples(6, 3)
    bad[4, 1] = value
    with pytest.raises(ValueError, match="`x` contains NaN or inf"):
        nearest_neighbors(bad, 2)
    with pytest.raises(ValueError, match="`x` contains NaN or inf"):
        mutual_knn(bad, good, k=2)
    with pytest.raises(ValueError, match="`y` contains NaN or inf"):
        mutual_knn(good, bad, k=2)


def test_shapes() -> None:
    with pytest.raises(ValueError, match=r"same samples, got 6 and 7 rows"):
        mutual_knn(samples(6, 3), samples(7, 3), k=2)
    with pytest.raises(ValueError, match=r"`x` must have shape \[N, d\], got \[6\]"):
        nearest_neighbors(torch.ones(6), 2)
    with pytest.raises(ValueError, match=r"`y` must have shape \[N, d\], got \[6, 3, 1\]"):
        mutual_knn(samples(6, 3), samples(6, 3)[..., None], k=2)
