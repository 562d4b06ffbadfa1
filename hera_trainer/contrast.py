"""Whose samples are compared with whose, and what that means for each sample's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

from .data import TeacherBatch
from .loss import HeRALoss
from .memory import SampleQueue

logger = get_logger(__name__)

_FIRST_STEPS = 50  # of a run: whether most of them went without alignment is looked at once


@dataclass
class PoolLoss:
    """The alignment loss of one pool of samples and its gradients at the head representations of this process.

    Args:
        value (`Tensor`): Scalar loss of the whole pool; zero where it was skipped.
        heads_grad (`Tensor` of shape `[m, B, d_model]`):
            Gradient at this process's B representations, times the number of processes: distributed training averages
            parameter gradients over processes, while the loss of the pool is one.
        temperature_grad (`Tensor`): Gradient at the log temperature, the same on every process.
        samples (`Tensor`):
            Number of samples of the pool that took part, of all processes and the queue; zero where it was skipped.
        left_out (`Tensor`): Number of this process's samples that could not take part.
        skipped (`Tensor`): Whether the pool was too small or its loss not finite, as 0.0 or 1.0.
        not_finite (`Tensor`): Whether the loss or its gradient was NaN or infinite, as 0.0 or 1.0.
    """

    value: Tensor
    heads_grad: Tensor
    temperature_grad: Tensor
    samples: Tensor
    left_out: Tensor
    skipped: Tensor
    not_finite: Tensor

    def carrier(self, leaves: Tensor, log_temperature: Tensor, start: int, share: float) -> Tensor:
        """A scalar to be added to a micro-batch's loss: its value is the micro-batch's share of the loss, its gradient
        that of the pool at the micro-batch's representations. Whatever scales the loss (accumulation, a gradient
        scaler, DeepSpeed) scales these gradients alike, each exactly once.

        Args:
            leaves (`Tensor` of shape `[m, b, d_model]`): Representations of b of this process's samples.
            log_temperature (`Tensor`): The loss's parameter.
            start (`int`): Index of the first of them among the process's samples of the pool.
            share (`float`): Share of the micro-batch in the pool's value and in the temperature's gradient.
        """
        part = self.heads_grad[:, start : start + leaves.shape[1]]
        # Masked where the gradient is zero, since zero times NaN is NaN: a pool is skipped when a value is not finite.
        gradient = (leaves.masked_fill(part == 0, 0.0) * part).sum()
        log_temperature = log_temperature.masked_fill(self.temperature_grad == 0, 0.0)
        gradient = gradient + share * self.temperature_grad * log_temperature
        return share * self.value + gradient - gradient.detach()


class Contrast:
    """Compares samples of all processes with each other, and with a queue of past ones if there is one.

    Args:
        criterion ([`HeRALoss`]): The loss.
        accelerator ([`~accelerate.Accelerator`], *optional*): Gathers samples of all processes.
        queue ([`~memory.SampleQueue`], *optional*): Past samples that join the candidates.
    """

    def __init__(
        self, criterion: HeRALoss, accelerator: Accelerator | None = None, queue: SampleQueue | None = None
    ) -> None:
        self.criterion = criterion
        self.accelerator = accelerator
        self.queue = queue

    def reset(self) -> None:
        """Forgets what an earlier run has left, also one that ran out of memory within a step: past samples and the
        temperature's gradient."""
        self.criterion.log_temperature.grad = None
        if self.queue is not None:
            self.queue.clear()

    @property
    def num_processes(self) -> int:
        """Number of processes that share a pool."""
        return 1 if self.accelerator is None else self.accelerator.num_processes

    def __call__(self, heads: Tensor, teacher: Tensor, valid: Tensor, turns: Tensor | None = None) -> PoolLoss:
        """Loss and gradients of the pool to which this process contributes B samples. To be called by all processes
        alike; B may differ between them.

        Args:
            heads (`Tensor` of shape `[m, B, d_model]`): Head representations.
            teacher (`Tensor` of shape `[B, d_teacher]`): Teacher vectors.
            valid (`BoolTensor` of shape `[B]`): Samples that have a teacher vector and a token to pool.
            turns (`LongTensor` of shape `[B]`, *optional*):
                Number of the micro-batch that each sample belongs to. The queue takes samples in the order of these
                numbers, then of processes, so that it does not depend on how the step is cut.
        """
        own = heads.shape[1]
        turns = torch.zeros_like(valid, dtype=torch.long) if turns is None else turns
        columns = [heads.detach().float(), teacher, valid, turns]
        (pool_heads, pool_teacher, pool_valid, pool_turns), start = self._gather(*columns)
        log_temperature = self.criterion.log_temperature
        with torch.enable_grad():
            leaves = pool_heads.requires_grad_()
            loss = self.criterion(leaves, pool_teacher, pool_valid, self.queue)
            inputs = [leaves, log_temperature] if log_temperature.requires_grad else [leaves]
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        heads_grad = gradients[0]
        temperature_grad = gradients[1] if len(inputs) > 1 else torch.zeros_like(log_temperature)
        finite = loss.isfinite() & heads_grad.isfinite().all() & temperature_grad.isfinite()
        samples = pool_valid.sum() + len(self.queue or ())
        taken = finite & pool_valid.any() & (samples >= self.criterion.num_neighbors + 2)
        if self.queue is not None:
            usable = pool_valid & pool_heads.detach().isfinite().all(-1).all(0)
            order = pool_turns.argsort(stable=True)
            order = order[usable[order]]
            self.queue.push(pool_heads[:, order], pool_teacher[order])
        return PoolLoss(
            value=torch.where(taken, loss.detach(), 0.0),
            heads_grad=torch.where(taken, heads_grad[:, start : start + own] * self.num_processes, 0.0),
            temperature_grad=torch.where(taken, temperature_grad, 0.0),
            samples=samples * taken,
            left_out=(~valid).sum().float(),
            skipped=1.0 - taken.float(),
            not_finite=1.0 - finite.float(),
        )

    def _gather(self, heads: Tensor, teacher: Tensor, valid: Tensor, turns: Tensor) -> tuple[list[Tensor], int]:
        """The samples of all processes, and where this process's own begin. Shorter contributions are padded with
        samples that are not valid."""
        if self.accelerator is None or self.num_processes == 1:
            return [heads, teacher, valid, turns], 0
        columns = [heads.transpose(0, 1).contiguous(), teacher, valid.long(), turns]
        padded = [self.accelerator.pad_across_processes(column, dim=0) for column in columns]
        start = self.accelerator.process_index * len(padded[0])
        gathered = [self.accelerator.gather(column) for column in padded]
        return [gathered[0].transpose(0, 1), gathered[1], gathered[2].bool(), gathered[3]], start


class EvalPools:
    """The alignment loss over an evaluation set, in consecutive pools as large as those of training: the loss grows
    with the pool, so only pools of one size can be compared.

    Args:
        criterion ([`HeRALoss`]): The loss.
        pool_size (`int`): Samples in a pool.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            Gathers the batches of all processes, so that the pools are those of one process.
    """

    def __init__(self, criterion: HeRALoss, pool_size: int, accelerator: Accelerator | None = None) -> None:
        self.criterion = criterion
        self.pool_size = pool_size
        self.accelerator = accelerator
        self.total = 0.0
        self.pools = 0
        self._heads: list[Tensor] = []
        self._teacher: list[Tensor] = []

    @torch.no_grad()
    def add(self, heads: Tensor, teacher: TeacherBatch, mask: Tensor) -> None:
        """Takes the valid samples of one batch.

        Args:
            heads (`Tensor` of shape `[m, B, d_model]`): Head representations.
            teacher ([`~data.TeacherBatch`]): Teacher vectors of the same samples.
            mask (`BoolTensor` of shape `[B, T]`): Positions that were pooled.
        """
        vectors, valid = teacher.vectors, teacher.valid(mask)
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            # Leaves out the samples that the last batch repeats to serve all processes alike.
            gather = self.accelerator.gather_for_metrics
            heads = gather(heads.transpose(0, 1).contiguous()).transpose(0, 1)
            vectors, valid = gather(vectors), gather(valid.long()).bool()
        self._heads.append(heads[:, valid])
        self._teacher.append(vectors[valid])
        while self.left_out >= self.pool_size:
            all_heads, all_teacher = torch.cat(self._heads, dim=1), torch.cat(self._teacher)
            self.total += self.criterion(all_heads[:, : self.pool_size], all_teacher[: self.pool_size]).item()
            self.pools += 1
            self._heads, self._teacher = [all_heads[:, self.pool_size :]], [all_teacher[self.pool_size :]]

    @property
    def left_out(self) -> int:
        """Samples that wait for a full pool; at the end, the remainder that is left out."""
        return sum(len(vectors) for vectors in self._teacher)


class AlignmentMeter:
    """Sums what is logged between two logging steps, on the device, so that no step waits for it."""

    _NAMES = ("windows", "lm_loss", "pools", "alignment_loss", "samples", "skipped", "left_out", "not_finite")

    def __init__(self) -> None:
        self.has_warned = False  # the trainer's: values that are not finite are said once a run
        self._steps = 0.0
        self._too_small: list[Tensor] | None = []  # whether pools of the first steps were, until that is looked at
        self.reset()

    def reset(self) -> None:
        """Forgets what was summed for the log."""
        self._sums: dict[str, Tensor] = {name: torch.zeros(()) for name in self._NAMES}

    def _add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + torch.as_tensor(value).detach().float()

    def add_micro_batch(self, lm_loss: Tensor, share: float) -> None:
        """
        Args:
            lm_loss (`Tensor`): The language-model loss as it is backpropagated, scaled for accumulation.
            share (`float`): Share of the micro-batch in its optimizer step.
        """
        self._steps += share
        self._add(windows=share, lm_loss=lm_loss)

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
        )
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
        return torch.stack([self._sums[name].to(device) for name in self._NAMES])

    def drain(self, sums: Tensor, num_processes: int = 1) -> dict[str, float]:
        """Metrics from sums of all processes, and a fresh start. Empty if nothing was added.

        Args:
            sums (`Tensor`): `as_tensor` of all processes, added up.
            num_processes (`int`, *optional*, defaults to `1`): Number of processes; they count the same pools.
        """
        total = dict(zip(self._NAMES, sums.tolist(), strict=True))
        self.reset()
        if not total["pools"]:
            return {}
        metrics = {
            "lm_loss": total["lm_loss"] / total["windows"],
            "alignment_pool": total["samples"] / total["pools"],
            "alignment_skipped": total["skipped"] / num_processes,
            "alignment_left_out": total["left_out"],
            "alignment_not_finite": total["not_finite"] / num_processes,
        }
        if total["pools"] > total["skipped"]:
            metrics["alignment_loss"] = total["alignment_loss"] / (total["pools"] - total["skipped"])
        return metrics
