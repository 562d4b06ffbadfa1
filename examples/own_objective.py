"""Another alignment objective: linear centred kernel alignment (CKA) between aligned heads and the teacher.

    accelerate launch examples/own_objective.py \\
        --model Qwen/Qwen2.5-VL-3B-Instruct --dataset trl-lib/llava-instruct-mix --split "train[:2000]" --output_dir out

The loop, the choice of heads and the exact gradient of the whole step are those of `custom_loop.py`; only what is
compared, and how, is replaced.
"""

from __future__ import annotations

import torch
from custom_loop import main
from torch import Tensor

from hera_trainer import HeRALoss


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of vectors `[B, d]` and `[B, e]` of the same samples: 1 if they differ by a rotation and a scale."""
    x, y = x - x.mean(0), y - y.mean(0)
    # By Gram matrices [B, B]: a pool has fewer samples than a representation has dimensions.
    kernel, target = x @ x.T, y @ y.T
    return (kernel * target).sum() / (kernel.norm() * target.norm()).clamp_min(1e-12)


class LinearCKALoss(HeRALoss):
    """One minus the linear CKA between a head's representations and the teacher's vectors, the mean over heads.

    It keeps the interface of [`HeRALoss`]: head representations `[m, B, d_model]` with gradient, teacher vectors
    `[B, d_teacher]`, the samples that take part, and a queue, which this one does not use. There is no temperature to
    learn.

    Args:
        min_samples (`int`, *optional*, defaults to `12`): A pool with fewer samples is left out.
    """

    def __init__(self, min_samples: int = 12) -> None:
        super().__init__(num_neighbors=min_samples - 2, learn_temperature=False)

    def forward(
        self, heads: Tensor, teacher: Tensor, valid: Tensor | None = None, queue: object | None = None
    ) -> Tensor:
        heads, teacher = heads.float(), teacher.detach().float()
        if valid is not None:
            heads, teacher = heads[:, valid], teacher[valid]
        if len(teacher) < self.num_neighbors + 2:
            return heads.flatten()[:0].sum()  # zero, connected to the graph
        return 1 - torch.stack([linear_cka(z, teacher) for z in heads]).mean()


if __name__ == "__main__":
    main(criterion=LinearCKALoss())
