"""Whose samples are compared with whose, and what that means for each sample's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from ..common.precision import exact_products
from ..objectives.objective import AlignmentObjective, total
from ..objectives.queue import SampleQueue


@dataclass
class PoolLoss:
    """The alignment loss of one pool of samples and its gradients at the head representations of this process.

    Args:
        value (`Tensor`): Scalar loss of the whole pool; zero where it was skipped.
        heads_grad (`Tensor` of shape `[m, B, d_model]`):
            Gradient at this process's B representations, times the number of processes: distributed training averages
            parameter gradients over processes, while the loss of the pool is one.
        parameter_grads (`list[Tensor]`): Gradients at the objective's parameters, the same on every process.
        samples (`Tensor`):
            Number of samples of the pool that took part, of all processes and the queue; zero where it was skipped.
        left_out (`Tensor`): Number of this process's samples that could not take part.
        skipped (`Tensor`): Whether the pool was too small or its loss not finite, as 0.0 or 1.0.
        not_finite (`Tensor`): Whether the loss or its gradient was NaN or infinite, as 0.0 or 1.0.
        repeated (`Tensor`): See [`repeated`]; zero where the pool was skipped.
        spread (`Tensor` of shape `[m]`): See [`spread`]; zeros where the pool was skipped.
        parts (`dict[str, Tensor]`): The terms of the loss by name, where the objective gives several.
    """

    value: Tensor
    heads_grad: Tensor
    parameter_grads: list[Tensor]
    samples: Tensor
    left_out: Tensor
    skipped: Tensor
    not_finite: Tensor
    repeated: Tensor
    spread: Tensor
    parts: dict[str, Tensor]

    def carrier(self, leaves: Tensor, parameters: Sequence[Tensor], start: int, share: float) -> Tensor:
        """A scalar to be added to a micro-batch's loss: its value is the micro-batch's share of the loss, its gradient
        that of the pool at the micro-batch's representations. Whatever scales the loss (accumulation, a gradient
        scaler, DeepSpeed) scales these gradients alike, each exactly once.

        Args:
            leaves (`Tensor` of shape `[m, b, d_model]`): Representations of b of this process's samples.
            parameters (sequence of `Tensor`): The objective's parameters.
            start (`int`): Index of the first of them among the process's samples of the pool.
            share (`float`): Share of the micro-batch in the pool's value and in the parameters' gradients.
        """
        part = self.heads_grad[:, start : start + leaves.shape[1]]
        # Masked where the gradient is zero, since zero times NaN is NaN: a pool is skipped when a value is not finite.
        gradient = (leaves.masked_fill(part == 0, 0.0) * part).sum()
        for parameter, grad in zip(parameters, self.parameter_grads, strict=True):
            gradient = gradient + share * (parameter.masked_fill(grad == 0, 0.0) * grad).sum()
        return share * self.value + gradient - gradient.detach()


def spread(heads: Tensor, valid: Tensor) -> Tensor:
    """How much heads tell samples apart: one minus the mean cosine between the representations of two samples. Near
    zero, they are parallel, and a temperature cannot tell them apart.

    Args:
        heads (`Tensor` of shape `[m, B, d_model]`): Head representations.
        valid (`BoolTensor` of shape `[B]`): Samples that count.

    Returns:
        `Tensor` of shape `[m]`.
    """
    count = valid.sum()
    unit = F.normalize(heads.float(), dim=-1).masked_fill(~valid[:, None], 0.0)
    # The squared norm of the sum of unit vectors is the sum of all cosines, those with themselves included.
    return 1 - (unit.sum(1).square().sum(-1) - count) / (count * (count - 1)).clamp(min=1)


def repeated(teacher: Tensor, valid: Tensor) -> Tensor:
    """How many samples have an image that another one, counted before, has as well: they are each other's neighbours
    whatever the teacher knows.

    Args:
        teacher (`Tensor` of shape `[B, d_teacher]`): Teacher vectors; those of the same images are equal.
        valid (`BoolTensor` of shape `[B]`): Samples that count.

    Returns:
        `Tensor`: Scalar, float32. Nothing waits for it.
    """
    # Equal rows have equal keys, so that sorting puts them side by side.
    weights = torch.arange(1, teacher.shape[1] + 1, device=teacher.device, dtype=teacher.dtype).sqrt()
    order = (teacher * weights).sum(-1).masked_fill(~valid, torch.inf).argsort()
    rows, counts = teacher[order], valid[order]
    return ((rows[1:] == rows[:-1]).all(-1) & counts[1:] & counts[:-1]).sum().float()


def _kept_where_it_is() -> AbstractContextManager:
    """Keeps hooks of `activation_offloading` from what the objective saves for its own backward, which would count as
    the step's first."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


class Contrast:
    """Compares samples of all processes with each other, and with a queue of past ones if there is one.

    Args:
        criterion ([`AlignmentObjective`]): The objective.
        accelerator ([`~accelerate.Accelerator`], *optional*): Gathers samples of all processes.
        queue ([`~objectives.queue.SampleQueue`], *optional*): Past samples that join the candidates.
    """

    def __init__(
        self, criterion: AlignmentObjective, accelerator: Accelerator | None = None, queue: SampleQueue | None = None
    ) -> None:
        self.criterion = criterion
        self.accelerator = accelerator
        self.queue = queue

    def reset(self) -> None:
        """Forgets what an earlier run has left, also one that ran out of memory within a step: past samples and the
        gradients of the objective's parameters."""
        self.criterion.zero_grad()
        if self.queue is not None:
            self.queue.clear()

    @property
    def parameters(self) -> list[Tensor]:
        """The objective's parameters that are trained."""
        return [parameter for parameter in self.criterion.parameters() if parameter.requires_grad]

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
        parameters = self.parameters
        # The first pass runs under autocast, which would round the backward of an objective, too.
        with torch.enable_grad(), exact_products(pool_heads.device), _kept_where_it_is():
            leaves = pool_heads.requires_grad_()
            result = self.criterion(leaves, pool_teacher, pool_valid, self.queue)
            parts = result if isinstance(result, dict) else {}
            loss = total(result)
            gradients = torch.autograd.grad(loss, [leaves, *parameters], allow_unused=True, materialize_grads=True)
        heads_grad, *parameter_grads = gradients
        loss = loss.detach()
        finite = loss.isfinite() & torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        samples = pool_valid.sum() + len(self.queue or ())
        taken = finite & pool_valid.any() & (samples >= self.criterion.least_samples)
        pool_heads = pool_heads.detach()
        if self.queue is not None:
            usable = pool_valid & pool_heads.isfinite().all(-1).all(0)
            order = pool_turns.argsort(stable=True)
            order = order[usable[order]]
            self.queue.push(pool_heads[:, order], pool_teacher[order])
        return PoolLoss(
            value=torch.where(taken, loss, 0.0),
            heads_grad=torch.where(taken, heads_grad[:, start : start + own] * self.num_processes, 0.0),
            parameter_grads=[torch.where(taken, gradient, 0.0) for gradient in parameter_grads],
            samples=samples * taken,
            left_out=(~valid).sum().float(),
            skipped=1.0 - taken.float(),
            not_finite=1.0 - finite.float(),
            repeated=repeated(pool_teacher, pool_valid) * taken,
            spread=torch.where(taken, spread(pool_heads, pool_valid), 0.0),
            parts={name: torch.where(taken, part.detach(), 0.0) for name, part in parts.items()},
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
