"""Linear CKA: heads' similarities between all samples become the teacher's."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..common.precision import exact_products
from .objective import CONTRASTIVE_SETTINGS, TOLD_APART, AlignmentObjective, constant_heads, valid_samples, zero_loss
from .queue import SampleQueue


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of two sets of vectors of the same samples: 1 if they differ by a rotation and a scale.

    Args:
        x (`Tensor` of shape `[..., B, d]`), y (`Tensor` of shape `[B, e]`): The vectors.

    Returns:
        `Tensor` of shape `[...]`.
    """
    # What a head of vectors that differ by rounding alone would have in all directions alike.
    least = TOLD_APART**2 * x.detach().square().sum((-1, -2)) / len(y) ** 0.5
    x, y = x - x.mean(-2, keepdim=True), y - y.mean(-2, keepdim=True)
    # By Gram matrices [B, B]: a pool has fewer samples than a representation has dimensions.
    kernel, target = x @ x.transpose(-1, -2), y @ y.T
    norms = torch.linalg.matrix_norm(kernel).clamp_min(least) * torch.linalg.matrix_norm(target)
    return (kernel * target).sum((-1, -2)) / norms.clamp_min(1e-12)


class CKALoss(AlignmentObjective):
    """One minus the linear centred kernel alignment ([Kornblith et al., 2019](https://arxiv.org/abs/1905.00414)) of a
    head's representations and the teacher vectors, averaged over heads. CMAR, one of the methods that the HeRA paper
    compares with, aligns layers by CKA.

    Of a head whose vectors differ by less than a hundredth of their length, the differences count as rounding.

    It needs no projection although the widths differ, no neighbours and no temperature.

    Inputs:
        heads `[m, B, d_model]`, teacher `[B, d_teacher]`, valid `[B]` bool or `None`. Computed in float32.
    """

    ignored_settings: ClassVar[tuple[str, ...]] = CONTRASTIVE_SETTINGS
    summary: ClassVar[str] = (
        "trained to find samples as similar to each other as a frozen vision encoder does, the teacher (linear CKA)"
    )
    least_samples = 3  # of two samples, any two centred kernels are the same

    def forward(
        self, heads: Tensor, teacher: Tensor, valid: Tensor | None = None, queue: SampleQueue | None = None
    ) -> Tensor:
        with exact_products(heads.device):
            heads, teacher = valid_samples(heads, teacher, valid)
            if len(teacher) < self.least_samples:
                return zero_loss(heads)
            return 1 - linear_cka(heads, teacher).mean()

    def advice(self, spread: Tensor) -> str | None:
        """Warns of heads that say the same of all samples."""
        return constant_heads(spread)
