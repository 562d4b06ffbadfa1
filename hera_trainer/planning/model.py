"""A model without weights: how many parameters it has, and how many bytes they take in 16 and in 4 bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ..heads.accessor import HeadAccessor
from ..heads.registry import get_head_accessor

# Of bitsandbytes' NF4: numbers that share a scale, and scales that share a scale under double quantization.
_BLOCK = 64
_NESTED_BLOCK = 256


def read_config(name_or_path: str, revision: str | None = None) -> transformers.PreTrainedConfig:
    """The configuration of a model on the Hub or in a folder. Weights are not looked for.

    Raises:
        `ValueError`: If there is none that can be read.
    """
    try:
        return transformers.AutoConfig.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ValueError(
            f"The configuration of {name_or_path!r} cannot be read ({reason}). Give the name of a model on the Hub, "
            "or a folder with its `config.json`; no weights are needed."
        ) from error


def meta_model(config: transformers.PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model of a configuration on the meta device: every module and shape, no numbers.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Its configuration.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Dtype of its parameters.

    Raises:
        `ValueError`: If transformers has no such model that writes text.
    """
    auto: Any = transformers.AutoModelForCausalLM
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        auto = transformers.AutoModelForImageTextToText
    elif type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"transformers has no image-text-to-text or causal language model of type {config.model_type!r}. See the "
            "page of supported models."
        )
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


@dataclass(frozen=True)
class ModelParts:
    """Where a model has which of its modules.

    Args:
        model (`nn.Module`): The model.
        accessor ([`HeadAccessor`]): Its attention heads and decoder layers.
        vision_tower (`nn.Module`, *optional*): Its vision encoder.
        vision_blocks (sequence of `nn.Module`): The layers of the vision encoder.
    """

    model: Any
    accessor: HeadAccessor
    vision_tower: nn.Module | None
    vision_blocks: list[nn.Module]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.model.get_input_embeddings().embedding_dim

    def embeddings(self) -> list[nn.Module]:
        """Input embeddings and LM head."""
        found = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        return [module for module in found if module is not None]

    def counts(self) -> dict[str, int]:
        """Number of parameters by part; tied ones count once."""
        groups = [
            ("embeddings", self.embeddings()),
            ("language_model", [self.accessor.decoder]),
            ("vision_tower", [] if self.vision_tower is None else [self.vision_tower]),
        ]
        part_of = {id(p): name for name, modules in reversed(groups) for m in modules for p in m.parameters()}
        counts = dict.fromkeys(["language_model", "embeddings", "vision_tower", "projector_and_other"], 0)
        for parameter in self.model.parameters():
            counts[part_of.get(id(parameter), "projector_and_other")] += parameter.numel()
        return counts


def find_parts(model: Any) -> ModelParts:
    """Finds decoder, heads and vision encoder of a model.

    Raises:
        `ValueError`: If its attention heads are not known.
    """
    accessor = get_head_accessor(model)
    tower = model.get_encoder(modality="image")
    if tower is None or tower is model or any(module is accessor.decoder for module in tower.modules()):
        tower = None  # these are the answers of transformers for a model without one
    blocks: list[nn.Module] = []
    if tower is not None:
        lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module)]
        # The tower says how many layers it has. Mergers beside them (deepstack of Qwen3-VL) may be larger.
        depth = next((n for name in ("num_hidden_layers", "depth") if (n := getattr(tower.config, name, None))), None)
        lists = [layers for layers in lists if len(layers) == depth] or lists
        blocks = list(max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=[]))
    return ModelParts(model, accessor, tower, blocks)


def quantized_linears(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers, vision tower and projector included, that transformers has bitsandbytes quantize: all but the
    LM head, what is tied to it, and what the model keeps in float32. Their biases stay 16-bit."""
    skipped = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or [])]
    for name, module in model.named_modules():
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skipped):
            yield name, module


def four_bit_bytes(numbers: int, double_quant: bool) -> int:
    """Bytes that bitsandbytes keeps for the weight of one 4-bit layer: two numbers a byte, a scale for every 64 of
    them, and its tables."""
    blocks = math.ceil(numbers / _BLOCK)
    tables = 16 * 4
    if double_quant:  # scales of 8 bit, with scales, a table and an offset of their own
        scales = blocks + 4 * math.ceil(blocks / _NESTED_BLOCK) + 256 * 4 + 4
    else:
        scales = 4 * blocks
    return math.ceil(numbers / 2) + scales + tables


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a model's parameters.

    Args:
        as_loaded (`int`): Unquantized, in the model's dtype.
        nf4 (`int`): With the linear layers in 4 bit.
        nf4_double (`int`): The same with double quantization.
        quantized (`int`): Number of parameters that 4-bit loading quantizes.
        not_quantized (`int`): Number of parameters that stay.
        largest_quantized (`int`): Parameters of the largest quantized layer, unpacked to 16 bit when it runs.
    """

    as_loaded: int
    nf4: int
    nf4_double: int
    quantized: int
    not_quantized: int
    largest_quantized: int


def weight_sizes(model: Any) -> WeightSizes:
    """Measures the model as 16-bit and as 4-bit loading would make it."""
    as_loaded = sum(p.numel() * p.element_size() for p in model.parameters())
    weights: list[Any] = [module.weight for _, module in quantized_linears(model)]
    rest = as_loaded - sum(weight.numel() * weight.element_size() for weight in weights)
    quantized = sum(weight.numel() for weight in weights)
    return WeightSizes(
        as_loaded=as_loaded,
        nf4=rest + sum(four_bit_bytes(weight.numel(), False) for weight in weights),
        nf4_double=rest + sum(four_bit_bytes(weight.numel(), True) for weight in weights),
        quantized=quantized,
        not_quantized=sum(p.numel() for p in model.parameters()) - quantized,
        largest_quantized=max((weight.numel() for weight in weights), default=0),
    )


def attach_lora(
    model: Any,
    r: int,
    target_modules: str | list[str] | None,
    modules_to_save: list[str] | None = None,
    use_dora: bool = False,
) -> None:
    """Puts LoRA adapters on a meta model, in place, as PEFT itself does it.

    Args:
        model (`nn.Module`): Model on the meta device.
        r (`int`): Rank.
        target_modules (`str` or `list[str]`, *optional*):
            `"all-linear"`, a regular expression, names; `None` for PEFT's own choice for the type.
        modules_to_save (`list[str]`, *optional*): Modules of which the adapter holds whole copies.
        use_dora (`bool`, *optional*, defaults to `False`): DoRA.

    Raises:
        `ValueError`: If PEFT finds no such module.
    """
    more: dict[str, Any] = {"modules_to_save": modules_to_save, "use_dora": use_dora}
    lora = LoraConfig(r=r, target_modules=target_modules, task_type="CAUSAL_LM", **more)
    get_peft_model(model, lora, low_cpu_mem_usage=True)
