"""Nearest neighbours, mutual k-nearest-neighbour alignment and what unrelated spaces score, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.precision import exact_products

# Similarities held at a time: 2**24 float32 numbers are 64 MiB, whatever N is.
_MAX_SIMILARITIES = 2**24

# Similarities of one matrix product where N is small: 4 MiB, still in the cache when the neighbours are looked up.
_CACHED_SIMILARITIES = 2**20

# Pairs of samples of which a table of one byte each is kept: 4 MiB.
_TABLED_PAIRS = 2**22

# Numbers that are clipped or permuted at a time: 2 MiB of eight bytes each, again for the cache.
_CACHED_NUMBERS = 2**18


def _checked(x: Tensor, k: int, name: str) -> Tensor:
    if x.ndim != 2:
        raise ValueError(f"`{name}` must have shape [N, d], got {list(x.shape)}.")
    if not 1 <= k < x.shape[0]:
        raise ValueError(
            f"k={k} nearest other samples do not exist among {x.shape[0]} samples: k must be between 1 and N - 1."
        )
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"`{name}` contains NaN or inf.")
    return x


def top_neighbors(x: Tensor, k: int, normalize: bool) -> Tensor:
    """[`nearest_neighbors`] without the checks, for tensors on a training step's path (a check is a device sync)."""
    return next(neighbors_of_each([x[None]], k, normalize))


def spaces_at_a_time(n: int) -> int:
    """How many spaces of n samples [`neighbors_of_each`] is best given at a time: as many as the cache has room for."""
    return max(1, _CACHED_SIMILARITIES // n**2)


def neighbors_of_each(stacks: Iterable[Tensor], k: int, normalize: bool) -> Iterator[Tensor]:
    """[`top_neighbors`] in many spaces of the same samples. Where N is small, there is one product and one selection
    for all spaces of a stack, and the next stack's similarities take the place of the last one's.

    Args:
        stacks (iterable of `Tensor` of shape `[S, N, d]`): The spaces, some at a time (see [`spaces_at_a_time`]).
        k (`int`), normalize (`bool`): As for [`nearest_neighbors`].

    Yields:
        `LongTensor` of shape `[N, k]` for each space.
    """
    scratch: Tensor | None = None
    for stack in stacks:
        spaces, n = stack.detach(), stack.shape[1]
        side = min(n, math.isqrt(_MAX_SIMILARITIES))
        rows = min(n, max(1, _CACHED_SIMILARITIES // n))
        if side == n and (scratch is None or scratch.numel() < len(spaces) * rows * n):
            scratch = spaces.new_empty(len(spaces) * rows * n)
        # Rounded similarities would have other neighbours.
        with exact_products(spaces.device):
            spaces = F.normalize(spaces, dim=-1) if normalize else spaces
            if scratch is None or side < n:
                found = torch.stack([_top_neighbors_by_tiles(space, k, side) for space in spaces])
            else:
                found = _top_neighbors_by_rows(spaces, k, rows, scratch)
        yield from found


def _top_neighbors_by_rows(spaces: Tensor, k: int, rows: int, scratch: Tensor) -> Tensor:
    """Neighbours `[S, N, k]` from some rows of the similarity matrix of each space at a time."""
    count, n, _ = spaces.shape
    neighbors = []
    for start in range(0, n, rows):
        part = spaces[:, start : start + rows]
        out = scratch[: count * part.shape[1] * n].view(count, part.shape[1], n)
        similarity = torch.bmm(part, spaces.transpose(1, 2), out=out)
        similarity.diagonal(start, dim1=1, dim2=2).fill_(-torch.inf)
        neighbors.append(similarity.topk(k, dim=-1).indices)
    return torch.cat(neighbors, dim=1)


def _top_neighbors_by_tiles(x: Tensor, k: int, side: int) -> Tensor:
    """Neighbours from square tiles of the similarity matrix. It is symmetric: a tile above the diagonal serves its rows
    and, transposed, its columns, so half of the products are computed."""
    n = x.shape[0]
    best = torch.full((n, k), -torch.inf, dtype=x.dtype, device=x.device)
    neighbors = torch.zeros(n, k, dtype=torch.long, device=x.device)
    tile, transposed = x.new_empty(side * side), x.new_empty(side * side)  # fresh memory costs as much as filling it

    def take(similarity: Tensor, row: int, column: int) -> None:
        rows = slice(row, row + similarity.shape[0])
        found = similarity.topk(min(k, similarity.shape[1]), dim=-1)
        merged = torch.cat([best[rows], found.values], dim=1).topk(k, dim=-1)
        candidates = torch.cat([neighbors[rows], found.indices + column], dim=1)
        best[rows], neighbors[rows] = merged.values, candidates.gather(1, merged.indices)

    for row in range(0, n, side):
        a = x[row : row + side]
        for column in range(row, n, side):
            b = x[column : column + side]
            similarity = torch.mm(a, b.T, out=tile[: len(a) * len(b)].view(len(a), len(b)))
            if column == row:
                similarity.fill_diagonal_(-torch.inf)
            take(similarity, row, column)
            if column > row:
                mirrored = transposed[: similarity.numel()].view(len(b), len(a))
                take(mirrored.copy_(similarity.T), column, row)
    return neighbors


def check_clip_quantile(quantile: float | None, name: str = "clip_quantile") -> None:
    """Refuses what is no quantile to clip at, by the name of its setting.

    Raises:
        `ValueError`: If `quantile` is neither `None` nor above 0 and below 1.
    """
    if quantile is not None and not 0 < quantile < 1:
        raise ValueError(
            f"`{name}` must be above 0 and below 1, got {quantile}. The reference code clips at 0.95; leave it at "
            "`None` to clip nothing."
        )


def clip_outliers(x: Tensor, quantile: float) -> Tensor:
    """Clamps every value to plus or minus one threshold: the mean over the rows of the quantile of a row's absolute
    values. So does the reference code of the metric, [platonic-rep](https://github.com/minyoungg/platonic-rep), at the
    quantile 0.95 and before it normalises. Its option `--precise` takes one quantile over all values instead.

    Args:
        x (`Tensor` of shape `[N, d]`): float32 or float64.
        quantile (`float`): Above 0 and below 1.

    Returns:
        `Tensor` of shape `[N, d]`. Besides it, memory for some rows at a time is taken.
    """
    parts = x.split(max(1, _CACHED_NUMBERS // x.shape[1]))
    threshold = torch.cat([part.abs().quantile(quantile, dim=1) for part in parts]).mean()
    return x.clamp(-threshold, threshold)


def nearest_neighbors(
    x: Tensor, k: int, normalize: bool = True, clip_quantile: float | None = None, center: bool = False
) -> Tensor:
    """Indices of each row's `k` nearest other rows by dot product.

    The similarity matrix is computed in tiles, so memory grows with N and not with N squared. Which of several equally
    similar rows count as the nearest is left open, but the same input gives the same rows again.

    Args:
        x (`Tensor` of shape `[N, d]`): Vectors; float64 is kept, any other dtype is computed in float32.
        k (`int`): Number of neighbours, at most `N - 1`.
        normalize (`bool`, *optional*, defaults to `True`): L2-normalise the rows first (cosine similarity).
        clip_quantile (`float`, *optional*):
            Before that, clamp every value to this quantile of the absolute values (see [`mutual_knn`]).
        center (`bool`, *optional*, defaults to `False`):
            Take the mean over the rows away before they are normalised: what all samples share does not count.

    Returns:
        `LongTensor` of shape `[N, k]`, most similar first, on the device of `x`. A row is never its own neighbour.

    Raises:
        `ValueError`: If `x` is not 2-dimensional or not finite, `k` is not in `[1, N - 1]`, or `clip_quantile` is not
            above 0 and below 1.
    """
    check_clip_quantile(clip_quantile)
    x = _checked(x, k, "x")
    x = x if clip_quantile is None else clip_outliers(x, clip_quantile)
    return top_neighbors(x - x.mean(0) if center else x, k, normalize)


def neighbor_overlap(a: Tensor, b: Tensor) -> float:
    """Mean share of common neighbours of two neighbour tables.

    Args:
        a (`LongTensor` of shape `[N, k]`): Neighbours in one space, as [`nearest_neighbors`] gives them.
        b (`LongTensor` of shape `[N, k]`): Neighbours of the same samples in another space.

    Returns:
        `float` in [0, 1].
    """
    rows = max(1, _MAX_SIMILARITIES // a.shape[1] ** 2)  # compared at a time: [rows, k, k]
    parts = zip(a.split(rows), b.split(rows), strict=True)
    # A row names a neighbour once, so each common one is one equal pair.
    common = torch.stack([torch.count_nonzero(x.unsqueeze(2) == y.unsqueeze(1)) for x, y in parts]).sum()
    return common.item() / a.numel()


def mutual_knn(
    x: Tensor,
    y: Tensor,
    k: int = 10,
    normalize: bool = True,
    clip_quantile: float | None = None,
    center: bool = False,
) -> float:
    """Mutual k-nearest-neighbour alignment of two representations of the same samples (MKNN, eq. 3 of the
    [HeRA paper](https://huggingface.co/papers/2606.23885); the metric of the Platonic Representation Hypothesis).

    For each sample, the `k` nearest other samples are found once in each space; the score is the mean size of the
    intersection divided by `k`. It depends on N and k: unrelated spaces score `k / (N - 1)` on average, and the spread
    around it is that of [`mutual_knn_null`]. Compare scores of the same N and k only.

    Args:
        x (`Tensor` of shape `[N, d_x]`): First representation.
        y (`Tensor` of shape `[N, d_y]`): Second representation of the same N samples.
        k (`int`, *optional*, defaults to `10`): Number of neighbours, at most `N - 1`.
        normalize (`bool`, *optional*, defaults to `True`): L2-normalise both first, as the reference metric does.
        clip_quantile (`float`, *optional*):
            Before that, clamp every value of a representation to the mean over the samples of this quantile of a
            sample's absolute values. The [reference code](https://github.com/minyoungg/platonic-rep) does, with 0.95,
            against single dimensions of huge values. Off by default.
        center (`bool`, *optional*, defaults to `False`):
            Take each space's mean over the samples away before vectors are normalised.

    Returns:
        `float` in [0, 1].

    Raises:
        `ValueError`: If the shapes disagree, a value is not finite, `k` is not in `[1, N - 1]`, or `clip_quantile` is
            not above 0 and below 1.
    """
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"`x` and `y` must describe the same samples, got {x.shape[0]} and {y.shape[0]} rows.")
    y = _checked(y, k, "y").to(x.device)
    x, y = (nearest_neighbors(each, k, normalize, clip_quantile, center) for each in (x, y))
    return neighbor_overlap(x, y)


class MutualKNNNull(NamedTuple):
    """What unrelated spaces score.

    Args:
        mean (`float`): Mean score of permuted pairs, an estimate of `k / (N - 1)`.
        p95 (`float`): Their 95th percentile: one in twenty unrelated pairs of spaces scores higher.
    """

    mean: float
    p95: float

    @classmethod
    def of(cls, scores: Tensor) -> MutualKNNNull:
        """Of the scores `[n]` of permuted pairs, as [`permuted_overlaps`] gives them."""
        return cls(scores.mean().item(), scores.quantile(0.95).item())


def permuted_overlaps(a: Tensor, b: Tensor, permutations: int, generator: torch.Generator) -> Tensor:
    """[`neighbor_overlap`] of `a` with `b`, whose samples have changed places at random. Neighbours are not looked for
    again: who was near whom in the second space still is, under other numbers.

    Args:
        a (`LongTensor` of shape `[N, k]`): Neighbours in one space, as [`nearest_neighbors`] gives them.
        b (`LongTensor` of shape `[N, k]`): Neighbours in another space.
        permutations (`int`): Number of random permutations.
        generator (`torch.Generator`): Where they are drawn from, on the CPU.

    Returns:
        `Tensor` of shape `[permutations]`, float64, on the CPU.
    """
    (n, k), device = a.shape, a.device
    b = b.to(device)
    rows = torch.arange(n, device=device)[:, None]
    pairs = (rows * n + a).flatten()  # sample and neighbour as one number
    is_among = _membership(pairs, n * n)
    scores = []
    for count in torch.arange(permutations).split(max(1, _CACHED_NUMBERS // (n * k))):
        moved = torch.stack([torch.randperm(n, generator=generator) for _ in count]).to(device)  # [p, n]
        others = (moved[:, :, None] * n + moved[:, b]).flatten(1)  # [p, n * k]
        scores.append(is_among(others).sum(1).cpu().double() / (n * k))
    return torch.cat(scores)


def _membership(numbers: Tensor, bound: int) -> Callable[[Tensor], Tensor]:
    """Tells of each of many numbers below a bound whether it is among `numbers`: by a table, or by a search where the
    table would be large."""
    if bound <= _TABLED_PAIRS:
        table = torch.zeros(bound, dtype=torch.bool, device=numbers.device)
        table[numbers] = True
        return lambda asked: table[asked]
    known = numbers.sort().values
    return lambda asked: known[torch.searchsorted(known, asked).clamp(max=len(known) - 1)] == asked


def mutual_knn_null(a: Tensor, b: Tensor, permutations: int = 1000, seed: int = 0) -> MutualKNNNull:
    """What the mutual k-NN score of two spaces would be if they had nothing to do with each other: the samples of one
    side are permuted, so that each is paired with another's, and scored again, many times.

    A score says little without it, since it depends on N and k
    ([Gröger et al., 2026](https://arxiv.org/abs/2602.14486) calibrate by permutations,
    [2604.18572](https://arxiv.org/abs/2604.18572) show how scores fall with N). The mean is `k / (N - 1)` whatever the
    spaces are; how far single permutations stray from it depends on their hubs, the samples that are everyone's
    neighbours. It is the null of one score. The best of many scores (of layers, heads, or models) exceeds it by chance.

    Args:
        a (`LongTensor` of shape `[N, k]`): Neighbours in one space, as [`nearest_neighbors`] gives them.
        b (`LongTensor` of shape `[N, k]`): Neighbours of the same samples in another space.
        permutations (`int`, *optional*, defaults to `1000`): Number of permutations.
        seed (`int`, *optional*, defaults to `0`): Seed of the permutations. No random state outside is touched.

    Returns:
        [`MutualKNNNull`]: `mean` and `p95`.

    Raises:
        `ValueError`: If the shapes disagree, or `permutations` is below 1.

    Example:

    ```python
    >>> a, b = nearest_neighbors(x, k=10), nearest_neighbors(y, k=10)
    >>> mutual_knn_null(a, b)
    MutualKNNNull(mean=0.010..., p95=0.012...)
    ```
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"`a` and `b` must both have shape [N, k], got {list(a.shape)} and {list(b.shape)}.")
    if permutations < 1:
        raise ValueError(f"`permutations` must be at least 1, got {permutations}.")
    return MutualKNNNull.of(permuted_overlaps(a, b, permutations, torch.Generator().manual_seed(seed)))
