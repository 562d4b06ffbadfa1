"""The alignment loss over an evaluation set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.batch import TeacherBatch
from ..objectives.objective import AlignmentObjective
from .contrast import repeated


class EvalPools:
    """The alignment loss over an evaluation set, in consecutive pools as large as those of training: the loss grows
    with the pool, so only pools of one size can be compared. Pools that a queue makes large enough in training are as
    large as they must be without one.

    Args:
        criterion ([`AlignmentObjective`]): The objective.
        pool_size (`int`): Samples in a pool.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            Gathers the batches of all processes, so that the pools are those of one process.
    """

    def __init__(self, criterion: AlignmentObjective, pool_size: int, accelerator: Accelerator | None = None) -> None:
        self.criterion = criterion
        self.pool_size = max(pool_size, criterion.least_samples)
        self.accelerator = accelerator
        self.totals: dict[str, float] = {}  # of each term, or of the loss where it has none
        self.pools = self.not_finite = 0
        self.repeated = 0.0
        self._heads: list[Tensor] = []
        self._teacher: list[Tensor] = []

    @torch.no_grad()
    def add(self, heads: Tensor, teacher: TeacherBatch, mask: Tensor) -> None:
        """Takes the valid samples of one batch.

        Args:
            heads (`Tensor` of shape `[m, B, d_model]`): Head representations.
            teacher ([`~data.batch.TeacherBatch`]): Teacher vectors of the same samples.
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
            self._compare(all_heads[:, : self.pool_size], all_teacher[: self.pool_size])
            self._heads, self._teacher = [all_heads[:, self.pool_size :]], [all_teacher[self.pool_size :]]

    def _compare(self, heads: Tensor, teacher: Tensor) -> None:
        loss = self.criterion(heads, teacher)
        terms = {name: term.item() for name, term in (loss if isinstance(loss, dict) else {"": loss}).items()}
        is_finite = math.isfinite(sum(terms.values()))  # if not, it is left out as in training
        for name, term in terms.items():
            self.totals[name] = self.totals.get(name, 0.0) + (term if is_finite else 0.0)
        if not is_finite:
            self.not_finite += 1
            return
        self.pools += 1
        self.repeated += repeated(teacher, torch.ones_like(teacher[:, 0], dtype=torch.bool)).item()

    @property
    def left_out(self) -> int:
        """Samples that wait for a full pool; at the end, the remainder that is left out."""
        return sum(len(vectors) for vectors in self._teacher)

    def metrics(self) -> dict[str, float]:
        """The mean alignment loss of the pools, and that of each term with a name, if there was a full one, how many
        samples of a pool show an image that another one shows, and the number of samples left out. Pools whose loss was
        NaN or infinite do not count; how many, if any."""
        found: dict[str, float] = {}
        if self.pools or self.not_finite:
            means = {name: total / self.pools if self.pools else math.nan for name, total in self.totals.items()}
            found["alignment_loss"] = sum(means.values())
            found |= {f"alignment_loss/{name}": mean for name, mean in means.items() if name}
        if self.pools:
            found["alignment_repeated"] = self.repeated / self.pools
        if self.not_finite:
            found["alignment_not_finite"] = self.not_finite
        return {**found, "alignment_left_out": self.left_out}


@contextmanager
def evaluated(criterion: AlignmentObjective) -> Iterator[None]:
    """The objective is in evaluation mode inside, and what it keeps beside its parameters is as before afterwards: to
    look at it must not change training."""
    was_training = criterion.training
    # By name: to keep something is as often to put another tensor in its place as to change it.
    kept = [
        (module, {name: _copied(buffer) for name, buffer in module._buffers.items()}) for module in criterion.modules()
    ]
    criterion.eval()
    try:
        yield
    finally:
        criterion.train(was_training)
        for module, buffers in kept:
            module._buffers.update(buffers)


def _copied(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()
