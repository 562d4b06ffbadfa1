"""What attention heads write into the residual stream: the arithmetic of an output projection, head by head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .modes import without_autocast, without_dropout

_EXACT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _weight_dtype(projection: nn.Module) -> torch.dtype | None:
    """Dtype of the weight under adapters, or `None` where it is packed: held in integers, or in buffers under other
    names, as GPTQ and AWQ do."""
    base = projection.get_base_layer() if isinstance(projection, BaseTunerLayer) else projection
    dtype = getattr(getattr(base, "weight", None), "dtype", None)
    return dtype if dtype in _EXACT_DTYPES else None


def _device(projection: nn.Module) -> torch.device:
    return next(itertools.chain(projection.parameters(), projection.buffers())).device


def _apply(projection: nn.Module, x: Tensor) -> Tensor:
    """`projection` on rows `[n, in_features]` without adapter dropout and without its own hooks, in float32."""
    with without_autocast(x), without_dropout(projection):
        return projection.forward(x.to(_weight_dtype(projection) or torch.float32)).float()


def project_heads(projection: nn.Module, pooled: Tensor, heads: Sequence[int]) -> Tensor:
    """Contributions of heads to the residual stream, without the projection's bias, which belongs to no head.

    A plain `nn.Linear` is applied block by block. Anything else (LoRA and its variants, 4-bit, 8-bit, other weight-only
    schemes) computes with its own arithmetic: a head's slice is placed into a vector of zeros of full width, and what
    the module makes of zeros alone, its bias, is taken off. Dropout of adapters is not applied: representations must
    be the same function of the weights whenever they are computed.

    Args:
        projection (`nn.Module`): Output projection of a layer.
        pooled (`Tensor` of shape `[B, h, d_head]`): Pooled input slices of h heads.
        heads (sequence of `int`): Their h indices.

    Returns:
        `Tensor` of shape `[B, h, d_model]`, float32.
    """
    batch, count, width = pooled.shape
    pooled = pooled.float()
    if type(projection) is nn.Linear:
        with without_autocast(pooled):
            blocks = [projection.weight[:, head * width : (head + 1) * width] for head in heads]
            return torch.einsum("bhd,hod->bho", pooled, torch.stack(blocks).float())
    total = projection.in_features // width
    rows = pooled.new_zeros(batch, count, total, width)
    rows[:, torch.arange(count), torch.as_tensor(heads)] = pooled
    rows = torch.cat([rows.reshape(batch * count, total * width), rows.new_zeros(1, total * width)])
    out = _apply(projection, rows)
    return (out[:-1] - out[-1:]).reshape(batch, count, -1)


def projection_offset(projection: nn.Module) -> Tensor:
    """The part of the projection's output that belongs to no head (its bias), `[d_model]`, float32."""
    return _apply(projection, torch.zeros(1, projection.in_features, device=_device(projection)))[0]


def projection_blocks(projection: nn.Module, num_heads: int) -> Tensor:
    """The projection's weight seen from each head, whatever wraps or quantizes it.

    Returns:
        `Tensor` of shape `[num_heads, d_head, d_model]`, float32.
    """
    if type(projection) is nn.Linear:
        weight = projection.weight.T.float()
    else:
        identity = torch.eye(projection.in_features, device=_device(projection))
        weight = _apply(projection, identity) - projection_offset(projection)  # [in_features, d_model]
    return weight.reshape(num_heads, -1, weight.shape[-1])


def _tolerance(projection: nn.Module, out: Tensor) -> float:
    """Relative tolerance of the self-check: rounding of the coarsest dtype on the way."""
    if _weight_dtype(projection) is None:  # packed weights compute in 16 bit, int8 kernels round activations too
        return 5e-2
    return {torch.bfloat16: 3e-2, torch.float16: 5e-3}.get(out.dtype, 1e-4)


def contributions_add_up(projection: nn.Module, num_heads: int, x: Tensor, out: Tensor) -> bool:
    """Whether the contributions of all heads plus the bias are what the projection really put out, token by token and
    for the mean of the tokens, as pooling has it.

    Args:
        projection (`nn.Module`): Output projection of a layer.
        num_heads (`int`): Number of heads that share its input.
        x (`Tensor` of shape `[n, in_features]`): What the projection was given in a forward pass.
        out (`Tensor` of shape `[n, d_model]`): What came out of it, adapter dropout off.
    """
    tolerance = _tolerance(projection, out)
    x, out = (torch.cat([rows.float(), rows.float().mean(0, keepdim=True)]) for rows in (x, out))
    parts = project_heads(projection, x.reshape(x.shape[0], num_heads, -1), range(num_heads))
    total = parts.sum(1) + projection_offset(projection)
    scale = out.abs().max().clamp(min=1e-6)
    return bool((total - out).abs().max() <= tolerance * scale)
