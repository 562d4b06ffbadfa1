"""Products of float32 matrices as float32 has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# What decides how products of float32 matrices are rounded, and from where a `"none"` takes it over.
_MATMULS: tuple[tuple[Any, Any], ...] = (
    (torch.backends.cuda.matmul, torch.backends.cudnn),
    (torch.backends.mkldnn.matmul, torch.backends.mkldnn),  # type: ignore[attr-defined]
)
_EXACT = ("none", "ieee")


def rounds_products() -> bool:
    """Whether this process rounds what it multiplies in float32: TF32 (`tf32=True`, `torch_compile=True`), which keeps
    10 bits of 23, or bfloat16."""
    return any(matmul.fp32_precision not in _EXACT for matmul, _ in _MATMULS)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Inside, products of float32 matrices are rounded neither by autocast nor by TF32. The heads of a language model
    may be parallel to a thousandth: rounded, they lose their neighbours.

    Args:
        device (`torch.device`): Where they are computed.
    """
    before = [(matmul, parent, matmul.fp32_precision) for matmul, parent in _MATMULS]
    rounding = [entry for entry in before if entry[2] not in _EXACT]
    for matmul, _, _ in rounding:
        matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type=device.type, enabled=False):
            yield
    finally:
        for matmul, parent, precision in rounding:  # one that follows its parent goes on to
            matmul.fp32_precision = "none" if parent.fp32_precision == precision else precision
