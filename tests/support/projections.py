"""Output projections of many kinds with their explicit weights, for the tests of what heads write."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

HEADS, HEAD_DIM, WIDTH = 4, 32, 64  # 128 features in, 64 out: 4-bit layers take no fewer
FULL = HEADS * HEAD_DIM


class Holder(nn.Module):
    """A module with an output projection, which PEFT can wrap."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.o_proj = projection
        self.config = SimpleNamespace(model_type="toy")
        self.is_loaded_in_4bit = "4bit" in type(projection).__name__
        self.is_loaded_in_8bit = "8bit" in type(projection).__name__


def randomize_adapters(module: nn.Module) -> None:
    """Gives adapters values that matter (they start as zeros)."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * noise)
            elif "lora_" in name:
                parameter.copy_(0.2 * noise)


def plain(bias: bool = False) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        projection = nn.Linear(FULL, WIDTH, bias=bias)
        if bias:
            nn.init.normal_(projection.bias, std=0.2)
    return projection


def with_lora(projection: nn.Module, **settings: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(Holder(projection), LoraConfig(r=4, lora_alpha=6, target_modules=["o_proj"], **settings))
    wrapped = model.base_model.model.o_proj
    randomize_adapters(wrapped)
    return wrapped


Explicit = tuple[nn.Module, Tensor, Tensor]  # projection, weight [out, in], offset [out]


def base_values(projection: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = projection.weight.detach()
    return weight, torch.zeros(WIDTH) if projection.bias is None else projection.bias.detach().clone()


def lora_update(wrapped: nn.Module, scaling: float) -> tuple[Tensor, Tensor]:
    a, b = wrapped.lora_A["default"], wrapped.lora_B["default"]
    bias = torch.zeros(WIDTH) if b.bias is None else b.bias.detach().float()
    return scaling * b.weight.detach().float() @ a.weight.detach().float(), scaling * bias


def linear_case(bias: bool) -> Explicit:
    projection = plain(bias)
    return projection, *base_values(projection)


def lora_case(bias: bool, scaling: float = 6 / 4, **settings: Any) -> Explicit:
    projection = plain(bias)
    weight, offset = base_values(projection)
    wrapped = with_lora(projection, **settings)
    update, update_offset = lora_update(wrapped, scaling)
    return wrapped, weight + update, offset + update_offset


def dora_case(bias: bool, **settings: Any) -> Explicit:
    wrapped, weight, offset = lora_case(bias, use_dora=True, **settings)
    magnitude = wrapped.lora_magnitude_vector["default"].weight.detach()
    return wrapped, weight * (magnitude / weight.norm(dim=1))[:, None], offset


def merged_case() -> Explicit:
    wrapped, weight, offset = lora_case(True)
    wrapped.merge()
    return wrapped, weight, offset


def disabled_case() -> Explicit:
    projection = plain(True)
    weight, offset = base_values(projection)
    wrapped = with_lora(projection)
    wrapped.enable_adapters(False)
    return wrapped, weight, offset


def conv1d() -> Conv1D:
    """The layer of GPT-2: its weight is transposed, and it always has a bias."""
    source = plain(True)
    projection = Conv1D(WIDTH, FULL)
    with torch.no_grad():
        projection.weight.copy_(source.weight.T)
        projection.bias.copy_(source.bias)
    return projection


def conv1d_case(lora: bool) -> Explicit:
    projection: nn.Module = conv1d()
    weight, offset = base_values(plain(True))
    if lora:
        projection = with_lora(projection, fan_in_fan_out=True)
        weight = weight + lora_update(projection, 6 / 4)[0]
    return projection, weight, offset


def saved_module_case() -> Explicit:
    """PEFT trains a copy of the whole projection (`modules_to_save`)."""
    holder = Holder(plain(True))
    holder.q_proj = nn.Linear(8, 8)
    model = get_peft_model(holder, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"]))
    wrapped = model.base_model.model.o_proj
    copy = wrapped.modules_to_save["default"]
    with torch.no_grad():
        copy.weight.mul_(1.5)
        copy.bias.add_(1.0)
    return wrapped, copy.weight.detach(), copy.bias.detach()


class WeightOnlyLinear(nn.Module):
    """What GPTQ, AWQ and their like are: integers and scales in buffers, no `weight`, no parameters."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        source = plain(bias)
        self.in_features, self.out_features = FULL, WIDTH
        scales = source.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (source.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("bias", None if source.bias is None else source.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qweight.to(x.dtype) * self.scales.to(x.dtype), self.bias)


def weight_only_case(bias: bool) -> Explicit:
    projection = WeightOnlyLinear(bias)
    weight = projection.qweight.float() * projection.scales
    return projection, weight, torch.zeros(WIDTH) if projection.bias is None else projection.bias


CASES: dict[str, Callable[[], Explicit]] = {
    "linear": lambda: linear_case(False),
    "linear with bias": lambda: linear_case(True),
    "lora": lambda: lora_case(False),
    "lora with bias": lambda: lora_case(True),
    "rslora": lambda: lora_case(True, scaling=6 / 4**0.5, use_rslora=True),
    "dora": lambda: dora_case(False),
    "dora with bias": lambda: dora_case(True),
    "dora dropout": lambda: dora_case(True, lora_dropout=0.5),
    "lora_bias": lambda: lora_case(True, lora_bias=True),
    "lora dropout": lambda: lora_case(True, lora_dropout=0.5),
    "merged lora": merged_case,
    "disabled lora": disabled_case,
    "modules_to_save": saved_module_case,
    "Conv1D": lambda: conv1d_case(False),
    "Conv1D with lora": lambda: conv1d_case(True),
    "weight-only": lambda: weight_only_case(False),
    "weight-only with bias": lambda: weight_only_case(True),
}


def pooled_vectors(count: int, batch: int = 5) -> Tensor:
    return torch.randn(batch, count, HEAD_DIM, generator=torch.Generator().manual_seed(3))


def slices(weight: Tensor, pooled: Tensor, heads: list[int]) -> Tensor:
    """z = W[:, slice of the head] @ vector, in float64, head by head and sample by sample."""
    out = torch.zeros(*pooled.shape[:2], WIDTH, dtype=torch.float64)
    for i, row in enumerate(pooled.double()):
        for place, head in enumerate(heads):
            out[i, place] = weight.double()[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] @ row[place]
    return out
