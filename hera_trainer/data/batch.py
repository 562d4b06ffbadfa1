"""Teacher vectors of one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..teacher.column import TEACHER_COLUMN


@dataclass
class TeacherBatch:
    """Teacher vectors of one batch.

    Args:
        vectors (`Tensor` of shape `[B, d_teacher]`): Float32; zeros for samples without an image.
        present (`BoolTensor` of shape `[B]`): Samples that have an image.
    """

    vectors: Tensor
    present: Tensor

    def valid(self, mask: Tensor) -> Tensor:
        """Samples that can take part in the alignment loss, `[B]` bool: those that have an image and, in `mask`
        (`[B, T]` bool), a position to pool."""
        return self.present & mask.any(1)


def pop_teacher(inputs: dict[str, Any]) -> TeacherBatch | None:
    """Takes the teacher vectors out of a batch, or returns `None` where it carries none."""
    vectors = inputs.pop(TEACHER_COLUMN, None)
    if vectors is None:
        return None
    present = ~vectors.isnan().any(-1)
    return TeacherBatch(vectors.nan_to_num(0.0), present)
