"""What the trainer adds to its logs, and to which of them."""

from __future__ import annotations

from typing import Any

import pytest
from runs import logged, trainer
from tiny import image_dataset
from transformers import TrainerCallback

NAMED = {"aligned_heads": ["L0H1", "L1H2"]}
ADDED = ("lm_loss", "alignment_loss", "alignment_pull", "temperature")


class Logs(TrainerCallback):
    """Logs something of its own, as one process alone may do."""

    trainer: Any

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 2:  # where Trainer logs itself, it would take that for its own entry
            self.trainer.log({"mine": float(state.global_step)})


class StopsAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def test_logs_of_a_callback_take_nothing_and_wait_for_nobody(tmp_path, monkeypatch):
    """The sums of all processes belong to the entry that all of them write."""
    plain = trainer(tmp_path / "a", max_steps=4, logging_steps=2, **NAMED)
    plain.train()
    callback = Logs()
    run = trainer(tmp_path / "b", max_steps=4, logging_steps=2, callbacks=[callback], **NAMED)
    callback.trainer, steps, reduce = run, [], run.accelerator.reduce

    def counted(*args, **kwargs):
        steps.append(run.state.global_step)
        return reduce(*args, **kwargs)

    monkeypatch.setattr(run.accelerator, "reduce", counted)
    run.train()
    assert logged(run, "mine") == [1.0, 3.0]
    assert set(steps) == {2, 4}
    for name in ADDED:
        assert len(logged(run, name)) == 2
        assert logged(run, name) == pytest.approx(logged(plain, name), rel=1e-6)


def test_evaluating_on_the_training_data(tmp_path):
    """As callbacks do: `train_loss` is in that log, too."""
    rows = image_dataset(n=12, seed=1, with_features=8)

    class Evaluates(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 2:
                found.append(run.evaluate(rows, metric_key_prefix="train"))

    found = []
    run = trainer(tmp_path, max_steps=4, logging_steps=2, callbacks=[Evaluates()], **NAMED)
    run.train()
    for evaluated, entry in zip(found, [e for e in run.state.log_history if "loss" in e], strict=True):
        assert evaluated["train_loss"] > 0 and "alignment_pull" not in evaluated
        assert entry["lm_loss"] > 0 and entry["alignment_loss"] > 0


def test_an_epoch_that_ends_with_an_evaluation(tmp_path):
    """The model is in eval mode when the epoch is logged."""
    rows = image_dataset(n=12, seed=1, with_features=8)
    every = {"logging_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 2}
    run = trainer(tmp_path, eval_dataset=rows, **every, **NAMED)
    run.train()
    epochs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(epochs) == 2
    for entry in epochs:
        assert entry["lm_loss"] + entry["alignment_loss"] * run.args.alignment_weight == pytest.approx(
            entry["loss"], rel=1e-3
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alignment_weight": 1e-4}, True),
        ({"alignment_weight": 3.0}, False),
        ({"alignment_weight": 1e-4, "target_pull": 0.3}, False),
        ({"alignment_weight": 1e-4, "max_steps": 1000}, False),
    ],
)
def test_a_pull_that_moves_nothing_in_a_short_run(tmp_path, caplog, settings, said):
    """Is said once a run, at its first log."""
    run = trainer(tmp_path, **{"max_steps": 3, **settings}, callbacks=[StopsAfter(3)], **NAMED)
    for _ in range(2):
        caplog.clear()
        run.train()
        found = [record.message for record in caplog.records if "pulls at the aligned heads" in record.message]
        assert len(found) == said
        if said:
            pull = logged(run, "alignment_pull")[0]
            assert f"with {pull:.2g} of the strength" in found[0] and "a run of 3 steps" in found[0]
