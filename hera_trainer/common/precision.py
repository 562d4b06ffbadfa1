"""Products of float32 matrices as float32 has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# What decides how products of float32 matrices (and convolutions) are rounded, and from where a `"none"` takes it over.
_MATMULS: tuple[tuple[Any, Any], ...] = (
    (torch.backends.cuda.matmul, torch.backends.cudnn),
    (torch.backends.mkldnn.matmul, torch.backends.mkldnn),  # type: ignore[attr-defined]
)
_CONVOLUTIONS: tuple[tuple[Any, Any], ...] = (
    (torch.backends.cudnn.conv, torch.backends.cudnn),  # type: ignore[attr-defined]
    (torch.backends.mkldnn.conv, torch.backends.mkldnn),  # type: ignore[attr-defined]
)
_EXACT = ("none", "ieee")


def rounds_products() -> bool:
    """Whether this process rounds what it multiplies in float32: TF32 (`tf32=True`, `torch_compile=True`), which keeps
    10 bits of 23, or bfloat16."""
    return any(matmul.fp32_precision not in _EXACT for matmul, _ in _MATMULS)


@contextmanager
def exact_products(device: torch.device, convolutions: bool = False) -> Iterator[None]:
    """Inside, products of float32 matrices are rounded neither by autocast nor by TF32. The heads of a language model
    may be parallel to a thousandth: rounded, they lose their neighbours.

    Args:
        device (`torch.device`): Where they are computed.
        convolutions (`bool`, *optional*, defaults to `False`):
            Whether convolutions are not rounded either. PyTorch rounds them to TF32 unless it is told not to.
    """
    operations = (*_MATMULS, *_CONVOLUTIONS) if convolutions else _MATMULS
    before = [(operation, parent, operation.fp32_precision) for operation, parent in operations]
    rounding = [entry for entry in before if entry[2] not in _EXACT]
    for operation, _, _ in rounding:
        operation.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type=device.type, enabled=False):
            yield
    finally:
        for operation, parent, precision in rounding:  # one that follows its parent goes on to
            operation.fp32_precision = "none" if parent.fp32_precision == precision else precision
