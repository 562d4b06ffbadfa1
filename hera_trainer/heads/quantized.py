"""What is particular to quantized layers: kernels that round activations, and bitsandbytes' 4-bit layers on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def _bitsandbytes() -> Any:
    """bitsandbytes' layers, without importing it: where nobody did, no module can be one of them."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    return None if bitsandbytes is None else bitsandbytes.nn


def four_bit_layers(model: nn.Module) -> list[nn.Module]:
    """The `bitsandbytes.nn.Linear4bit` modules of `model`."""
    bnb = _bitsandbytes()
    return [] if bnb is None else [module for module in model.modules() if isinstance(module, bnb.Linear4bit)]


def is_bitsandbytes(layer: nn.Module) -> bool:
    """Whether `layer` is a quantized layer of bitsandbytes."""
    bnb = _bitsandbytes()
    return bnb is not None and isinstance(layer, (bnb.Linear4bit, bnb.Linear8bitLt))


def quantizes_activations(layer: nn.Module) -> bool:
    """Whether the kernel of `layer` rounds its input to 8 bits as well: LLM.int8 of bitsandbytes, and the dynamic
    schemes of torchao. Such a layer is not linear, so that parts of an input add up within about a percent only."""
    bnb = _bitsandbytes()
    if bnb is not None and isinstance(layer, bnb.Linear8bitLt):
        return True
    weight = getattr(layer, "weight", None)  # the two names are of torchao's tensors
    return any(getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "activation_quantization"))


@contextmanager
def restored_flags(modules: list[nn.Module]) -> Iterator[None]:
    """The `training` flags of modules are afterwards as they were."""
    before = [module.training for module in modules]
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


@contextmanager
def frozen_packing(model: nn.Module) -> Iterator[None]:
    """Keeps 4-bit weights in the layout that training needs, whatever forward runs inside.

    On CPUs with AVX512-BF16, the first gradient-free forward of a `Linear4bit` in eval mode rewrites its weights for
    inference. That rewrite rounds the quantization constants and has no backward: a later training step gets no
    gradient through the layer, or crashes. The layer decides by its own `training` flag, so the flag of these layers
    (which have no dropout and behave the same in both modes) is held at `True` here. Call it *inside* the switch to
    eval mode, since `model.eval()` resets the flag.

    Args:
        model (`nn.Module`): Any model; nothing happens for one without 4-bit layers.
    """
    layers = four_bit_layers(model)
    with restored_flags(layers):
        for layer in layers:
            layer.training = True
        yield


def check_not_packed(model: nn.Module) -> None:
    """Raises `ValueError` if a 4-bit layer was already rewritten for CPU inference: it can no longer be trained."""
    for layer in four_bit_layers(model):
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "The model's 4-bit weights were rewritten for CPU inference by an earlier eval-mode forward (for "
                "example `model.generate`), and bitsandbytes has no gradient for that layout. Load the model again, or "
                "run what comes before training inside `hera_trainer.heads.quantized.frozen_packing(model)`."
            )
