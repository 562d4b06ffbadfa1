"""Nearest neighbours and mutual k-nearest-neighbour alignment, as pure functions over tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Similarities held at a time: 2**24 float32 numbers are 64 MiB, whatever N is.
_MAX_SIMILARITIES = 2**24

# Similarities of one matrix product where N is small: 4 MiB, still in the cache when the neighbours are looked up.
_CACHED_SIMILARITIES = 2**20


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
    n = x.shape[0]
    side = min(n, math.isqrt(_MAX_SIMILARITIES))
    # Under autocast, similarities would be rounded to 16 bit and neighbours with them.
    with torch.autocast(device_type=x.device.type, enabled=False):
        if normalize:
            x = F.normalize(x, dim=-1)
        if side < n:
            return _top_neighbors_by_tiles(x, k, side)
        neighbors = []
        start = 0
        for rows in x.split(max(1, _CACHED_SIMILARITIES // n)):
            similarity = rows @ x.T
            similarity[:, start : start + len(rows)].fill_diagonal_(-torch.inf)
            neighbors.append(similarity.topk(k, dim=-1).indices)
            start += len(rows)
        return torch.cat(neighbors)


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


def nearest_neighbors(x: Tensor, k: int, normalize: bool = True) -> Tensor:
    """Indices of each row's `k` nearest other rows by dot product.

    The similarity matrix is computed in tiles, so memory grows with N and not with N squared. Which of several equally
    similar rows count as the nearest is left open, but the same input gives the same rows again.

    Args:
        x (`Tensor` of shape `[N, d]`): Vectors; float64 is kept, any other dtype is computed in float32.
        k (`int`): Number of neighbours, at most `N - 1`.
        normalize (`bool`, *optional*, defaults to `True`): L2-normalise the rows first (cosine similarity).

    Returns:
        `LongTensor` of shape `[N, k]`, most similar first, on the device of `x`. A row is never its own neighbour.

    Raises:
        `ValueError`: If `x` is not 2-dimensional or not finite, or `k` is not in `[1, N - 1]`.
    """
    return top_neighbors(_checked(x, k, "x"), k, normalize)


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


def mutual_knn(x: Tensor, y: Tensor, k: int = 10, normalize: bool = True) -> float:
    """Mutual k-nearest-neighbour alignment of two representations of the same samples (MKNN, eq. 3 of the
    [HeRA paper](https://huggingface.co/papers/2606.23885); the metric of the Platonic Representation Hypothesis).

    For each sample, the `k` nearest other samples are found once in each space; the score is the mean size of the
    intersection divided by `k`. Unrelated spaces score about `k / (N - 1)`.

    Args:
        x (`Tensor` of shape `[N, d_x]`): First representation.
        y (`Tensor` of shape `[N, d_y]`): Second representation of the same N samples.
        k (`int`, *optional*, defaults to `10`): Number of neighbours, at most `N - 1`.
        normalize (`bool`, *optional*, defaults to `True`): L2-normalise both first, as the reference metric does.

    Returns:
        `float` in [0, 1].

    Raises:
        `ValueError`: If the shapes disagree, a value is not finite, or `k` is not in `[1, N - 1]`.
    """
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"`x` and `y` must describe the same samples, got {x.shape[0]} and {y.shape[0]} rows.")
    y = _checked(y, k, "y").to(x.device)
    return neighbor_overlap(nearest_neighbors(x, k, normalize), nearest_neighbors(y, k, normalize))
