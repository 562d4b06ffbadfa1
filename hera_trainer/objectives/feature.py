"""Feature matching: heads' representations, projected, become the teacher vectors themselves."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.precision import exact_products
from .objective import CONTRASTIVE_SETTINGS, AlignmentObjective, valid_samples, zero_loss
from .queue import SampleQueue


class FeatureLoss(AlignmentObjective):
    """One minus the cosine between a head's representation, taken through a trainable projector, and the sample's
    teacher vector, averaged over samples and heads: what VIRAL does to hidden states of language models and REPA
    ([arXiv 2410.06940](https://arxiv.org/abs/2410.06940)) to those of diffusion transformers.

    Each head has a projector of its own: the representation is scaled to unit root mean square, then a linear layer,
    SiLU and another linear layer, as wide as the teacher vectors. Every sample counts by itself, so that the pool does
    not matter.

    Inputs:
        heads `[m, B, d_model]`, teacher `[B, d_teacher]`, valid `[B]` bool or `None`. Computed in float32.
    """

    least_samples = 1
    ignored_settings: ClassVar[tuple[str, ...]] = CONTRASTIVE_SETTINGS
    summary: ClassVar[str] = (
        "trained to give, through projectors that are not kept, the vectors of a frozen vision encoder, the teacher "
        "(feature matching)"
    )

    def __init__(self) -> None:
        super().__init__()
        self.first_weight: nn.Parameter | None = None  # [m, d_model, d_teacher]
        self.first_bias: nn.Parameter | None = None  # [m, 1, d_teacher]
        self.second_weight: nn.Parameter | None = None  # [m, d_teacher, d_teacher]
        self.second_bias: nn.Parameter | None = None  # [m, 1, d_teacher]

    def prepare(self, num_heads: int, head_width: int, teacher_width: int, seed: int) -> None:
        """Makes the projectors, drawn as `nn.Linear` draws them.

        Raises:
            `ValueError`: If the width of the teacher's vectors is not known.
        """
        if teacher_width < 1:
            raise ValueError(
                "`FeatureLoss` projects into the teacher's space, so it must know its width: "
                "`Alignment(..., teacher_width=1024)` for vectors of 1,024 numbers."
            )
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int, fan_in: int) -> nn.Parameter:
            bound = 1 / math.sqrt(fan_in)
            return nn.Parameter(torch.empty(num_heads, *shape).uniform_(-bound, bound, generator=generator))

        self.first_weight = drawn(head_width, teacher_width, fan_in=head_width)
        self.first_bias = drawn(1, teacher_width, fan_in=head_width)
        self.second_weight = drawn(teacher_width, teacher_width, fan_in=teacher_width)
        self.second_bias = drawn(1, teacher_width, fan_in=teacher_width)

    def project(self, heads: Tensor) -> Tensor:
        """Head representations `[m, B, d_model]` in the teacher's space, `[m, B, d_teacher]`."""
        first, second = (self.first_weight, self.first_bias), (self.second_weight, self.second_bias)
        if first[0] is None or first[1] is None or second[0] is None or second[1] is None:
            raise RuntimeError("`prepare` makes the projectors, once the widths of heads and teacher are known.")
        x = F.silu(F.rms_norm(heads, heads.shape[-1:]) @ first[0] + first[1])
        return x @ second[0] + second[1]

    def forward(
        self, heads: Tensor, teacher: Tensor, valid: Tensor | None = None, queue: SampleQueue | None = None
    ) -> Tensor:
        with exact_products(heads.device):
            heads, teacher = valid_samples(heads, teacher, valid)
            if not len(teacher):
                return zero_loss(heads)
            return 1 - F.cosine_similarity(self.project(heads), teacher, dim=-1).mean()
