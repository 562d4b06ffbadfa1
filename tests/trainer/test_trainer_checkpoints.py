"""The trainer's own parameter, the temperature, and its checkpoints: resumed runs equal uninterrupted ones."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import assert_same_parameters, config, logged, parameters, trainer
from safetensors.torch import load_file, save_file
from tiny import build_vlm, image_dataset, save_tiny_dinov2
from transformers import LlavaForConditionalGeneration, TrainerCallback

from hera_trainer import AttentionHead, HeRATrainer, VisionTeacher, read_run
from hera_trainer.cli.sft import _checkpoint
from hera_trainer.runs.checkpoints import find_checkpoint, put_aside
from hera_trainer.runs.weights import load_weights


class Keep(TrainerCallback):
    """Keeps the parameters after each step, and ends training after one of them, as an interruption would."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = parameters(model)
        control.should_training_stop |= state.global_step == self.stop_at


class TestTemperature:
    def test_one_adam_step(self, tmp_path):
        """Adam's first step moves a parameter by the learning rate, gradient accumulation or not; and the gradient
        does not pile up from step to step."""
        run = trainer(tmp_path, max_steps=1, gradient_accumulation_steps=2, learning_rate=1e-2)
        run.train()
        assert abs(math.log(run.criterion.temperature / 0.3)) == pytest.approx(1e-2, rel=1e-3)
        assert run.criterion.log_temperature.grad is None

    def test_fixed_temperature(self, tmp_path):
        run = trainer(tmp_path, max_steps=2, learn_temperature=False, learning_rate=1e-2)
        run.train()
        assert run.criterion.temperature == pytest.approx(0.3)

    def test_outside_the_clipped_norm(self, tmp_path):
        """The logged gradient norm is that of the model's parameters."""
        norms = []

        class Norm(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                norms.append(
                    math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
                )

        run = trainer(tmp_path, max_steps=1, alignment_weight=5.0, max_grad_norm=1e6, callbacks=[Norm()])
        run.train()
        assert logged(run, "grad_norm")[0] == pytest.approx(norms[0], rel=1e-5)

    def test_clamped(self, tmp_path):
        class Cold(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                with torch.no_grad():
                    run.criterion.log_temperature.fill_(math.log(0.005))

        run = trainer(tmp_path, max_steps=1, learning_rate=1e-4, callbacks=[Cold()])
        run.train()
        assert run.criterion.temperature == pytest.approx(0.01)


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("family", "tuning", "scope", "queue"),
        [
            ("llava", "full", "step", 0),
            ("llava", "lora", "micro_batch", 0),
            ("llava", "lora_dropout", "step", 0),
            ("qwen2_5_vl", "full", "micro_batch", 7),
            ("qwen2_5_vl", "lora_dropout", "step", 20),
            ("idefics3", "full", "step", 20),
            ("idefics3", "lora_dropout", "micro_batch", 0),
        ],
    )
    def test_resumed_run_equals_uninterrupted_run(self, tmp_path, family, tuning, scope, queue):
        dropout = 0.1 if tuning == "lora_dropout" else 0.0
        lora = None if tuning == "full" else LoraConfig(target_modules="all-linear", lora_dropout=dropout)
        kwargs = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
        kwargs |= {"contrast_scope": scope, "queue_size": queue}
        whole = trainer(tmp_path / "whole", family, peft_config=lora, max_steps=6, **kwargs)
        whole.train()
        begun = trainer(tmp_path / "half", family, peft_config=lora, max_steps=6, callbacks=[Keep(stop_at=3)], **kwargs)
        begun.train()
        assert begun.state.global_step == 3
        resumed = trainer(tmp_path / "half", family, peft_config=lora, max_steps=6, **kwargs)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.aligned_heads == whole.aligned_heads
        for name in ("loss", "lm_loss", "alignment_loss", "temperature"):
            assert logged(resumed, name) == logged(whole, name) and len(logged(whole, name)) == 6
        assert_same_parameters(parameters(resumed.model), parameters(whole.model))
        assert torch.equal(resumed.criterion.log_temperature, whole.criterion.log_temperature)

    def test_ranking_comes_from_the_checkpoint(self, tmp_path, monkeypatch):
        kwargs = {"save_strategy": "steps", "save_steps": 1}
        first = trainer(tmp_path, max_steps=1, **kwargs)
        first.train()
        path = tmp_path / "checkpoint-1" / "head_ranking.json"
        content = json.loads(path.read_text())
        content["scores"][2][2] = -1.0  # so that it is told apart from a fresh ranking
        path.write_text(json.dumps(content))
        monkeypatch.setattr("hera_trainer.heads.ranking_cache.rank_samples", None)
        second = trainer(tmp_path, max_steps=2, **kwargs)
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert second.aligned_heads[0] == AttentionHead(2, 2)

    @pytest.mark.parametrize("differs", [True, False])
    def test_a_ranking_that_is_given_does_not_change_the_heads(self, tmp_path, caplog, differs):
        kwargs = {"save_strategy": "steps", "save_steps": 1}
        first = trainer(tmp_path, max_steps=1, **kwargs)
        first.train()
        scores = -first.head_ranking.scores if differs else first.head_ranking.scores
        given = replace(first.head_ranking, scores=scores)
        second = trainer(tmp_path, max_steps=2, head_ranking=given, **kwargs)
        caplog.clear()
        second.train(resume_from_checkpoint=True)
        assert second.aligned_heads == first.aligned_heads
        said = [r.message for r in caplog.records if "goes on with the heads of its checkpoint" in r.message]
        assert len(said) == differs
        if differs:
            for heads in (first.aligned_heads, given.select(m=len(first.aligned_heads))):
                assert " ".join(map(str, heads)) in said[0]

    def test_a_resumed_run_without_alignment_goes_on_with_its_weights(self, tmp_path):
        """All weights of a type whose checkpoint has other names than the model."""
        kwargs = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "alignment_weight": 0.0}
        kwargs |= {"learning_rate": 1e-2}
        whole = trainer(tmp_path / "whole", **kwargs)
        whole.train()
        trainer(tmp_path / "half", callbacks=[Keep(stop_at=2)], **kwargs).train()
        resumed = trainer(tmp_path / "half", **kwargs)
        resumed.train(resume_from_checkpoint=True)
        assert_same_parameters(parameters(resumed.model), parameters(whole.model))

    @pytest.mark.parametrize(("tuning", "weight"), [("full", 1.0), ("lora", 1.0), ("full", 0.0)])
    def test_best_model_is_loaded(self, tmp_path, tuning, weight):
        """Asked for the largest loss while the loss falls: the best model is the first one."""
        keep = Keep()
        run = trainer(
            tmp_path,
            peft_config=None if tuning == "full" else LoraConfig(target_modules="all-linear"),
            eval_dataset=image_dataset(n=6, seed=3, with_features=8),
            max_steps=3,
            learning_rate=1e-2,
            metric_for_best_model="loss",
            greater_is_better=True,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            alignment_weight=weight,
            callbacks=[keep],
        )
        run.train()
        assert run.state.best_global_step == 1
        assert_same_parameters(parameters(run.model), keep.after[1])
        if weight:  # the objective's parameters are those that belong to these weights
            saved = [load_file(tmp_path / f"checkpoint-{step}" / "hera_objective.safetensors") for step in (1, 3)]
            first, last = (tensors["log_temperature"] for tensors in saved)
            assert torch.equal(run.criterion.log_temperature.detach(), first) and not torch.equal(first, last)

    def test_a_run_that_goes_on_as_its_control_is_told(self, tmp_path, caplog):
        kwargs = {"save_strategy": "steps", "save_steps": 1, "aligned_heads": ["L0H1"]}
        trainer(tmp_path, max_steps=1, **kwargs).train()
        trainer(tmp_path, max_steps=2, **kwargs).train(resume_from_checkpoint=True)
        assert "was trained with `teacher_control=" not in caplog.text
        trainer(tmp_path, max_steps=3, teacher_control="permuted", **kwargs).train(resume_from_checkpoint=True)
        assert "was trained with `teacher_control='none'`, this run goes on with 'permuted'" in caplog.text

    def test_temperature_is_no_part_of_the_adapter(self, tmp_path):
        run = trainer(
            tmp_path,
            peft_config=LoraConfig(target_modules="all-linear"),
            max_steps=1,
            save_strategy="steps",
            save_steps=1,
        )
        run.train()
        names = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors").keys()
        assert names and all("lora" in name for name in names)

    def test_model_card_names_method_and_paper(self, tmp_path):
        run = trainer(tmp_path, max_steps=1)
        run.create_model_card("tiny")
        card = (tmp_path / "README.md").read_text()
        assert "2606.23885" in card and "hera" in card


def test_a_finished_run_that_is_resumed_takes_no_further_step(tmp_path):
    """Its last checkpoint lies within an epoch: 48 samples, of which three steps of eight are taken."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    rows = image_dataset(n=48, with_features=8)
    first = trainer(tmp_path, dataset=rows, per_device_train_batch_size=8, **settings)
    first.train()
    again = trainer(tmp_path, dataset=rows, per_device_train_batch_size=8, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3 and not (tmp_path / "checkpoint-4").exists()
    assert_same_parameters(parameters(again.model), parameters(first.model))
    assert again.criterion.temperature == first.criterion.temperature


# --- Dtypes: what was saved comes back bit for bit -------------------------------------------------------------------


def in_full_precision(model):
    """A float32 model, though its configuration names another dtype."""
    model.config.dtype = torch.bfloat16
    return model


def projector_in_full_precision(model):
    """A bf16 model of which the projector, in float32, is trained alone."""
    model = model.to(torch.bfloat16).requires_grad_(False)
    model.config.dtype = torch.bfloat16
    model.model.multi_modal_projector.float().requires_grad_(True)
    return model


def every_other_layer(model):
    """Half precisions of two kinds, neither of which holds the other's numbers."""
    model.config.dtype = torch.float16
    model.model.language_model.layers[0].to(torch.float16)
    model.model.language_model.layers[1].to(torch.bfloat16)
    return model


def adapters_in_half_precision(model):
    """As SFTTrainer has them on a quantized backbone."""
    torch.manual_seed(0)
    model = get_peft_model(model.to(torch.bfloat16), LoraConfig(target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


DTYPES = {
    "float32 under a bf16 config": in_full_precision,
    "float32 projector on bf16": projector_in_full_precision,
    "float16 and bf16": every_other_layer,
}


class Llava(LlavaForConditionalGeneration):
    """LLaVA with a buffer that is saved."""

    def __init__(self, llava_config):
        super().__init__(llava_config)
        self.register_buffer("scale", torch.ones(7))


@pytest.mark.parametrize("form", DTYPES)
def test_weights_and_buffers_are_loaded_bit_for_bit(tmp_path, form):
    saved, model = (DTYPES[form](Llava(build_vlm("llava")[0].config)) for _ in range(2))
    with torch.no_grad():
        for tensor in saved.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape))
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    saved.save_pretrained(tmp_path)
    load_weights(model, tmp_path)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtypes[name] and torch.equal(tensor, saved.state_dict()[name]), name
    assert any(not torch.equal(tensor, tensor.bfloat16()) for tensor in model.state_dict().values())


@pytest.mark.parametrize("form", ["float32 under a bf16 config", "float32 projector on bf16", "bf16 adapters"])
def test_resumed_run_of_any_dtypes_equals_uninterrupted_run(tmp_path, form):
    def run(folder, steps, **kwargs):
        model, processor = build_vlm("llava")
        model = adapters_in_half_precision(model) if form == "bf16 adapters" else DTYPES[form](model)
        settings = {"bf16": "bf16 config" not in form, "learning_rate": 1e-2, "max_steps": 4}
        settings |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        keep = Keep(stop_at=steps)
        return keep, HeRATrainer(
            model,
            config(tmp_path / folder, **settings, **kwargs),
            train_dataset=image_dataset(n=24, with_features=8),
            eval_dataset=image_dataset(n=6, seed=3, with_features=8),
            processing_class=processor,
            callbacks=[keep],
        )

    kept, whole = run("whole", 4)
    whole.train()
    run("half", 2)[1].train()
    _, resumed = run("half", 4)
    resumed.train(resume_from_checkpoint=True)
    assert_same_parameters(parameters(resumed.model), parameters(whole.model))
    assert logged(resumed, "loss") == logged(whole, "loss") and len(logged(whole, "loss")) == 4
    # And as the best model, after two more steps: by a rule that prefers the first.
    first, second = logged(whole, "eval_loss")
    choice = {"metric_for_best_model": "loss", "greater_is_better": first > second, "load_best_model_at_end": True}
    _, best = run("best", 4, **choice)
    best.train()
    assert best.state.best_global_step == 2 and first != second
    assert_same_parameters(parameters(best.model), kept.after[2])


# --- The best weights: those of the best step that was saved ----------------------------------------------------------


class Scripted(HeRATrainer):
    """Evaluates to losses that are set."""

    losses: dict[int, float]

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        loss = self.losses[self.state.global_step]
        if loss is KeyboardInterrupt:
            raise loss
        output.metrics["eval_loss"] = loss
        return output


def best_run(path, losses, save_steps, name=None, resume=None, **kwargs):
    """A run of a LoRA adapter, the parameters after each of its steps, and its record."""
    model, processor = build_vlm("llava")
    lora = LoraConfig(r=4, target_modules=".*language_model.*o_proj")
    if name is not None:
        model = get_peft_model(model, lora)  # the untrained default one
        model.add_adapter(name, lora)
        model.set_adapter(name)
        lora = None
    keep = Keep()
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": save_steps}
    args = config(
        path,
        max_steps=len(losses),
        aligned_heads=["L1H0", "L2H1"],
        learning_rate=1e-2,
        load_best_model_at_end=True,
        **evaluating,
        **kwargs,
    )
    rows = image_dataset(n=24, with_features=8)
    held_out = image_dataset(n=8, seed=3, with_features=8)
    run = Scripted(model, args, None, rows, held_out, processor, peft_config=lora, callbacks=[keep])
    run.losses = losses
    run.train(resume_from_checkpoint=resume)
    return run, keep.after, read_run(path)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_best_step_is_one_that_was_saved(tmp_path, weight):
    """Steps 2 and 4 are saved. When 2 was, it was the best one; 3 was better than 4, and is gone."""
    losses = {1: 9.0, 2: 5.0, 3: 3.0, 4: 4.0}
    run, after, record = best_run(tmp_path / "a", losses, 2, alignment_weight=weight)
    assert_same_parameters(parameters(run.model), after[2])
    assert run.best_step == 2 and run.state.best_global_step == 3
    if weight:
        assert record.best_step == 2
    # None of the best steps was saved: nothing is loaded.
    run, after, record = best_run(tmp_path / "b", {1: 2.0, 2: 5.0, 3: 6.0}, 3, alignment_weight=weight)
    assert_same_parameters(parameters(run.model), after[3])
    assert run.state.best_global_step == 1 and run.best_step is record.best_step is None


def test_the_best_weights_of_a_named_adapter(tmp_path):
    """They are its own, not those of the adapter beside it."""
    run, after, record = best_run(tmp_path, {1: 9.0, 2: 5.0, 3: 6.0}, 1, name="mine")
    assert run.best_step == record.best_step == 2
    assert_same_parameters(parameters(run.model), after[2])
    names = [name for name in after[2] if ".mine." in name]
    assert names and any(not torch.equal(after[2][n], after[2][n.replace(".mine.", ".default.")]) for n in names)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_run_that_begins_anew_has_its_own_checkpoints(tmp_path, weight):
    """Not those of the run before it in its folder: neither as the best of its steps nor to go on from."""
    best_run(tmp_path, {1: 9.0, 2: 8.0, 3: 7.0}, 1, alignment_weight=weight)
    before = {path.name: load_file(path / "adapter_model.safetensors") for path in tmp_path.glob("checkpoint-*")}
    assert set(before) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    with pytest.warns(
        UserWarning, match="holds checkpoints of an earlier run .checkpoint-1, checkpoint-2, checkpoint-3"
    ):
        run, after, _ = best_run(tmp_path, {1: 2.0, 2: 5.0}, 2, alignment_weight=weight, seed=1)
    assert run.best_step is None and run.state.best_global_step == 1  # which only the earlier run has saved
    assert_same_parameters(parameters(run.model), after[2])
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2"}
    for name, weights in before.items():
        assert_same_parameters(load_file(tmp_path / "earlier-run" / name / "adapter_model.safetensors"), weights)
    if weight:
        assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.warns(UserWarning, match="holds checkpoints of an earlier run .checkpoint-2"):
        best_run(tmp_path, {1: 2.0}, 1, alignment_weight=weight)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("earlier-*/checkpoint-2")) == [
        "earlier-run-2/checkpoint-2",
        "earlier-run/checkpoint-2",
    ]


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_an_earlier_run_goes_on_as_itself(tmp_path, weight):
    """Resumed from where it was put aside, while the folder holds checkpoints of the run that did: its best step,
    measurements and time are its own."""
    more = {"alignment_weight": weight, "monitor_steps": 1, "monitor_num_samples": 8, "num_neighbors": 3}
    losses = {1: 9.0, 2: 8.0, 3: 10.0, 4: 11.0}
    whole, _, expected = best_run(tmp_path / "whole", losses, 2, **more)
    assert whole.best_step == 2
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        best_run(out, {**losses, 3: KeyboardInterrupt}, 1, **more)
    begun = read_run(out).record["started"]
    with pytest.warns(UserWarning, match=r"checkpoint-1, checkpoint-2.*lie in its folder `earlier-run`"):
        best_run(out, {1: 5.0, 2: 4.0}, 2, **{**more, "seed": 5})
    other = load_file(out / "checkpoint-2" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"an earlier run .checkpoint-2.*lie in its folder `earlier-run-2`"):
        run, _, record = best_run(out, losses, 2, resume=str(out / "earlier-run" / "checkpoint-2"), **more)
    assert run.best_step == 2 and run.state.best_model_checkpoint == str(out / "earlier-run" / "checkpoint-2")
    assert_same_parameters(parameters(run.model), parameters(whole.model))
    assert_same_parameters(load_file(out / "earlier-run-2" / "checkpoint-2" / "adapter_model.safetensors"), other)
    assert record.record["started"] == begun
    assert record.image_gains == expected.image_gains


def test_the_best_checkpoint_stays_where_a_copy_of_another_goes_on(tmp_path):
    """And one that was trained without alignment has learned no objective that could be missed."""
    out, losses = tmp_path / "out", {1: 9.0, 2: 10.0, 3: 11.0}
    best_run(out, {1: 9.0, 2: 10.0}, 1, alignment_weight=0.0)
    shutil.copytree(out / "checkpoint-2", tmp_path / "safe" / "checkpoint-2")
    best = load_file(out / "checkpoint-1" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"holds checkpoints of an earlier run .checkpoint-2"):
        run, _, _ = best_run(out, losses, 1, resume=str(tmp_path / "safe" / "checkpoint-2"))
    assert run.best_step == 1
    assert_same_parameters(load_file(out / "checkpoint-1" / "adapter_model.safetensors"), best)


@pytest.mark.parametrize("state", ["half", "none"])
def test_the_best_checkpoint_of_which_a_kill_left_half_of_another(tmp_path, state):
    """It waits under the other name, and is gone on from."""
    losses = {1: 9.0, 2: 8.0, 3: 10.0, 4: 11.0}
    whole, _, _ = best_run(tmp_path / "whole", losses, 2)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        best_run(out, {**losses, 3: KeyboardInterrupt}, 2)
    waiting = (out / "checkpoint-2").rename(out / "replaced-checkpoint-2")
    (out / "checkpoint-2").mkdir()
    if state == "half":
        (out / "checkpoint-2" / "trainer_state.json").write_text((waiting / "trainer_state.json").read_text()[:200])
    with pytest.warns(UserWarning, match="the writing of checkpoint-2 was interrupted"):
        run, _, _ = best_run(out, losses, 2, resume=True)
    assert run.best_step == 2
    assert_same_parameters(parameters(run.model), parameters(whole.model))


def test_what_is_put_aside(tmp_path):
    """All, but for the one that is trained on, of which weights may be all there is. Nothing is deleted."""
    for step, files in ((2, ["hera_complete", "trainer_state.json"]), (4, ["trainer_state.json"]), (6, []), (8, [])):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in [*files, "adapter_model.safetensors"]:
            (folder / name).touch()
    (tmp_path / "checkpoint-9").touch()  # no folder
    (tmp_path / "log.json").touch()
    with pytest.warns(
        UserWarning,
        match=r"an earlier run \(checkpoint-2, checkpoint-4, checkpoint-6\).*_checkpoint='.*/earlier-run/checkpoint-2'",
    ):
        put_aside(tmp_path, ["some/model", str(tmp_path / "checkpoint-8")], ["log.json", "not there"])
    names = {*(f"earlier-run/checkpoint-{step}" for step in (2, 4, 6)), "checkpoint-8"}
    assert {path.name for path in tmp_path.iterdir()} == {"earlier-run", "checkpoint-8", "checkpoint-9"}
    assert all((tmp_path / name / "adapter_model.safetensors").is_file() for name in names)
    assert sorted(path.name for path in (tmp_path / "earlier-run").glob("*.json")) == ["log.json"]
    put_aside(tmp_path / "not there", records=["log.json"])
    (tmp_path / "log.json").touch()
    put_aside(tmp_path, [str(tmp_path / "checkpoint-8")], ["log.json"])  # a log without a run
    assert (tmp_path / "log.json").is_file()
    # Which is where `hera sft` begins anew once more.
    shutil.rmtree(tmp_path / "checkpoint-8")
    assert _checkpoint("true", str(tmp_path), True) is _checkpoint("true", str(tmp_path), False) is None
    named = tmp_path / "earlier-run" / "checkpoint-2"
    assert find_checkpoint(str(named), tmp_path) == str(named)


# --- The queue of past samples belongs to one run --------------------------------------------------------------------


def with_teacher_vectors(n, seed):
    """The same rows, with the vectors of one teacher or another."""
    rows = image_dataset(n=n, with_features=8)
    vectors = np.random.default_rng(seed).standard_normal((n, 8)).astype(np.float32)
    feature = datasets.List(datasets.Value("float32"))
    return rows.remove_columns("teacher_features").add_column("teacher_features", list(vectors), feature=feature)


QUEUE = {"queue_size": 18, "save_strategy": "steps", "save_steps": 2, "aligned_heads": ["L0H1", "L1H2"]}
CHANGES = {
    "nothing": ({}, None),
    "similarity": ({"similarity": "cosine"}, None),  # past samples are kept as they are
    "heads": ({"aligned_heads": ["L0H1", "L2H2"]}, "aligned heads differ"),
    "order of heads": ({"aligned_heads": ["L1H2", "L0H1"]}, "aligned heads differ"),
    "number of heads": ({"aligned_heads": ["L0H1"]}, "aligned heads differ"),
    "teacher": ({"dataset": with_teacher_vectors(24, seed=2)}, "teacher differ"),
    "width": ({"dataset": image_dataset(n=24, with_features=9)}, "teacher, teacher width differ"),
    "control": ({"teacher_control": "permuted"}, "teacher differ"),
}


@pytest.mark.parametrize("has_metadata", [True, False], ids=["", "without metadata"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_queue_is_taken_by_the_same_run_alone(tmp_path, change, has_metadata, caplog):
    rows = with_teacher_vectors(24, seed=1)
    trainer(tmp_path, dataset=rows, max_steps=2, **QUEUE).train()
    path = tmp_path / "checkpoint-2" / "hera_queue.safetensors"
    stored = load_file(path)
    assert [len(stored["teacher"]), stored["heads"].shape[1]] == [12, 12]
    settings, message = CHANGES[change]
    if not has_metadata:  # as earlier versions wrote it: known are the widths, and the heads from the file beside it
        save_file(stored, path)
        message = {"teacher": None, "control": None, "width": "teacher width differ"}.get(change, message)
    resumed = trainer(tmp_path, **{"dataset": rows, "max_steps": 3, **QUEUE, **settings})
    resumed.train(resume_from_checkpoint=True)
    # The step's own six samples, with the twelve of the queue or without.
    assert logged(resumed, "alignment_pool")[-1] == (18 if message is None else 6)
    warnings = [record.message for record in caplog.records if "The queue of past samples" in record.message]
    assert len(warnings) == (message is not None) and all(f"({message})" in warning for warning in warnings)


def test_the_queue_knows_its_teacher_by_its_weights(tmp_path, caplog):
    teachers = [save_tiny_dinov2(tmp_path / f"teacher{seed}", seed=seed) for seed in range(2)]
    moved = shutil.copytree(teachers[0], tmp_path / "elsewhere")
    rows = image_dataset(n=24)
    trainer(tmp_path / "out", dataset=rows, teacher=teachers[0], max_steps=2, **QUEUE).train()
    for teacher, pool in ((str(moved), 18), (VisionTeacher.from_pretrained(teachers[0]), 18), (teachers[1], 6)):
        resumed = trainer(tmp_path / "out", dataset=rows, teacher=teacher, max_steps=3, **QUEUE)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert logged(resumed, "alignment_pool")[-1] == pool
    assert sum("(teacher differ)" in record.message for record in caplog.records) == 1
