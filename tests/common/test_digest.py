"""The digest of weights notices every number, and only them."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import build_vlm
from torch import nn

from hera_trainer.common.digest import weights_digest


def layer(rows: int = 128, columns: int = 96) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows)


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (127, 95), (64, 48)])
def test_each_number_counts(place: tuple[int, int]) -> None:
    changed = layer()
    with torch.no_grad():
        changed.weight[place] += 1e-6
    assert weights_digest(changed) != weights_digest(layer())


def test_a_rewritten_head_counts() -> None:
    """With rows that are a multiple of 64, samples at equal distances all lie in the first column."""
    changed = layer()
    with torch.no_grad():
        changed.weight[:, 24:48] = 0
    assert weights_digest(changed) != weights_digest(layer())


def test_dtypes_shapes_and_names_count() -> None:
    zeros = [torch.zeros(4, 2), torch.zeros(2, 4), torch.zeros(8), torch.zeros(4, 2, dtype=torch.int32)]
    zeros += [torch.zeros(4, 4, dtype=torch.bfloat16), torch.tensor(0.0), torch.zeros(0), torch.zeros(3).bool()]
    models = []
    for name in ("a", "b"):
        for tensor in zeros:
            model = nn.Module()
            model.register_buffer(name, tensor)
            models.append(model)
    assert len({weights_digest(model) for model in models}) == len(models)


def test_it_is_that_of_the_bytes_by_hand() -> None:
    model = nn.Sequential(layer(), layer(2, 3).bfloat16())
    lines = []
    for name, tensor in model.state_dict().items():
        content = bytes(tensor.clone().untyped_storage())
        lines.append(f"{name} {list(tensor.shape)} {tensor.dtype} {hashlib.sha256(content).hexdigest()}")
    assert weights_digest(model) == hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    with torch.no_grad():  # laid out otherwise in memory, the same numbers
        model[0].weight = nn.Parameter(model[0].weight.T.contiguous().T)
    assert weights_digest(model) == hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def test_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights_digest(layer())
    monkeypatch.setattr("hera_trainer.common.digest._PIECE", 1000)
    assert weights_digest(layer()) == whole


ADAPTERS: dict[str, Any] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "copies": {"modules_to_save": ["o_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [1, 3]},
}


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_count_or_do_not(kind: str, injected: bool) -> None:
    bare = weights_digest(build_vlm("llava")[0].get_decoder())
    model = build_vlm("llava")[0]
    decoder = model.get_decoder()
    config = LoraConfig(target_modules=["q_proj"], **ADAPTERS[kind])
    if injected:
        inject_adapter_in_model(config, decoder)
    else:
        model = get_peft_model(model, config)
    assert weights_digest(decoder, adapters=False) == bare
    before = weights_digest(decoder)
    names = [name for name, p in decoder.named_parameters() if p.requires_grad]
    assert names
    for name in names:
        with torch.no_grad():
            decoder.get_parameter(name).view(-1)[-1] += 1
        after = weights_digest(decoder)
        assert after != before, name
        before = after
    assert weights_digest(decoder, adapters=False) == bare
    with torch.no_grad():
        decoder.layers[1].self_attn.q_proj.base_layer.weight[3, 5] += 1
    assert weights_digest(decoder, adapters=False) != bare


@pytest.mark.parametrize("double", [False, True])
def test_four_bit_layers(double: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def quantized(scale: float) -> nn.Module:
        torch.manual_seed(0)
        linear = bnb.nn.Linear4bit(128, 128, quant_type="nf4", compress_statistics=double)
        weight = torch.randn(128, 128) * scale
        linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double)
        return linear.to("cpu")

    first, scaled = quantized(1.0), quantized(2.0)  # the same codes with other scales
    assert torch.equal(first.weight, scaled.weight)
    assert weights_digest(first) == weights_digest(quantized(1.0)) != weights_digest(scaled)


def test_torchao_layers() -> None:
    torchao = pytest.importorskip("torchao.quantization")

    def quantized(change: float) -> nn.Module:
        model = nn.Sequential(layer())
        with torch.no_grad():
            model[0].weight[:, 1] += change
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        return model

    assert weights_digest(quantized(0)) == weights_digest(quantized(0)) != weights_digest(quantized(0.05))
