"""The zoo's tiny models: every type that transformers maps is built and run, and what is written down about its heads
is compared with what its attention computes, seen from inside the attention functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_zoo import (
    build,
    expected_heads,
    known_types,
    projection_path,
    projections,
    text_inputs,
)
from torch import Tensor, nn
from transformers import AttentionInterface

# Attention that doesn't go through transformers' attention functions
OWN_SOFTMAX = ("blip", "git")
# What the projection reads are the heads' outputs, but for a gate between 0 and 1 here ...
GATED = (
    *("dots3_note", "hy_v4_vl", "inkling2", "inkling2_loop", "lfm3_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"),
    *("muse_glimmer", "muse_spark", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "step3p7"),
)
# ... and a norm over all heads here.
NORMED = ("kosmos-2",)


class Probe:
    """Records what attention modules compute: number of query heads, and their outputs `[B, T, heads, size]`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.query_heads: dict[nn.Module, int] = {}
        self.outputs: dict[nn.Module, Tensor] = {}
        get_interface = AttentionInterface.get_interface
        monkeypatch.setattr(
            AttentionInterface, "get_interface", lambda *args, **kwargs: self._watched(get_interface(*args, **kwargs))
        )

    def _watched(self, attend: Callable[..., Any]) -> Callable[..., Any]:
        def watched(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = attend(module, query, *args, **kwargs)
            self.query_heads[module] = query.shape[1]
            self.outputs[module] = result[0]
            return result

        return watched

    def watch_own_softmax(self, attention: nn.Module) -> None:
        """Reads number and outputs of heads off what `attention` returns: context and probabilities."""

        def hook(module: nn.Module, _: Any, result: tuple[Tensor, Tensor]) -> None:
            context, probabilities = result[:2]  # [B, T, heads * size], [B, heads, T, T]
            self.query_heads[module] = probabilities.shape[1]
            self.outputs[module] = context.unflatten(-1, (probabilities.shape[1], -1))

        attention.register_forward_hook(hook)


def attention_of(model: nn.Module, model_type: str, layer: int) -> nn.Module:
    """The module that computes the softmax of `layer`: BERT's descendants keep it next to the projection's parent."""
    parent = projection_path(model_type).format(layer).removesuffix(".linear").rpartition(".")[0]
    if parent.endswith("attention.output"):
        parent = parent.removesuffix("output") + "self"
    return model.get_submodule(parent)


def layers_of(model: nn.Module, model_type: str, attentions: dict[nn.Module, Any]) -> list[int]:
    """The decoder layers in which `attentions` are."""
    prefix = projection_path(model_type).partition("{}")[0]
    names = [name for name, module in model.named_modules() if module in attentions]
    return sorted({int(name.removeprefix(prefix).partition(".")[0]) for name in names if name.startswith(prefix)})


@pytest.mark.parametrize("model_type", known_types(runs=True))
def test_what_is_written_down_is_what_the_model_computes(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(model_type)
    assert model.config.model_type == model_type
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = expected_heads(model_type)
    attentions = {layer: attention_of(model, model_type, layer) for layer in expected}
    probe = Probe(monkeypatch)
    if model_type in OWN_SOFTMAX:
        for attention in attentions.values():
            probe.watch_own_softmax(attention)
    read: dict[int, Tensor] = {}
    for layer, projection in projections(model_type, model).items():
        projection.register_forward_pre_hook(lambda _, args, layer=layer: read.update({layer: args[0]}))

    with torch.no_grad():
        logits = model(**text_inputs(model_type, model)).logits

    assert logits.isfinite().all()
    assert layers_of(model, model_type, probe.outputs) == sorted(expected)
    for layer, (number, size) in expected.items():
        heads = probe.outputs[attentions[layer]]
        assert (probe.query_heads[attentions[layer]], *heads.shape[2:]) == (number, number, size)
        assert read[layer].shape[-1] == number * size
        heads = heads.flatten(2)  # one after another, as the projection's input must have them
        if model_type in GATED:
            assert torch.equal(read[layer].sign(), heads.sign()) and not torch.equal(read[layer], heads)
        elif model_type in NORMED:
            assert torch.equal(read[layer], attentions[layer].inner_attn_ln(heads))
        else:
            assert torch.equal(read[layer], heads)


def test_a_seed_is_a_model() -> None:
    random_state = torch.get_rng_state()
    first, again, other = build("llava"), build("llava"), build("llava", seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    weights = [model.state_dict()["model.language_model.layers.0.self_attn.o_proj.weight"] for model in (first, again)]
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], other.state_dict()["model.language_model.layers.0.self_attn.o_proj.weight"])
