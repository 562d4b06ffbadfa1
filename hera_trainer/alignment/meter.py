"""What is logged of the alignment loss."""

from __future__ import annotations

import torch
from accelerate.logging import get_logger
from torch import Tensor

from .contrast import PoolLoss

logger = get_logger(__name__)


_FIRST_STEPS = 50  # of a run: whether most of them went without alignment is looked at once


class AlignmentMeter:
    """Sums what is logged between two logging steps, on the device, so that no step waits for it.

    Attributes:
        spread (`Tensor` of shape `[m]` or `None`): How much each head told samples apart when it was last logged.
    """

    _NAMES = ("steps", "lm_loss", "pools", "alignment_loss", "samples", "skipped", "left_out", "not_finite", "repeated")

    def __init__(self) -> None:
        self.has_warned = self.has_advised = False  # what is said once a run
        self._steps = 0.0
        self.spread: Tensor | None = None
        self._too_small: list[Tensor] | None = []  # whether pools of the first steps were, until that is looked at
        self.reset()

    def reset(self) -> None:
        """Forgets what was summed for the log."""
        self._sums: dict[str, Tensor] = {name: torch.zeros(()) for name in self._NAMES}
        self._spread: Tensor | None = None  # of all pools, the same in each process

    def _add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + torch.as_tensor(value).detach().float()

    def add_micro_batch(self, lm_loss: Tensor, share: float) -> None:
        """
        Args:
            lm_loss (`Tensor`): The language-model loss as it is backpropagated, scaled for accumulation.
            share (`float`): Share of the micro-batch in its optimizer step.
        """
        self._steps += share
        self._add(steps=share, lm_loss=lm_loss)

    def add_pool(self, pool: PoolLoss) -> None:
        """
        Args:
            pool ([`PoolLoss`]): The alignment loss of a pool.
        """
        self._add(
            pools=1.0,
            alignment_loss=pool.value,
            samples=pool.samples,
            skipped=pool.skipped,
            left_out=pool.left_out,
            not_finite=pool.not_finite,
            repeated=pool.repeated,
            **{f"alignment_loss/{name}": part for name, part in pool.parts.items()},
        )
        self._spread = pool.spread if self._spread is None else self._spread + pool.spread
        if self._too_small is not None:
            self._too_small.append(pool.skipped - pool.not_finite)
            if round(self._steps, 6) >= _FIRST_STEPS:
                self._look_at_first_steps(self._too_small)
                self._too_small = None

    @staticmethod
    def _look_at_first_steps(too_small: list[Tensor]) -> None:
        count, skipped = len(too_small), int(torch.stack(too_small).sum())
        if skipped > count / 2:
            logger.warning(
                f"Most of the first {_FIRST_STEPS} steps were trained without the alignment loss: in {skipped} of "
                f"{count} pools, too few samples had an image and a label. Raise `gradient_accumulation_steps`, "
                "`per_device_train_batch_size` or `queue_size`, or lower `num_neighbors`."
            )

    def as_tensor(self, device: torch.device) -> Tensor:
        """The sums, to be added up over processes."""
        return torch.stack([value.to(device) for value in self._sums.values()])

    def drain(self, sums: Tensor, num_processes: int = 1) -> dict[str, float]:
        """Metrics from sums of all processes, and a fresh start. Empty if nothing was added.

        Args:
            sums (`Tensor`): `as_tensor` of all processes, added up.
            num_processes (`int`, *optional*, defaults to `1`): Number of processes; they count the same pools.
        """
        total = dict(zip(self._sums, sums.tolist(), strict=True))
        spread = self._spread
        self.reset()
        if not total["pools"]:
            return {}
        metrics = {
            "lm_loss": total["lm_loss"] / total["steps"],
            "alignment_pool": total["samples"] / total["pools"],
            "alignment_repeated": total["repeated"] / total["pools"],
            "alignment_skipped": total["skipped"] / num_processes,
            "alignment_left_out": total["left_out"],
            "alignment_not_finite": total["not_finite"] / num_processes,
        }
        taken = total["pools"] - total["skipped"]
        if taken and spread is not None:
            metrics.update({name: total[name] / taken for name in total if name.split("/")[0] == "alignment_loss"})
            self.spread = spread / (taken / num_processes)
            metrics["alignment_spread"] = self.spread.mean().item()
        return metrics
