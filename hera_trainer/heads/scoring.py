"""Scores of what was observed of the attention heads and layers: mutual k-NN with the teacher, and its null."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..common.sharded import whole
from ..objectives.metrics import (
    MutualKNNNull,
    nearest_neighbors,
    neighbor_overlap,
    neighbors_of_each,
    permuted_overlaps,
    spaces_at_a_time,
)
from .accessor import HeadAccessor
from .projection import projection_blocks

# Permuted pairs in all, dealt out evenly over the heads.
_PERMUTATIONS = 500


class NotFiniteError(ValueError):
    """Heads whose representations cannot be compared."""


def score_layers(
    accessor: HeadAccessor,
    layers: Iterable[tuple[int, Tensor | None, Tensor | None]],
    targets: Tensor,
    normalize: bool,
    clip_quantile: float | None,
    seed: int,
    center: bool = False,
) -> tuple[Tensor, Tensor, MutualKNNNull]:
    """Scores of what was observed.

    Args:
        accessor ([`HeadAccessor`]): The model's attention heads.
        layers: Layer by layer, what [`~heads.observer.Observer.gather`] gives.
        targets (`LongTensor` of shape `[N, k]`): The teacher's neighbours, as [`nearest_neighbors`] gives them.
        normalize (`bool`), clip_quantile (`float` or `None`): As for [`~heads.rank.rank_heads`].
        seed (`int`): Seed of the permuted pairs.
        center (`bool`, *optional*, defaults to `False`): As for [`~heads.rank.rank_heads`].

    Returns:
        Scores of the heads `[L, largest H]` and of the layers `[L]`, float32, NaN where there is none, and the null of
        the score of one head: the permuted scores of all heads, as of one drawn at random among them.
    """
    k = targets.shape[1]
    counts = [accessor.num_heads(layer) for layer in accessor.layers_with_heads]
    scores = torch.full((accessor.num_layers, max(counts)), torch.nan)
    layer_scores = torch.full((accessor.num_layers,), torch.nan)
    permuted: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    for layer, hidden, pooled in layers:
        if hidden is not None and hidden.isfinite().all():
            neighbors = nearest_neighbors(hidden, k, normalize, clip_quantile, center)
            layer_scores[layer] = neighbor_overlap(neighbors, targets)
        if pooled is None:
            continue
        if not pooled.isfinite().all():
            raise NotFiniteError(f"The attention heads of layer {layer} give NaN or inf. Rank them in bf16 or float32.")
        with whole(accessor.projection(layer)):
            blocks = projection_blocks(accessor.projection(layer), accessor.num_heads(layer))
        for head, neighbors in enumerate(head_neighbors(pooled, blocks, k, normalize, clip_quantile, center)):
            scores[layer, head] = neighbor_overlap(neighbors, targets)
            permuted.append(permuted_overlaps(neighbors, targets, -(-_PERMUTATIONS // sum(counts)), generator))
    return scores, layer_scores, MutualKNNNull.of(torch.cat(permuted))


def head_neighbors(
    pooled: Tensor, blocks: Tensor, k: int, normalize: bool, clip_quantile: float | None = None, center: bool = False
) -> Iterator[Tensor]:
    """Nearest neighbours in the space of each head of a layer.

    Without clipping they are found in the heads' own d_head dimensions. Clipping looks at the single values of a head's
    representation, so that it is made in its d_model dimensions: `[N, d_model]`, for one head at a time, as large as
    the hidden states of one layer. Products and similarities take d_model / d_head times the work, and the quantiles a
    sort of each vector.

    Args:
        pooled (`Tensor` of shape `[N, H, d_head]`): Pooled input slices of the output projection.
        blocks (`Tensor` of shape `[H, d_head, d_model]`): Each head's weight in it.
        k (`int`), normalize (`bool`), clip_quantile (`float`, *optional*), center (`bool`, *optional*):
            As for [`nearest_neighbors`].

    Yields:
        `LongTensor` of shape `[N, k]`, H times.
    """
    if clip_quantile is not None:
        for head, block in enumerate(blocks.float()):
            yield nearest_neighbors(pooled[:, head] @ block, k, normalize, clip_quantile, center)
        return
    factors = _gram_factors(blocks)
    groups = torch.arange(len(factors)).split(spaces_at_a_time(len(pooled)))
    yield from neighbors_of_each((_spaces(pooled, factors, group.tolist(), center) for group in groups), k, normalize)


def _spaces(pooled: Tensor, factors: Tensor, heads: Sequence[int], center: bool) -> Tensor:
    """The spaces `[S, N, d_head]` of some heads."""
    spaces = [pooled[:, head] @ factors[head] for head in heads]
    return torch.stack([space - space.mean(0) for space in spaces] if center else spaces)


def _gram_factors(blocks: Tensor) -> Tensor:
    """Square matrices F with `p F` as long as, and at the same angles as, `p W`: neighbours are the same in d_head
    dimensions as in d_model.

    Args:
        blocks (`Tensor` of shape `[H, d_head, d_model]`): Each head's weight W.

    Returns:
        `Tensor` of shape `[H, d_head, d_head]`, with `F F^T = W W^T`.
    """
    exact = (blocks.cpu() if blocks.device.type == "mps" else blocks).double()  # Apple's GPUs have no float64
    gram = exact @ exact.transpose(1, 2)
    factors, failed = torch.linalg.cholesky_ex(gram)
    if failed.any():  # slower, but a head may use fewer directions than it has
        values, vectors = torch.linalg.eigh(gram)
        factors = vectors * values.clamp(min=0).sqrt()[:, None]
    return factors.float().to(blocks.device)
