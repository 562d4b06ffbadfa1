"""The loss of an optimizer step does not depend on how the step is cut into micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig
from reference import Recorder, assert_gradients_equal, step_gradients
from tiny import build_vlm, image_dataset, sft_args
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import HeRAConfig, HeRATrainer
from hera_trainer.data.collator import TEACHER_COLUMN, RowCollator
from hera_trainer.heads import capture

WEIGHT = 5.0
CUTS = [(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)]  # batch x accumulation
FAMILIES = ["llava", "qwen2_5_vl", "idefics3"]
CHECKPOINTING = {"none": None, "non_reentrant": False, "reentrant": True}


def dataset(n=16, without=()):
    rows = image_dataset(n=n, with_features=8)
    if not without:
        return rows
    features = [None if i in without else vector for i, vector in enumerate(rows[TEACHER_COLUMN])]
    return rows.remove_columns(TEACHER_COLUMN).add_column(TEACHER_COLUMN, features)


def make_trainer(
    tmp_path,
    family,
    cut,
    lora=None,
    checkpointing=None,
    data=None,
    trainer_class=HeRATrainer,
    model=None,
    processor=None,
    **kwargs,
):
    if model is None:
        model, processor = build_vlm(family)
    defaults = {"max_steps": 1, "max_grad_norm": 0.0, "num_neighbors": 3, "alignment_weight": WEIGHT}
    args = HeRAConfig(
        **sft_args(
            tmp_path,
            **{
                **defaults,
                "per_device_train_batch_size": cut[0],
                "gradient_accumulation_steps": cut[1],
                "aligned_heads": ["L1H3", "L0H1", "L1H0"],  # not in the last layer: the first pass ends early
                "gradient_checkpointing": checkpointing is not None,
                "gradient_checkpointing_kwargs": None if checkpointing is None else {"use_reentrant": checkpointing},
                **kwargs,
            },
        )
    )
    data = dataset() if data is None else data
    trainer = trainer_class(model, args, train_dataset=data, processing_class=processor, peft_config=lora)
    trainer._get_train_sampler = lambda *args: SequentialSampler(data)  # the same 16 samples for every cut
    return trainer


def lora_config(dropout=0.0):
    return LoraConfig(target_modules="all-linear", r=4, lora_dropout=dropout, init_lora_weights=False)


def run(trainer):
    recorder = Recorder(trainer)
    trainer.train()
    assert len(recorder.batches) == trainer.args.gradient_accumulation_steps
    return recorder


def lm_gradients(tmp_path, family, cut, lora):
    """SFTTrainer's own gradients for the same cut (alignment switched off; that this is SFTTrainer is tested apart)."""
    trainer = make_trainer(tmp_path, family, cut, lora, alignment_weight=0.0)
    gradients = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Keep())
    trainer.train()
    collator = trainer.data_collator
    assert type(collator) is RowCollator and type(collator.inner) is DataCollatorForVisionLanguageModeling
    return gradients


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_cut_has_the_same_alignment_gradient(tmp_path, family, tuning):
    """Total gradient of each cut = hook-free computation over the 16 samples; alignment gradients equal one another."""
    alignment, totals = {}, {}
    for cut in CUTS:
        lora = lora_config() if tuning == "lora" else None
        recorder = run(make_trainer(tmp_path / f"{cut}", family, cut, lora))
        expected = step_gradients(recorder, WEIGHT, "step", [0] * cut[1])
        assert_gradients_equal(recorder.gradients, expected, tolerance=5e-4)
        plain = lm_gradients(tmp_path / f"{cut} plain", family, cut, lora_config() if tuning == "lora" else None)
        assert set(plain) == set(recorder.gradients) - {"log_temperature"}
        alignment[cut] = {
            name: value - plain.get(name, torch.zeros_like(value)) for name, value in recorder.gradients.items()
        }
        totals[cut] = recorder.gradients
    for cut in CUTS[1:]:
        assert_gradients_equal(alignment[cut], alignment[CUTS[0]], tolerance=5e-4)
        if family != "qwen2_5_vl":  # whose language-model loss depends on the cut in TRL
            assert_gradients_equal(totals[cut], totals[CUTS[0]], tolerance=5e-4)


OBJECTIVES = {
    "cosine": {"similarity": "cosine"},
    "dot": {"similarity": "dot"},
    "centered": {"similarity": "centered_cosine", "teacher_similarity": "centered_cosine"},
    "feature": {"alignment_objective": "feature"},
    "cka": {"alignment_objective": "cka"},
    "uniformity": {"alignment_objective": "uniformity"},
    "layers": {"alignment_granularity": "layer", "aligned_heads": ["L1", "L0"]},
    "layer_feature": {
        "alignment_granularity": "layer",
        "aligned_heads": ["L1"],
        "alignment_objective": "feature",
    },
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_cut_has_the_same_gradient_under_every_objective(tmp_path, name):
    """Of the model and of the objective's own parameters, with checkpointing in one of the cuts."""
    totals = []
    for cut, checkpointing in ((CUTS[0], None), (CUTS[2], None), (CUTS[2], False), (CUTS[4], None)):
        folder = tmp_path / f"{cut} {checkpointing}"
        trainer = make_trainer(folder, "llava", cut, lora_config(), checkpointing, **OBJECTIVES[name])
        recorder = run(trainer)
        expected = step_gradients(recorder, WEIGHT, "step", [0] * cut[1])
        assert_gradients_equal(recorder.gradients, expected, tolerance=5e-4)
        totals.append(recorder.gradients)
    for other in totals[1:]:
        assert_gradients_equal(other, totals[0], tolerance=5e-4)


LAYERS = {"alignment_granularity": "layer", "aligned_heads": ["L2", "L0"]}  # the last and the first


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_have_the_gradient_of_a_hook_free_computation(tmp_path, family, checkpointing):
    """Also of the last one, with LoRA and its dropout."""
    lora = lora_config(dropout=0.1)
    recorder = run(make_trainer(tmp_path, family, (4, 4), lora, CHECKPOINTING[checkpointing], **LAYERS))
    assert [str(layer) for layer in recorder.trainer.aligned_heads] == ["L2", "L0"]
    expected = step_gradients(recorder, WEIGHT, "step", recorder.seeds)
    assert_gradients_equal(recorder.gradients, expected, tolerance=5e-4)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_layers_of_a_fully_trained_model_in_one_pass(tmp_path, checkpointing):
    trainer = make_trainer(tmp_path, "llava", (16, 1), checkpointing=CHECKPOINTING[checkpointing], **LAYERS)
    recorder = run(trainer)
    expected = step_gradients(recorder, WEIGHT, "step", [0])
    assert_gradients_equal(recorder.gradients, expected, tolerance=5e-4)
    # The comparison would notice a missing alignment term above the attention.
    plain = step_gradients(recorder, 0.0, "step", [0])
    name = next(n for n in plain if n.endswith("layers.2.mlp.down_proj.weight"))
    assert (expected[name] - plain[name]).abs().max() > 0.1 * plain[name].abs().max()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_draws_the_same_masks_in_both_passes(tmp_path, family, checkpointing):
    trainer = make_trainer(tmp_path, family, (4, 4), lora_config(dropout=0.1), CHECKPOINTING[checkpointing])
    recorder = run(trainer)
    expected = step_gradients(recorder, WEIGHT, "step", recorder.seeds)
    assert_gradients_equal(recorder.gradients, expected, tolerance=5e-4)


def test_checkpointing_changes_nothing(tmp_path):
    """The same seed, the same gradients, whatever is recomputed."""
    gradients = [
        run(make_trainer(tmp_path / name, "llava", (4, 4), lora_config(dropout=0.1), value)).gradients
        for name, value in CHECKPOINTING.items()
    ]
    assert_gradients_equal(gradients[1], gradients[0], tolerance=1e-5)
    assert_gradients_equal(gradients[2], gradients[0], tolerance=1e-5)


@pytest.mark.parametrize("cut", [(8, 2), (2, 8)])
def test_rows_without_an_image(tmp_path, cut):
    recorder = run(make_trainer(tmp_path, "llava", cut, data=dataset(without=(0, 1, 5, 11))))
    expected = step_gradients(recorder, WEIGHT, "step", [0] * cut[1])
    assert_gradients_equal(recorder.gradients, expected, tolerance=5e-4)
    assert recorder.trainer.state.log_history[0]["alignment_pool"] == 12


def test_bf16_autocast_is_within_rounding_of_fp32(tmp_path):
    exact = run(make_trainer(tmp_path / "a", "llava", (4, 4)))
    rounded = run(make_trainer(tmp_path / "b", "llava", (4, 4), bf16=True))
    for name, value in exact.gradients.items():
        if value.abs().max() > 1e-3 * max(v.abs().max() for v in exact.gradients.values()):
            cosine = torch.nn.functional.cosine_similarity(value.flatten(), rounded.gradients[name].flatten(), dim=0)
            assert cosine > 0.99, name


def test_temperature_is_the_same_for_every_cut(tmp_path):
    """The same gradient, and the same value after five steps (the model's own steps are too small to matter)."""
    runs = {}
    for cut in CUTS:
        trainer = make_trainer(
            tmp_path / f"{cut}", "idefics3", cut, data=dataset(n=80), max_steps=5, learning_rate=1e-3
        )
        recorder = Recorder(trainer)
        trainer.train()
        runs[cut] = (recorder.gradients["log_temperature"].item(), trainer.criterion.log_temperature.item())
    first = runs[CUTS[0]]
    assert first[1] != pytest.approx(math.log(0.3), abs=1e-3)
    for cut in CUTS[1:]:
        assert runs[cut] == pytest.approx(first, rel=1e-4)


def test_step_scope_differs_from_micro_batch_scope(tmp_path):
    """What the exactness is about: the gradient of contrast within micro-batches is another one."""
    step = run(make_trainer(tmp_path / "a", "llava", (8, 2))).gradients
    micro = run(make_trainer(tmp_path / "b", "llava", (8, 2), contrast_scope="micro_batch")).gradients
    name = next(n for n in step if n.endswith("layers.0.self_attn.v_proj.weight"))
    assert torch.nn.functional.cosine_similarity(step[name].flatten(), micro[name].flatten(), dim=0) < 0.95


def test_no_second_pass_without_alignment_or_with_one_micro_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("hera_trainer.alignment.alignment.StepWindow", None)
    run(make_trainer(tmp_path / "a", "llava", (16, 1)))
    trainer = make_trainer(tmp_path / "b", "llava", (4, 4), alignment_weight=0.0)
    trainer.train()
    assert trainer.state.global_step == 1


class FromTheBeginning(TrainerCallback):
    """Sets counts to zero when training begins: what prepares the run is not counted."""

    def __init__(self, calls):
        self.calls = calls

    def on_train_begin(self, args, state, control, **kwargs):
        self.calls.update(dict.fromkeys(self.calls, 0))


def test_first_pass_ends_after_the_deepest_head(tmp_path):
    """It runs neither later layers nor the LM head, and each image is prepared once."""
    trainer = make_trainer(tmp_path, "llava", (4, 4))
    calls = {"layer 1": 0, "layer 2": 0, "processor": 0}
    layers = trainer.model.get_decoder().layers

    def counter(name):
        def hook(*args):
            calls[name] += 1

        return hook

    layers[1].self_attn.q_proj.register_forward_hook(counter("layer 1"))
    layers[2].self_attn.q_proj.register_forward_hook(counter("layer 2"))
    processor = trainer.processing_class.image_processor
    original = type(processor).__call__
    trainer.add_callback(FromTheBeginning(calls))

    class Counting(type(processor)):
        def __call__(self, *args, **kwargs):
            calls["processor"] += 1
            return original(self, *args, **kwargs)

    processor.__class__ = Counting
    trainer.train()
    assert calls == {"layer 1": 8, "layer 2": 4, "processor": 4}


def test_first_pass_ends_after_the_deepest_layer(tmp_path):
    """It runs all of that layer and nothing of the next."""
    settings = {"alignment_granularity": "layer", "aligned_heads": ["L1"]}
    trainer = make_trainer(tmp_path, "llava", (4, 4), **settings)
    calls = {"L1": 0, "L2": 0}
    trainer.add_callback(FromTheBeginning(calls))

    def count(name):
        def hook(*args):
            calls[name] += 1

        return hook

    layers = trainer.model.get_decoder().layers
    layers[1].mlp.register_forward_hook(count("L1"))
    layers[2].self_attn.q_proj.register_forward_hook(count("L2"))
    trainer.train()
    assert calls == {"L1": 8, "L2": 4}


def test_last_window_that_is_too_short_is_skipped_and_counted(tmp_path):
    """20 samples, 16 a step: the second step of the epoch has 4, too few for 3 neighbours."""
    trainer = make_trainer(tmp_path, "llava", (4, 4), data=dataset(n=20), max_steps=2)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["alignment_skipped"] == 0 and first["alignment_pool"] == 16
    assert second["alignment_skipped"] == 1 and second["alignment_pool"] == 0
    assert second["loss"] == pytest.approx(second["lm_loss"], rel=1e-6)


@pytest.mark.parametrize("scope", ["step", "micro_batch"])
def test_loss_that_is_not_finite_is_left_out(tmp_path, scope, caplog):
    """A head that overflows costs the step its alignment term, not the run."""

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer.criterion.log_temperature.data.fill_(float("nan") if state.global_step == 1 else -2.0)

    trainer = make_trainer(
        tmp_path, "llava", (8, 2), data=dataset(n=48), max_steps=3, contrast_scope=scope, learn_temperature=False
    )
    trainer.add_callback(Break())
    trainer.train()
    counts = [entry["alignment_not_finite"] for entry in trainer.state.log_history[:3]]
    assert counts == [0, 1 if scope == "step" else 2, 0]
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert trainer.state.log_history[1]["loss"] == pytest.approx(trainer.state.log_history[1]["lm_loss"], rel=1e-6)
    assert sum("was NaN or infinite" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(("scope", "queue"), [("step", 0), ("step", 8), ("micro_batch", 0)])
def test_representation_that_overflows_is_left_out(tmp_path, scope, queue, caplog, monkeypatch):
    """One sample's z is infinite in the second step, in both passes: no alignment term in that step, training goes on,
    and no later step meets it again in the queue."""
    project, broken = capture.project_heads, []

    def overflow(projection, pooled, heads):
        vectors = project(projection, pooled, heads)
        if trainer.model.training and trainer.state.global_step == 1:
            scale = torch.ones(len(vectors), 1, 1)
            scale[0] = 3e38  # finite, as overgrown weights are, so that a gradient of zero stays zero on the way back
            vectors = vectors * scale * scale
            broken.append(not vectors[0].isfinite().any() and vectors[1:].isfinite().all())
        return vectors

    monkeypatch.setattr(capture, "project_heads", overflow)
    trainer = make_trainer(
        tmp_path,
        "llava",
        (8, 2),
        lora_config(),
        data=dataset(n=48),
        max_steps=3,
        contrast_scope=scope,
        queue_size=queue,
    )
    trainer.train()
    assert broken and all(broken)
    logs = trainer.state.log_history[:3]
    assert [entry["alignment_not_finite"] for entry in logs] == [0, 1 if scope == "step" else 2, 0]
    assert [entry["alignment_skipped"] for entry in logs] == [entry["alignment_not_finite"] for entry in logs]
    assert logs[1]["loss"] == pytest.approx(logs[1]["lm_loss"], rel=1e-6)
    assert math.isfinite(logs[1]["grad_norm"]) and logs[1]["temperature"] == pytest.approx(logs[2]["temperature"], 0.05)
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert trainer.criterion.log_temperature.isfinite()
    if queue:
        past = trainer.alignment.contrast.queue
        assert len(past) == queue and past.heads.isfinite().all()
    assert sum("was NaN or infinite" in record.message for record in caplog.records) == 1


def test_gradient_scaler_reaches_both_passes():
    """The core under fp16's loss scaling: scaled, unscaled, the gradient is the plain one."""
    from hera_trainer.alignment.contrast import Contrast
    from hera_trainer.objectives.contrastive import HeRALoss

    torch.manual_seed(0)
    inputs, teacher = torch.randn(12, 6), torch.randn(12, 5)
    valid = torch.ones(12, dtype=torch.bool)
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(1)
        model, criterion = torch.nn.Linear(6, 4), HeRALoss(num_neighbors=2, similarity="cosine")
        optimizer = torch.optim.SGD([*model.parameters(), criterion.log_temperature], lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, enabled=enabled)
        with torch.no_grad():
            pool = Contrast(criterion)(model(inputs)[None], teacher, valid)
        for start in range(0, 12, 4):
            leaves = model(inputs[start : start + 4])[None]
            scaler.scale(pool.carrier(leaves, [criterion.log_temperature], start, share=1 / 3)).backward()
        scaler.unscale_(optimizer)
        gradients.append([model.weight.grad, model.bias.grad, criterion.log_temperature.grad])
    torch.manual_seed(1)
    model, criterion = torch.nn.Linear(6, 4), HeRALoss(num_neighbors=2, similarity="cosine")
    criterion(model(inputs)[None], teacher).backward()
    expected = [model.weight.grad, model.bias.grad, criterion.log_temperature.grad]
    for plain, scaled, direct in zip(*gradients, expected, strict=True):
        torch.testing.assert_close(plain, direct, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(scaled, direct, rtol=1e-5, atol=1e-7)


def test_schedule_and_norm_are_those_of_sft_trainer(tmp_path):
    """With a vanishing weight, everything that is logged about the model is as without alignment."""
    kwargs = {"max_steps": 3, "max_grad_norm": 0.5, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
    data = dataset(n=48)
    tiny = make_trainer(tmp_path / "a", "llava", (4, 4), data=data, alignment_weight=1e-12, **kwargs)
    none = make_trainer(tmp_path / "b", "llava", (4, 4), data=data, alignment_weight=0.0, **kwargs)
    assert isinstance(none, SFTTrainer)
    tiny.train()
    none.train()
    for a, b in zip(tiny.state.log_history[:3], none.state.log_history[:3], strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "num_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)
