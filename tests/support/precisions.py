"""Precisions of a backbone, loaded as users load them, and their weights as the libraries dequantize them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from reference import alignment_loss, pooled_positions, recorded_projections
from tiny import build_vlm, image_dataset
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TorchAoConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import AttentionHead
from hera_trainer.heads.capture import HeadCapture
from hera_trainer.heads.registry import get_head_accessor

SIZES = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes' 4-bit kernels take no narrower layers
SAMPLES = 6
# Linear layers of the language model, those of linear attention included, and none of the vision tower.
ADAPTED = r"(?!.*(vision|visual)).*_proj(_\w+)?"
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ACTIVATIONS_ROUNDED = 2e-2  # LLM.int8, where its kernels run: in eval mode on a CPU, always on a GPU


@dataclass(frozen=True)
class Precision:
    """A precision: how a backbone is loaded in it, and how exact that is.

    Args:
        library: Package that makes it.
        dtype: Dtype of the model and of its arithmetic.
        quantization: Makes the `quantization_config` of `from_pretrained`, given the dtype.
        convert: Quantizes a loaded model in place, where transformers cannot.
        rounds_activations: Whether there are kernels that round their input to 8 bits.
    """

    library: str
    dtype: torch.dtype = torch.bfloat16
    quantization: Callable[[torch.dtype], Any] | None = None
    convert: Callable[[nn.Module], None] | None = None
    rounds_activations: bool = False

    @property
    def tolerance(self) -> float:
        """Largest deviation of a head vector, relative to the largest value."""
        return ACTIVATIONS_ROUNDED if self.rounds_activations else ROUNDING[self.dtype]

    @property
    def is_quantized(self) -> bool:
        return self.library != "torch"

    def init_kwargs(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        quantization = {} if self.quantization is None else {"quantization_config": self.quantization(self.dtype)}
        return {"dtype": self.dtype, **quantization}

    def load(self, path: str, **kwargs: Any) -> Any:
        model = AutoModelForImageTextToText.from_pretrained(path, **self.init_kwargs(), **kwargs)
        if self.convert is not None:
            self.convert(model)
        return model


def _four_bit(kind: str, double: bool) -> Precision:
    def config(dtype: torch.dtype) -> BitsAndBytesConfig:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
        )

    return Precision("bitsandbytes", quantization=config)


def _llm_int8(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao_int8(dtype: torch.dtype) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_int4(model: nn.Module) -> None:
    """transformers holds torchao's 4-bit schemes for untrainable, so the language model is quantized after loading."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    quantize_(model.get_decoder(), IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def _hqq_4bit(model: nn.Module) -> None:
    """transformers 5 cannot load HQQ yet, so the layers of the language model are replaced after loading."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model.requires_grad_(False)
    for module in list(model.get_decoder().layers.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                config = BaseQuantizeConfig(nbits=4, group_size=32)
                dtype, device = child.weight.dtype, str(child.weight.device)
                setattr(module, name, HQQLinear(child, config, compute_dtype=dtype, device=device))


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("torch", torch.float32),
    "bf16": Precision("torch"),
    "fp16": Precision("torch", torch.float16),
    "nf4": _four_bit("nf4", False),
    "nf4, double quantization": _four_bit("nf4", True),
    "fp4": _four_bit("fp4", False),
    "fp4, double quantization": _four_bit("fp4", True),
    "LLM.int8": Precision("bitsandbytes", quantization=_llm_int8, rounds_activations=True),
    "torchao int8": Precision("torchao", quantization=_torchao_int8),
    "torchao int4": Precision("torchao", convert=_torchao_int4),
    "HQQ 4-bit": Precision("hqq", convert=_hqq_4bit),
}


def base_layer(layer: nn.Module) -> nn.Module:
    return layer.base_layer if hasattr(layer, "base_layer") else layer


def base_weight(layer: nn.Module) -> Tensor:
    """Weight `[out, in]` of a layer without adapters in float32, dequantized by its library's public function."""
    layer = base_layer(layer)
    weight = getattr(layer, "weight", None)
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    if getattr(weight, "SCB", None) is not None or hasattr(layer, "init_8bit_state"):
        from bitsandbytes.functional import int8_vectorwise_dequant

        # The first forward hands the scales over to the layer's state.
        return int8_vectorwise_dequant(weight.data, layer.state.SCB if weight.SCB is None else weight.SCB).float()
    if hasattr(layer, "dequantize"):  # HQQ
        return layer.dequantize().float()
    if hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:  # torchao
        return weight.dequantize().float()
    return weight.detach().float()


def explicit_weight(layer: nn.Module) -> Tensor:
    """Weight `[out, in]` in float32: the dequantized one, and `B A` times the scaling for a LoRA layer."""
    weight = base_weight(layer)
    if hasattr(layer, "lora_A"):
        (name,) = layer.active_adapters
        weight = weight + layer.scaling[name] * (layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float())
    return weight


def explicit_vectors(model: nn.Module, batch: dict[str, Any], heads: list[AttentionHead]) -> Tensor:
    """Head representations z `[m, B, d_model]` of a forward pass, by the definition, in float32."""
    with recorded_projections(model) as recordings:
        model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    mask = pooled_positions(batch, model)
    accessor, vectors = get_head_accessor(model), []
    for layer, head in heads:
        num_heads = accessor.num_heads(layer)
        x, weight = recordings[layer].x.float(), explicit_weight(recordings[layer].projection)
        columns = slice(head * x.shape[-1] // num_heads, (head + 1) * x.shape[-1] // num_heads)
        vectors.append(torch.stack([weight[:, columns] @ x[i, mask[i], columns].mean(0) for i in range(len(x))]))
    return torch.stack(vectors)


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def lora_config(dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=ADAPTED, lora_dropout=dropout)


def with_lora(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    """LoRA on the language model, with values of B that matter (they start as zeros)."""
    model = get_peft_model(model, lora_config(dropout))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def dense_twin(model: nn.Module, family: str) -> nn.Module:
    """A float32 model of ordinary layers with the dequantized weights of `model` (which has no adapters yet)."""
    twin, _ = build_vlm(family, **SIZES)
    with torch.no_grad():
        for name, module in twin.named_modules():
            original = model.get_submodule(name)
            for key, parameter in module.named_parameters(recurse=False):
                is_weight = isinstance(module, nn.Linear) and key == "weight"
                parameter.copy_(base_weight(original) if is_weight else getattr(original, key).float())
    return twin


# --- A batch, its head vectors and their gradient --------------------------------------------------------------------


def batch_of(path: str) -> dict[str, Any]:
    collator = DataCollatorForVisionLanguageModeling(AutoProcessor.from_pretrained(path))
    return collator(list(image_dataset(SAMPLES)))


def heads_of_two_layers(model: nn.Module) -> list[AttentionHead]:
    heads = get_head_accessor(model).heads()
    return [heads[-1], heads[1], heads[2]]


def alignment_of(z: Tensor) -> Tensor:
    """Alignment loss of head vectors with a random teacher."""
    teacher = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(0)).to(z.device)
    return alignment_loss(z, teacher, 2, torch.tensor(0.07).log(), similarity="cosine")  # centred, rounding grows


def captured(model: nn.Module, batch: dict[str, Any], heads: list[AttentionHead]) -> Tensor:
    """Head vectors of a forward pass in the mode that the model is in, without gradient."""
    capture = HeadCapture(get_head_accessor(model), heads, "tiny")
    with capture.attached(), torch.no_grad():
        return capture.read(lambda inputs: model(**inputs), batch, pooled_positions(batch, model), stop_early=False)


def alignment_gradients(model: nn.Module, batch: dict[str, Any], heads: list[AttentionHead]) -> dict[str, Tensor]:
    """Gradients of the alignment loss alone, through the taps."""
    capture = HeadCapture(get_head_accessor(model), heads, "tiny")
    model.train()
    with capture.attached():
        capture.start(pooled_positions(batch, model))
        loss = model(**batch, use_cache=False).loss
        alignment = alignment_of(capture.vectors())
        (0.0 * loss + alignment).backward()
        capture.stop()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: gradient for name, gradient in gradients.items() if gradient.any()}


def assert_same_direction(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The two gradients differ by `tolerance` of their norm at most."""
    expected = {name: gradient for name, gradient in expected.items() if gradient.any()}
    assert set(found) == set(expected) and len(found) >= 20
    difference = torch.cat([(found[name].float() - expected[name].float()).flatten() for name in expected])
    norm = torch.cat([gradient.float().flatten() for gradient in expected.values()]).norm()
    assert difference.norm() <= tolerance * norm
