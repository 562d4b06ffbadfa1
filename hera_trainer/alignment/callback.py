"""What a `Trainer` tells the alignment of its optimizer's steps."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainingArguments

from .alignment import Alignment
from .optimizer import note_rates, scheduled_rate


class ObjectiveCallback(TrainerCallback):
    """Trains the objective's parameters beside the model, at the schedule of the model's learning rate. For any
    `Trainer`.

    Args:
        alignment ([`Alignment`]): What the trainer holds.
        learning_rate (`float`, *optional*): Rate that the schedule scales, the trainer's `learning_rate` by default.
    """

    def __init__(self, alignment: Alignment, learning_rate: float | None = None) -> None:
        self.alignment = alignment
        self.learning_rate = learning_rate

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and kwargs.get("optimizer") is not None:
            note_rates(kwargs["optimizer"])

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.alignment.before_optimizer_step()

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        rate = args.learning_rate if self.learning_rate is None else self.learning_rate
        self.alignment.optimizer_step(scheduled_rate(rate, kwargs["optimizer"]))
