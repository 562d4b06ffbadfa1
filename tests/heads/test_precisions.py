"""Backbones in every precision that runs on a CPU, against their dequantized weights: vectors, ranking, training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from precisions import (
    PRECISIONS,
    SIZES,
    Precision,
    alignment_gradients,
    alignment_of,
    assert_same_direction,
    base_weight,
    batch_of,
    captured,
    dense_twin,
    deviation,
    explicit_vectors,
    explicit_weight,
    heads_of_two_layers,
    lora_config,
    with_lora,
)
from reference import gradients_of
from tiny import image_dataset, save_vlm, sft_args
from torch import Tensor, nn
from transformers import AutoProcessor

from hera_trainer import HeRAConfig, HeRATrainer, rank_heads
from hera_trainer.heads.checks import check_projections
from hera_trainer.heads.modes import evaluating
from hera_trainer.heads.projection import passes_gradient, projection_blocks
from hera_trainer.heads.quantized import check_not_packed
from hera_trainer.heads.registry import get_head_accessor

# Qwen3.5 is a hybrid: one layer in four has softmax attention. In the Qwen models num_heads * head_dim is not d_model.
FAMILIES = ("llava", "qwen3_5", "qwen3_vl")
EVERYWHERE = pytest.mark.parametrize("family", FAMILIES)
ALL = pytest.mark.parametrize("name", PRECISIONS)
QUANTIZED = pytest.mark.parametrize("name", [name for name, scheme in PRECISIONS.items() if scheme.is_quantized])

pytestmark = pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: save_vlm(family, tmp_path_factory.mktemp(family), **SIZES) for family in FAMILIES}


def available(name: str) -> Precision:
    pytest.importorskip(PRECISIONS[name].library)
    return PRECISIONS[name]


@EVERYWHERE
@ALL
def test_head_vectors_are_those_of_the_dequantized_weights(saved: dict[str, str], name: str, family: str) -> None:
    scheme, batch = available(name), batch_of(saved[family])
    model = scheme.load(saved[family])
    for wrap in (lambda plain: plain, lambda plain: with_lora(plain, dropout=0.3)):
        model = wrap(model)
        accessor, heads = get_head_accessor(model), heads_of_two_layers(model)
        with evaluating(model):  # kernels differ between the modes: LLM.int8 rounds activations in this one on CPUs
            found, expected = captured(model, batch, heads), explicit_vectors(model, batch, heads)
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert deviation(found, expected) <= scheme.tolerance
        for layer in accessor.layers_with_heads:
            projection, num_heads = accessor.projection(layer), accessor.num_heads(layer)
            with evaluating(model):
                blocks = projection_blocks(projection, num_heads)
            weight = explicit_weight(projection).detach()
            assert deviation(blocks, weight.T.reshape(blocks.shape)) <= scheme.tolerance
            assert passes_gradient(projection, num_heads)
        check_projections(model, accessor, accessor.layers_with_heads)


@EVERYWHERE
@ALL
def test_gradient_of_the_alignment_alone(saved: dict[str, str], name: str, family: str) -> None:
    """In the precision as users load it, against the explicit computation on the same forward pass."""
    scheme, batch = available(name), batch_of(saved[family])
    model = with_lora(scheme.load(saved[family]))
    heads = heads_of_two_layers(model)
    found = alignment_gradients(model, batch, heads)
    expected = gradients_of(model, alignment_of(explicit_vectors(model, batch, heads)))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained)
    # The backward of torch's 16-bit matrix products rounds as well.
    assert_same_direction(found, expected, {torch.float32: 1e-5, torch.float16: 5e-3}.get(scheme.dtype, 3e-2))


@EVERYWHERE
@QUANTIZED
def test_gradient_is_that_of_an_ordinary_model(saved: dict[str, str], name: str, family: str) -> None:
    """Computing in float32, the whole of it equals a model of ordinary layers with the dequantized weights."""
    scheme, batch = replace(available(name), dtype=torch.float32), batch_of(saved[family])
    model = scheme.load(saved[family])
    twin = dense_twin(model, family)
    original = base_weight(get_head_accessor(model).projection(3 if family == "qwen3_5" else 0))
    model, twin = with_lora(model), with_lora(twin).train()
    with torch.no_grad():
        trained = dict(model.named_parameters())
        for key, parameter in twin.named_parameters():
            if parameter.requires_grad:
                assert deviation(trained[key].float(), parameter) <= 1e-2  # a quantized model's may be bf16
                parameter.copy_(trained[key])
    heads = heads_of_two_layers(model)
    z = explicit_vectors(twin, batch, heads)
    model.train()
    assert deviation(captured(model, batch, heads), z) <= 5e-5  # float32, summed in another order
    expected = gradients_of(twin, alignment_of(z))
    assert_same_direction(alignment_gradients(model, batch, heads), expected, 1e-3)
    assert original.unique().numel() < original.numel()  # it was quantized


@ALL
def test_ranking(saved: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranking reads weights as blocks; with the dequantized ones in their place it is the same."""
    model = with_lora(replace(available(name), dtype=torch.float32).load(saved["qwen3_5"]))
    arguments = (model, AutoProcessor.from_pretrained(saved["qwen3_5"]), image_dataset(24, with_features=8))
    ranking = rank_heads(*arguments, k=3, progress=False)
    assert [head.layer for head in ranking.heads()] == [3, 3, 3, 3]

    def explicit_blocks(projection: nn.Module, num_heads: int) -> Tensor:
        weight = explicit_weight(projection).detach()
        return weight.T.reshape(num_heads, -1, len(weight))

    monkeypatch.setattr("hera_trainer.heads.scoring.projection_blocks", explicit_blocks)
    expected = rank_heads(*arguments, k=3, progress=False)
    one_neighbor = 1 / (24 * 3)  # two samples at nearly the same distance may change places
    torch.testing.assert_close(ranking.scores, expected.scores, rtol=0, atol=1.5 * one_neighbor, equal_nan=True)
    check_not_packed(model)


@pytest.mark.parametrize("family", ["llava", "qwen3_5"])
@ALL
def test_training(saved: dict[str, str], tmp_path: Any, name: str, family: str) -> None:
    """Loaded by the trainer where transformers can: ranking, steps of two micro-batches, evaluations in between."""
    scheme, path = available(name), saved[family]
    args = HeRAConfig(
        **sft_args(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3),
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=1e-2,
        num_neighbors=3,
        num_aligned_heads=3,
        alignment_weight=0.1,
        model_init_kwargs=scheme.init_kwargs() if scheme.convert is None else None,
    )
    trainer = HeRATrainer(
        path if scheme.convert is None else scheme.load(path),
        args,
        train_dataset=image_dataset(n=16, with_features=8),
        eval_dataset=image_dataset(n=16, with_features=8),
        processing_class=AutoProcessor.from_pretrained(path),
        peft_config=lora_config(dropout=0.1),
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    frozen = explicit_weight(get_head_accessor(trainer.model).projection(3 if family == "qwen3_5" else 0)).detach()
    trainer.train()
    assert before and all("lora_" in n for n in before)
    moved = {n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert moved == set(before)
    check_not_packed(trainer.model)
    after = base_weight(get_head_accessor(trainer.model).projection(3 if family == "qwen3_5" else 0))
    assert torch.equal(after, frozen)  # B starts as zeros
    history = trainer.state.log_history
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(evaluations) == 3 and evaluations[-1] < evaluations[0]
    for key in ("loss", "lm_loss", "alignment_loss", "grad_norm"):
        values = [entry[key] for entry in history if key in entry]
        assert len(values) == 3 and torch.tensor(values).isfinite().all(), key
    assert all(entry["alignment_pool"] == 8 for entry in history if "alignment_pool" in entry)
