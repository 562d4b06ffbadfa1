"""Nearest neighbours and mutual k-NN against their definitions, written out with sorts and sets in float64."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import hera_trainer.objectives.metrics as metrics
from hera_trainer.objectives.metrics import (
    mutual_knn,
    mutual_knn_null,
    nearest_neighbors,
    neighbor_overlap,
    top_neighbors,
)


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


@pytest.mark.parametrize("bound", [1, 7 * 40, 40 * 40, 3 * 40 * 40 + 5])
@pytest.mark.parametrize("normalize", [True, False])
def test_many_spaces_are_those_of_each_by_itself(monkeypatch: pytest.MonkeyPatch, bound: int, normalize: bool) -> None:
    """Bit for bit as one product and one selection a space and some rows at a time, as they were made before."""
    monkeypatch.setattr(metrics, "_CACHED_SIMILARITIES", bound)
    spaces = torch.randn(7, 40, 6)
    size = metrics.spaces_at_a_time(40)
    assert size == max(1, bound // 1600)
    found = list(metrics.neighbors_of_each(spaces.split(size), 5, normalize))
    assert len(found) == 7
    for space, neighbors in zip(spaces, found, strict=True):
        x = torch.nn.functional.normalize(space, dim=-1) if normalize else space
        expected, start = [], 0
        for rows in x.split(max(1, bound // 40)):
            similarity = rows @ x.T
            similarity[:, start : start + len(rows)].fill_diagonal_(-torch.inf)
            expected.append(similarity.topk(5, dim=-1).indices)
            start += len(rows)
        assert torch.equal(neighbors, torch.cat(expected))


def test_many_spaces_of_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_MAX_SIMILARITIES", 16 * 16)
    spaces = torch.randn(3, 40, 6)
    found = list(metrics.neighbors_of_each([spaces[:1], spaces[1:]], 5, True))
    assert all(torch.equal(a, top_neighbors(b, 5, True)) for a, b in zip(found, spaces, strict=True))


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


# --- Clipping --------------------------------------------------------------------------------------------------------


def outlying(n: int, d: int, seed: int) -> Tensor:
    """Vectors in which two dimensions are far larger than the others, as in the hidden states of language models."""
    return samples(n, d, seed) * torch.cat([torch.full((2,), 40.0), torch.ones(d - 2)])


def reference_score(x: Tensor, y: Tensor, k: int, quantile: float) -> float:
    """The arithmetic of the reference code (`measure_alignment.py` and `metrics.py` of platonic-rep), restated: clamp
    to the mean of the samples' quantiles, normalise, sort all similarities, multiply 0/1 matrices of neighbours."""
    masks = []
    for space in (x, y):
        threshold = torch.stack([row.abs().quantile(quantile) for row in space]).mean()
        space = torch.where(space > threshold, threshold, torch.where(space < -threshold, -threshold, space))
        space = space / space.norm(dim=1, keepdim=True)
        similarity = space @ space.T
        similarity.fill_diagonal_(-1e8)
        order = similarity.argsort(dim=1, descending=True)[:, :k]
        masks.append(torch.zeros_like(similarity).scatter(1, order, 1.0))
    return ((masks[0] * masks[1]).sum(1) / k).mean().item()


@pytest.mark.parametrize("quantile", [0.95, 0.5])
@pytest.mark.parametrize("k", [1, 10])
def test_clipped_and_normalized_is_the_reference_codes_arithmetic(k: int, quantile: float) -> None:
    x = outlying(60, 24, 0)
    y = torch.cat([x[:, 2:12] + samples(60, 10, seed=1), outlying(60, 9, 2)], 1)  # another width
    score = mutual_knn(x, y, k=k, clip_quantile=quantile)
    assert score == pytest.approx(reference_score(x, y, k, quantile), abs=1e-6)
    assert score != mutual_knn(x, y, k=k)


def test_one_threshold_for_all_values() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0], [10.0, -20.0, 30.0, -40.0, 50.0]])
    # The medians of the rows' absolute values are 3 and 30.
    expected = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0], [10.0, -16.5, 16.5, -16.5, 16.5]])
    assert torch.equal(metrics.clip_outliers(x, 0.5), expected)
    assert torch.equal(nearest_neighbors(x, 1, False, 0.5), nearest_neighbors(expected, 1, False))


def test_rows_clipped_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = outlying(50, 16, 0)
    whole = metrics.clip_outliers(x, 0.95)
    monkeypatch.setattr(metrics, "_CACHED_NUMBERS", 7 * 16)
    assert torch.equal(metrics.clip_outliers(x, 0.95), whole)


@pytest.mark.parametrize("quantile", [0.0, 1.0, 95, -0.5, math.nan])
def test_clip_quantile_out_of_range(quantile: float) -> None:
    with pytest.raises(ValueError, match=r"`clip_quantile` must be above 0 and below 1, got"):
        mutual_knn(samples(20, 3), samples(20, 3), k=2, clip_quantile=quantile)


# --- What unrelated spaces score -------------------------------------------------------------------------------------


def permuted_scores(x: Tensor, y: Tensor, k: int, permutations: list[list[int]]) -> list[float]:
    """Scores of `x` with the rows of `y` in other orders, by the definition and from the vectors."""
    sets = [set(row) for row in sorted_neighbors(x, k, True)]
    scores = []
    for order in permutations:
        others = sorted_neighbors(y[order], k, True)
        scores.append(sum(len(a & set(b)) for a, b in zip(sets, others, strict=True)) / (len(x) * k))
    return scores


def test_null_is_the_score_of_permuted_rows() -> None:
    x, y, k, n = samples(20, 5), samples(20, 3, seed=1), 4, 20
    generator = torch.Generator().manual_seed(3)
    moved = [torch.randperm(n, generator=generator) for _ in range(30)]  # sample i takes the place moved[i]
    expected = permuted_scores(x, y, k, [order.argsort().tolist() for order in moved])
    assert len(set(expected)) > 5
    a, b = nearest_neighbors(x, k), nearest_neighbors(y, k)
    found = metrics.permuted_overlaps(a, b, 30, torch.Generator().manual_seed(3))
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    null = mutual_knn_null(a, b, permutations=30, seed=3)
    assert null.mean == pytest.approx(sum(expected) / 30, abs=1e-12)
    low, high = sorted(expected)[27:29]  # 0.95 of the way from the first to the thirtieth: place 27.55
    assert null.p95 == pytest.approx(low + 0.55 * (high - low), abs=1e-12)


def test_permuted_pairs_are_found_by_table_and_by_search(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (nearest_neighbors(torch.randn(30, 4), 5) for _ in range(2))
    by_table = metrics.permuted_overlaps(a, b, 20, torch.Generator().manual_seed(1))
    monkeypatch.setattr(metrics, "_TABLED_PAIRS", 0)
    assert torch.equal(metrics.permuted_overlaps(a, b, 20, torch.Generator().manual_seed(1)), by_table)


def test_null_of_all_permutations() -> None:
    """Over all of them the mean is k / (N - 1) to the last digit, also where a hub is everyone's neighbour, and random
    ones take each score as often."""
    x = torch.tensor([[5.0, 0.0], [1.0, 0.2], [1.0, -0.3], [0.9, 0.1], [0.8, -0.1]])
    a, b = nearest_neighbors(x, 2, normalize=False), nearest_neighbors(samples(5, 2), 2)
    assert (a == 0).sum() == 4  # the hub
    orders = list(itertools.permutations(range(5)))
    overlaps = [neighbor_overlap(torch.tensor(order)[a], b[list(order)]) for order in orders]
    assert sum(overlaps) / len(overlaps) == pytest.approx(2 / 4, abs=1e-12)
    drawn = metrics.permuted_overlaps(a, b, 5000, torch.Generator().manual_seed(0)).tolist()
    expected = {score: count / len(orders) for score, count in Counter(overlaps).items()}
    assert len(expected) > 3
    assert {score: count / 5000 for score, count in Counter(drawn).items()} == pytest.approx(expected, abs=0.02)


def test_null_is_seeded_and_leaves_random_states_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = nearest_neighbors(samples(30, 5), 4), nearest_neighbors(samples(30, 5, seed=1), 4)
    state = torch.get_rng_state()
    null = mutual_knn_null(a, b, 100)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    assert mutual_knn_null(a, b, 100) == mutual_knn_null(a, b, 100, seed=0) == null
    assert mutual_knn_null(a, b, 100, seed=1) != null
    monkeypatch.setattr(metrics, "_CACHED_NUMBERS", 7 * 30 * 4)  # seven permutations at a time
    assert mutual_knn_null(a, b, 100) == null


def test_identical_spaces_are_far_above_their_null() -> None:
    a = nearest_neighbors(samples(200, 8), 10)
    null = mutual_knn_null(a, a)
    assert null.mean == pytest.approx(10 / 199, rel=0.02)
    assert null.mean < null.p95 < 0.1 < neighbor_overlap(a, a) == 1


def test_null_refuses() -> None:
    a = nearest_neighbors(samples(20, 3), 2)
    with pytest.raises(ValueError, match=r"shape \[N, k\], got \[20, 2\] and \[19, 2\]"):
        mutual_knn_null(a, a[:19])
    with pytest.raises(ValueError, match="`permutations` must be at least 1, got 0"):
        mutual_knn_null(a, a, permutations=0)


def test_centering_takes_away_what_all_samples_share() -> None:
    """Neighbours by the cosines of deviations from the mean: those of vectors that were never moved, whose own mean is
    taken away."""
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    deviations = x - x.mean(0)
    moved = x + 50.0
    assert torch.equal(nearest_neighbors(moved.double(), 4, center=True), nearest_neighbors(deviations.double(), 4))
    assert not torch.equal(nearest_neighbors(moved, 4), nearest_neighbors(deviations, 4))
    assert torch.equal(
        nearest_neighbors(x, 4, normalize=False, center=True), nearest_neighbors(deviations, 4, normalize=False)
    )
    y = torch.randn(30, 5, generator=torch.Generator().manual_seed(1)) + 9.0
    expected = mutual_knn(deviations, y - y.mean(0), 4)
    assert mutual_knn(x, y, 4, center=True) == pytest.approx(expected, abs=1e-9)
