"""An alignment objective of your own: heads' distances between samples become the teacher's (relational distillation).

    accelerate launch examples/own_objective.py \\
        --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset_name trl-lib/llava-instruct-mix \\
        --use_peft --lora_target_modules all-linear --dtype bfloat16 --num_train_epochs 1 \\
        --alignment_objective distances --output_dir out

The file is `hera sft` with one objective more.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from hera_trainer import AlignmentObjective, register_objective
from hera_trainer.cli import sft


def relative_distances(x: Tensor) -> Tensor:
    """Distances between all samples `[..., B, d]`, over their mean."""
    distances = torch.cdist(x, x)
    count = x.shape[-2]
    return distances / (distances.sum((-1, -2), keepdim=True) / (count * (count - 1))).clamp_min(1e-6)


@register_objective("distances")
class DistanceLoss(AlignmentObjective):
    """Distance-wise relational distillation ([Park et al., 2019](https://arxiv.org/abs/1904.05068)), with a scale that
    is trained. Two terms, which are logged by name."""

    least_samples = 3

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, heads: Tensor, teacher: Tensor, valid: Tensor | None = None, queue: object = None):
        heads, teacher = heads.float(), teacher.float()
        if valid is not None:
            heads, teacher = heads[:, valid], teacher[valid]
        if len(teacher) < self.least_samples:
            return heads.flatten()[:0].sum()  # zero, connected to the graph
        own, target = relative_distances(heads), relative_distances(teacher).expand(len(heads), -1, -1)
        return {
            "distances": F.smooth_l1_loss(self.log_scale.exp() * own, target),
            "scale": 0.01 * self.log_scale.square(),
        }


if __name__ == "__main__":
    sft.main(sys.argv[1:])
