"""What heads write into the residual stream, against explicit slices of explicit weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import MontecloraConfig, VeloraConfig
from projections import (
    CASES,
    FULL,
    HEAD_DIM,
    HEADS,
    WIDTH,
    Holder,
    base_values,
    conv1d,
    linear_case,
    lora_case,
    lora_update,
    plain,
    pooled_vectors,
    slices,
    with_lora,
)
from torch import Tensor, nn

from hera_trainer.heads.capture import pool_heads
from hera_trainer.heads.projection import (
    contributions_add_up,
    input_width,
    project_heads,
    projection_blocks,
    projection_offset,
)


@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [2], [3, 1]])
@pytest.mark.parametrize("name", CASES)
def test_contributions_are_slices_of_the_weight(name: str, heads: list[int]) -> None:
    projection, weight, _ = CASES[name]()
    projection.train()  # dropout on, if it were applied
    pooled = pooled_vectors(len(heads))
    z = project_heads(projection, pooled, heads)
    assert (z.dtype, z.shape) == (torch.float32, (5, len(heads), WIDTH))
    torch.testing.assert_close(z.double(), slices(weight, pooled, heads), rtol=1e-5, atol=1e-5)
    assert torch.equal(z, project_heads(projection, pooled, heads))


@pytest.mark.parametrize("name", CASES)
def test_offset_and_blocks(name: str) -> None:
    projection, weight, offset = CASES[name]()
    projection.train()
    torch.testing.assert_close(projection_offset(projection).double(), offset.double(), rtol=1e-5, atol=1e-6)
    blocks = projection_blocks(projection, HEADS)
    assert (blocks.dtype, blocks.shape) == (torch.float32, (HEADS, HEAD_DIM, WIDTH))
    for head in range(HEADS):
        expected = weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM].T
        torch.testing.assert_close(blocks[head].double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_really_flowed_adds_up(name: str) -> None:
    projection, weight, offset = CASES[name]()
    projection.eval()
    x = torch.randn(9, FULL, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        out = projection(x)
    # The cases' own explicit weights are right.
    torch.testing.assert_close(out.double(), x.double() @ weight.double().T + offset.double(), rtol=1e-5, atol=1e-5)
    assert contributions_add_up(projection, HEADS, x, out)
    change = 0.01
    assert not contributions_add_up(projection, HEADS, x, out * (1 + change))
    assert not contributions_add_up(projection, HEADS, x, out + change * out.abs().max())
    assert not contributions_add_up(projection, HEADS, x.roll(1, dims=1), out)
    assert not contributions_add_up(projection, HEADS, x, torch.full_like(out, torch.nan))


@pytest.mark.parametrize("name", CASES)
def test_input_width(name: str) -> None:
    assert input_width(CASES[name]()[0]) == FULL


def test_a_layer_that_hides_its_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"class Bilinear does not say how many features it reads.*`in_features`"):
        input_width(nn.Bilinear(4, 4, 4))


def test_dropout_is_off_for_the_projection_alone_and_for_a_moment() -> None:
    projection, _, _ = lora_case(True, lora_dropout=0.5)
    projection.train()
    flags = [module.training for module in projection.modules()]
    project_heads(projection, pooled_vectors(2), [0, 1])
    assert [module.training for module in projection.modules()] == flags
    x = torch.randn(9, FULL)
    assert not torch.equal(projection(x), projection(x))  # its own forward still drops


# What some methods need to be told for a layer of this size.
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 32},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 8},
    "ROAD": {"group_size": 8},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 64},
}
# Prompts and caches beside the model, routers that need more than an input, and what adapts other layers than a linear.
NOT_OF_A_LINEAR = {
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "SHADOW",
    "TRAINABLE_TOKENS",
    "XLORA",
}
METHODS = sorted({method.value for method in PEFT_TYPE_TO_CONFIG_MAPPING} - NOT_OF_A_LINEAR)
VARIANTS = {
    "DoRA": {"use_dora": True},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig()},
    "VeLoRA": {"velora_config": VeloraConfig()},
}


def with_adapter(method: str, **settings: Any) -> nn.Module:
    """A projection under an adapter of PEFT that drops half of all it can drop, with values that matter."""
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    rates = {field.name: 0.5 for field in fields(config_class) if "dropout" in field.name}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = config_class(target_modules=["o_proj"], **rates, **METHOD_SETTINGS.get(method, {}), **settings)
        projection = get_peft_model(Holder(plain(True)), config).base_model.model.o_proj
        for parameter in projection.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter.data, std=0.2)
    return projection


@pytest.mark.parametrize("case", [*METHODS, *VARIANTS])
def test_no_adapter_draws_random_numbers(case: str) -> None:
    """Neither dropout of any kind nor noise: z is that of eval mode, bit for bit."""
    if case == "ADAMSS":
        pytest.importorskip("sklearn")
    projection = with_adapter("LORA", **VARIANTS[case]) if case in VARIANTS else with_adapter(case)
    pooled = pooled_vectors(HEADS)
    z = project_heads(projection.eval(), pooled, range(HEADS))
    x = torch.randn(9, FULL)
    assert not torch.allclose(projection(x), plain(True)(x), rtol=0.1)  # the adapter matters
    projection.train()
    flags = [module.training for module in projection.modules()]
    state = torch.get_rng_state()
    assert torch.equal(project_heads(projection, pooled, range(HEADS)), z)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in projection.modules()] == flags


def test_hooks_of_the_projection_do_not_fire() -> None:
    for projection, _, _ in (linear_case(True), lora_case(True)):
        projection.register_forward_hook(lambda *args: pytest.fail("a hook was called"))
        project_heads(projection, pooled_vectors(1), [2])
        projection_offset(projection)
        projection_blocks(projection, HEADS)


@pytest.mark.parametrize("name", ["linear with bias", "lora with bias", "rslora", "lora dropout", "modules_to_save"])
def test_gradients_are_those_of_the_slices(name: str) -> None:
    projection, _, _ = CASES[name]()
    projection.train().requires_grad_(True)
    pooled = pooled_vectors(2)
    target = torch.randn(5, 2, WIDTH, generator=torch.Generator().manual_seed(5))
    heads = [3, 1]

    def explicit_weight() -> Tensor:
        if hasattr(projection, "lora_A"):
            update = projection.lora_B["default"].weight @ projection.lora_A["default"].weight
            return projection.base_layer.weight + projection.scaling["default"] * update
        return (
            projection.modules_to_save["default"].weight
            if hasattr(projection, "modules_to_save")
            else projection.weight
        )

    weight = explicit_weight()
    blocks = torch.stack([weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] for head in heads])
    parameters = {n: p for n, p in projection.named_parameters() if not n.endswith("bias") and "original" not in n}
    leaf = pooled.clone().requires_grad_()
    wanted = [*parameters.values(), leaf]
    expected = torch.autograd.grad((torch.einsum("bhd,hod->bho", leaf, blocks) * target).sum(), wanted)
    found = torch.autograd.grad((project_heads(projection, leaf, heads) * target).sum(), wanted)
    for parameter, ours, theirs in zip([*parameters, "pooled"], found, expected, strict=True):
        assert theirs.abs().max() > 0, parameter
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=parameter)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(dtype: torch.dtype, bias: bool) -> None:
    projection = plain(bias).to(dtype)
    weight, _ = base_values(projection)
    pooled = pooled_vectors(HEADS)
    heads = list(range(HEADS))
    # A plain layer's rounded weights are multiplied in float32.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = project_heads(projection, pooled, heads)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.double(), slices(weight, pooled, heads), rtol=1e-5, atol=1e-5)
    # Under LoRA, too: neighbours of nearly parallel vectors would be lost otherwise.
    wrapped = with_lora(projection)
    update, _ = lora_update(wrapped, 6 / 4)
    stored = dict(wrapped.base_layer.named_parameters())
    exact = slices(weight.float() + update, pooled, heads)
    torch.testing.assert_close(project_heads(wrapped, pooled, heads).double(), exact, rtol=1e-5, atol=1e-5)
    after = dict(wrapped.base_layer.named_parameters())
    assert list(after) == list(stored) and all(after[name] is stored[name] for name in stored)
    # ZeRO-3 looks at the parameters of a layer that runs, and must find its own.
    stored["weight"].ds_id = 0
    dtypes = []
    handle = wrapped.base_layer.register_forward_pre_hook(lambda layer, args: dtypes.append(layer.weight.dtype))
    error = (project_heads(wrapped, pooled, heads) - exact).abs().max() / exact.abs().max()
    handle.remove()
    assert dtypes == [dtype] and 0 < error < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    del stored["weight"].ds_id
    # And what flows through it in that dtype adds up.
    x = torch.randn(9, FULL, generator=torch.Generator().manual_seed(4)).to(dtype)
    wrapped.eval()
    with torch.no_grad():
        assert contributions_add_up(wrapped, HEADS, x, wrapped(x))
        assert not contributions_add_up(wrapped, HEADS, x, wrapped(x) * 1.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: plain(True), conv1d], ids=["Linear", "Conv1D"])
def test_a_large_bias_costs_no_digits(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """A bias 1,000 times as large as the contributions would leave none of their digits in 16 bit."""
    projection = make()
    with torch.no_grad():
        projection.bias.copy_(1e4 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(6)))
    projection = projection.to(dtype)
    weight = base_values(plain())[0].to(dtype)
    wrapped = with_lora(projection, fan_in_fan_out=not isinstance(projection, nn.Linear))
    bias = wrapped.base_layer.bias
    weight = weight.float() + lora_update(wrapped, 6 / 4)[0]
    pooled, heads = pooled_vectors(HEADS), list(range(HEADS))
    expected = slices(weight, pooled, heads)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    error = (project_heads(wrapped, pooled, heads) - expected).abs().max() / expected.abs().max()
    assert error < tolerance
    blocks = projection_blocks(wrapped, HEADS) - weight.T.reshape(HEADS, HEAD_DIM, WIDTH)
    assert blocks.abs().max() < tolerance * weight.abs().max()
    assert wrapped.base_layer.bias is bias  # off for a moment only
    assert torch.equal(projection_offset(wrapped), bias.float())


def test_biases_come_back_after_an_error() -> None:
    wrapped, _, _ = lora_case(True, lora_bias=True)
    before = {name: parameter for name, parameter in wrapped.named_parameters() if name.endswith("bias")}
    assert len(before) == 2
    with pytest.raises(RuntimeError):
        project_heads(wrapped, pooled_vectors(1)[..., :-1], [0])  # rows too short for the layer
    assert all(dict(wrapped.named_parameters())[name] is parameter for name, parameter in before.items())


@pytest.mark.parametrize("wrap", [lambda projection: projection, with_lora], ids=["plain", "lora"])
def test_large_activations_in_float16(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """One head's contribution may be beyond float16's range where the sum of all is not."""
    projection = plain()
    with torch.no_grad():
        projection.weight.copy_(projection.weight.abs())
        projection.weight[:, HEAD_DIM:] *= -1
    projection = wrap(projection.to(torch.float16))
    base = projection if isinstance(projection, nn.Linear) else projection.base_layer
    weight = base.weight.detach().float()
    if projection is not base:
        weight = weight + lora_update(projection, 6 / 4)[0]
    pooled = torch.full((3, 1, HEAD_DIM), 6e4)
    expected = slices(weight, pooled, [0])
    assert expected.abs().max() > torch.finfo(torch.float16).max
    z = project_heads(projection, pooled, [0])
    torch.testing.assert_close(z.double(), expected, rtol=5e-3, atol=5e-3 * expected.abs().max().item())


def test_pooling_sums_in_float32() -> None:
    x = torch.full((1, 7, FULL), 6e4, dtype=torch.float16)
    pooled = pool_heads(x, torch.ones(1, 7, dtype=torch.bool), HEADS)
    assert torch.equal(pooled, x[:, 0].float().reshape(1, HEADS, HEAD_DIM))
