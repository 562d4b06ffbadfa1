"""What attention heads write into the residual stream: the arithmetic of an output projection, head by head."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..common.precision import exact_products, rounds_products
from .modes import without_bias, without_dropout
from .quantized import is_bitsandbytes, quantizes_activations

_EXACT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ROUNDING = {torch.bfloat16: 3e-2, torch.float16: 5e-3}  # relative to the largest value of an output
_LARGE = 256.0  # inputs of which a projection in float16 makes no infinity


def _base_layer(projection: nn.Module) -> nn.Module:
    """The layer under PEFT's wrappers."""
    if isinstance(projection, BaseTunerLayer):
        return _base_layer(projection.get_base_layer())
    if isinstance(projection, ModulesToSaveWrapper):  # a whole copy of the layer for each adapter
        active = [] if projection.disable_adapters else projection.active_adapters
        copies = [projection.modules_to_save[name] for name in active if name in projection.modules_to_save]
        return _base_layer(copies[0] if copies else projection.original_module)
    return projection


def input_width(projection: nn.Module) -> int:
    """Number of features that an output projection reads, whatever wraps or quantizes it. Its weight is not looked at:
    it may be packed, transposed, divided among processes or on the meta device.

    Args:
        projection (`nn.Module`): Output projection of a layer.

    Raises:
        `ValueError`: If the module doesn't say.
    """
    return _told(projection, "nx", "in_features", "reads")


def output_width(projection: nn.Module) -> int:
    """Number of features that an output projection writes, whatever wraps or quantizes it: `d_model`.

    Args:
        projection (`nn.Module`): Output projection of a layer.

    Raises:
        `ValueError`: If the module doesn't say.
    """
    return _told(projection, "nf", "out_features", "writes")


def _told(projection: nn.Module, name_of_conv1d: str, name: str, verb: str) -> int:
    base = _base_layer(projection)
    width = getattr(base, name_of_conv1d if isinstance(base, Conv1D) else name, None)
    if not isinstance(width, int):
        raise ValueError(
            f"The output projection of class {type(base).__name__} does not say how many features it {verb}. Give it "
            f"an attribute `{name}`, or name another module in the accessor of this model type (see "
            "`hera_trainer.register_head_accessor`)."
        )
    return width


def _dense_weight(projection: nn.Module) -> Tensor | None:
    """Weight `[d_model, in_features]` of a plain layer that wraps and quantizes nothing, `None` for any other module.

    The weight's own type counts too: torchao leaves `nn.Linear` in place and swaps the weight for a packed tensor, of
    which no columns can be cut.
    """
    if type(projection) not in (nn.Linear, Conv1D) or type(projection.weight) not in (Tensor, nn.Parameter):
        return None
    return projection.weight.T if isinstance(projection, Conv1D) else projection.weight


def _compute_dtype(projection: nn.Module) -> torch.dtype:
    """Dtype in which the layer under adapters multiplies."""
    base = _base_layer(projection)
    dtypes = [getattr(getattr(base, "weight", None), "dtype", None)]  # integers where packed, absent in GPTQ, AWQ, HQQ
    dtypes.append(getattr(base, "compute_dtype", None))  # bitsandbytes' 4-bit layers and HQQ
    dtypes += [tensor.dtype for tensor in itertools.chain(base.parameters(), base.buffers())]  # scales
    return next((dtype for dtype in dtypes if dtype in _EXACT_DTYPES), torch.float32)


def _input_dtype(projection: nn.Module) -> torch.dtype:
    """Dtype of rows that the module can be called with."""
    # bitsandbytes casts what it is given, and float32 keeps what adapters add exact; other packed layers don't cast.
    return torch.float32 if is_bitsandbytes(_base_layer(projection)) else _compute_dtype(projection)


def _device(projection: nn.Module) -> torch.device:
    return next(itertools.chain(projection.parameters(), projection.buffers())).device


def _is_plain_under_lora(projection: nn.Module) -> bool:
    """Whether nothing but LoRA, or a copy that is trained as a whole, wraps a plain layer, of which neither PEFT nor
    DeepSpeed looks at the parameters when it runs."""
    while isinstance(projection, (LoraLayer, ModulesToSaveWrapper)) and not isinstance(projection, ParamWrapper):
        projection = projection.get_base_layer() if isinstance(projection, LoraLayer) else _base_layer(projection)
    divided = any(hasattr(parameter, "ds_id") for parameter in projection.parameters(recurse=False))  # by ZeRO-3
    return _dense_weight(projection) is not None and not divided


@contextmanager
def _exact_weights(projection: nn.Module) -> Iterator[torch.dtype]:
    """Where LoRA wraps a plain layer, that layer's weights are float32 inside, as such layers alone are multiplied: 16
    bit would round away what tells nearly parallel vectors apart. Yields the dtype of rows that the module can be
    called with."""
    base = _base_layer(projection)
    if not _is_plain_under_lora(projection) or _compute_dtype(projection) not in _ROUNDING:
        yield _input_dtype(projection)
        return
    stored = dict(base._parameters)
    try:
        # In their place, so that the order of parameters stays. A gradient passes to the stored ones.
        base._parameters.update({name: None if p is None else p.float() for name, p in stored.items()})
        yield torch.float32
    finally:
        base._parameters.update(stored)


def _apply(projection: nn.Module, x: Tensor) -> Tensor:
    """`projection` on rows `[n, in_features]` without adapter dropout and without its own hooks, in float32."""
    with exact_products(x.device), without_dropout(projection), _exact_weights(projection) as dtype:
        return projection.forward(x.to(dtype)).float()


def _apply_linear(projection: nn.Module, x: Tensor) -> Tensor:
    """As `_apply`, without what the module adds to every row.

    The biases are switched off rather than subtracted afterwards: in 16 bit a large bias would swallow the digits of
    what it is added to. An offset that is no bias (of a custom module) is still subtracted.
    """
    # One head alone may be larger than the sum of all, which the model keeps within the range of float16. Powers of two
    # cost no digits.
    scale = (x.detach().abs().amax(1, keepdim=True) / _LARGE).clamp(min=1.0).log2().ceil().exp2()
    with without_bias(projection):
        out = _apply(projection, torch.cat([x / scale, x.new_zeros(1, x.shape[1])]))
    return (out[:-1] - out[-1:]) * scale


def project_heads(projection: nn.Module, pooled: Tensor, heads: Sequence[int]) -> Tensor:
    """Contributions of heads to the residual stream, without the projection's bias, which belongs to no head.

    A plain layer (`nn.Linear`, or transformers' `Conv1D` with its transposed weight) is applied block by block in
    float32. Anything else (LoRA and its variants, 4-bit, 8-bit, other weight-only schemes) computes with its own
    arithmetic, plain layers under LoRA in float32: a head's slice is placed into a vector of zeros of full width.
    Dropout of adapters is not applied: representations must be the same function of the weights whenever they are
    computed.

    Args:
        projection (`nn.Module`): Output projection of a layer.
        pooled (`Tensor` of shape `[B, h, d_head]`): Pooled input slices of h heads.
        heads (sequence of `int`): Their h indices.

    Returns:
        `Tensor` of shape `[B, h, d_model]`, float32.
    """
    batch, count, width = pooled.shape
    pooled = pooled.float()
    weight = _dense_weight(projection)
    if weight is not None:
        with exact_products(pooled.device):
            blocks = [weight[:, head * width : (head + 1) * width] for head in heads]
            return torch.einsum("bhd,hod->bho", pooled, torch.stack(blocks).float())
    total = input_width(projection) // width
    rows = pooled.new_zeros(batch, count, total, width)
    rows[:, torch.arange(count), torch.as_tensor(heads)] = pooled
    return _apply_linear(projection, rows.reshape(batch * count, total * width)).reshape(batch, count, -1)


def projection_offset(projection: nn.Module) -> Tensor:
    """The part of the projection's output that belongs to no head (its bias), `[d_model]`, float32."""
    return _apply(projection, torch.zeros(1, input_width(projection), device=_device(projection)))[0]


def projection_blocks(projection: nn.Module, num_heads: int) -> Tensor:
    """The projection's weight seen from each head, whatever wraps or quantizes it.

    Returns:
        `Tensor` of shape `[num_heads, d_head, d_model]`, float32.
    """
    weight = _dense_weight(projection)
    if weight is None:
        rows = _apply_linear(projection, torch.eye(input_width(projection), device=_device(projection)))
    else:
        rows = weight.T.float()  # [in_features, d_model]
    return rows.reshape(num_heads, -1, rows.shape[-1])


def _tolerance(projection: nn.Module, out: Tensor) -> float:
    """Relative tolerance of the self-check: rounding of the coarsest dtype on the way."""
    if quantizes_activations(_base_layer(projection)):
        return 5e-2
    exact = _ROUNDING[torch.bfloat16] if rounds_products() else 1e-4  # the model's products may be; ours are not
    return max(_ROUNDING.get(dtype, exact) for dtype in (out.dtype, _compute_dtype(projection)))


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


def passes_gradient(projection: nn.Module, num_heads: int) -> bool:
    """Whether a gradient of head vectors reaches what the projection was given. Some inference kernels have no backward
    or round their input, which has a gradient of zero: nothing below would be aligned, without a word.

    Args:
        projection (`nn.Module`): Output projection of a layer.
        num_heads (`int`): Number of heads that share its input.
    """
    base = _base_layer(projection)  # a trained adapter has a gradient of its own
    device = _device(base)
    with torch.enable_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        pooled = torch.randn(1, num_heads, input_width(base) // num_heads, device=device, requires_grad=True)
        total = project_heads(base, pooled, range(num_heads)).square().sum()
        if not total.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(total, pooled, allow_unused=True)
    return gradient is not None and bool(gradient.abs().max() > 0)
