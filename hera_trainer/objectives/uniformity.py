"""Uniformity: heads' representations spread over the images, whatever the teacher says."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.precision import exact_products
from .objective import CONTRASTIVE_SETTINGS, AlignmentObjective, valid_samples, zero_loss
from .queue import SampleQueue


class UniformityLoss(AlignmentObjective):
    """The uniformity loss of [Wang and Isola (2020)](https://arxiv.org/abs/2005.10242): the logarithm of the mean
    Gaussian potential between the normalised representations of different samples, averaged over heads.

    It uses no teacher: whatever it does to the heads, the teacher has not taught. A second control beside permuted
    teacher vectors (`teacher_control`).

    Args:
        t (`float`, *optional*, defaults to `2.0`): Sharpness of the potential `exp(-t * distance ** 2)`.

    Inputs:
        heads `[m, B, d_model]`; teacher `[B, d_teacher]`, not used; valid `[B]` bool or `None`. Computed in float32.
    """

    uses_teacher: ClassVar[bool] = False
    ignored_settings: ClassVar[tuple[str, ...]] = CONTRASTIVE_SETTINGS
    summary: ClassVar[str] = "spread over the samples without a teacher (uniformity), as a control"

    def __init__(self, t: float = 2.0) -> None:
        super().__init__()
        self.t = t

    def forward(
        self, heads: Tensor, teacher: Tensor, valid: Tensor | None = None, queue: SampleQueue | None = None
    ) -> Tensor:
        with exact_products(heads.device):
            heads, _ = valid_samples(heads, teacher, valid)
            count = heads.shape[1]
            if count < self.least_samples:
                return zero_loss(heads)
            z = F.normalize(heads, dim=-1)
            # Of unit vectors, the squared distance is 2 - 2 times the cosine.
            potential = 2 * self.t * (z @ z.transpose(1, 2) - 1)  # [m, B, B]
            others = ~torch.eye(count, dtype=torch.bool, device=z.device)
            return (potential[:, others].logsumexp(dim=-1) - math.log(count * (count - 1))).mean()
