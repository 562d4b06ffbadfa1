"""What a training run needs, estimated from a model's configuration: [`plan_run`], the arithmetic of `hera plan`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..heads.accessor import HeadAccessor
from ..heads.head import AlignedUnit, parse_units
from ..heads.ranking import HeadRanking
from .compute import ImageShape, Operations, image_shape, operations
from .memory import GIB, FeatureMemory, StepMemory, optimizer_bytes, pageable_bytes
from .model import ModelParts, WeightSizes, attach_lora, find_parts, meta_model, weight_sizes
from .settings import RunSettings

# Of a GPU's memory: what CUDA and its libraries take for themselves, and what is lost between tensors. Guesses.
CUDA_GIB = 0.75
FRAGMENTATION = 0.05


@dataclass
class RunPlan:
    """An estimate of what a run needs. Bytes, unless named otherwise.

    Args:
        settings ([`RunSettings`]): What it was made for.
        model_type (`str`): Type of the model.
        parameters (`dict[str, int]`): Number of parameters by part.
        weights ([`~planning.model.WeightSizes`]): Bytes of the weights, 16-bit and 4-bit.
        trained (`int`): Number of trained parameters.
        trained_bytes (`int`): Bytes of the adapter; without one, zero, since the weights are counted above.
        image ([`~planning.compute.ImageShape`]): What an image becomes.
        fixed (`dict[str, int]`): Device memory that does not depend on the batch.
        batch (`dict[str, int]`): Device memory that does, for the settings' micro-batch.
        alignment (`dict[str, int]`): The part of it that head alignment adds.
        features ([`~planning.memory.FeatureMemory`]): Where image features wait between the two passes of a step.
        pageable (`int`): Optimizer state that a paged optimizer may move to the host.
        first_pass (`dict[str, float]`): Share that the first pass adds to the operations of a step, by heads.
    """

    settings: RunSettings
    model_type: str
    parameters: dict[str, int]
    weights: WeightSizes
    trained: int
    trained_bytes: int
    image: ImageShape
    fixed: dict[str, int]
    batch: dict[str, int]
    alignment: dict[str, int]
    features: FeatureMemory
    pageable: int
    first_pass: dict[str, float]
    _memory: StepMemory = field(repr=False)

    @property
    def pool(self) -> int:
        """Samples compared with each other."""
        return self.settings.pool_size()

    @property
    def total(self) -> int:
        """Bytes at the peak of a step, by the estimate."""
        return sum(self.fixed.values()) + sum(self.batch.values()) + sum(self.alignment.values())

    def largest_batch(self, gpu_gib: float) -> int:
        """The largest micro-batch that fits a GPU, by the estimate; zero if none does.

        Args:
            gpu_gib (`float`): Memory of the GPU in GiB.
        """
        usable, batch = usable_bytes(gpu_gib), 0
        for step in (2**i for i in reversed(range(13))):
            if self._memory.total(batch + step) <= usable:
                batch += step
        return batch

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        content = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        content |= {name: asdict(content[name]) for name in ("settings", "weights", "image", "features")}
        return {**content, "pool": self.pool, "total": self.total, "estimate": True}


def usable_bytes(gpu_gib: float) -> float:
    """What of a GPU's memory a run may count on."""
    return (gpu_gib * (1 - FRAGMENTATION) - CUDA_GIB) * GIB


def aligned_heads(settings: RunSettings, accessor: HeadAccessor) -> list[AlignedUnit] | None:
    """The heads or layers to align, if the settings say which.

    Raises:
        `ValueError`: If the model has no such head or layer, or the ranking is another model's.
    """
    granularity = settings.alignment_granularity
    units = accessor.units(granularity)
    if settings.aligned_heads:
        heads = parse_units(settings.aligned_heads, granularity)
    elif settings.head_ranking_path:
        ranking = HeadRanking.load(os.fspath(settings.head_ranking_path))
        heads = ranking.select(settings.head_selection, settings.num_aligned_heads, settings.seed, granularity)
    else:
        if settings.num_aligned_heads > len(units):
            raise ValueError(
                f"`num_aligned_heads` ({settings.num_aligned_heads}) exceeds the {len(units)} {units[0].kind}s of this "
                "model. Lower it."
            )
        return None
    missing = sorted(set(heads) - set(units))
    if missing:
        raise ValueError(
            f"{missing[0].kind.capitalize()} {missing[0]} does not exist in this model, which has {granularity}s in "
            f"layers {units[0].layer} to {units[-1].layer}."
        )
    return heads


def plan_run(config: Any, settings: RunSettings | None = None) -> RunPlan:
    """Estimates what a run needs. Nothing is downloaded, and no weights are made.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The model's configuration.
        settings ([`RunSettings`], *optional*): The run.

    Raises:
        `ValueError`: If the model or a setting cannot be planned for; the message names the cure.

    Example:

    ```python
    >>> from transformers import AutoConfig
    >>> from hera_trainer.planning.plan import GIB, RunSettings, plan_run
    >>> config = AutoConfig.from_pretrained("Qwen/Qwen3-VL-4B-Instruct")
    >>> plan = plan_run(config, RunSettings(load_in_4bit=True, per_device_train_batch_size=2))
    >>> plan.total / GIB
    ```
    """
    settings = settings or RunSettings()
    model = meta_model(config, getattr(torch, settings.dtype))
    parts = find_parts(model)
    heads = aligned_heads(settings, parts.accessor)
    image = image_shape(config, settings.image_size, settings.image_tokens)
    counts, sizes = parts.counts(), weight_sizes(model)
    work = operations(parts, image, settings.text_tokens)
    if settings.use_peft:
        adapted = settings.lora_target_modules, settings.lora_modules_to_save, settings.use_dora
        attach_lora(model, settings.lora_r, *adapted)
    tensors = [p for p in model.parameters() if p.requires_grad]
    # TRL makes the adapters of a quantized model bfloat16; PEFT makes those of any other float32.
    element = 2 if settings.load_in_4bit else tensors[0].element_size()
    numbers = [p.numel() for p in tensors]
    words = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    states = [p.numel() for p in tensors if id(p) not in words], [p.numel() for p in tensors if id(p) in words]
    adapter = element * sum(numbers) if settings.use_peft else 0
    nf4 = sizes.nf4_double if settings.use_bnb_nested_quant else sizes.nf4
    fixed = {
        "weights": nf4 if settings.load_in_4bit else sizes.as_loaded,
        "unpacked_layer": 2 * sizes.largest_quantized if settings.load_in_4bit else 0,
        "adapter": adapter,
        # Autocast keeps a 16-bit copy of what is trained in float32.
        "autocast_copies": 2 * sum(numbers) if element == 4 else 0,
        "gradients": element * sum(numbers),
        # What DDP sends: a second copy, in buckets.
        "gradient_buckets": element * sum(numbers) if settings.processes > 1 else 0,
        "optimizer": optimizer_bytes(states[0], settings.optim, element, states[1]),
    }
    trained = _trained_parts(parts)
    memory = StepMemory(
        parts,
        settings,
        image,
        fixed,
        trained=trained,
        outside=counts["projector_and_other"] > 0,
        stream_size=getattr(torch, settings.dtype).itemsize,
        read=_read_width(parts, settings, heads),
        hooked=settings.use_peft and settings.gradient_checkpointing and _is_hooked(parts),
    )
    batch = settings.per_device_train_batch_size
    return RunPlan(
        settings=settings,
        model_type=config.model_type,
        parameters=counts,
        weights=sizes,
        trained=sum(numbers),
        trained_bytes=adapter,
        image=image,
        fixed=fixed,
        batch=memory.batch(batch),
        alignment=memory.alignment(batch),
        features=memory.features(batch),
        pageable=pageable_bytes(states[0], settings.optim, states[1]),
        first_pass=_first_pass(memory, work, heads, batch),
        _memory=memory,
    )


def _trained_parts(parts: ModelParts) -> dict[str, bool]:
    def trains(modules: Sequence[Any]) -> bool:
        return any(p.requires_grad for module in modules for p in module.parameters())

    inside = {
        id(p) for m in [parts.accessor.decoder, parts.vision_tower, *parts.embeddings()] if m for p in m.parameters()
    }
    between = any(p.requires_grad and id(p) not in inside for p in parts.model.parameters())
    tower = [] if parts.vision_tower is None else [parts.vision_tower]
    return {"vision": trains(tower), "projector": between, "language": trains(parts.accessor.layers)}


def _is_hooked(parts: ModelParts) -> bool:
    """Whether transformers finds the vision tower's embeddings, where it has all of them require gradients."""
    parts.model.enable_input_require_grads()
    tower = [] if parts.vision_tower is None else parts.vision_tower.modules()
    return any(module._forward_hooks for module in tower)


def _read_width(parts: ModelParts, settings: RunSettings, heads: Sequence[AlignedUnit] | None) -> int:
    """Largest width of what is read from one layer: slices of heads, if these are not known all from one, or the
    residual stream."""
    accessor = parts.accessor
    if settings.alignment_granularity == "layer":
        return parts.d_model
    if heads is None:
        return max(
            min(settings.num_heads, accessor.num_heads(i)) * accessor.head_dim(i) for i in accessor.layers_with_heads
        )
    layers = [head.layer for head in heads]
    return max(layers.count(layer) * accessor.head_dim(layer) for layer in set(layers))


def _first_pass(
    memory: StepMemory, work: Operations, heads: Sequence[AlignedUnit] | None, batch: int
) -> dict[str, float]:
    """Share that the first pass adds, for the aligned heads or, where they are not known, for two guesses."""
    settings, accessor, features = memory.settings, memory.parts.accessor, memory.features(batch)
    whole = settings.alignment_granularity == "layer"
    there = list(range(accessor.num_layers)) if whole else accessor.layers_with_heads
    if heads is not None:
        last = max(heads).layer
        deepest = {f"deepest layer {last}" if whole else f"deepest head in layer {last}": last}
    else:
        third = max((i for i in there if i < accessor.num_layers / 3), default=there[0])
        deepest = {
            f"{'layers' if whole else 'heads'} in the first third (layer {third})": third,
            f"{'' if whole else 'a head in '}the last layer ({there[-1]})": there[-1],
        }
    tower = features.vision if memory.hooked else 0.0
    step = work.step(memory.trained, settings.use_peft, settings.gradient_checkpointing, tower)
    share = 1 / step if settings.has_first_pass else 0.0
    again = features.vision, features.projector
    return {name: share * work.first_pass(layer, whole, *again) for name, layer in deepest.items()}
