"""What happens to the model before the first step, and by what the best one can be chosen."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import NoStep, config, trainer
from tiny import build_vlm, image_dataset, save_tiny_dinov2

import hera_trainer.trainer as trainer_module
from hera_trainer import HeadRanking, HeRALoss, get_head_accessor, read_run
from hera_trainer.alignment.alignment import Alignment
from hera_trainer.alignment.checks import check_rows_train, check_whole_layers
from hera_trainer.data.pool import check_pool
from hera_trainer.heads.checks import other_ranking_advice

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

    @pytest.mark.parametrize("settings", [{}, {"auto_find_batch_size": True, "num_neighbors": 4}])
    def test_streams_and_batch_sizes_that_are_found(self, tmp_path, settings):
        rows = image_dataset(n=5, seed=1, with_features=8)
        rows = rows if settings else rows.to_iterable_dataset()
        run = self.run(tmp_path, rows, callbacks=[NoStep()], **settings)
        with pytest.raises(ValueError, match=r"needs 6 evaluation rows with an image.* there are 5"):
            run.train()

    @pytest.mark.parametrize("metric", ["alignment_mknn_image/aligned", "eval_alignment_mknn/top", "image_gain"])
    def test_by_what_the_monitor_measures(self, tmp_path, metric):
        run = self.run(tmp_path, image_dataset(n=8, seed=1, with_features=8), metric, callbacks=[NoStep()])
        with pytest.raises(ValueError, match="is measured by the monitor"):
            run.train()

    def test_terms_of_the_loss_are_better_when_they_are_smaller(self, tmp_path):
        def chosen(metric, **kwargs):
            best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", **kwargs}
            return config(tmp_path, metric_for_best_model=metric, **best).greater_is_better

        assert not chosen("eval_alignment_loss/spread") and not chosen("eval_alignment_loss")
        assert chosen("eval_accuracy") and chosen("eval_alignment_loss/spread", greater_is_better=True)

    def test_evaluating_alone_chooses_no_model(self, tmp_path):
        rows = image_dataset(n=5, seed=1, with_features=8)
        assert self.run(tmp_path, rows).evaluate()["eval_alignment_left_out"] == 5

    @pytest.mark.parametrize("metric", ["eval_alignment_loss", "eval_loss"])
    def test_by_one_that_it_gives(self, tmp_path, metric):
        run = self.run(tmp_path, image_dataset(n=6 if "align" in metric else 5, seed=1, with_features=8), metric)
        run.train()
        assert run.state.best_metric == next(entry[metric] for entry in run.state.log_history if metric in entry)


class TestReadyRanking:
    """One that ranks heads otherwise than the run would is used, and says so."""

    def said(self, tmp_path, caplog, **changes):
        own = trainer(tmp_path / "own", ranking_num_samples=20)
        own.prepare_alignment()
        other = replace(own.head_ranking, **changes)
        for given in (other, tmp_path / "ranking.json"):
            other.save(tmp_path / "ranking.json")
            caplog.clear()
            run = trainer(tmp_path, head_ranking=given)
            run.prepare_alignment()
            run.prepare_alignment()
            assert run.aligned_heads == other.select(m=run.args.num_aligned_heads)
        return [r.message for r in caplog.records if "is not the one that this run would make" in r.message]

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"k": 5}, "k is 5, not 3"),
            ({"context": "image"}, "images were in context"),
            ({"center": True}, "compared centred, not by cosines"),
            ({"normalize": False, "clip_quantile": 0.9}, "clipped at quantile 0.9, by dot products, not by cosines"),
        ],
    )
    def test_that_differs(self, tmp_path, caplog, changes, words):
        (message,) = self.said(tmp_path, caplog, **changes)
        assert words in message and "`head_ranking_path`" in message

    def test_by_another_teacher(self):
        own = HeadRanking(torch.zeros(2, 4), torch.zeros(2), k=3, num_samples=20, teacher="org/one")
        settings = {"k": 3, "clip_quantile": None, "center": False, "normalize": True}
        assert "'org/one', not 'org/two'" in other_ranking_advice(own, teacher="org/two", **settings)
        local = replace(own, teacher="dinov2")  # as a run's folder has it
        assert other_ranking_advice(local, teacher="/models/dinov2", **settings) is None
        for unknown in ("org/one", ""):
            assert other_ranking_advice(own, teacher=unknown, **settings) is None

    def test_that_is_its_own(self, tmp_path, caplog):
        assert not self.said(tmp_path, caplog)


def test_evaluating_a_finished_run(tmp_path, caplog):
    """The run's ranking stays, a head that it has not aligned is named, and nothing need be trained."""
    rows = image_dataset(n=12, seed=1, with_features=8)
    trainer(tmp_path, max_steps=1, num_aligned_heads=2).train()
    before = (tmp_path / "head_ranking.json").read_text()
    aligned = read_run(tmp_path).record["aligned_heads"]
    others = [f"L{layer}H{head}" for layer in range(3) for head in range(4) if f"L{layer}H{head}" not in aligned]

    def frozen(heads):
        run = trainer(tmp_path, eval_dataset=rows, aligned_heads=heads)
        run.model.requires_grad_(False)
        return run

    run = frozen(others[:2])
    assert run.evaluate()["eval_alignment_loss"] > 0
    assert (tmp_path / "head_ranking.json").read_text() == before
    said = [record.message for record in caplog.records if "is measured at the heads" in record.message]
    assert len(said) == 1 and " ".join(aligned) in said[0] and " ".join(others[:2]) in said[0]
    caplog.clear()
    frozen(aligned).evaluate()
    assert "with the objective's parameters (such as the temperature) that a run begins with" in caplog.text
    assert "they are in its checkpoints alone" in caplog.text
    trainer(tmp_path, eval_dataset=rows, alignment_weight=0.0).evaluate()
    assert "is measured at the heads" not in caplog.text
    with pytest.raises(ValueError, match="No trainable parameter"):
        run.train()


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_persistent_workers_do_not_keep_another_data_set(tmp_path, weight):
    """Each data set has its own loss: the one of a run whose workers do not stay."""
    first, second = (image_dataset(n=12, seed=seed, with_features=8) for seed in (3, 4))
    expected, found = (
        trainer(
            tmp_path,
            eval_dataset=first,
            alignment_weight=weight,
            dataloader_num_workers=1,
            dataloader_persistent_workers=persistent,
            **NAMED,
        )
        for persistent in (False, True)
    )
    for rows in (None, first, second, {"a": first, "b": second}, None):
        one, other = ({n: v for n, v in run.evaluate(rows).items() if "loss" in n} for run in (expected, found))
        assert one == pytest.approx(other) and one
    kept = dict(found._eval_dataloaders)
    assert list(kept) == ["eval"] and found.evaluate() and found._eval_dataloaders == kept  # its workers stay
    found.eval_dataset = second
    assert found.evaluate()["eval_loss"] == pytest.approx(expected.evaluate(second)["eval_loss"])
    assert found.args.dataloader_persistent_workers


@pytest.mark.parametrize("way", ["loaded", "tp", "fp8"])
def test_layers_that_are_not_whole_are_refused(way, monkeypatch):
    model, _ = build_vlm("llava")
    monkeypatch.setattr(type(model), "is_distributed_loading_by_transformers", property(lambda model: way == "loaded"))
    accelerator = SimpleNamespace(
        parallelism_config=SimpleNamespace(tp_enabled=way == "tp"), mixed_precision="fp8" if way == "fp8" else "bf16"
    )
    with pytest.raises(ValueError, match="fp8" if way == "fp8" else "FSDP2"):
        check_whole_layers(model, accelerator)
    monkeypatch.undo()
    check_whole_layers(model, SimpleNamespace(parallelism_config=None, mixed_precision="bf16"))


def test_rows_without_an_image_are_counted(tmp_path):
    rows = image_dataset(n=24)
    rows = rows.map(lambda row, i: {"images": row["images"] if i % 8 else []}, with_indices=True)
    save_tiny_dinov2(tmp_path / "teacher")
    teacher = {"teacher_model_name_or_path": str(tmp_path / "teacher")}
    run = trainer(tmp_path, dataset=rows, gradient_accumulation_steps=2, **teacher, **NAMED)
    run.prepare_alignment()
    assert run.teacher_vectors.rows_without_image == 3
    # Of vectors that the data brought, it is not known.
    run = trainer(tmp_path, **NAMED)
    run.prepare_alignment()
    assert run.teacher_vectors.rows_without_image == 0


def test_rows_that_train_nothing_are_refused_for_several_processes():
    model, _ = build_vlm("llava")
    accessor = get_head_accessor(model)
    check_rows_train(model, accessor, 5)  # the language model is trained
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("multi_modal_projector" in name)
    check_rows_train(model, accessor, 0)
    with pytest.raises(ValueError, match="5 rows have no image"):
        check_rows_train(model, accessor, 5)


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
