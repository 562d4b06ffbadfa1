"""What every alignment objective offers."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .queue import SampleQueue

# Share of a head's norm below which differences between samples count as rounding. A head that attends to the first
# token alone says the same of all samples; divided by what differs in it, it would have most of the gradient.
TOLD_APART = 1e-2

# Fields of the configuration that say how the contrastive loss compares samples.
CONTRASTIVE_SETTINGS = ("similarity", "teacher_similarity", "temperature", "learn_temperature")


class AlignmentObjective(nn.Module):
    """Compares the representations of the aligned heads with the teacher vectors of one pool of samples.

    Its parameters, if it has any, are trained by an optimizer of their own, saved with every checkpoint, and no part of
    the model. A class of your own says how it is made from the configuration ([`~AlignmentObjective.from_config`]) and
    what the loss is (`forward`), and gets a name with [`register_objective`].

    Attributes:
        uses_queue (`bool`): Whether past samples (`queue_size`) take part.
        uses_teacher (`bool`): Whether the teacher's vectors do. What is trained without them is not an aligned run.
        ignored_settings (`tuple[str, ...]`): Fields of the configuration that other objectives read and this one does
            not, so that setting them is refused.
        summary (`str`): What is done to heads, for model cards: "5 attention heads were ...". `{unit}` stands for a
            head or layer.
        least_samples (`int`): A pool with fewer valid samples, those of the queue included, goes without the loss.
    """

    uses_queue: ClassVar[bool] = False
    uses_teacher: ClassVar[bool] = True
    ignored_settings: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "trained with a loss of their own on the vectors of a frozen vision encoder, the teacher"
    least_samples: int = 2

    @classmethod
    def from_config(cls, args: Any) -> Self:
        """The objective that a configuration describes.

        Args:
            args ([`HeRAConfig`]): The configuration.
        """
        return cls()

    def prepare(self, num_heads: int, head_width: int, teacher_width: int, seed: int) -> None:
        """Makes parameters whose shapes depend on model and teacher. Called once these are known, before training, and
        again when other heads are chosen. Must do the same in every process.

        Args:
            num_heads (`int`): Number m of aligned heads.
            head_width (`int`): Width `d_model` of a head representation.
            teacher_width (`int`): Width `d_teacher` of a teacher vector.
            seed (`int`): Seed for what is drawn.
        """

    def forward(
        self, heads: Tensor, teacher: Tensor, valid: Tensor | None = None, queue: SampleQueue | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Computes the loss of a pool.

        Args:
            heads (`Tensor` of shape `[m, B, d_model]`): Pooled representations of the m aligned heads, with gradient.
            teacher (`Tensor` of shape `[B, d_teacher]`): Teacher vectors of the same samples, without.
            valid (`BoolTensor` of shape `[B]`, *optional*): Samples that take part.
            queue ([`~objectives.queue.SampleQueue`], *optional*): Past samples.

        Returns:
            `Tensor` or `dict[str, Tensor]`: A scalar, float32, connected to `heads` also where it is zero; or several
            by name, whose sum is the loss. Each is logged as `alignment_loss/<name>`.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after each optimizer step, for bounds that hold in place."""

    def metrics(self) -> dict[str, float]:
        """What is logged of the objective's state."""
        return {}

    def advice(self, spread: Tensor) -> str | None:
        """What to warn of, once, when it is seen how much the heads tell samples apart.

        Args:
            spread (`Tensor` of shape `[m]`): One minus the mean cosine of two samples' representations.
        """
        return None


def valid_samples(heads: Tensor, teacher: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Head representations `[m, V, d_model]` and teacher vectors `[V, d_teacher]` of the samples that take part, both
    float32."""
    heads, teacher = heads.float(), teacher.detach().float()
    return (heads, teacher) if valid is None else (heads[:, valid], teacher[valid])


def constant_heads(spread: Tensor) -> str | None:
    """What to say of heads that give all samples the same representation, by their spread `[m]`."""
    constant = int((spread < TOLD_APART**2).sum())
    if not constant:
        return None
    return (
        f"{constant} of {len(spread)} aligned heads give all samples the same representation (`alignment_spread`), as "
        "heads that attend to the first token alone do. There is nothing in them to align. Name others with "
        "`aligned_heads`: `hera rank` scores all of them."
    )


def total(result: Tensor | dict[str, Tensor]) -> Tensor:
    """The loss that an objective returned, at once or in terms."""
    return torch.stack(list(result.values())).sum() if isinstance(result, dict) else result


def zero_loss(heads: Tensor) -> Tensor:
    """A zero that is connected to the graph: an empty slice has a gradient (of zeros) even where values are NaN."""
    return heads.flatten()[:0].sum()
