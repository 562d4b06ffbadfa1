"""Backbones in every precision on a GPU: the kernels that a CPU has not, and mixed precision with a gradient scaler.

`HERA_TEST_GPU=1` lets the tests see a GPU. `HERA_TEST_CHECKPOINTS` names checkpoints that are quantized already, as
those of GPTQ and AWQ are (local paths, separated by commas).
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from precisions import (
    PRECISIONS,
    SIZES,
    alignment_gradients,
    alignment_of,
    assert_same_direction,
    batch_of,
    captured,
    deviation,
    explicit_vectors,
    heads_of_two_layers,
    lora_config,
    with_lora,
)
from reference import gradients_of
from tiny import image_dataset, save_vlm, sft_args
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from hera_trainer import HeRAConfig, HeRATrainer
from hera_trainer.heads.checks import check_projections
from hera_trainer.heads.modes import evaluating
from hera_trainer.heads.projection import passes_gradient, project_heads, projection_blocks
from hera_trainer.heads.registry import get_head_accessor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and HERA_TEST_GPU=1"),
]
FAMILIES = ("llava", "qwen3_5")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: save_vlm(family, tmp_path_factory.mktemp(family), **SIZES) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PRECISIONS)
def test_vectors_and_gradient(saved: dict[str, str], name: str, family: str) -> None:
    """LLM.int8 rounds activations in both modes here; the others multiply with the dequantized weights."""
    scheme = PRECISIONS[name]
    pytest.importorskip(scheme.library)
    model = with_lora(scheme.load(saved[family], device_map={"": 0}))
    batch = {key: value.to("cuda") for key, value in batch_of(saved[family]).items()}
    heads, accessor = heads_of_two_layers(model), get_head_accessor(model)
    check_projections(model, accessor, accessor.layers_with_heads)
    assert all(passes_gradient(accessor.projection(layer), 4) for layer in accessor.layers_with_heads)
    # Tensor cores round float32 products to 10 bits where TF32 is allowed.
    tolerance = max(scheme.tolerance, 1e-3)
    for mode in (torch.no_grad(), evaluating(model)):
        model.train()
        with mode:
            assert deviation(captured(model, batch, heads), explicit_vectors(model, batch, heads)) <= tolerance
    found = alignment_gradients(model, batch, heads)
    expected = gradients_of(model, alignment_of(explicit_vectors(model, batch, heads)))
    assert_same_direction(found, expected, 5 * tolerance)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_trains(saved: dict[str, str], tmp_path: Any, precision: str) -> None:
    """fp16 comes with a gradient scaler, through which the alignment's gradient must pass: steps as in float32."""
    runs = {}
    for mode in ("none", precision):
        settings = {"use_cpu": False, "fp16": mode == "fp16", "bf16": mode == "bf16", "max_steps": 8}
        args = HeRAConfig(
            **sft_args(tmp_path / mode, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings),
            learning_rate=1e-3,
            num_neighbors=3,
            aligned_heads=["L1H3", "L0H1"],
            alignment_weight=1.0,
        )
        trainer = HeRATrainer(
            AutoModelForImageTextToText.from_pretrained(saved["llava"], dtype=torch.float32),
            args,
            train_dataset=image_dataset(n=16, with_features=8),
            processing_class=AutoProcessor.from_pretrained(saved["llava"]),
            peft_config=lora_config(),
        )
        trainer.train()
        runs[mode] = trainer
    for key in ("lm_loss", "alignment_loss"):
        plain, mixed = ([entry[key] for entry in run.state.log_history if key in entry] for run in runs.values())
        assert mixed == pytest.approx(plain, rel=2e-2), key
    assert runs[precision].criterion.temperature == pytest.approx(runs["none"].criterion.temperature, rel=1e-3)


@pytest.mark.parametrize("checkpoint", os.environ.get("HERA_TEST_CHECKPOINTS", "").split(","))
def test_calibrated_checkpoints(checkpoint: str) -> None:
    """GPTQ and AWQ checkpoints, whose layers have no `weight`: heads add up, and a gradient reaches them."""
    if not checkpoint:
        pytest.skip("HERA_TEST_CHECKPOINTS names no checkpoint")
    pytest.importorskip("gptqmodel")
    try:
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, device_map={"": 0})
    except ValueError:  # a language model
        model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map={"": 0})
    model = with_lora(model)
    accessor = get_head_accessor(model)
    layers = accessor.layers_with_heads[:2]
    check_projections(model, accessor, layers)
    for layer in layers:
        projection, num_heads = accessor.projection(layer), accessor.num_heads(layer)
        assert passes_gradient(projection, num_heads)
        pooled = torch.randn(3, num_heads, accessor.head_dim(layer), device="cuda")
        with evaluating(model):
            z = project_heads(projection, pooled, range(num_heads))
            expected = torch.einsum("bhd,hdo->bho", pooled, projection_blocks(projection, num_heads))
        assert deviation(z, expected) <= 1e-2
