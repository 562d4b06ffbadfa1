"""Training the objective's parameters beside a model, and beside the model's optimizer, that they are no part of."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainingArguments

from ..common.files import write_atomically
from ..objectives.objective import AlignmentObjective


class ObjectiveOptimizer:
    """AdamW for the parameters of an objective: the log temperature of [`HeRALoss`], the projectors of
    [`~objectives.feature.FeatureLoss`]. Without weight decay.

    The model's own optimizer cannot be trusted with them: it may take parameters of the model only (FSDP, DeepSpeed) or
    matrices only (Muon), step inside of the backward pass (layerwise optimizers, LOMO), or be the user's own, with
    rates that are meant for other things. And its state must load whether the temperature is learned or not.

    Args:
        criterion ([`AlignmentObjective`]): Those of its parameters are trained that require a gradient.
        accelerator ([`~accelerate.Accelerator`], *optional*): Averages gradients over processes, and scales the loss.
        args ([`~transformers.TrainingArguments`], *optional*): Adam's settings, torch's by default.
    """

    def __init__(
        self,
        criterion: AlignmentObjective,
        accelerator: Accelerator | None = None,
        args: TrainingArguments | None = None,
    ) -> None:
        self.criterion = criterion
        self.accelerator = accelerator
        self._adam: torch.optim.AdamW | None = None
        trained = [parameter for parameter in criterion.parameters() if parameter.requires_grad]
        if trained:
            betas, epsilon = (0.9, 0.999), 1e-8
            if args is not None:
                betas, epsilon = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
            self._adam = torch.optim.AdamW(trained, lr=0.0, betas=betas, eps=epsilon, weight_decay=0.0)

    def before_step(self) -> None:
        """Makes gradients those of all processes. To be called by all of them, before the model's optimizer steps."""
        if self.accelerator is None:
            return
        for parameter in self.criterion.parameters():
            if parameter.grad is None:
                continue
            if self.accelerator.num_processes > 1:
                parameter.grad.copy_(self.accelerator.reduce(parameter.grad, reduction="mean"))
            if self.accelerator.scaler is not None:  # it unscales the gradients of the model's optimizer only
                parameter.grad /= self.accelerator.scaler.get_scale()

    def step(self, learning_rate: float) -> None:
        """One update, unless the model's optimizer skipped its own (an overflow in fp16). To be called after that.

        Args:
            learning_rate (`float`): Rate of this step.
        """
        skipped = self.accelerator is not None and self.accelerator.optimizer_step_was_skipped
        if self._adam is not None and not skipped:
            self._adam.param_groups[0]["lr"] = learning_rate
            self._adam.step()
        self.criterion.after_step()
        self.criterion.zero_grad()

    def save(self, path: str | os.PathLike) -> None:
        """Writes the parameters, Adam's state and the objective's buffers as safetensors, atomically. Nothing where
        there are none."""
        tensors = {name: buffer.cpu().contiguous() for name, buffer in self._buffers().items()}
        for name, parameter in self.criterion.named_parameters():
            state = {} if self._adam is None else self._adam.state.get(parameter, {})
            tensors[name] = parameter.detach().cpu().contiguous()
            tensors.update({f"{name}.{key}": value.cpu().contiguous() for key, value in state.items()})
        if tensors:
            write_atomically(path, lambda temporary: save_file(tensors, temporary))

    @torch.no_grad()
    def load(self, path: str | os.PathLike) -> None:
        """Takes what `save` wrote.

        Raises:
            `ValueError`: If it is of another objective, or of other widths.
        """
        tensors = load_file(path)
        shapes = {name: parameter.shape for name, parameter in self.criterion.named_parameters()}
        if any(name not in tensors or tensors[name].shape != shape for name, shape in shapes.items()):
            raise ValueError(
                f"{str(path)!r} holds other parameters than those of {type(self.criterion).__name__}. Resume with the "
                "`alignment_objective`, the aligned heads and the teacher of the checkpoint."
            )
        for name, parameter in self.criterion.named_parameters():
            if name == "log_temperature" and not parameter.requires_grad:
                _warn_of_another_temperature(tensors[name].exp().item(), parameter.exp().item())
            parameter.copy_(tensors[name])
            prefix = f"{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            self._restore(parameter, state)
        for name, buffer in self._buffers().items():
            if name in tensors:  # not so in what was saved before they were
                owner, _, own_name = name.rpartition(".")
                self.criterion.get_submodule(owner)._buffers[own_name] = tensors[name].to(buffer.device)

    def _buffers(self) -> dict[str, Tensor]:
        """What an objective of one's own keeps beside its parameters, such as a running mean."""
        parameters = dict(self.criterion.named_parameters())
        return {name: value for name, value in self.criterion.state_dict().items() if name not in parameters}

    @torch.no_grad()
    def load_temperature(self, state: dict[str, Any]) -> None:
        """Takes the log temperature and Adam's three numbers, as `hera_state.json` held them when there was no other
        parameter."""
        parameter = getattr(self.criterion, "log_temperature", None)
        if parameter is not None:
            parameter.fill_(state["log_temperature"])
            self._restore(parameter, {name: torch.tensor(value) for name, value in state["optimizer"].items()})

    def _restore(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        if self._adam is not None and parameter.requires_grad and state:
            # Adam counts its steps on the CPU
            self._adam.state[parameter] = {
                name: value if name == "step" else value.to(parameter.device) for name, value in state.items()
            }


def _warn_of_another_temperature(then: float, now: float) -> None:
    if not math.isclose(then, now, rel_tol=1e-4):
        warnings.warn(
            f"Training goes on with the checkpoint's temperature, {then:.4g}, and not with the `temperature` that is "
            f"set now, {now:.4g}: what is resumed is the run that was begun.",
            stacklevel=3,
        )


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer, as accelerate wraps it or not."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    # transformers keeps an optimizer a parameter for layerwise ones, behind one that does nothing.
    parts = (getattr(optimizer, "optimizer_dict", None) or {None: optimizer}).values()
    return [group for part in parts for group in part.param_groups]


def note_rates(optimizer: Any) -> None:
    """Writes down where the groups of an optimizer begin, as most schedules do, for those that do not (on a plateau).
    It goes with the optimizer's state into checkpoints. To be called before a run's first step."""
    for group in _groups(optimizer):
        group.setdefault("initial_lr", group["lr"])


def scheduled_rate(learning_rate: float, optimizer: Any) -> float:
    """`learning_rate` after the schedule that the groups of an optimizer follow.

    Args:
        learning_rate (`float`): The rate that the schedule scales.
        optimizer ([`~torch.optim.Optimizer`]):
            The model's optimizer, as accelerate wraps it or not. Its groups may begin at rates of their own.
    """
    default = getattr(getattr(optimizer, "optimizer", optimizer), "defaults", {}).get("lr", 0.0)
    if default is None:  # the optimizer finds its own rates (Adafactor), and follows no schedule
        return learning_rate
    for group in _groups(optimizer):
        # What was saved before rates were noted began at the optimizer's default, which DeepSpeed's do not tell.
        begin = float(group.get("initial_lr", default))
        if begin > 0:
            return float(group["lr"]) * (learning_rate / begin)
    return 0.0
