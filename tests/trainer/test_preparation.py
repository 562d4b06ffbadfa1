"""What happens to the model before the first step, and by what the best one can be chosen."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from runs import NoStep, config, trainer
from tiny import build_vlm, image_dataset

import hera_trainer.trainer as trainer_module
from hera_trainer import HeRALoss
from hera_trainer.alignment.alignment import Alignment
from hera_trainer.data.pool import check_pool

NAMED = {"aligned_heads": ["L0H1", "L1H2"]}


@pytest.mark.parametrize("full_eval", [False, True])
def test_heads_are_ranked_where_the_model_is_trained(tmp_path, monkeypatch, full_eval):
    """With `bf16_full_eval`, Trainer leaves it to `train` to move the model there."""
    order = []
    ranking, move = trainer_module.cached_ranking, trainer_module.HeRATrainer._move_model_to_device

    def rank(*args, **kwargs):
        order.append("rank")
        return ranking(*args, **kwargs)

    def moved(self, model, device):
        order.append("move")
        return move(self, model, device)

    monkeypatch.setattr(trainer_module, "cached_ranking", rank)
    monkeypatch.setattr(trainer_module.HeRATrainer, "_move_model_to_device", moved)
    run = trainer(tmp_path, max_steps=1, bf16_full_eval=full_eval, ranking_num_samples=20)
    run.prepare_alignment()
    assert order == ["move", "rank"]


def test_samples_are_compared_where_the_accelerator_is():
    """An engine may move the model there only when training begins."""
    model, _ = build_vlm("llava")
    accelerator = SimpleNamespace(
        device=torch.device("meta"),
        num_processes=1,
        scaler=None,
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend="NO")),
    )
    alignment = Alignment(model, HeRALoss(num_neighbors=3), accelerator=accelerator)
    assert alignment.device.type == "meta"
    alignment = Alignment(model, HeRALoss(num_neighbors=3))
    assert alignment.device == model.device


@pytest.mark.parametrize("bf16", [True, False])
def test_projections_are_checked_in_the_precision_of_training(tmp_path, monkeypatch, bf16):
    """Flash attention takes 16 bit alone."""
    seen = []
    check = trainer_module.check_projections

    def checked(*args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return check(*args)

    monkeypatch.setattr(trainer_module, "check_projections", checked)
    trainer(tmp_path, bf16=bf16, **NAMED).prepare_alignment()
    assert seen == [bf16]


class TestBestModel:
    def run(self, tmp_path, rows, metric="eval_alignment_loss", **kwargs):
        steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        best = {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": False}
        return trainer(tmp_path, eval_dataset=rows, **steps, **best, **NAMED, **kwargs)

    @pytest.mark.parametrize(
        ("rows", "metric"),
        [
            (image_dataset(n=5, seed=1, with_features=8), "eval_alignment_loss"),
            (image_dataset(n=5, seed=1, with_features=8), "alignment_loss"),
            ({"held_out": image_dataset(n=5, seed=1, with_features=8)}, "eval_held_out_alignment_loss"),
        ],
    )
    def test_by_a_loss_that_evaluation_cannot_give(self, tmp_path, rows, metric):
        run = self.run(tmp_path, rows, metric, callbacks=[NoStep()])
        with pytest.raises(ValueError, match=r"needs 6 evaluation rows with an image.* there are 5"):
            run.train()

    def test_evaluating_alone_chooses_no_model(self, tmp_path):
        rows = image_dataset(n=5, seed=1, with_features=8)
        assert self.run(tmp_path, rows).evaluate()["eval_alignment_left_out"] == 5

    @pytest.mark.parametrize("metric", ["eval_alignment_loss", "eval_loss"])
    def test_by_one_that_it_gives(self, tmp_path, metric):
        run = self.run(tmp_path, image_dataset(n=6 if "align" in metric else 5, seed=1, with_features=8), metric)
        run.train()
        assert run.state.best_metric == next(entry[metric] for entry in run.state.log_history if metric in entry)


def test_predicting_gives_what_evaluating_gives(tmp_path):
    rows = image_dataset(n=12, seed=1, with_features=8)
    run = trainer(tmp_path, eval_dataset=rows, **NAMED)
    evaluated, predicted = run.evaluate(), run.predict(rows).metrics
    assert evaluated["eval_alignment_loss"] > 0
    for name in ("loss", "alignment_loss", "alignment_left_out"):
        assert predicted[f"test_{name}"] == pytest.approx(evaluated[f"eval_{name}"], rel=1e-6)


def test_predicting_on_rows_that_cannot_be_aligned(tmp_path):
    """They need not be: nothing is asked of them, and no teacher is loaded for them."""
    run = trainer(tmp_path, teacher=str(tmp_path / "nowhere"), **NAMED)
    for rows in (image_dataset(n=6, seed=1), [dict(row) for row in image_dataset(n=6, seed=1)]):
        metrics = run.predict(rows).metrics
        assert metrics["test_loss"] > 0 and "test_alignment_loss" not in metrics


def test_a_ranking_that_nothing_needs_is_not_read(tmp_path):
    """Without alignment and without a monitor the trainer is SFTTrainer."""
    run = trainer(tmp_path, alignment_weight=0.0, head_ranking_path=str(tmp_path / "nowhere.json"), max_steps=1)
    run.train()
    run.save_model()
    assert run.head_ranking is None and not (tmp_path / "head_ranking.json").exists()


def test_a_step_without_its_first_pass_is_refused(tmp_path, monkeypatch):
    """A `training_step` of one's own that does not call the trainer's would train another loss."""
    run = trainer(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=1, **NAMED)
    monkeypatch.setattr(run, "_first_pass", lambda *args: None)
    with pytest.raises(RuntimeError, match="2 micro-batches, which are compared as one"):
        run.train()


@pytest.mark.parametrize("split", [True, False])
def test_pool_of_batches_that_are_split(tmp_path, monkeypatch, split):
    """`split_batches` divides one batch among the processes."""
    args = config(tmp_path, per_device_train_batch_size=4, accelerator_config={"split_batches": split})
    monkeypatch.setattr(type(args), "world_size", 4)
    assert args.pool_size() == (4 if split else 16)
    if not split:
        check_pool(args)
        return
    with pytest.raises(ValueError, match=r"4 \(.* = 4 x 1 x 1 \+ 0\), but 5 are needed"):
        check_pool(args)
