"""Start-up checks: projections are what they should be, and something is trained below each head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LilyConfig, LoraConfig, get_peft_model
from projections import randomize_adapters
from tiny import FAMILIES, build_vlm, image_dataset
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer.heads.accessor import HeadAccessor
from hera_trainer.heads.checks import check_projections, check_trainable
from hera_trainer.heads.head import AttentionHead
from hera_trainer.heads.registry import get_head_accessor

# --- Start-up checks: projections ------------------------------------------------------------------------------------


def text_layers(model: nn.Module) -> Any:
    return get_head_accessor(model).layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_supported_models_pass(family: str, lora: bool, dtype: torch.dtype) -> None:
    model, _ = build_vlm(family)
    model = model.to(dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
        randomize_adapters(model)
    model.train()
    flags = {name: module.training for name, module in model.named_modules()}
    accessor = get_head_accessor(model)
    check_projections(model, accessor, accessor.layers_with_heads)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert not any(module._forward_hooks for layer in accessor.layers for module in layer.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def bypass(attention: nn.Module) -> None:
    """What fused kernels do: the projection's weight is used, the module is not called."""
    original, projection = attention.forward, attention.o_proj

    def forward(*args: Any, **kwargs: Any) -> Any:
        del attention._modules["o_proj"]
        attention.__dict__["o_proj"] = lambda x: F.linear(x, projection.weight)
        try:
            return original(*args, **kwargs)
        finally:
            del attention.__dict__["o_proj"]
            attention.o_proj = projection

    attention.forward = forward


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_bypassed_projection_is_refused(family: str) -> None:
    model, _ = build_vlm(family)
    accessor = get_head_accessor(model)
    bypass(text_layers(model)[1].self_attn)
    check_projections(model, accessor, [0, 2])
    with pytest.raises(
        ValueError, match=rf"{family}.*does not call the output projection of layer 1.*alignment_weight=0"
    ):
        check_projections(model, accessor, [0, 1, 2])
    assert not any(module._forward_hooks for layer in accessor.layers for module in layer.modules())


def scaled(projection: nn.Module) -> nn.Module:
    projection.forward = lambda x: 1.05 * F.linear(x, projection.weight)
    return projection


class SquashingLinear(nn.Linear):
    """Not linear, so a head has no share of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((20 * x).tanh())


class NormalizingLinear(nn.Linear):
    """Normalises over all heads before projecting, as sub-layer norms do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.rms_norm(x, x.shape[-1:]))


def replaced(projection_class: type) -> Callable[[nn.Linear], nn.Linear]:
    def replace(projection: nn.Linear) -> nn.Linear:
        other = projection_class(projection.in_features, projection.out_features, bias=False)
        other.load_state_dict(projection.state_dict())
        return other

    return replace


@pytest.mark.parametrize("doctor", [scaled, replaced(SquashingLinear), replaced(NormalizingLinear)])
def test_a_doctored_projection_is_refused(doctor: Callable[[nn.Module], nn.Module]) -> None:
    model, _ = build_vlm("llava")
    attention = text_layers(model)[1].self_attn
    attention.o_proj = doctor(attention.o_proj)
    accessor = get_head_accessor(model)
    check_projections(model, accessor, [0, 2])
    with pytest.raises(ValueError, match=r"In layer 1 of this 'llava' model.*4 attention heads do not add up"):
        check_projections(model, accessor, [0, 1])


def test_an_accessor_with_the_wrong_projection_is_refused() -> None:
    model, _ = build_vlm("llava")
    good = get_head_accessor(model)
    projections = {i: good.projection(i) for i in range(3)}
    projections[1] = model.model.vision_tower.encoder.layers[0].self_attn.out_proj
    wrong = HeadAccessor(
        good.decoder, good.layers, {i: good.attention(i) for i in range(3)}, projections, {0: 4, 1: 4, 2: 4}
    )
    with pytest.raises(ValueError, match="does not call the output projection of layer 1"):
        check_projections(model, wrong, [1])


# --- Start-up checks: something must be trained below the head -------------------------------------------------------

HEAD = AttentionHead(1, 2)


def lora_on(targets: str | list[str], layers: list[int] | None = None) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        return get_peft_model(
            model, LoraConfig(r=2, target_modules=targets, layers_to_transform=layers, layers_pattern=None)
        )

    return wrap


def only(*fragments: str) -> Callable[[nn.Module], nn.Module]:
    """Trains the parameters whose name contains one of `fragments`."""

    def freeze(model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(fragment in name for fragment in fragments))
        assert any(parameter.requires_grad for parameter in model.parameters())
        return model

    return freeze


TEXT = r".*language_model.*"
BELOW: dict[str, Callable[[nn.Module], nn.Module]] = {
    "everything": lambda model: model.requires_grad_(True),
    "LoRA everywhere": lora_on("all-linear"),
    "LoRA on o_proj in the head's layer": lora_on(["o_proj"], [1]),
    "LoRA on q_proj in the head's layer": lora_on(["q_proj"], [1]),
    "LoRA on the MLP of the layer before": lora_on(rf"{TEXT}layers\.0\.mlp\.up_proj"),
    "projector (stage 1)": only("multi_modal_projector"),
    "vision tower": only("vision_tower.encoder.layers.0"),
    "embeddings": only("embed_tokens"),
    "projector and lm_head": only("multi_modal_projector", "lm_head"),
    "norm before the head": only("language_model.layers.1.input_layernorm"),
    "the head's output projection": only("language_model.layers.1.self_attn.o_proj"),
}
NOT_BELOW: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model.requires_grad_(False),
    "LoRA above": lora_on(rf"{TEXT}layers\.2\..*_proj"),
    "LoRA on the MLP of the head's own layer": lora_on(rf"{TEXT}layers\.1\.mlp\..*_proj"),
    "lm_head": only("lm_head"),
    "LoRA on lm_head": lora_on(["lm_head"]),
    "final norm": only("language_model.norm"),
    "layer above": only("language_model.layers.2"),
    "MLP of the head's own layer": only("language_model.layers.1.mlp"),
    "norm after the head": only("language_model.layers.1.post_attention_layernorm"),
}


def gets_a_gradient(model: nn.Module, processor: Any) -> bool:
    """Whether anything trainable really influences the head: by autograd, over a batch with images."""
    batch = DataCollatorForVisionLanguageModeling(processor)(list(image_dataset(2)))
    outputs = []
    hook = text_layers(model)[HEAD.layer].self_attn.o_proj.register_forward_hook(lambda m, a, out: outputs.append(out))
    model(**batch)
    hook.remove()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not outputs[0].requires_grad:
        return False
    grads = torch.autograd.grad(outputs[0].square().sum(), trainable, allow_unused=True)
    return any(grad is not None and bool(grad.abs().max() > 0) for grad in grads)


@pytest.mark.parametrize("name", BELOW)
def test_something_trainable_below_the_head(name: str) -> None:
    model, processor = build_vlm("llava")
    model = BELOW[name](model)
    assert gets_a_gradient(model, processor)
    check_trainable(model, get_head_accessor(model), [HEAD])


@pytest.mark.parametrize("name", NOT_BELOW)
def test_nothing_trainable_below_the_head(name: str) -> None:
    model, processor = build_vlm("llava")
    model = NOT_BELOW[name](model)
    assert not gets_a_gradient(model, processor)
    with pytest.raises(ValueError, match=r"attention head L1H2.*at or below layer 1.*`aligned_heads`"):
        check_trainable(model, get_head_accessor(model), [HEAD])


def test_the_first_head_without_gradient_is_named() -> None:
    model, _ = build_vlm("llava")
    model = lora_on(["q_proj", "v_proj"], [1])(model.requires_grad_(False))
    for name, parameter in model.named_parameters():  # all-layer patterns also match the vision tower
        parameter.requires_grad_("lora_" in name and "language_model" in name)
    accessor = get_head_accessor(model)
    check_trainable(model, accessor, [AttentionHead(2, 0), AttentionHead(1, 3)])
    with pytest.raises(ValueError, match="attention head L0H1:"):
        check_trainable(model, accessor, [AttentionHead(2, 0), AttentionHead(0, 1)])


def test_linear_attention_layers_below_a_head_count() -> None:
    model, _ = build_vlm("qwen3_5")
    model = only("language_model.layers.2.linear_attn")(model)
    check_trainable(model, get_head_accessor(model), [AttentionHead(3, 0)])


@pytest.mark.parametrize(
    ("adapter", "config"),
    [
        ("aLoRA", LoraConfig(alora_invocation_tokens=[5], task_type="CAUSAL_LM", target_modules=["v_proj", "o_proj"])),
        ("Lily", LilyConfig(target_modules=["v_proj", "o_proj"])),
    ],
)
def test_adapters_that_heads_have_in_common_are_refused(adapter, config) -> None:
    """Where and which of their matrices act is decided for whole tokens: a head's slice would meet others."""
    model = get_peft_model(build_vlm("llava")[0], config)
    with pytest.raises(ValueError, match=f"The {adapter} adapter on the output projection of layer 1 cannot be told"):
        check_projections(model, get_head_accessor(model), [1])


def test_adapters_beside_the_output_projections_are_not() -> None:
    model = get_peft_model(build_vlm("llava")[0], LilyConfig(target_modules=["v_proj"]))
    check_projections(model, get_head_accessor(model), [0, 1])
