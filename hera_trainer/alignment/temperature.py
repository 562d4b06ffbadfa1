"""Training the loss's log temperature beside a model, and beside the model's optimizer, that it is no part of."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainingArguments

from ..objectives.contrastive import HeRALoss


class TemperatureOptimizer:
    """AdamW for the log temperature alone.

    The model's own optimizer cannot be trusted with it: it may take parameters of the model only (FSDP, DeepSpeed) or
    matrices only (Muon), step inside of the backward pass (layerwise optimizers, LOMO), or be the user's own, with
    rates that are meant for other things. And its state must load whether the temperature is learned or not.

    Args:
        criterion ([`HeRALoss`]): Its `log_temperature` is trained, if it requires a gradient.
        accelerator ([`~accelerate.Accelerator`], *optional*): Averages gradients over processes, and scales the loss.
        args ([`~transformers.TrainingArguments`], *optional*): Adam's settings, torch's by default.
    """

    def __init__(
        self, criterion: HeRALoss, accelerator: Accelerator | None = None, args: TrainingArguments | None = None
    ) -> None:
        self.criterion = criterion
        self.accelerator = accelerator
        parameter = criterion.log_temperature
        self._adam: torch.optim.AdamW | None = None
        if parameter.requires_grad:
            betas, epsilon = (0.9, 0.999), 1e-8
            if args is not None:
                betas, epsilon = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
            self._adam = torch.optim.AdamW([parameter], lr=0.0, betas=betas, eps=epsilon, weight_decay=0.0)

    def before_step(self) -> None:
        """Makes the gradient that of all processes. To be called by all of them, before the model's optimizer steps."""
        gradient = self.criterion.log_temperature.grad
        if gradient is None or self.accelerator is None:
            return
        if self.accelerator.num_processes > 1:
            gradient.copy_(self.accelerator.reduce(gradient, reduction="mean"))
        if self.accelerator.scaler is not None:  # it unscales the gradients of the model's optimizer only
            gradient /= self.accelerator.scaler.get_scale()

    def step(self, learning_rate: float) -> None:
        """One update, unless the model's optimizer skipped its own (an overflow in fp16). To be called after that.

        Args:
            learning_rate (`float`): Rate of this step.
        """
        skipped = self.accelerator is not None and self.accelerator.optimizer_step_was_skipped
        if self._adam is not None and not skipped:
            self._adam.param_groups[0]["lr"] = learning_rate
            self._adam.step()
        self.criterion.clamp_temperature_()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forgets the gradient."""
        self.criterion.log_temperature.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The log temperature and Adam's state (three numbers, none before the first step), as JSON can hold them."""
        state: dict[str, torch.Tensor] = {} if self._adam is None else next(iter(self._adam.state.values()), {})
        return {
            "log_temperature": self.criterion.log_temperature.item(),
            "optimizer": {name: value.item() for name, value in state.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        parameter = self.criterion.log_temperature
        parameter.fill_(state["log_temperature"])
        if self._adam is not None and state["optimizer"]:
            self._adam.state[parameter] = {
                # Adam counts its steps on the CPU
                name: torch.tensor(value, device="cpu" if name == "step" else parameter.device)
                for name, value in state["optimizer"].items()
            }


def scheduled_rate(learning_rate: float, optimizer: Any) -> float:
    """`learning_rate` after the schedule that the groups of an optimizer follow.

    Args:
        learning_rate (`float`): The rate that the schedule scales.
        optimizer ([`~torch.optim.Optimizer`]):
            The model's optimizer, as accelerate wraps it or not. Its groups may begin at rates of their own.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    # transformers keeps an optimizer a parameter for layerwise ones, behind one that does nothing.
    parts = (getattr(optimizer, "optimizer_dict", None) or {None: optimizer}).values()
    for group in (group for part in parts for group in part.param_groups):
        # Schedules write down where a group began; one that does not (on a plateau) began at the optimizer's default.
        begin = float(group.get("initial_lr", optimizer.defaults.get("lr", 0.0)))
        if begin > 0:
            return float(group["lr"]) * (learning_rate / begin)
    return 0.0


class TemperatureCallback(TrainerCallback):
    """Trains the temperature beside the model of any [`~transformers.Trainer`], at the schedule's rate of
    `learning_rate`.

    Args:
        temperature ([`~alignment.temperature.TemperatureOptimizer`]): `alignment.temperature` of an [`Alignment`].

    Example:

    ```python
    >>> trainer.add_callback(TemperatureCallback(alignment.temperature))
    ```
    """

    def __init__(self, temperature: TemperatureOptimizer) -> None:
        self.temperature = temperature

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.temperature.before_step()

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.temperature.step(scheduled_rate(args.learning_rate, kwargs["optimizer"]))
