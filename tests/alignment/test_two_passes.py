"""Both passes of an optimizer step compute the same, whatever stands in the way of the forward; or training stops."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import config, logged, trainer, watch_passes
from test_window import make_trainer, run
from tiny import build_vlm, image_dataset

from hera_trainer import HeRATrainer
from hera_trainer.alignment.window import StepWindow


@pytest.fixture
def checks(monkeypatch):
    """The relative differences between the passes that were looked at."""
    return watch_passes(monkeypatch)


class Averaging(torch.optim.SGD):
    """As schedule-free optimizers do: holds an average of the weights in evaluation, and others in training."""

    def __init__(self, parameters, **kwargs):
        super().__init__(parameters, **kwargs)
        self.other = [p.detach().clone() * 1.5 for group in self.param_groups for p in group["params"]]
        self.mode = "train"

    @torch.no_grad()
    def _swap(self, mode):
        if mode != self.mode:
            self.mode = mode
            for p, other in zip((p for g in self.param_groups for p in g["params"]), self.other, strict=True):
                kept = p.clone()
                p.copy_(other)
                other.copy_(kept)

    def train(self):
        self._swap("train")

    def eval(self):
        self._swap("eval")


def test_optimizers_that_swap_weights_for_evaluation(tmp_path, checks):
    model, processor = build_vlm("llava")
    aligned = HeRATrainer(
        model,
        config(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            eval_on_start=True,
        ),
        train_dataset=image_dataset(n=24, with_features=8),
        eval_dataset=image_dataset(n=8, seed=3, with_features=8),
        processing_class=processor,
        optimizers=(Averaging(model.parameters(), lr=1e-3), None),
    )
    aligned.train()
    assert len(checks) == 6 and max(checks) < 1e-6  # both micro-batches of each step, since each follows an evaluation


def test_passes_are_compared_in_the_first_step_and_after_evaluations_and_resumes(tmp_path, checks):
    kwargs = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "steps"}
    kwargs |= {"eval_dataset": image_dataset(n=8, seed=3, with_features=8), "save_steps": 4}
    first = trainer(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, **kwargs)
    first.train()
    assert len(checks) == 4  # steps 1 and 3
    checks.clear()
    trainer(tmp_path, max_steps=6, **kwargs).train(resume_from_checkpoint=True)
    assert len(checks) == 2 and max(checks) < 1e-6


def test_activated_lora(tmp_path):
    """aLoRA finds its positions in `PeftModel.forward`."""
    losses = {}
    for cut in ((16, 1), (4, 4)):
        model, processor = build_vlm("llava")
        tokens = processor.tokenizer.encode("assistant", add_special_tokens=False)
        torch.manual_seed(0)
        lora = LoraConfig(
            target_modules=["q_proj", "v_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
            alora_invocation_tokens=tokens,
        )
        model = get_peft_model(model, lora)
        hooks = [len(module._forward_pre_hooks) for module in model.modules()]
        recorder = run(make_trainer(tmp_path / f"{cut}", "llava", cut, model=model, processor=processor))
        losses[cut] = logged(recorder.trainer, "alignment_loss")[0]
        # The adapter acts on some of the positions: with all or none of them, the loss would be another one.
        assert recorder.trainer.model.peft_config["default"].alora_invocation_tokens == tokens
        # PEFT's, which it takes away at the end of a forward pass: none may be left early.
        assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert losses[4, 4] == pytest.approx(losses[16, 1], rel=1e-5)


class Editing(HeRATrainer):
    """Changes its batch on the way to the loss: labels of some tokens and all pixels, these in place."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        labels = inputs["labels"].clone()
        last = (labels != -100).int().flip(1).argmax(1)
        labels[torch.arange(len(labels)), labels.shape[1] - 1 - last] = -100
        inputs["pixel_values"].mul_(-0.5)
        return super().compute_loss(model, {**inputs, "labels": labels}, *args, **kwargs)


def test_a_subclass_that_edits_batches(tmp_path, checks):
    losses = {}
    for cut in ((16, 1), (8, 2), (4, 4)):
        recorder = run(make_trainer(tmp_path / f"{cut}", "llava", cut, trainer_class=Editing))
        losses[cut] = logged(recorder.trainer, "alignment_loss")[0]
    assert losses[8, 2] == losses[4, 4] == pytest.approx(losses[16, 1], rel=1e-5)
    plain = run(make_trainer(tmp_path / "plain", "llava", (16, 1)))
    assert logged(plain.trainer, "alignment_loss")[0] != pytest.approx(losses[16, 1], rel=1e-3)
    assert len(checks) == 6 and max(checks) < 1e-6


class Random(HeRATrainer):
    """Noise from torch's generator is the same in both passes, also outside of the model."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        noise = torch.randn_like(inputs["pixel_values"])
        return super().compute_loss(model, {**inputs, "pixel_values": noise}, *args, **kwargs)


def test_a_subclass_that_draws_random_numbers(tmp_path, checks):
    run(make_trainer(tmp_path, "llava", (4, 4), trainer_class=Random))
    assert len(checks) == 4 and max(checks) < 1e-6


@pytest.mark.parametrize("accumulation", [1, 2])
def test_image_tokens_that_are_cut_get_trls_message(tmp_path, accumulation, monkeypatch):
    """Of the first forward that meets them; here of every row, which would be refused before."""
    aligned = trainer(tmp_path, max_steps=1, gradient_accumulation_steps=accumulation, max_length=8)
    with pytest.raises(ValueError, match=r"or raise `max_length` \(8\), which cuts labels"):
        aligned.train()
    monkeypatch.setattr("hera_trainer.data.teacher_vectors.check_expected_pool", lambda *args: None)
    aligned = trainer(tmp_path, max_steps=1, gradient_accumulation_steps=accumulation, max_length=8)
    with pytest.raises(ValueError, match=r"The current `max_length` \(8\) is too short"):
        aligned.train()


def test_a_forward_that_asks_for_gradients_is_refused(tmp_path):
    aligned = make_trainer(tmp_path, "llava", (4, 4))

    def scaled(module, args, out):
        return out * 1.01 if torch.is_grad_enabled() else out

    aligned.model.get_decoder().layers[0].self_attn.v_proj.register_forward_hook(scaled)
    with pytest.raises(RuntimeError, match="two passes of an optimizer step do not agree"):
        aligned.train()


def test_rounding_is_no_difference():
    """As large as the tolerance, and just above it."""

    class Nothing:
        def __call__(self, *args):
            return None

    from hera_trainer.data.batch import TeacherBatch

    heads = torch.randn(2, 3, 8)
    teacher = TeacherBatch(torch.ones(3, 4), torch.ones(3, dtype=torch.bool))
    mask = torch.ones(3, 5, dtype=torch.bool)
    window = StepWindow(Nothing(), [(heads, teacher, mask)], [0], torch.device("cpu"))
    window.check(heads * 1.0009, torch.float32)
    window.check(heads * 1.04, torch.bfloat16)
    window.check(torch.full_like(heads, torch.nan), torch.float32)  # the contrast leaves it out and counts it
    for factor, dtype in ((1.002, torch.float32), (1.02, torch.float16), (1.06, torch.bfloat16)):
        with pytest.raises(RuntimeError, match="do not agree"):
            window.check(heads * factor, dtype)
