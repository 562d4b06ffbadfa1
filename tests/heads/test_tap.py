"""Gradients of the trainer's step equal those of a hook-free autograd computation."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import (
    Recorder,
    alignment_loss,
    assert_gradients_equal,
    gradients_of,
    head_vectors,
    language_model_loss,
    step_gradients,
)
from tiny import build_vlm, image_dataset, sft_args
from transformers import TrainerCallback

from hera_trainer import HeRAConfig, HeRATrainer, get_head_accessor, rank_heads
from hera_trainer.data.collator import TEACHER_COLUMN
from hera_trainer.heads.modes import without_adapters

WEIGHT = 5.0  # large, so that a wrong alignment gradient cannot hide behind the language-model loss
CHECKPOINTING = {"none": None, "non_reentrant": False, "reentrant": True}
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "idefics3")


class SeededTrainer(HeRATrainer):
    """Draws the same dropout masks in each micro-batch as the reference does."""

    def compute_loss(self, *args, **kwargs):
        if self.model.training:
            self.micro_batch = getattr(self, "micro_batch", -1) + 1
            torch.manual_seed(1000 + self.micro_batch)
        return super().compute_loss(*args, **kwargs)


def make_trainer(
    tmp_path, family, checkpointing=None, lora=None, accumulation=1, fmt="prompt_completion", layers=3, **kwargs
):
    model, processor = build_vlm(family, num_hidden_layers=layers) if layers != 3 else build_vlm(family)
    args = HeRAConfig(
        **sft_args(
            tmp_path,
            per_device_train_batch_size=6,
            gradient_accumulation_steps=accumulation,
            contrast_scope="micro_batch",
            num_neighbors=2,
            alignment_weight=WEIGHT,
            aligned_heads=["L2H3", "L0H1", "L2H0"] if layers == 3 else [f"L{layers - 2}H3", "L0H1"],
            max_steps=1,
            max_grad_norm=0.0,
            gradient_checkpointing=checkpointing is not None,
            gradient_checkpointing_kwargs=None if checkpointing is None else {"use_reentrant": checkpointing},
            **kwargs,
        )
    )
    dataset = image_dataset(n=24, with_features=8, fmt=fmt)
    return SeededTrainer(model, args, train_dataset=dataset, processing_class=processor, peft_config=lora)


def lora_config(dropout=0.0):
    # not initialised to zero: with B = 0, half of the adapter has no gradient to compare
    return LoraConfig(target_modules="all-linear", r=4, lora_dropout=dropout, init_lora_weights=False)


def reference_gradients(recorder):
    seeds = [1000 + i for i in range(len(recorder.batches))]
    return step_gradients(recorder, WEIGHT, "micro_batch", seeds)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_hook_free_computation(tmp_path, family, tuning, checkpointing):
    lora = lora_config() if tuning == "lora" else None
    trainer = make_trainer(tmp_path, family, CHECKPOINTING[checkpointing], lora, accumulation=2)
    recorder = Recorder(trainer)
    trainer.train()
    assert len(recorder.batches) == 2
    expected = reference_gradients(recorder)
    if (family, checkpointing, tuning) == ("qwen3_vl", "reentrant", "lora"):
        # Reentrant checkpointing gives nothing to adapters of this tower, with or without alignment: torch needs an
        # input that requires a gradient, and the pixels don't.
        expected = {name: value for name, value in expected.items() if ".visual.blocks." not in name}
    assert_gradients_equal(recorder.gradients, expected, tolerance=2e-4)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_gradients_with_adapter_dropout(tmp_path, checkpointing, monkeypatch):
    """Dropout acts on the forward pass as without us, and not on the representations (the reference's projection by
    hand has none)."""
    trainer = make_trainer(tmp_path, "llava", CHECKPOINTING[checkpointing], lora_config(dropout=0.3))
    recorder = Recorder(trainer)
    trainer.train()
    assert_gradients_equal(recorder.gradients, reference_gradients(recorder), tolerance=2e-4)


def test_alignment_gradient_matters_in_this_test(tmp_path):
    """The comparison above would notice a missing alignment term."""
    trainer = make_trainer(tmp_path, "llava")
    recorder = Recorder(trainer)
    trainer.train()
    trainer.args.alignment_weight = WEIGHT
    expected = reference_gradients(recorder)
    model, batch = recorder.model, recorder.batches[0]
    logits, _ = head_vectors(model, batch, [(0, 0)], num_heads=4)
    plain = gradients_of(model, language_model_loss(logits, batch["labels"], "mean"))
    name = next(n for n in plain if n.endswith("layers.2.self_attn.o_proj.weight"))
    assert (expected[name] - plain[name]).abs().max() > 0.1 * plain[name].abs().max()


@pytest.mark.parametrize("setting", ["label_smoothing", "image_labels"])
def test_further_forwards_and_labelled_images(tmp_path, setting):
    """Label smoothing runs a second forward, which must not be read; `messages` data put labels on image tokens,
    which must not be pooled."""
    if setting == "label_smoothing":
        trainer = make_trainer(tmp_path, "llava", label_smoothing_factor=0.1)
    else:
        trainer = make_trainer(tmp_path, "llava", fmt="messages")
    recorder = Recorder(trainer)
    trainer.train()
    (batch,) = recorder.batches
    heads = [tuple(head) for head in trainer.aligned_heads]
    log_temperature = recorder.parameters["log_temperature"].requires_grad_()
    recorder.model.train()
    logits, z = head_vectors(recorder.model, batch, heads, num_heads=4)
    align = alignment_loss(z, batch[TEACHER_COLUMN], 2, log_temperature)
    if setting == "label_smoothing":
        log_probs = logits[:, :-1].log_softmax(-1)
        labels = batch["labels"][:, 1:]
        nll = -log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        smooth = -log_probs.mean(-1)
        kept = labels != -100
        lm = (0.9 * nll[kept] + 0.1 * smooth[kept]).mean()
    else:
        assert (batch["labels"] == trainer.model.config.image_token_id).any()
        lm = language_model_loss(logits, batch["labels"], "mean")
    expected = gradients_of(recorder.model, lm + WEIGHT * align, {"log_temperature": log_temperature})
    assert_gradients_equal(recorder.gradients, expected, tolerance=2e-4)


class TwoForwards(SeededTrainer):
    """With a term of one's own, which takes a forward of the other rows' order, before or after the loss."""

    when = "after"

    def compute_loss(self, model, inputs, *args, **kwargs):
        flipped = {name: value.flip(0) for name, value in inputs.items() if torch.is_tensor(value)}
        flipped = {name: value for name, value in flipped.items() if name not in ("labels", TEACHER_COLUMN)}

        def term():
            torch.manual_seed(7)
            return model(**flipped, use_cache=False).logits.square().mean()

        if self.when == "before":
            own = term()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.when == "after":
            own = term()
        if self.when == "unused":
            term()
            own = 0.0
        return loss + own


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
@pytest.mark.parametrize("when", ["before", "after", "unused"])
def test_a_term_that_takes_a_further_forward(tmp_path, when, checkpointing, monkeypatch):
    monkeypatch.setattr(TwoForwards, "when", when)
    monkeypatch.setitem(globals(), "SeededTrainer", TwoForwards)
    trainer = make_trainer(tmp_path, "llava", CHECKPOINTING[checkpointing], lora_config(dropout=0.2))
    recorder = Recorder(trainer)
    trainer.train()
    expected = reference_gradients(recorder)
    if when != "unused":
        (batch,) = recorder.batches
        flipped = {name: value.flip(0) for name, value in batch.items() if name not in ("labels", TEACHER_COLUMN)}
        recorder.model.train()
        torch.manual_seed(7)
        own = gradients_of(recorder.model, recorder.model(**flipped, use_cache=False).logits.square().mean())
        assert any(bool(value.abs().max() > 1e-3 * expected[name].abs().max()) for name, value in own.items())
        expected = {name: value + own[name] if name in own else value for name, value in expected.items()}
    assert_gradients_equal(recorder.gradients, expected, tolerance=2e-4)


# --- Compiled models -------------------------------------------------------------------------------------------------


def compile_model(model, how, backend):
    layers = model.get_decoder().layers
    modules = {
        "model.compile()": [model],
        "layer.compile()": layers,
        "projection.compile()": [layer.self_attn.o_proj for layer in layers],
    }
    for module in modules.get(how, []):
        module.compile(backend=backend)


@pytest.fixture
def compiled_graphs():
    """Counts what was really compiled."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()


def compiled_run(tmp_path, how, backend, checkpointing, lora, layers=3):
    """Evaluates, trains and evaluates: compiled code must notice that hooks come and go."""
    compiled = {"torch_compile": True, "torch_compile_backend": backend} if how == "torch_compile=True" else {}
    trainer = make_trainer(tmp_path, "llava", CHECKPOINTING[checkpointing], lora, layers=layers, **compiled)
    compile_model(trainer.model, how, backend)
    gradients = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            gradients.append({name.replace("_orig_mod.", ""): value for name, value in found.items()})

    trainer.add_callback(Keep())
    evaluation = image_dataset(n=6, with_features=8, seed=3)
    before = trainer.evaluate(evaluation)
    trainer.train()
    after = trainer.evaluate(evaluation)
    return gradients[0], [metrics["eval_alignment_loss"] for metrics in (before, after)]


@pytest.mark.parametrize(
    ("how", "backend", "checkpointing", "tuning"),
    [
        ("torch_compile=True", "eager", "none", "full"),
        ("model.compile()", "eager", "non_reentrant", "full"),
        ("layer.compile()", "eager", "none", "lora"),
        ("layer.compile()", "aot_eager", "non_reentrant", "full"),
        ("projection.compile()", "aot_eager", "none", "full"),
    ],
)
def test_compiled_models(tmp_path, how, backend, checkpointing, tuning, compiled_graphs):
    lora = lora_config() if tuning == "lora" else None
    expected, expected_losses = compiled_run(tmp_path / "eager", "not at all", backend, checkpointing, lora)
    assert compiled_graphs() == 0
    lora = lora_config() if tuning == "lora" else None
    gradients, losses = compiled_run(tmp_path / "compiled", how, backend, checkpointing, lora)
    assert compiled_graphs() > 0
    # Compiled code gives zeros to parameters that eager code leaves without a gradient.
    gradients = {name: value for name, value in gradients.items() if name in expected or value.any()}
    assert_gradients_equal(gradients, expected, tolerance=2e-4)
    assert losses == pytest.approx(expected_losses, rel=1e-5)


def test_code_compiled_for_a_layer_without_a_chosen_head_does_not_run_for_one_with_some(tmp_path):
    expected, _ = compiled_run(tmp_path / "eager", "not at all", "eager", "none", None, layers=6)
    gradients, _ = compiled_run(tmp_path / "compiled", "torch_compile=True", "eager", "none", None, layers=6)
    gradients = {name: value for name, value in gradients.items() if name in expected or value.any()}
    assert_gradients_equal(gradients, expected, tolerance=2e-4)


def test_compiled_code_draws_random_numbers_as_eager_code_does(tmp_path):
    """Both passes of a step must draw the same dropout masks, and the first one is not compiled."""
    settings = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            settings.append(torch._inductor.config.fallback_random)

    trainer = make_trainer(tmp_path, "llava")
    trainer.add_callback(Look())
    trainer.train()
    assert settings == [True] and torch._inductor.config.fallback_random is False


@pytest.mark.parametrize("part", ["model", "layer"])
def test_wrapped_by_torch_compile(tmp_path, part):
    model, processor = build_vlm("llava")
    if part == "model":
        model = torch.compile(model, backend="eager")
    else:
        layers = model.get_decoder().layers
        layers[1] = torch.compile(layers[1], backend="eager")
    args = HeRAConfig(**sft_args(tmp_path, per_device_train_batch_size=12))
    with pytest.raises(ValueError, match=r"`torch_compile=True`.*`model.compile\(\)`"):
        HeRATrainer(model, args, train_dataset=image_dataset(n=12, with_features=8), processing_class=processor)


@pytest.mark.parametrize("lora", [None, lora_config()])
def test_heads_of_a_wrapped_model_can_be_ranked(lora):
    dataset = image_dataset(n=24, with_features=8)
    model, processor = build_vlm("llava")
    expected = rank_heads(model, processor, dataset, k=3, progress=False)
    wrapped = torch.compile(model if lora is None else get_peft_model(model, lora), backend="eager")
    assert get_head_accessor(wrapped).projection(1) is model.get_decoder().layers[1].self_attn.o_proj
    with without_adapters(wrapped):
        assert torch.equal(rank_heads(wrapped, processor, dataset, k=3, progress=False).scores, expected.scores)
