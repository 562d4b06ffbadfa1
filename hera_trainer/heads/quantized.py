"""What bitsandbytes' 4-bit layers need on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def four_bit_layers(model: nn.Module) -> list[nn.Module]:
    """The `bitsandbytes.nn.Linear4bit` modules of `model`, without importing bitsandbytes for models that have none."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:  # nobody imported it, so no module of the model can be one of its
        return []
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


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
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


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
