"""The alignment loss over an evaluation set."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.collator import TeacherBatch
from ..objectives.objective import AlignmentObjective, total


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
        self.total = 0.0
        self.pools = 0
        self._heads: list[Tensor] = []
        self._teacher: list[Tensor] = []

    @torch.no_grad()
    def add(self, heads: Tensor, teacher: TeacherBatch, mask: Tensor) -> None:
        """Takes the valid samples of one batch.

        Args:
            heads (`Tensor` of shape `[m, B, d_model]`): Head representations.
            teacher ([`~data.collator.TeacherBatch`]): Teacher vectors of the same samples.
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
            self.total += total(self.criterion(all_heads[:, : self.pool_size], all_teacher[: self.pool_size])).item()
            self.pools += 1
            self._heads, self._teacher = [all_heads[:, self.pool_size :]], [all_teacher[self.pool_size :]]

    @property
    def left_out(self) -> int:
        """Samples that wait for a full pool; at the end, the remainder that is left out."""
        return sum(len(vectors) for vectors in self._teacher)

    def metrics(self) -> dict[str, float]:
        """The mean alignment loss of the pools, if there was a full one, and the number of samples left out."""
        loss = {"alignment_loss": self.total / self.pools} if self.pools else {}
        return {**loss, "alignment_left_out": self.left_out}
