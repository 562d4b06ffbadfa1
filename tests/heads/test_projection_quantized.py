"""What heads write through quantized projections, against slices of the dequantized weight."""

from __future__ import annotations

import pytest
import torch
from projections import FULL, HEAD_DIM, HEADS, WIDTH, base_values, lora_update, plain, pooled_vectors, slices, with_lora
from torch import Tensor, nn

from hera_trainer.heads.modes import evaluating
from hera_trainer.heads.projection import (
    contributions_add_up,
    passes_gradient,
    project_heads,
    projection_blocks,
    projection_offset,
)


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


def test_a_large_bias_of_a_four_bit_layer_costs_no_digits() -> None:
    projection, weight, _ = four_bit(True, False, torch.bfloat16)
    with torch.no_grad():
        projection.bias.fill_(3000.0)
    expected = weight.T.reshape(HEADS, HEAD_DIM, WIDTH)
    assert (projection_blocks(projection, HEADS) - expected).abs().max() < 1e-2 * expected.abs().max()


def torchao_layer(scheme: str, dtype: torch.dtype) -> nn.Linear:
    quantization = pytest.importorskip("torchao.quantization")
    int4, groups = {"weight_dtype": torch.int4}, quantization.PerGroup(32)
    config = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int4": lambda: quantization.IntxWeightOnlyConfig(granularity=groups, **int4),
        "dynamic int8": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
    }[scheme]()
    holder = nn.Sequential(plain(True)).to(dtype).requires_grad_(False)
    quantization.quantize_(holder, config)
    return holder[0]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_torchao(scheme: str, dtype: torch.dtype, lora: bool) -> None:
    """The layer stays an `nn.Linear`, of which no columns can be cut."""
    projection: nn.Module = torchao_layer(scheme, dtype)
    assert type(projection) is nn.Linear
    weight = projection.weight.dequantize().float()
    if lora:
        projection = with_lora(projection)
        weight = weight + lora_update(projection, 6 / 4)[0]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    heads = [3, 1]
    pooled = pooled_vectors(2).requires_grad_()
    z = project_heads(projection, pooled, heads)
    expected = slices(weight, pooled.detach(), heads)
    assert (z - expected).abs().max() <= tolerance * expected.abs().max()
    blocks = weight.T.reshape(HEADS, HEAD_DIM, WIDTH)
    assert (projection_blocks(projection, HEADS) - blocks).abs().max() <= tolerance * blocks.abs().max()
    (grad,) = torch.autograd.grad(z.sum(), pooled)
    sums = torch.stack([blocks[head].sum(1) for head in heads])
    assert (grad - sums).abs().max() <= tolerance * sums.abs().max()
    x = torch.randn(9, FULL, generator=torch.Generator().manual_seed(4)).to(dtype)
    with evaluating(projection):
        assert contributions_add_up(projection, HEADS, x, projection(x))
        assert not contributions_add_up(
            projection, HEADS, x, projection(x) * (1.1 if dtype == torch.bfloat16 else 1.01)
        )


def test_a_kernel_without_gradient_is_noticed() -> None:
    """Rounding the input has a gradient of zero, also where a trained adapter beside it has one."""
    dynamic = torchao_layer("dynamic int8", torch.float32)
    x = torch.randn(9, FULL, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert contributions_add_up(dynamic, HEADS, x, dynamic(x))  # nearly: what it rounds is no sum of parts
        assert not passes_gradient(dynamic, HEADS)
        assert not passes_gradient(with_lora(dynamic), HEADS)
        for scheme in ("int8", "int4"):
            assert passes_gradient(torchao_layer(scheme, torch.bfloat16), HEADS)
        for layer in (plain(True), with_lora(plain()), four_bit(True, True, torch.bfloat16)[0]):
            assert passes_gradient(layer.requires_grad_(False), HEADS)
