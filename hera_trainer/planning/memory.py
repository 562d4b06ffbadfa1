"""Bytes of a training step beside the weights: gradients, optimizer, activations, and what alignment adds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..common.limits import HOST_SHARE
from ..objectives.contrastive import MAX_LOGITS
from .compute import ImageShape
from .model import ModelParts
from .settings import RunSettings

_FLOAT = 4  # bytes of a float32
GIB = 2**30
_TILE_TOKENS, _TILE_VOCABULARY = 4096, 32768  # TRL's fused LM head: logits that are held at a time

# Of bitsandbytes: smaller tensors keep float32 states; numbers that share a scale; smaller tensors are never paged.
_LEAST_8BIT, _BLOCK_8BIT, _LEAST_PAGED = 4096, 256, 100_000


def optimizer_bytes(sizes: Iterable[int], optim: str, element_size: int, embeddings: Iterable[int] = ()) -> int:
    """Bytes of AdamW's state.

    Args:
        sizes (iterable of `int`): Number of elements of each trained tensor but those of embeddings.
        optim (`str`): One of [`~planning.settings.OPTIMIZERS`].
        element_size (`int`): Bytes of an element of the trained tensors: torch's AdamW keeps states in their dtype.
        embeddings (iterable of `int`, *optional*):
            The same of `nn.Embedding`, whose states `Trainer` keeps in float32 where those of others have 8 bit.
    """
    sizes, embeddings = list(sizes), list(embeddings)
    if "8bit" in optim:
        return _8bit_bytes(sizes) + sum(2 * n * _FLOAT for n in embeddings)
    sizes += embeddings
    if optim.startswith("adamw_torch"):
        return sum(2 * n * element_size + _FLOAT for n in sizes)  # and the number of steps
    return sum(2 * n * _FLOAT for n in sizes)


def _8bit_bytes(sizes: Sequence[int]) -> int:
    small = sum(2 * n * _FLOAT for n in sizes if n < _LEAST_8BIT)
    large = [n for n in sizes if n >= _LEAST_8BIT]
    tables = 2 * 256 * _FLOAT if large else 0
    return small + sum(2 * n + 2 * _FLOAT * math.ceil(n / _BLOCK_8BIT) for n in large) + tables


def pageable_bytes(sizes: Iterable[int], optim: str, embeddings: Iterable[int] = ()) -> int:
    """The part of the optimizer's state that a paged optimizer may move to the host."""
    others, words = ([n for n in numbers if n >= _LEAST_PAGED] for numbers in (sizes, embeddings))
    return optimizer_bytes(others, optim, _FLOAT, words) if optim.startswith("paged") else 0


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block.

    Args:
        name (`str`): Its own name.
        reads (`int`): Input width.
        writes (`int`): Output width.
        keeps (`bool`): Whether it keeps an input of its own for the backward. Siblings that are trained share
            one; adapters have one each, with their own dropout.
        adapted (`bool`): Whether an adapter is on it.
    """

    name: str
    reads: int
    writes: int
    keeps: bool
    adapted: bool


def linears(block: nn.Module) -> list[Linear]:
    """The linear layers of a block, adapters counted with the layer they are on."""
    found, inside, shared = [], set(), set()
    for name, module in block.named_modules():
        base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if id(module) in inside or not isinstance(base, nn.Linear):
            continue
        inside |= {id(part) for part in module.modules()}  # an adapter is made of linear layers, too
        adapted = base is not module
        sibling = (name.rpartition(".")[0], base.in_features)
        keeps = adapted or (base.weight.requires_grad and sibling not in shared)
        shared.add(sibling)
        found.append(Linear(name.rpartition(".")[2], base.in_features, base.out_features, keeps, adapted))
    return found


def kept_bytes(block: nn.Module, element_size: int) -> int:
    """Bytes a token that a block keeps for its backward: of each linear layer the output, of a trained one the input,
    with one byte an element for an adapter's dropout; the product of a gated MLP; two float32 copies at each of two
    norms, and at those of queries and keys. Attention is taken to be a kernel that keeps no scores (SDPA, flash)."""
    layers = linears(block)
    if not layers:
        return 0
    inputs = sum(layer.reads * (element_size + layer.adapted) for layer in layers if layer.keeps)
    outputs = [layer.writes for layer in layers]
    normed = 2 * layers[0].reads
    names = {name.rpartition(".")[2] for name, _ in block.named_modules()}
    normed += sum(layer.writes for layer in layers if f"{layer.name.removesuffix('_proj')}_norm" in names)
    return inputs + (sum(outputs) + max(outputs)) * element_size + 2 * _FLOAT * normed


def backward_bytes(block: nn.Module, element_size: int) -> int:
    """Bytes a token of the gradients that are alive at a time in a block's backward: four of its widest output."""
    return 4 * max((layer.writes for layer in linears(block)), default=0) * element_size


def activation_bytes(
    blocks: Sequence[nn.Module], tokens: int, width: int, element_size: int, checkpointing: bool
) -> tuple[int, int]:
    """Activations of a stack of blocks that takes part in the backward.

    Args:
        blocks (sequence of `nn.Module`): The blocks.
        tokens (`int`): Tokens of the micro-batch.
        width (`int`): Width of the stream between them.
        element_size (`int`): Bytes of an element.
        checkpointing (`bool`): Whether only the input of each block is kept.

    Returns:
        What is kept through the forward, and what the backward of the largest block needs on top.
    """
    kept = [tokens * kept_bytes(block, element_size) for block in blocks]
    backward = [tokens * backward_bytes(block, element_size) for block in blocks]
    if not checkpointing:
        return sum(kept), max(backward, default=0)
    stages = [sum(stage) for stage in zip(kept, backward, strict=True)]
    return len(blocks) * tokens * width * element_size, max(stages, default=0)


def lm_head_bytes(tokens: int, width: int, vocabulary: int, element_size: int, trained: bool) -> int:
    """Bytes of the fused LM head of TRL, which holds logits tile by tile: a tile, the hidden states that are scored and
    their float32 gradient; for a trained head the float32 gradient of its weight.

    Args:
        tokens (`int`): Scored tokens of the micro-batch.
        width (`int`): `d_model`.
        vocabulary (`int`): Size of the vocabulary.
        element_size (`int`): Bytes of an element.
        trained (`bool`): Whether the head's weight is trained.
    """
    tile = min(tokens, _TILE_TOKENS) * min(vocabulary, _TILE_VOCABULARY) * element_size
    states = tokens * width * (element_size + _FLOAT)
    return tile + states + (vocabulary * width * _FLOAT if trained else 0)


def alignment_bytes(
    heads: int, pool: int, width: int, teacher_width: int, queue: int, k: int, tokens: int, read: int
) -> dict[str, int]:
    """What head alignment holds on the device.

    Args:
        heads (`int`): Aligned heads m.
        pool (`int`): Samples B compared with each other, of all processes.
        width (`int`): `d_model`.
        teacher_width (`int`): Width of the teacher's vectors.
        queue (`int`): Past samples Q.
        k (`int`): Neighbours.
        tokens (`int`): Tokens of a micro-batch.
        read (`int`): Largest width of the slices that are read from one layer.

    Returns:
        Bytes by what they are for. The similarities are taken some heads and anchors at a time, 16 MiB of them.
    """
    candidates = pool + queue
    vectors = _FLOAT * heads * pool * width
    at_once = min(heads, max(1, MAX_LOGITS // (pool * candidates)))
    work = _FLOAT * at_once * candidates * width
    logits = _FLOAT * min(heads * pool * candidates, max(MAX_LOGITS, candidates))
    return {
        "head_vectors": vectors,
        "gradients": 2 * vectors,  # before and after those of a pool that is skipped are masked
        # Of the heads at work: normalized, divided by the temperature, and products of their size, four at a time.
        "heads_at_work": 4 * work,
        "similarities": 3 * logits,  # with their logarithms and where the neighbours are
        "teacher_vectors": 2 * _FLOAT * candidates * teacher_width + 8 * pool * k,
        "queue": _FLOAT * queue * (heads * width + teacher_width),
        "pooling": 2 * _FLOAT * tokens * read,  # float32 copies of what a layer's aligned heads put out, one by one
    }


def projector_bytes(heads: int, width: int, teacher_width: int) -> int:
    """Bytes of the projectors of [`FeatureLoss`], a head's each, with their gradients and AdamW's two states, float32.

    Args:
        heads (`int`): Aligned heads m.
        width (`int`): `d_model`.
        teacher_width (`int`): Width of the teacher's vectors.
    """
    return 4 * _FLOAT * heads * teacher_width * (width + 1 + teacher_width + 1)


def input_bytes(config: Any, image: ImageShape) -> int:
    """Bytes of a sample's pixels, float32. The processors of the Qwen models give every image as two equal frames."""
    vision = getattr(config, "vision_config", None)
    patch = getattr(vision, "patch_size", None)
    if not isinstance(patch, int):
        return 0
    return image.vision_tokens * 3 * patch**2 * getattr(vision, "temporal_patch_size", 1) * _FLOAT


def forward_bytes(block: nn.Module, element_size: int) -> int:
    """Bytes a token that a block holds at a time in a forward pass of which nothing is kept: the stream before and
    after it and its norm, and the outputs of a gated MLP with their product."""
    layers = linears(block)
    return 3 * (layers[0].reads + max(layer.writes for layer in layers)) * element_size if layers else 0


@dataclass(frozen=True)
class FeatureMemory:
    """Where the image features of a step wait between its two passes.

    Args:
        device, host (`int`): Bytes on the device and in main memory.
        vision, projector (`float`): Shares of what vision tower and projector compute that is computed again.
    """

    device: int = 0
    host: int = 0
    vision: float = 1.0
    projector: float = 1.0


@dataclass
class StepMemory:
    """A model with its adapters, to be asked for the memory of any micro-batch.

    Args:
        parts ([`~planning.model.ModelParts`]): The model.
        settings ([`~planning.settings.RunSettings`]): The run.
        image ([`~planning.compute.ImageShape`]): What an image becomes.
        fixed (`dict[str, int]`): Bytes that do not depend on the micro-batch.
        trained (`dict[str, bool]`): Whether vision tower, projector and language model have trained weights.
        outside (`bool`): Whether anything with weights lies between vision tower and language model, beside both.
        stream_size (`int`): Bytes of an element of the residual stream, which has the dtype of the weights.
        read (`int`): Largest width of what is read from one layer: the heads' slices, or the residual stream.
        hooked (`bool`, *optional*, defaults to `False`):
            Whether a vision tower without trained weights gets inputs that require gradients: adapters and gradient
            checkpointing have transformers hook the embeddings of every part of the model.
    """

    parts: ModelParts
    settings: RunSettings
    image: ImageShape
    fixed: dict[str, int]
    trained: dict[str, bool]
    outside: bool
    stream_size: int
    read: int
    hooked: bool = False

    def batch(self, size: int) -> dict[str, int]:
        """Device memory of a micro-batch of `size` samples at the peak of a step."""
        settings, parts, element = self.settings, self.parts, self.stream_size
        checkpointing = settings.gradient_checkpointing
        tokens, vision_tokens = size * self.tokens, size * self.image.vision_tokens
        layers = [layer for i, layer in enumerate(parts.accessor.layers) for _ in range(parts.accessor.passes(i))]
        blocks = parts.vision_blocks
        kept, stage = activation_bytes(layers, tokens, parts.d_model, element, checkpointing)
        if self.differentiates_tower(size):
            width = linears(blocks[0])[0].reads
            vision = activation_bytes(blocks, vision_tokens, width, element, checkpointing)
            kept, stage = kept + vision[0], max(stage, vision[1])
        stage = max(stage, self._lm_head(size))
        # Trainer fetches all micro-batches of a step together, and accelerate puts each on the device at once.
        inputs = settings.gradient_accumulation_steps * size * input_bytes(parts.model.config, self.image)
        passing = vision_tokens * max((forward_bytes(block, element) for block in blocks), default=0)
        if settings.has_first_pass:
            passing = max(passing, tokens * max(forward_bytes(layer, element) for layer in layers))
        # One stage after the other: vision tower and first pass before the activations are there, then the LM head,
        # then the backward of one layer after the other.
        return {"inputs": inputs, "activations": kept, "largest_stage": max(stage, passing - kept)}

    def differentiates_tower(self, size: int) -> bool:
        """Whether the vision tower takes part in the backward of micro-batches of `size` samples: because of its
        weights, or of its inputs in those that have no features of the first pass."""
        is_hooked = self.hooked and self.features(size).vision > 0
        return bool(self.parts.vision_blocks) and (self.trained["vision"] or is_hooked)

    def _lm_head(self, size: int) -> int:
        head = self.parts.model.get_output_embeddings()
        if head is None:
            return 0
        vocabulary, width = head.weight.shape
        scored = size * self.settings.text_tokens
        return lm_head_bytes(scored, width, vocabulary, 2, trained=head.weight.requires_grad)

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""
        return self.image.tokens + self.settings.text_tokens

    def features(self, size: int) -> FeatureMemory:
        """Image features of a step with micro-batches of `size` samples: what a frozen vision tower, and a projector
        that is frozen like it, compute once for both passes."""
        settings, blocks = self.settings, self.parts.vision_blocks
        if not settings.has_first_pass or not blocks or self.trained["vision"]:
            return FeatureMemory()
        config: Any = self.parts.model.config
        numbers = 0
        # What the projector is given: for one that is trained, or where the model takes a layer's output and cuts it.
        if self.trained["projector"] or (self.outside and hasattr(config, "vision_feature_layer")):
            numbers += self.image.vision_tokens * linears(blocks[0])[0].reads
        if not self.trained["projector"]:
            vision = config.vision_config
            levels = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
            numbers += self.image.tokens * self.parts.d_model * levels
        if not numbers:
            return FeatureMemory()
        each, batches = size * numbers * self.stream_size, settings.gradient_accumulation_steps
        limit = settings.image_feature_gib * GIB
        on_device = batches if each * batches <= limit else int(limit // each)
        on_host = min(batches - on_device, int(HOST_SHARE * limit // each))
        again = 1 - (on_device + on_host) / batches
        return FeatureMemory(on_device * each, on_host * each, again, 1.0 if self.trained["projector"] else again)

    def alignment(self, size: int) -> dict[str, int]:
        """Device memory that head alignment adds, with micro-batches of `size` samples."""
        settings = self.settings
        if not settings.alignment_weight:
            return {}
        more = {"image_features": self.features(size).device}
        if settings.alignment_objective == "feature":
            more["projectors"] = projector_bytes(settings.num_heads, self.parts.d_model, settings.teacher_dim)
        return more | alignment_bytes(
            heads=settings.num_heads,
            pool=settings.pool_size(size) - settings.queue_size,
            width=self.parts.d_model,
            teacher_width=settings.teacher_dim,
            queue=settings.queue_size,
            k=settings.num_neighbors,
            tokens=size * self.tokens,
            read=self.read,
        )

    def total(self, size: int) -> int:
        """All of it."""
        return sum([*self.fixed.values(), *self.batch(size).values(), *self.alignment(size).values()])
