"""Where a model's language model keeps its attention heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn

from .head import AttentionHead

HeadAccessorFactory = Callable[[nn.Module], "HeadAccessor"]

_FACTORIES: dict[str, HeadAccessorFactory] = {}


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

    Raises:
        `ValueError`: If a projection's input width is not divisible by its number of heads.
    """

    def __init__(
        self,
        decoder: nn.Module,
        layers: nn.ModuleList | list[nn.Module],
        attentions: Mapping[int, nn.Module],
        projections: Mapping[int, nn.Module],
        num_heads: Mapping[int, int],
    ) -> None:
        self.decoder = decoder
        self.layers = list(layers)
        self._attentions = dict(attentions)
        self._projections = dict(projections)
        self._num_heads = dict(num_heads)
        for layer, projection in self._projections.items():
            if projection.in_features % self._num_heads[layer]:
                raise ValueError(
                    f"The output projection of layer {layer} reads {projection.in_features} features, which "
                    f"{self._num_heads[layer]} heads cannot share equally. The accessor of this model type is wrong."
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

    def num_heads(self, layer: int) -> int:
        """Number of query heads of `layer`."""
        return self._num_heads[layer]

    def head_dim(self, layer: int) -> int:
        """Width of one head's slice of the projection's input. Read off the projection: `config.head_dim` is missing
        or wrong for several models."""
        return self._projections[layer].in_features // self._num_heads[layer]

    def attention(self, layer: int) -> nn.Module:
        """The attention module of `layer`."""
        return self._attentions[layer]

    def projection(self, layer: int) -> nn.Module:
        """The output projection of `layer`."""
        return self._projections[layer]


def unwrap_model(model: nn.Module) -> nn.Module:
    """The transformers model inside distributed, compiled and PEFT wrappers."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def register_head_accessor(model_type: str, factory: HeadAccessorFactory) -> None:
    """Tells hera_trainer where a model type keeps its attention heads.

    Args:
        model_type (`str`): `config.model_type` of the model.
        factory (`Callable`): Takes the transformers model (unwrapped from PEFT and parallel wrappers), returns its
            [`HeadAccessor`]. Replaces an earlier registration.

    Example:

    ```python
    >>> def my_accessor(model):
    ...     layers = model.transformer.blocks
    ...     attentions = {i: layer.attn for i, layer in enumerate(layers)}
    ...     projections = {i: layer.attn.out_proj for i, layer in enumerate(layers)}
    ...     return HeadAccessor(model.transformer, layers, attentions, projections, {i: 16 for i in projections})
    >>> register_head_accessor("my_model", my_accessor)
    ```
    """
    _FACTORIES[model_type] = factory


def supported_model_types() -> list[str]:
    """Model types that have an accessor."""
    return sorted(_FACTORIES)


def get_head_accessor(model: nn.Module) -> HeadAccessor:
    """The attention heads of `model`'s language model: vision towers, which name their projections alike, are never
    touched.

    Args:
        model (`nn.Module`): A transformers model, plain, quantized, wrapped by PEFT or by a parallel wrapper.

    Returns:
        [`HeadAccessor`].

    Raises:
        `ValueError`: If the model type is unknown, or the model does not look like its type says.
    """
    base = unwrap_model(model)
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type not in _FACTORIES:
        raise ValueError(
            f"No attention-head accessor is known for model type {model_type!r}. Known types: "
            f"{', '.join(supported_model_types())}. Tell hera_trainer where this model keeps its heads with "
            "`hera_trainer.register_head_accessor(model_type, factory)`."
        )
    return _FACTORIES[model_type](base)


def _query_heads(attention: nn.Module) -> int:
    """Number of query heads of an attention module: its own attribute where the class has one, else its config's."""
    own = getattr(attention, "num_heads", None)
    return own if isinstance(own, int) else attention.config.num_attention_heads


def decoder_accessor(model: nn.Module) -> HeadAccessor:
    """Accessor of the common layout: `model.get_decoder().layers[i].self_attn.o_proj`.

    Layers without a `self_attn` module (linear attention in hybrid stacks) have no heads.
    """
    decoder = model.get_decoder()
    attentions = {i: layer.self_attn for i, layer in enumerate(decoder.layers) if hasattr(layer, "self_attn")}
    for i, attention in attentions.items():
        if not isinstance(getattr(attention, "o_proj", None), nn.Module):
            raise ValueError(
                f"Layer {i} of this {model.config.model_type!r} model has no output projection `self_attn.o_proj`, as "
                "it has in an unpatched model. Load the model with transformers itself, or register an accessor with "
                "`hera_trainer.register_head_accessor`."
            )
    accessor = HeadAccessor(
        decoder=decoder,
        layers=decoder.layers,
        attentions=attentions,
        projections={i: attention.o_proj for i, attention in attentions.items()},
        num_heads={i: _query_heads(attention) for i, attention in attentions.items()},
    )
    for i, attention in attentions.items():
        # Any number of heads that divides the width adds up to the projection's output: only this tells it is right.
        if attention.head_dim != accessor.head_dim(i):
            raise ValueError(
                f"Layer {i} of this {model.config.model_type!r} model computes heads of size {attention.head_dim}, but "
                f"its output projection reads {accessor.num_heads(i)} heads of size {accessor.head_dim(i)}. Register "
                "an accessor that knows this model with `hera_trainer.register_head_accessor`."
            )
    return accessor


for _model_type in (
    # Qwen-VL
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    # LLaVA
    "llava",
    "llava_next",
    "llava_onevision",
    # Idefics
    "idefics2",
    "idefics3",
    "smolvlm",
    # The language models inside them, to rank the heads of a model before it has seen an image
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
):
    register_head_accessor(_model_type, decoder_accessor)
