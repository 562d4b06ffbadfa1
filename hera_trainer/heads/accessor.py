"""The attention heads of one language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from .head import AlignedUnit, AttentionHead, DecoderLayer
from .projection import input_width, output_width


class HeadAccessor:
    """The attention heads of one language model.

    A layer's *output projection* is the linear module that reads the concatenated outputs of the layer's query heads.
    The slice of its input that belongs to a head, times the slice of its weight that reads it, is the head's own
    contribution to the residual stream. Layers without softmax attention have no heads.

    Args:
        decoder (`nn.Module`):
            The text decoder, callable as `decoder(input_ids=..., attention_mask=..., use_cache=False)`.
        layers (sequence of `nn.Module`):
            Its decoder layers in order.
        attentions (`Mapping[int, nn.Module]`):
            Layer index -> the layer's attention module, for the layers that have heads.
        projections (`Mapping[int, nn.Module]`):
            Layer index -> the layer's output projection (possibly wrapped by PEFT or quantized).
        num_heads (`Mapping[int, int]`):
            Layer index -> number of query heads.
        needs (`str`, *optional*, defaults to `""`):
            What the decoder needs besides text, if it can't run on text alone, for messages (`"an encoder's output"`).
            The heads of such a model can be read from a forward pass of the whole model, but neither be ranked on text
            nor trained by [`HeRATrainer`].
        passes (`Mapping[int, int]`, *optional*):
            Layer index -> how often a forward pass goes through the layer, for the layers of a looped model that it
            goes through more than once. Heads are read in the first pass.

    Raises:
        `ValueError`: If there is no projection, or a projection's input width is not divisible by its number of heads.
    """

    def __init__(
        self,
        decoder: nn.Module,
        layers: nn.ModuleList | list[nn.Module],
        attentions: Mapping[int, nn.Module],
        projections: Mapping[int, nn.Module],
        num_heads: Mapping[int, int],
        needs: str = "",
        passes: Mapping[int, int] | None = None,
    ) -> None:
        self.decoder = decoder
        self.layers = list(layers)
        self.needs = needs
        self._attentions = dict(attentions)
        self._projections = dict(projections)
        self._num_heads = dict(num_heads)
        self._passes = dict(passes or {})
        if not self._projections:
            raise ValueError(
                f"None of the {len(self.layers)} layers of this {type(decoder).__name__} has softmax attention where "
                "its accessor looks for it: there are no attention heads to align. Register an accessor that finds "
                "them (`hera_trainer.register_head_accessor`), choose another model, or set `alignment_weight=0`."
            )
        for layer, projection in self._projections.items():
            width = input_width(projection)
            if width % self._num_heads[layer]:
                raise ValueError(
                    f"The output projection of layer {layer} reads {width} features, which {self._num_heads[layer]} "
                    "heads cannot share equally. The accessor of this model type is wrong."
                )

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, with or without heads."""
        return len(self.layers)

    @property
    def layers_with_heads(self) -> list[int]:
        """Indices of the layers that have attention heads."""
        return sorted(self._projections)

    def heads(self) -> list[AttentionHead]:
        """Every attention head, by layer and head."""
        return [
            AttentionHead(layer, head) for layer in self.layers_with_heads for head in range(self._num_heads[layer])
        ]

    def units(self, granularity: str) -> list[AlignedUnit]:
        """Everything that can be aligned: every attention head, or with the granularity `"layer"` every decoder layer,
        with or without heads."""
        return [DecoderLayer(layer) for layer in range(self.num_layers)] if granularity == "layer" else [*self.heads()]

    def module(self, unit: AlignedUnit) -> nn.Module:
        """The module whose forward shows a unit: the output projection of a head's layer, or a layer itself."""
        return self.layers[unit.layer] if isinstance(unit, DecoderLayer) else self.projection(unit.layer)

    @property
    def width(self) -> int:
        """Width `d_model` of the residual stream, into which the output projections write."""
        return output_width(self._projections[self.layers_with_heads[0]])

    @property
    def device(self) -> torch.device:
        """Where the text decoder takes its tokens."""
        return self.decoder.get_input_embeddings().weight.device

    def num_heads(self, layer: int) -> int:
        """Number of query heads of `layer`."""
        return self._num_heads[layer]

    def head_dim(self, layer: int) -> int:
        """Width of one head's slice of the projection's input. Read off the projection: `config.head_dim` is missing
        or wrong for several models."""
        return input_width(self._projections[layer]) // self._num_heads[layer]

    def passes(self, layer: int) -> int:
        """How often a forward pass goes through `layer`."""
        return self._passes.get(layer, 1)

    def attention(self, layer: int) -> nn.Module:
        """The attention module of `layer`."""
        return self._attentions[layer]

    def projection(self, layer: int) -> nn.Module:
        """The output projection of `layer`."""
        return self._projections[layer]


HeadAccessorFactory = Callable[[nn.Module], HeadAccessor]
