"""Training the loss's log temperature beside a model it is no part of."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .files import write_atomically
from .heads.head import AttentionHead
from .loss import HeRALoss


class CompanionOptimizer:
    """AdamW for the log temperature alone, for engines whose optimizer takes only parameters of the model (FSDP,
    DeepSpeed) and for optimizers that a user brings along.

    Stepped with the main optimizer, at its current learning rate, and skipped when that one skips a step.

    Args:
        criterion ([`HeRALoss`]): Its `log_temperature` is trained.
        args ([`~transformers.TrainingArguments`]): Adam's settings are taken from here.
    """

    def __init__(self, criterion: HeRALoss, args: TrainingArguments) -> None:
        self.optimizer = torch.optim.AdamW(
            [criterion.log_temperature],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=0.0,
        )

    def step(self, learning_rate: float) -> None:
        """One update at `learning_rate`."""
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()

    def state_dict(self) -> dict[str, float]:
        """Adam's state: three numbers, or none before the first step."""
        state: dict[str, torch.Tensor] = next(iter(self.optimizer.state.values()), {})
        return {name: value.item() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes what `state_dict` gave."""
        parameter = self.optimizer.param_groups[0]["params"][0]
        if state:
            self.optimizer.state[parameter] = {
                # Adam counts its steps on the CPU
                name: torch.tensor(value, device="cpu" if name == "step" else parameter.device)
                for name, value in state.items()
            }


class TemperatureCallback(TrainerCallback):
    """What the training loop does for a model's parameters and must be done for the log temperature: averaging its
    gradient over processes, stepping the companion optimizer, clamping, and zeroing the gradient.

    Args:
        criterion ([`HeRALoss`]): Holder of `log_temperature`.
        accelerator ([`~accelerate.Accelerator`]): The trainer's.
    """

    def __init__(self, criterion: HeRALoss, accelerator: Accelerator) -> None:
        self.criterion = criterion
        self.accelerator = accelerator
        self.companion: CompanionOptimizer | None = None
        self.is_optimized = False

    def save(self, path: str | os.PathLike, heads: Sequence[AttentionHead]) -> None:
        """Writes the temperature, the companion optimizer and the aligned heads as JSON, atomically."""
        state = {
            "aligned_heads": [str(head) for head in heads],
            "log_temperature": self.criterion.log_temperature.item(),
            "companion_optimizer": None if self.companion is None else self.companion.state_dict(),
        }
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(state, indent=1)))

    def load(self, path: str | os.PathLike, heads: Sequence[AttentionHead]) -> None:
        """Takes what `save` wrote. Warns if other heads were aligned then."""
        state = json.loads(Path(path).read_text())
        with torch.no_grad():
            self.criterion.log_temperature.fill_(state["log_temperature"])
        if self.companion is not None and state["companion_optimizer"]:
            self.companion.load_state_dict(state["companion_optimizer"])
        if state["aligned_heads"] != [str(head) for head in heads]:
            warnings.warn(
                f"The checkpoint was trained with aligned heads {', '.join(state['aligned_heads'])}, this run goes on "
                f"with {', '.join(map(str, heads))}.",
                stacklevel=2,
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradient = self.criterion.log_temperature.grad
        if gradient is None:
            return
        if self.accelerator.num_processes > 1:
            gradient.copy_(self.accelerator.reduce(gradient, reduction="mean"))
        if self.companion is not None and self.accelerator.scaler is not None:
            gradient /= self.accelerator.scaler.get_scale()  # the scaler unscales the main optimizer's gradients only

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.companion is not None and not self.accelerator.optimizer_step_was_skipped:
            self.companion.step(kwargs["lr_scheduler"].get_last_lr()[0])
        self.criterion.clamp_temperature_()
        self.criterion.log_temperature.grad = None
