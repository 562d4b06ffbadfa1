"""What heads write into the residual stream, against explicit slices of explicit weights; and the start-up checks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, build_vlm, image_dataset
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer.heads.checks import check_projections, check_trainable
from hera_trainer.heads.head import AttentionHead
from hera_trainer.heads.modes import evaluating
from hera_trainer.heads.projection import contributions_add_up, project_heads, projection_blocks, projection_offset
from hera_trainer.heads.registry import HeadAccessor, get_head_accessor

HEADS, HEAD_DIM, WIDTH = 4, 32, 64  # 128 features in, 64 out: 4-bit layers take no fewer
FULL = HEADS * HEAD_DIM


class Holder(nn.Module):
    """A module with an output projection, which PEFT can wrap."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.o_proj = projection
        self.config = SimpleNamespace(model_type="toy")
        self.is_loaded_in_4bit = "4bit" in type(projection).__name__
        self.is_loaded_in_8bit = "8bit" in type(projection).__name__


def randomize_adapters(module: nn.Module) -> None:
    """Gives adapters values that matter (they start as zeros)."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * noise)
            elif "lora_" in name:
                parameter.copy_(0.2 * noise)


def plain(bias: bool = False) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        projection = nn.Linear(FULL, WIDTH, bias=bias)
        if bias:
            nn.init.normal_(projection.bias, std=0.2)
    return projection


def with_lora(projection: nn.Module, **settings: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(Holder(projection), LoraConfig(r=4, lora_alpha=6, target_modules=["o_proj"], **settings))
    wrapped = model.base_model.model.o_proj
    randomize_adapters(wrapped)
    return wrapped


Explicit = tuple[nn.Module, Tensor, Tensor]  # projection, weight [out, in], offset [out]


def base_values(projection: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = projection.weight.detach()
    return weight, torch.zeros(WIDTH) if projection.bias is None else projection.bias.detach().clone()


def lora_update(wrapped: nn.Module, scaling: float) -> tuple[Tensor, Tensor]:
    a, b = wrapped.lora_A["default"], wrapped.lora_B["default"]
    bias = torch.zeros(WIDTH) if b.bias is None else b.bias.detach().float()
    return scaling * b.weight.detach().float() @ a.weight.detach().float(), scaling * bias


def linear_case(bias: bool) -> Explicit:
    projection = plain(bias)
    return projection, *base_values(projection)


def lora_case(bias: bool, scaling: float = 6 / 4, **settings: Any) -> Explicit:
    projection = plain(bias)
    weight, offset = base_values(projection)
    wrapped = with_lora(projection, **settings)
    update, update_offset = lora_update(wrapped, scaling)
    return wrapped, weight + update, offset + update_offset


def dora_case(bias: bool, **settings: Any) -> Explicit:
    wrapped, weight, offset = lora_case(bias, use_dora=True, **settings)
    magnitude = wrapped.lora_magnitude_vector["default"].weight.detach()
    return wrapped, weight * (magnitude / weight.norm(dim=1))[:, None], offset


def merged_case() -> Explicit:
    wrapped, weight, offset = lora_case(True)
    wrapped.merge()
    return wrapped, weight, offset


def disabled_case() -> Explicit:
    projection = plain(True)
    weight, offset = base_values(projection)
    wrapped = with_lora(projection)
    wrapped.enable_adapters(False)
    return wrapped, weight, offset


def saved_module_case() -> Explicit:
    """PEFT trains a copy of the whole projection (`modules_to_save`)."""
    holder = Holder(plain(True))
    holder.q_proj = nn.Linear(8, 8)
    model = get_peft_model(holder, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"]))
    wrapped = model.base_model.model.o_proj
    copy = wrapped.modules_to_save["default"]
    with torch.no_grad():
        copy.weight.mul_(1.5)
        copy.bias.add_(1.0)
    return wrapped, copy.weight.detach(), copy.bias.detach()


class WeightOnlyLinear(nn.Module):
    """What GPTQ, AWQ and their like are: integers and scales in buffers, no `weight`, no parameters."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        source = plain(bias)
        self.in_features, self.out_features = FULL, WIDTH
        scales = source.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (source.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("bias", None if source.bias is None else source.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qweight.to(x.dtype) * self.scales.to(x.dtype), self.bias)


def weight_only_case(bias: bool) -> Explicit:
    projection = WeightOnlyLinear(bias)
    weight = projection.qweight.float() * projection.scales
    return projection, weight, torch.zeros(WIDTH) if projection.bias is None else projection.bias


CASES: dict[str, Callable[[], Explicit]] = {
    "linear": lambda: linear_case(False),
    "linear with bias": lambda: linear_case(True),
    "lora": lambda: lora_case(False),
    "lora with bias": lambda: lora_case(True),
    "rslora": lambda: lora_case(True, scaling=6 / 4**0.5, use_rslora=True),
    "dora": lambda: dora_case(False),
    "dora with bias": lambda: dora_case(True),
    "dora dropout": lambda: dora_case(True, lora_dropout=0.5),
    "lora_bias": lambda: lora_case(True, lora_bias=True),
    "lora dropout": lambda: lora_case(True, lora_dropout=0.5),
    "merged lora": merged_case,
    "disabled lora": disabled_case,
    "modules_to_save": saved_module_case,
    "weight-only": lambda: weight_only_case(False),
    "weight-only with bias": lambda: weight_only_case(True),
}


def pooled_vectors(count: int, batch: int = 5) -> Tensor:
    return torch.randn(batch, count, HEAD_DIM, generator=torch.Generator().manual_seed(3))


def slices(weight: Tensor, pooled: Tensor, heads: list[int]) -> Tensor:
    """z = W[:, slice of the head] @ vector, in float64, head by head and sample by sample."""
    out = torch.zeros(*pooled.shape[:2], WIDTH, dtype=torch.float64)
    for i, row in enumerate(pooled.double()):
        for place, head in enumerate(heads):
            out[i, place] = weight.double()[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] @ row[place]
    return out


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
    change = 0.1 if "weight-only" in name else 0.01  # packed weights may compute in 16 bit: twice the tolerance
    assert not contributions_add_up(projection, HEADS, x, out * (1 + change))
    assert not contributions_add_up(projection, HEADS, x, out + change * out.abs().max())
    assert not contributions_add_up(projection, HEADS, x.roll(1, dims=1), out)
    assert not contributions_add_up(projection, HEADS, x, torch.full_like(out, torch.nan))


def test_dropout_is_off_for_the_projection_alone_and_for_a_moment() -> None:
    projection, _, _ = lora_case(True, lora_dropout=0.5)
    projection.train()
    flags = [module.training for module in projection.modules()]
    project_heads(projection, pooled_vectors(2), [0, 1])
    assert [module.training for module in projection.modules()] == flags
    x = torch.randn(9, FULL)
    assert not torch.equal(projection(x), projection(x))  # its own forward still drops


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
    # Around it, LoRA computes in the layer's own dtype: a few roundings.
    wrapped = with_lora(projection)
    update, _ = lora_update(wrapped, 6 / 4)
    exact = slices(weight.float() + update, pooled, heads)
    error = (project_heads(wrapped, pooled, heads) - exact).abs().max() / exact.abs().max()
    assert error < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    # And what flows through it in that dtype adds up.
    x = torch.randn(9, FULL, generator=torch.Generator().manual_seed(4)).to(dtype)
    wrapped.eval()
    with torch.no_grad():
        assert contributions_add_up(wrapped, HEADS, x, wrapped(x))
        assert not contributions_add_up(wrapped, HEADS, x, wrapped(x) * 1.2)


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


def four_bit(bias: bool, double_quantization: bool, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """A `Linear4bit` with its weight as bitsandbytes itself dequantizes it."""
    bnb = pytest.importorskip("bitsandbytes")
    source = plain(bias)
    layer = bnb.nn.Linear4bit(
        FULL, WIDTH, bias=bias, compute_dtype=dtype, compress_statistics=double_quantization, quant_type="nf4"
    )
    layer.load_state_dict(source.state_dict())
    layer = layer.to("cpu").requires_grad_(False)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.quant_state.nested == double_quantization
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert 0 < (weight - source.weight).abs().max() < 0.05
    return layer, weight, base_values(source)[1]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quantization", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_four_bit(bias: bool, double_quantization: bool, dtype: torch.dtype, lora: bool) -> None:
    projection, weight, offset = four_bit(bias, double_quantization, dtype)
    if lora:
        projection = with_lora(projection, lora_dropout=0.5)
        assert type(projection).__module__ == "peft.tuners.lora.bnb"
        update, _ = lora_update(projection, 6 / 4)
        weight = weight + update
    projection.train()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5  # relative to the largest value

    def assert_near(found: Tensor, expected: Tensor) -> None:
        assert found.dtype == torch.float32
        # The bias is part of what is rounded, though it is taken off again.
        assert (found - expected).abs().max() <= tolerance * max(expected.abs().max(), offset.abs().max())

    heads = [3, 1]
    pooled = pooled_vectors(2).requires_grad_()
    z = project_heads(projection, pooled, heads)
    assert_near(z, slices(weight, pooled.detach(), heads))
    torch.testing.assert_close(projection_offset(projection), offset, rtol=tolerance, atol=1e-6)
    expected_blocks = weight.T.reshape(HEADS, HEAD_DIM, WIDTH)
    assert_near(projection_blocks(projection, HEADS), expected_blocks)
    # The gradient is that of the slices.
    (grad,) = torch.autograd.grad(z.sum(), pooled)
    assert_near(grad, torch.stack([expected_blocks[head].sum(1) for head in heads]).expand_as(grad))

    x = torch.randn(9, FULL, generator=torch.Generator().manual_seed(4))
    with evaluating(projection):
        out = projection(x.to(dtype))
        assert contributions_add_up(projection, HEADS, x.to(dtype), out)
        assert not contributions_add_up(projection, HEADS, x.to(dtype), out * 1.1)
    # Looking changed nothing: the layer can still be trained.
    x.requires_grad_()
    (grad,) = torch.autograd.grad(projection(x).float().sum(), x)
    assert grad.abs().max() > 0


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_eight_bit(bias: bool, lora: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    source = plain(bias)
    projection: nn.Module = bnb.nn.Linear8bitLt(FULL, WIDTH, bias=bias, has_fp16_weights=False)
    projection.load_state_dict(source.state_dict())
    projection = projection.to("cpu").requires_grad_(False)
    assert projection.weight.dtype == torch.int8
    weight = source.weight.detach()
    if lora:
        projection = with_lora(projection)
        weight = weight + lora_update(projection, 6 / 4)[0]
    pooled, heads = pooled_vectors(2), [3, 1]
    expected = slices(weight, pooled, heads)
    # Its kernel rounds activations to 8 bits as well, so a head alone is only nearly its share of the whole.
    assert (project_heads(projection, pooled, heads) - expected).abs().max() < 5e-2 * expected.abs().max()
    x = torch.randn(9, FULL, generator=torch.Generator().manual_seed(4))
    with evaluating(projection):
        out = projection(x)
        assert contributions_add_up(projection, HEADS, x, out)
        assert not contributions_add_up(projection, HEADS, x, out * 1.2)


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
