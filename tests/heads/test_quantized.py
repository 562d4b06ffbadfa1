"""4-bit backbones on a CPU: train, evaluate, train; and what bitsandbytes' inference layout would break."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, prepare_model_for_kbit_training
from reference import Recorder, step_gradients
from tiny import image_dataset, save_vlm, sft_args
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from hera_trainer import HeRAConfig, HeRATrainer
from hera_trainer.heads.quantized import four_bit_layers, frozen_packing

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_vlm("llava", tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128)


def four_bit(double):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def trainer(tmp_path, model, quantization_config=None, processing_class=None, dropout=0.1, **kwargs):
    args = HeRAConfig(
        **sft_args(
            tmp_path,
            **{
                "per_device_train_batch_size": 6,
                "num_neighbors": 3,
                "num_aligned_heads": 3,
                "learning_rate": 1e-2,
                **kwargs,
            },
        )
    )
    return HeRATrainer(
        model,
        args,
        train_dataset=image_dataset(n=24, with_features=8),
        eval_dataset=image_dataset(n=12, seed=3, with_features=8),
        processing_class=processing_class,
        quantization_config=quantization_config,
        peft_config=LoraConfig(target_modules="all-linear", exclude_modules=".*vision_tower.*", lora_dropout=dropout),
    )


def packed(model):
    return [
        layer for layer in four_bit_layers(model) if getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    ]


@pytest.mark.parametrize("double", [False, True])
def test_train_evaluate_train(tmp_path, saved, double):
    run = trainer(tmp_path, saved, four_bit(double), max_steps=6, eval_strategy="steps", eval_steps=2)
    assert len(four_bit_layers(run.model)) > 0
    before = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
    run.train()
    assert not packed(run.model)
    losses = [entry["lm_loss"] for entry in run.state.log_history if "lm_loss" in entry]
    evaluations = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0] and evaluations[-1] < evaluations[0]
    moved = {n for n, p in run.model.named_parameters() if n in before and not torch.equal(p, before[n])}
    # also below the last 4-bit layer: the gradient passed through all of them, after evaluations too
    assert any("layers.0.self_attn.q_proj" in name for name in moved)


def test_evaluation_changes_nothing(tmp_path, saved):
    """Evaluating between steps leaves the trajectory as it is without evaluation (apart from dropout: an evaluation's
    data loader draws a random number)."""
    quiet = trainer(tmp_path / "a", saved, four_bit(True), dropout=0.0, max_steps=4)
    watched = trainer(
        tmp_path / "b", saved, four_bit(True), dropout=0.0, max_steps=4, eval_strategy="steps", eval_steps=1
    )
    quiet.train()
    watched.train()
    losses = [[entry["loss"] for entry in run.state.log_history if "lm_loss" in entry] for run in (quiet, watched)]
    assert losses[0] == losses[1]


def test_model_prepared_for_kbit_training(tmp_path, saved):
    model = AutoModelForImageTextToText.from_pretrained(saved, quantization_config=four_bit(True))
    model = prepare_model_for_kbit_training(model)
    processor = AutoProcessor.from_pretrained(saved)
    run = trainer(tmp_path, model, processing_class=processor, max_steps=4)
    run.train()
    losses = [entry["lm_loss"] for entry in run.state.log_history if "lm_loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("double", [False, True])
def test_gradients_equal_those_of_dequantized_weights(tmp_path, saved, double):
    """One optimizer step of two micro-batches: the whole step's gradient, with the 4-bit projections unpacked by hand.
    The adapters are bf16, as TRL makes them for quantized models, so the two agree within bf16's rounding."""
    run = trainer(
        tmp_path,
        saved,
        four_bit(double),
        dropout=0.0,
        max_steps=1,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        alignment_weight=5.0,
        gradient_checkpointing=False,
    )
    with torch.no_grad():  # with B = 0, half of the adapter has no gradient to compare
        for name, parameter in run.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    recorder = Recorder(run)
    run.train()
    expected = step_gradients(recorder, 5.0, "step", [0, 0])
    largest = max(value.abs().max() for value in expected.values())
    compared = 0
    for name, value in expected.items():
        if value.ndim and value.abs().max() > 1e-2 * largest:
            cosine = torch.nn.functional.cosine_similarity(
                value.flatten().float(), recorder.gradients[name].flatten().float(), dim=0
            )
            assert cosine > 0.999, name
            compared += 1
    assert compared > 10
    assert recorder.gradients["log_temperature"] == pytest.approx(expected["log_temperature"].item(), rel=2e-2)


def test_packed_weights_are_refused(tmp_path, saved):
    """An eval-mode forward of the user's own, before training, has rewritten the weights (on CPUs that do so)."""
    model = AutoModelForImageTextToText.from_pretrained(saved, quantization_config=four_bit(False)).eval()
    with torch.no_grad():
        model.get_decoder()(input_ids=torch.arange(6)[None])
    if not packed(model):
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes keeps the training layout")
    processor = AutoProcessor.from_pretrained(saved)
    with pytest.raises(ValueError, match="frozen_packing"):
        trainer(tmp_path, model, processing_class=processor, max_steps=1).train()


def test_frozen_packing_keeps_the_layout_and_the_flags(saved):
    model = AutoModelForImageTextToText.from_pretrained(saved, quantization_config=four_bit(False)).eval()
    flags = [module.training for module in model.modules()]
    with frozen_packing(model), torch.no_grad():
        model.get_decoder()(input_ids=torch.arange(6)[None])
    assert not packed(model)
    assert [module.training for module in model.modules()] == flags


def test_adapter_from_quantized_training_loads_with_peft_alone(tmp_path, saved):
    from peft import PeftModel

    run = trainer(tmp_path, saved, four_bit(True), max_steps=2)
    run.train()
    run.save_model()
    base = AutoModelForImageTextToText.from_pretrained(saved)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    ours = {n: p for n, p in run.model.named_parameters() if "lora" in n}
    theirs = dict(loaded.named_parameters())
    assert ours and all(torch.equal(ours[n].float(), theirs[n].float()) for n in ours)
