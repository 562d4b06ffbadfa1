"""Running a model for a moment in another mode, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .quantized import frozen_packing


@contextmanager
def _restored_flags(modules: list[nn.Module]) -> Iterator[None]:
    before = [module.training for module in modules]
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own flag is restored afterwards.

    4-bit layers keep their training layout (see [`~heads.quantized.frozen_packing`]).
    """
    with _restored_flags(list(model.modules())):
        model.eval()
        with frozen_packing(model), torch.no_grad():
            yield


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Dropout off in `module` and below (for a LoRA layer: its adapter dropout), everything else as it is."""
    dropouts = [child for child in module.modules() if isinstance(child, _DropoutNd)]
    with _restored_flags(dropouts):
        for dropout in dropouts:
            dropout.eval()
        yield


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """Autocast off for the device of `tensor`: head vectors and the loss are computed in float32."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def without_adapters(model: nn.Module) -> AbstractContextManager[Any]:
    """Context in which a PEFT model computes what its base model computes. Nothing happens for other models."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
