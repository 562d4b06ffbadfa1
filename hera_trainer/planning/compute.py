"""Operations of a training step, to say which share of it the first pass of head alignment adds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .model import ModelParts


@dataclass(frozen=True)
class ImageShape:
    """What an image becomes.

    Args:
        tokens (`int`): Tokens in the language model.
        frames (`int`): Images that the vision tower gets of it, where it is cut into tiles.
        patches (`int`): Patches of one of them.
    """

    tokens: int
    frames: int
    patches: int

    @property
    def vision_tokens(self) -> int:
        """Tokens of the vision tower."""
        return self.frames * self.patches


def image_shape(config: Any, size: tuple[int, int], tokens: int | None = None) -> ImageShape:
    """What an image becomes by the rules of the model's processor with its default settings.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The model's configuration.
        size (`tuple[int, int]`): Width and height in pixels.
        tokens (`int`, *optional*): Tokens in the language model, instead of what follows from `size`.

    Raises:
        `ValueError`: If the rule of the model type is not known and `tokens` is not given.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return ImageShape(tokens or 0, 1 if tokens else 0, tokens or 0)
    patch, side = getattr(vision, "patch_size", None), getattr(vision, "image_size", None)
    merge, shuffle = getattr(vision, "spatial_merge_size", None), getattr(config, "scale_factor", None)
    if isinstance(merge, int) and isinstance(patch, int):  # Qwen: patches as the image has them, then merged
        if tokens is None:
            width, height = (max(1, round(edge / (patch * merge))) for edge in size)
            tokens = width * height
        return ImageShape(tokens, 1, tokens * merge**2)
    if isinstance(shuffle, int) and isinstance(patch, int) and isinstance(side, int):
        # Idefics3, SmolVLM: enlarged to four tiles along the longer edge, and the whole image as one more tile
        patches = (side // patch) ** 2
        if tokens is None:
            columns, rows = (math.ceil(4 * side * edge / max(size) / side) for edge in size)
            frames = rows * columns + 1
            marks = 2 * rows * columns + rows + 4  # the tokens that say which tile it is
            return ImageShape(frames * patches // shuffle**2 + marks, frames, patches)
        return ImageShape(tokens, max(1, round(tokens * shuffle**2 / patches)), patches)
    if config.model_type in ("llava", "vipllava") and isinstance(patch, int) and isinstance(side, int):
        patches = (side // patch) ** 2
        frames = 1 if tokens is None else max(1, round(tokens / patches))
        return ImageShape(tokens or patches, frames, patches + 1)
    if tokens is None:
        raise ValueError(
            f"How many tokens an image has is not known here for models of type {config.model_type!r}. Say it: "
            "`--image-tokens N` (the processor's placeholders of one image)."
        )
    return ImageShape(tokens, 1, tokens)


def _matrices(module: nn.Module, config: Any) -> float:
    """Numbers that a token is multiplied with; of experts, those of the chosen ones."""
    experts = [getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")]
    total = next((count for count in experts if isinstance(count, int) and count), None)
    share = 1.0 if total is None else getattr(config, "num_experts_per_tok", total) / total
    return sum(
        parameter.numel() * (share if "experts." in name and "shared" not in name else 1.0)
        for name, parameter in module.named_parameters()
        if parameter.ndim > 1
    )


@dataclass(frozen=True)
class Operations:
    """Multiply-adds, times two, of one forward pass of one sample.

    Args:
        vision (`float`): Vision tower.
        projector (`float`): What lies between it and the language model.
        layers (`list[float]`): Each decoder layer, once.
        passes (`list[int]`): How often a forward pass goes through it.
        attentions (`list[float]`): The attention of each of them alone, zero where it has none that is known.
        lm_head (`float`): The LM head on the scored tokens.
    """

    vision: float
    projector: float
    layers: list[float]
    passes: list[int]
    attentions: list[float]
    lm_head: float

    def first_pass(self, deepest: int, whole: bool = False, vision: float = 1.0, projector: float = 1.0) -> float:
        """A forward pass that ends with the attention of layer `deepest` or with all of it, in a loop with its first
        time.

        Args:
            deepest (`int`): The layer.
            whole (`bool`, *optional*, defaults to `False`): Whether all of it runs.
            vision, projector (`float`, *optional*, defaults to `1.0`):
                Shares of what vision tower and projector compute that the training pass computes again.
        """
        before = sum(self.layers[:deepest]) if self.passes[deepest] > 1 else self._language(deepest)
        images = vision * self.vision + projector * self.projector
        return images + before + (self.layers if whole else self.attentions)[deepest]

    def _language(self, layers: int | None = None) -> float:
        """The first `layers` layers, all by default, in all their passes."""
        return sum(work * passes for work, passes in zip(self.layers[:layers], self.passes[:layers], strict=True))

    def step(self, trained: dict[str, bool], adapters: bool, checkpointing: bool, tower: float = 0.0) -> float:
        """Forward and backward, with recomputation. A frozen weight costs one product in the backward, a trained one
        two; what lies before everything trained costs none.

        Args:
            trained (`dict[str, bool]`): Whether vision tower, projector and language model have trained weights.
            adapters (`bool`): Whether these are adapters beside frozen weights. Their own products are left out.
            checkpointing (`bool`): Whether blocks run once more in the backward.
            tower (`float`, *optional*, defaults to `0.0`):
                Share of the micro-batches in whose backward a vision tower without trained weights takes part.
        """
        backward = (1 if adapters else 2) + 1
        recomputed = 1 if checkpointing else 0
        tower = 1.0 if trained["vision"] else tower
        vision = self.vision * (1 + tower * (backward + recomputed - 1))
        projector = self.projector * (backward if trained["projector"] else 1 + tower * (backward - 1))
        # The fused LM head computes its logits once more in the backward.
        return vision + projector + self._language() * (backward + recomputed) + self.lm_head * (backward + 1)


def operations(parts: ModelParts, image: ImageShape, text_tokens: int) -> Operations:
    """Counts from the shapes of the weights, and attention from the number of tokens."""
    accessor, tokens = parts.accessor, image.tokens + text_tokens
    text_config = parts.model.config.get_text_config()
    layers, attentions = [], []
    for i, layer in enumerate(accessor.layers):
        scores, attention = 0.0, 0.0
        if i in accessor.layers_with_heads:  # queries times keys and scores times values, half of them masked
            scores = 2.0 * tokens**2 * accessor.num_heads(i) * accessor.head_dim(i)
            attention = 2 * tokens * _matrices(accessor.attention(i), text_config) + scores
        layers.append(2 * tokens * _matrices(layer, text_config) + scores)
        attentions.append(attention)
    head = parts.model.get_output_embeddings()
    return Operations(
        vision=_vision_operations(parts, image),
        projector=2 * image.tokens * sum(module.weight.numel() for module in _between(parts)),
        layers=layers,
        passes=[accessor.passes(i) for i in range(accessor.num_layers)],
        attentions=attentions,
        lm_head=0.0 if head is None else 2.0 * text_tokens * head.weight.numel(),
    )


def _weighted(modules: Iterable[nn.Module]) -> list[Any]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [module for module in modules if isinstance(module, kinds)]


def _between(parts: ModelParts) -> list[Any]:
    """Linear layers outside of decoder, embeddings and vision tower, and those of the tower behind its blocks (the
    merger of the Qwen models), which see image tokens instead of patches."""
    known = {id(m) for whole in [*parts.embeddings(), parts.accessor.decoder] for m in whole.modules()}
    if parts.vision_tower is not None:
        known |= {id(module) for block in parts.vision_blocks for module in block.modules()}
        known |= {id(m) for m in _weighted(parts.vision_tower.modules()) if not isinstance(m, nn.Linear)}
    return [module for module in _weighted(parts.model.modules()) if id(module) not in known]


def _vision_operations(parts: ModelParts, image: ImageShape) -> float:
    if parts.vision_tower is None:
        return 0.0
    patches = image.patches
    config: Any = getattr(parts.model.config, "vision_config", None)
    embed = [m for m in _weighted(parts.vision_tower.modules()) if not isinstance(m, nn.Linear)]
    products = sum(module.weight.numel() for module in embed)
    products += sum(_matrices(block, config) for block in parts.vision_blocks)
    width = max(
        (m.out_features for block in parts.vision_blocks[:1] for m in block.modules() if _is_output(m)), default=0
    )
    # Qwen2.5-VL attends within windows in most of its blocks.
    full = getattr(config, "fullatt_block_indexes", None)
    window = getattr(config, "window_size", None)
    blocks = len(parts.vision_blocks)
    within = patches if not full or not window else min(patches, (window // config.patch_size) ** 2)
    seen = blocks * patches if not full else len(full) * patches + (blocks - len(full)) * within
    return image.frames * patches * (2.0 * products + 4.0 * seen * width)


def _is_output(module: nn.Module) -> bool:
    """Whether a module of a vision block keeps the width of the stream, as the output projection of attention does."""
    return isinstance(module, nn.Linear) and module.in_features == module.out_features
