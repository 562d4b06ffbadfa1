"""Where models keep their attention heads: every supported family, plain and wrapped, against modules found by hand."""

from __future__ import annotations

import re
import textwrap
from types import SimpleNamespace

import pytest
import torch
from model_zoo import known_types
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import FAMILIES, build_vlm
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hera_trainer.heads import registry
from hera_trainer.heads.accessor import HeadAccessor
from hera_trainer.heads.head import AttentionHead
from hera_trainer.heads.registry import (
    get_head_accessor,
    register_head_accessor,
    supported_model_types,
    unknown_model_types,
    unwrap_model,
)

WRAPPINGS = ("plain", "all-linear", "without o_proj")


def wrap(model: nn.Module, wrapping: str) -> nn.Module:
    if wrapping == "plain":
        return model
    target = "all-linear" if wrapping == "all-linear" else ["q_proj", "v_proj", "up_proj"]
    return get_peft_model(model, LoraConfig(r=2, target_modules=target))


def text_decoder(model: nn.Module, family: str) -> nn.Module:
    """The text decoder, by the path at which the family keeps it."""
    base = model.base_model.model if isinstance(model, PeftModel) else model
    return base.model.text_model if family.startswith(("idefics", "smolvlm")) else base.model.language_model


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_the_language_model(family: str, wrapping: str) -> None:
    model, _ = build_vlm(family)
    model = wrap(model, wrapping)
    decoder = text_decoder(model, family)
    layers = [3] if family == "qwen3_5" else [0, 1, 2]  # of Qwen3.5's four layers, the last is softmax attention
    accessor = get_head_accessor(model)

    assert accessor.decoder is decoder
    assert accessor.num_layers == len(decoder.layers) == (4 if family == "qwen3_5" else 3)
    assert all(ours is theirs for ours, theirs in zip(accessor.layers, decoder.layers, strict=True))
    assert accessor.layers_with_heads == layers
    assert accessor.heads() == [AttentionHead(layer, head) for layer in layers for head in range(4)]
    for layer in layers:
        assert accessor.attention(layer) is decoder.layers[layer].self_attn
        assert accessor.projection(layer) is decoder.layers[layer].self_attn.o_proj
        assert accessor.num_heads(layer) == 4
        # Qwen3's heads are wider than hidden_size / num_heads.
        assert accessor.head_dim(layer) == (16 if family in ("qwen3_vl", "qwen3_5") else 8)
        assert accessor.head_dim(layer) * accessor.num_heads(layer) == accessor.projection(layer).in_features
        assert hasattr(accessor.projection(layer), "lora_A") == (wrapping == "all-linear")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vision_tower_is_never_touched(family: str) -> None:
    model, _ = build_vlm(family)
    accessor = get_head_accessor(model)
    ours = [accessor.projection(layer) for layer in accessor.layers_with_heads]
    inside = {id(module) for module in text_decoder(model, family).modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    assert any(isinstance(module, nn.Linear) for module in outside)
    assert not {id(module) for module in outside} & {id(module) for module in [*ours, *accessor.layers]}


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_the_projections_are_what_a_forward_pass_runs_through(family: str) -> None:
    model, _ = build_vlm(family)
    accessor = get_head_accessor(model)
    widths = []
    for layer in accessor.layers_with_heads:
        accessor.projection(layer).register_forward_hook(lambda m, args, out: widths.append(args[0].shape[-1]))
    with torch.no_grad():
        accessor.decoder(input_ids=torch.arange(5)[None], attention_mask=torch.ones(1, 5), use_cache=False)
    assert widths == [accessor.num_heads(i) * accessor.head_dim(i) for i in accessor.layers_with_heads]


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_query_heads_count(num_key_value_heads: int) -> None:
    model, _ = build_vlm("qwen2_5_vl", num_key_value_heads=num_key_value_heads)
    assert get_head_accessor(model).num_heads(0) == 4


def test_a_projection_that_is_trained_beside_the_adapter() -> None:
    model, _ = build_vlm("llava")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"]))
    accessor = get_head_accessor(model)
    assert accessor.projection(1) is text_decoder(model, "llava").layers[1].self_attn.o_proj
    assert (accessor.num_heads(1), accessor.head_dim(1)) == (4, 8)


@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [
        (LlamaForCausalLM, LlamaConfig),
        (MistralForCausalLM, MistralConfig),
        (Qwen2ForCausalLM, Qwen2Config),
        (Qwen3ForCausalLM, Qwen3Config),
    ],
)
def test_bare_language_models(model_class: type, config_class: type) -> None:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    config = config_class(**size, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    model = model_class(config)
    for lm, decoder in ((model, model.model), (wrap(model, "all-linear"), model.model)):
        accessor = get_head_accessor(lm)
        assert accessor.decoder is decoder
        assert [accessor.projection(i) for i in range(2)] == [layer.self_attn.o_proj for layer in decoder.layers]
        assert len(accessor.heads()) == 8
        assert accessor.head_dim(0) == 8


def test_unwrapping() -> None:
    model, _ = build_vlm("llava", num_hidden_layers=1)
    assert unwrap_model(model) is model
    assert unwrap_model(nn.DataParallel(model)) is model
    wrapped = wrap(model, "all-linear")
    assert unwrap_model(wrapped) is model
    assert unwrap_model(nn.DataParallel(wrapped)) is model
    assert (
        get_head_accessor(nn.DataParallel(wrapped)).projection(0)
        is model.model.language_model.layers[0].self_attn.o_proj
    )


# --- Models that we don't know ---------------------------------------------------------------------------------------


@pytest.fixture
def scratch_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))


class ToyBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)


class ToyModel(nn.Module):
    def __init__(
        self, model_type: str = "toy", widths: tuple[int, ...] = (12, 12), heads: tuple[int, ...] = (3, 4)
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        self.blocks = nn.ModuleList(ToyBlock(width, count) for width, count in zip(widths, heads, strict=True))


def toy_accessor(model: nn.Module) -> HeadAccessor:
    blocks = dict(enumerate(model.blocks))
    projections = {i: block.out_proj for i, block in blocks.items()}
    return HeadAccessor(model, model.blocks, blocks, projections, {i: block.heads for i, block in blocks.items()})


@pytest.mark.usefixtures("scratch_registry")
def test_types_that_are_newer_than_this_release() -> None:
    """They are told apart from those that it knows, and the tests over all types skip them by their names."""
    newer = unknown_model_types()
    del registry._FACTORIES["smolvlm"], registry._FACTORIES["llava"]
    assert unknown_model_types() == sorted([*newer, "smolvlm", "llava"])
    skipped = [parameter for parameter in known_types() if not isinstance(parameter, str)]
    assert {parameter.values[0] for parameter in skipped} == set(unknown_model_types())
    assert all(mark.name == "skip" for parameter in skipped for mark in parameter.marks)
    register_head_accessor("llava", toy_accessor)
    assert unknown_model_types() == sorted([*newer, "smolvlm"])


def test_unknown_model_types_are_named_with_the_cure() -> None:
    for model, name in ((ToyModel(), "'toy'"), (nn.Linear(2, 2), "None")):
        with pytest.raises(ValueError, match=rf"known for model type {name}.*register the common accessor"):
            get_head_accessor(model)


@pytest.mark.usefixtures("scratch_registry")
def test_both_examples_in_the_message_work() -> None:
    model, _ = build_vlm("llava")
    expected = get_head_accessor(model).heads()
    model.config.model_type = "my_vlm"
    with pytest.raises(ValueError) as caught:
        get_head_accessor(model)
    common, own = re.findall(r"(?:^    .*\n)+", str(caught.value), flags=re.MULTILINE)

    exec(textwrap.dedent(common))
    assert get_head_accessor(model).heads() == expected

    # A model with other names, as the example has them.
    decoder = model.model.language_model
    model.my_decoder = decoder
    decoder.blocks = decoder.layers
    for layer in decoder.layers:
        layer.attn = layer.self_attn
        layer.attn.out_proj, layer.attn.num_heads = layer.attn.o_proj, 4
    register_head_accessor("my_vlm", lambda model: pytest.fail("replaced by the example's"))
    exec(textwrap.dedent(own), scope := {})
    accessor = get_head_accessor(model)
    assert accessor.heads() == expected
    assert accessor.decoder is decoder
    assert accessor.projection(1) is decoder.layers[1].self_attn.o_proj
    assert scope["accessor"](model).num_layers == 3


def test_every_family_is_supported() -> None:
    assert set(FAMILIES) <= set(supported_model_types())
    assert supported_model_types() == sorted(supported_model_types())


@pytest.mark.usefixtures("scratch_registry")
def test_a_model_of_your_own() -> None:
    register_head_accessor("toy", toy_accessor)
    model = ToyModel()
    accessor = get_head_accessor(model)
    assert "toy" in supported_model_types()
    # Layers may differ in their number of heads.
    assert accessor.heads() == [AttentionHead(0, i) for i in range(3)] + [AttentionHead(1, i) for i in range(4)]
    assert [accessor.head_dim(i) for i in range(2)] == [4, 3]
    assert accessor.projection(1) is model.blocks[1].out_proj
    # The factory gets the model without wrappers.
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["out_proj"]))
    assert get_head_accessor(wrapped).projection(1) is model.blocks[1].out_proj
    assert hasattr(get_head_accessor(wrapped).projection(1), "lora_A")
    # A second registration replaces the first.
    register_head_accessor("toy", lambda model: HeadAccessor(model, model.blocks, {}, {0: model.blocks[0].qkv}, {0: 2}))
    assert get_head_accessor(model).heads() == [AttentionHead(0, 0), AttentionHead(0, 1)]


@pytest.mark.usefixtures("scratch_registry")
def test_an_accessor_that_is_wrong() -> None:
    register_head_accessor("toy", lambda model: HeadAccessor(model, model.blocks, {}, {}, {}))
    with pytest.raises(ValueError, match=r"None of the 2 layers of this ToyModel has .* where its accessor looks"):
        get_head_accessor(ToyModel())
    register_head_accessor("toy", toy_accessor)
    with pytest.raises(ValueError, match="layer 1 reads 12 features, which 5 heads cannot share equally"):
        get_head_accessor(ToyModel(heads=(3, 5)))


def test_a_model_that_does_not_look_like_its_type() -> None:
    model, _ = build_vlm("llava")
    del model.model.language_model.layers[1].self_attn.o_proj
    with pytest.raises(ValueError, match=r"Layer 1 of this 'llava' model has no output projection `self_attn.o_proj`"):
        get_head_accessor(model)


def test_heads_that_the_projection_contradicts() -> None:
    model, _ = build_vlm("llava")
    model.model.language_model.layers[2].self_attn.head_dim = 4
    with pytest.raises(ValueError, match=r"Layer 2 of this 'llava'.*computes 4 heads of size 4.*reads 32 features"):
        get_head_accessor(model)


@pytest.mark.parametrize(("attribute", "value"), [("head_dim", None), ("config", None)])
def test_attention_that_does_not_say_what_heads_it_has(attribute: str, value: None) -> None:
    model, _ = build_vlm("llava")
    setattr(model.model.language_model.layers[0].self_attn, attribute, value)
    with pytest.raises(ValueError, match=r"A LlamaAttention does not say how many heads it has, or how large they are"):
        get_head_accessor(model)


def hybrid(kinds: list[str]) -> nn.Module:
    """A model whose second layer bears the same names, whatever it computes."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    model = Qwen2ForCausalLM(Qwen2Config(**size, num_attention_heads=4, num_key_value_heads=2))
    model.model.config.layer_types = kinds
    return model


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention", "hybrid"])
def test_kinds_of_layers_with_heads(kind: str) -> None:
    assert get_head_accessor(hybrid(["full_attention", kind])).layers_with_heads == [0, 1]


@pytest.mark.parametrize("kind", ["linear_attention", "conv"])
def test_kinds_of_layers_without(kind: str) -> None:
    assert get_head_accessor(hybrid(["full_attention", kind])).layers_with_heads == [0]


def test_kinds_of_layers_that_are_not_known() -> None:
    """A new kind of linear attention must not pass for softmax, nor a layer with softmax under other names for none."""
    with pytest.raises(ValueError, match=r"Layer 1 of this 'qwen2' model .* kind 'delta_rule' and has an attention"):
        get_head_accessor(hybrid(["full_attention", "delta_rule"]))
    model = hybrid(["full_attention", "sliding_attention"])
    del model.model.layers[1].self_attn
    with pytest.raises(ValueError, match=r"Layer 1 .* 'sliding_attention' and has no attention `self_attn`"):
        get_head_accessor(model)
