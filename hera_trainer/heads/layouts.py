"""Where the models of transformers keep the attention heads of their language model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .accessor import HeadAccessor
from .projection import input_width


@dataclass(frozen=True)
class Layout:
    """Names of submodules in a family of language models.

    Args:
        layers (`str`): From the decoder to its list of layers.
        attention (`str`): From a layer to its self-attention.
        projection (`str`): From a layer to the output projection of that attention.
        core (`str`): From a layer to the module that knows number and size of its heads.
        linear (`str`):
            From the projection to the linear layer in it, where the projection is a module that gates what it is given
            first. The gate is then part of the heads' outputs: what is linear in them begins behind it.
        needs (`str`): What the decoder needs besides text, if it can't run on text alone.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    projection: str = "self_attn.o_proj"
    core: str = "self_attn"
    linear: str = ""
    needs: str = ""


_OUT_PROJ = Layout(projection="self_attn.out_proj")
_DENSE = Layout(projection="self_attn.dense")
_BERT = Layout("encoder.layer", "attention", "attention.output.dense", "attention.self")
_KOSMOS = Layout("model.layers", projection="self_attn.out_proj")
_T5 = Layout("block", "layer.0.SelfAttention", "layer.0.SelfAttention.o", "layer.0.SelfAttention")
_GATED = Layout(linear="linear")  # since transformers 5.24; before, the gate stood outside of the projection
_ENCODER = "an encoder's output"

# By the model type of the decoder's own configuration. All others keep to the names above.
_LAYOUTS = {
    "bart": _OUT_PROJ,
    "bert": _BERT,
    "blip_text_model": Layout("bert.encoder.layer", "attention", "attention.output.dense", "attention.self"),
    "diffusion_gemma": Layout(needs="the cache that its encoder fills"),
    "git": _BERT,
    "gpt2": Layout("h", "attn", "attn.c_proj", "attn"),
    "gpt_neox": Layout(attention="attention", projection="attention.dense", core="attention"),
    "idefics": Layout(needs="an image's features"),
    "inkling2_loop_text": _GATED,
    "inkling2_text": _GATED,
    "kosmos_2_5_text_model": _KOSMOS,
    "kosmos_2_text_model": _KOSMOS,
    "lfm2": _OUT_PROJ,
    "nemotron_h": Layout(attention="mixer", projection="mixer.o_proj", core="mixer"),
    "opt": _OUT_PROJ,
    "persimmon": _DENSE,
    "phi": _DENSE,
    "pix2struct_text_model": Layout(
        "layer", "self_attention", "self_attention.attention.output", "self_attention.attention"
    ),
    "pp_formulanet_text": _OUT_PROJ,
    "t5": _T5,
    "t5gemma2_decoder": Layout(needs=_ENCODER),
    "udop": _T5,
}

# Models whose `get_decoder` doesn't lead to their text decoder, and the path to it.
_DECODERS = {
    "llama4": "language_model.model",
    "llama4_text": "model",
    "mllama_text_model": "model",
    "pi0": "model.vlm.language_model",
}

# Kinds of layers, as configurations name them. Those without heads mix positions without softmax attention, or not at
# all, though their modules may bear the names of those with heads: what is in neither set must be looked at first.
_WITHOUT_HEADS = {"conv", "linear_attention", "mlp", "moe"}
_WITH_HEADS = {
    *("full_attention", "sliding_attention", "reference_sliding_attention", "chunked_attention", "indexed_attention"),
    *("compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse", "hybrid", "hybrid_sliding"),
}

# Names under which attention modules keep the size and the number of their heads. Where keys and values differ in size,
# the projection reads values.
_SIZE_NAMES = ("v_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_COUNT_NAMES = ("num_heads", "num_attention_heads", "n_heads")

_HELP = (
    "Load the model with transformers itself, or register an accessor that knows it with "
    "`hera_trainer.register_head_accessor`."
)


def decoder_accessor(model: nn.Module) -> HeadAccessor:
    """Accessor of the models of transformers: the self-attention of the text decoder, by the names of its family.

    Nearly all of them keep a layer's output projection at `model.get_decoder().layers[i].self_attn.o_proj`. Layers with
    linear attention, convolution or cross-attention alone have no heads.

    Args:
        model (`nn.Module`): The transformers model, not wrapped.

    Returns:
        [`HeadAccessor`].

    Raises:
        `ValueError`: If the model does not look like its type says.
    """
    decoder, layout = _find_decoder(model)
    layers = decoder.get_submodule(layout.layers)
    assert isinstance(layers, nn.ModuleList)
    attentions, projections, num_heads = {}, {}, {}
    for i in _layers_with_heads(decoder, layers, layout):
        projection = _submodule(layers[i], layout.projection)
        if projection is None:
            raise ValueError(
                f"Layer {i} of this {_type_of(model)!r} model has no output projection `{layout.projection}`, as it "
                f"has in an unpatched model. {_HELP}"
            )
        projection = _submodule(projection, layout.linear) or projection
        attentions[i], projections[i] = layers[i].get_submodule(layout.attention), projection
        count, size = _heads_of(layers[i].get_submodule(layout.core))
        # Any number of heads that divides the width adds up to the projection's output: only this tells it is right.
        if count * size != input_width(projection):
            raise ValueError(
                f"Layer {i} of this {_type_of(model)!r} model computes {count} heads of size {size}, but its output "
                f"projection reads {input_width(projection)} features. {_HELP}"
            )
        num_heads[i] = count
    return HeadAccessor(decoder, layers, attentions, projections, num_heads, layout.needs, _passes(decoder))


def _type_of(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _find_decoder(model: nn.Module) -> tuple[nn.Module, Layout]:
    """The text decoder, which may be hidden behind a language-model head or an encoder-decoder, and its layout."""
    decoder: Any = _submodule(model, _DECODERS.get(_type_of(model), "")) or model
    while True:
        layout = _LAYOUTS.get(_type_of(decoder), Layout())
        if isinstance(_submodule(decoder, layout.layers), nn.ModuleList):
            return decoder, layout
        inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        if inner is decoder:
            raise ValueError(
                f"The text decoder of this {_type_of(model)!r} model, a {type(decoder).__name__}, has no list of "
                f"layers `{layout.layers}`. {_HELP}"
            )
        decoder = inner


def _layers_with_heads(decoder: Any, layers: nn.ModuleList, layout: Layout) -> Iterator[int]:
    """Indices of the layers with softmax self-attention."""
    kinds = getattr(decoder.config, "layer_types", None) or [None] * len(layers)
    for i, layer in enumerate(layers):
        if kinds[i] in _WITHOUT_HEADS:
            continue
        found = _submodule(layer, layout.attention) is not None
        if kinds[i] is not None and not (found and kinds[i] in _WITH_HEADS):
            raise ValueError(
                f"Layer {i} of this {_type_of(decoder)!r} model is of the kind {kinds[i]!r} and has "
                f"{'an' if found else 'no'} attention `{layout.attention}`: whether and where it has softmax attention "
                "is not known. Register an accessor that knows it with `hera_trainer.register_head_accessor`."
            )
        if found:
            yield i


def _passes(decoder: Any) -> dict[int, int]:
    """Layer -> how often a forward pass goes through it, for the layers that it goes through more than once."""
    if _type_of(decoder) != "inkling2_loop_text":
        return {}
    config = decoder.config
    return dict.fromkeys(range(config.loop_layer_index_start, config.loop_layer_index_end), config.loop_num_passes)


def _heads_of(core: Any) -> tuple[int, int]:
    """Number and size of the query heads of an attention module, as its own attributes or its configuration say."""

    def first(names: tuple[str, ...]) -> int | None:
        values = (getattr(core, name, None) for name in names)
        return next((value for value in values if isinstance(value, int)), None)

    size, count = first(_SIZE_NAMES), first(_COUNT_NAMES)
    if count is None:
        count = getattr(getattr(core, "config", None), "num_attention_heads", None)
    if size is None or not isinstance(count, int):
        raise ValueError(f"A {type(core).__name__} does not say how many heads it has, or how large they are. {_HELP}")
    return count, size
