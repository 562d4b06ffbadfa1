"""The alignment objective: multi-positive InfoNCE between attention heads and a frozen teacher's neighbourhoods."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..common.precision import exact_products
from .metrics import top_neighbors
from .objective import TOLD_APART, AlignmentObjective, constant_heads, valid_samples, zero_loss
from .queue import SampleQueue
from .similarity import SIMILARITIES

# As CLIP bounds its logit scale by 100.
MIN_TEMPERATURE = 0.01

# Share of the temperature below which the cosines of a head are taken for equal.
_FLAT = 0.2

# How samples are compared, and the temperature that each begins at: CLIP's where vectors keep a common part and differ
# little; a higher one where that part is taken away and cosines fill their range; 1 for plain dot products.
TEMPERATURES = {"dot": 1.0, "cosine": 0.07, "centered_cosine": 0.3}

# Norm below which a representation counts as zero: a pruned head's would get a gradient of 1e12 with torch's own.
_EPSILON = 1e-6

# Logits held at a time: 2**22 float32 numbers are 16 MiB, which a cache holds, whatever the pool and the heads are.
MAX_LOGITS = 2**22


@dataclass
class _Pool:
    """What is compared with what.

    Args:
        anchors (`LongTensor` of shape `[A]`): Samples, out of B, that have a term in the loss.
        positives (`LongTensor` of shape `[A, k]`): Their positives, of the B samples and, behind them, the Q past ones.
        past (`Tensor` of shape `[m, Q, d_model]`, *optional*): Past samples' representations.
        same_image (`BoolTensor` of shape `[A, Q]`, *optional*): Past samples of an anchor's own image.
    """

    anchors: Tensor
    positives: Tensor
    past: Tensor | None = None
    same_image: Tensor | None = None


def compared(x: Tensor, similarity: str) -> Tensor:
    """Vectors whose dot products are the similarities of samples.

    Args:
        x (`Tensor` of shape `[..., N, d]`): Vectors of N samples.
        similarity (`str`): `"dot"`, `"cosine"` or `"centered_cosine"`.
    """
    if similarity == "centered_cosine":
        x = x - x.mean(-2, keepdim=True)
    return x if similarity == "dot" else F.normalize(x, dim=-1)


def _hide(values: Tensor, anchors: Tensor, same_image: Tensor | None) -> Tensor:
    """Minus infinity, in place, in values `[..., A, B + Q]` of what is no candidate: the anchor itself, and past
    samples of its image."""
    values.scatter_(-1, anchors[:, None].expand(*values.shape[:-1], 1), -torch.inf)
    if same_image is not None:
        values[..., -same_image.shape[1] :].masked_fill_(same_image, -torch.inf)
    return values


def _terms(z: Tensor, temperature: Tensor, pool: _Pool, z_grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of the loss's terms over anchors and over as many heads as are held at a time, some anchors at a time.

    Args:
        z (`Tensor` of shape `[h, B + Q, d_model]`): What dot products are taken of.
        temperature (`Tensor`): Scalar.
        pool ([`_Pool`]): What is compared with what.
        z_grad (`Tensor` of shape `[h, B, d_model]` or `[h, B + Q, d_model]`, *optional*):
            The gradient with respect to as many rows of `z`, times `temperature`, is added to it. Without it no
            gradient is computed.

    Returns:
        The sum, and its gradient with respect to the logarithm of the temperature.
    """
    total, temperature_grad = torch.zeros_like(temperature), torch.zeros_like(temperature)
    k = pool.positives.shape[1]
    at_once = max(1, MAX_LOGITS // z.shape[1])
    for start in range(0, len(pool.anchors), at_once):
        rows = slice(start, start + at_once)
        anchors, positives = pool.anchors[rows], pool.positives[rows].expand(len(z), -1, -1)
        own = z[:, anchors]
        logits = own / temperature @ z.transpose(1, 2)  # [h, rows, B + Q]
        _hide(logits, anchors, None if pool.same_image is None else pool.same_image[rows])
        log_probs = logits.log_softmax(dim=-1)
        total -= log_probs.gather(-1, positives).sum() / k
        if z_grad is not None:
            # Softmax minus target. Both sides of a dot product are representations: it acts on rows and on columns.
            error = log_probs.exp_()
            error.scatter_add_(-1, positives, error.new_tensor(-1 / k).expand_as(positives))
            own_grad = error @ z
            temperature_grad -= (own_grad * own).sum() / temperature
            z_grad[:, anchors] += own_grad
            z_grad.baddbmm_(error[..., : z_grad.shape[1]].transpose(1, 2), own)
    return total, temperature_grad


def _norms(z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z, dim=-1, keepdim=True)


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of heads `[m, B, d_model]`, a few heads at a time.

    Its gradient is computed along with it. What waits for the backward is then as large as the heads, and no logits,
    which grow with the square of the pool.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, log_temperature: Tensor, pool: _Pool, similarity: str, with_gradient: bool
    ) -> Tensor:
        temperature = log_temperature.exp()
        loss, temperature_grad = torch.zeros_like(temperature), torch.zeros_like(temperature)
        heads_grad = torch.zeros_like(heads) if with_gradient else None
        own = heads.shape[1]
        candidates = own + (0 if pool.past is None else pool.past.shape[1])
        at_once = max(1, MAX_LOGITS // (len(pool.anchors) * candidates))
        for start in range(0, len(heads), at_once):
            part = slice(start, start + at_once)
            z = heads[part] if pool.past is None else torch.cat([heads[part], pool.past[part]], dim=1)
            centered = similarity == "centered_cosine"
            least = z.new_full((), _EPSILON)
            if centered:
                least = (TOLD_APART * _norms(z).mean(1, keepdim=True)).clamp_min(_EPSILON)
                z = z - z.mean(1, keepdim=True)
            norm = None
            if similarity != "dot":
                norm = _norms(z)
                z = z / norm.clamp_min(least)
            # Past samples have no gradient of their own, but a share in the mean.
            reached = z if centered else z[:, :own]
            z_grad = None
            if heads_grad is not None:
                z_grad = torch.zeros_like(z) if centered else heads_grad[part]
            terms = _terms(z, temperature, pool, z_grad)
            loss += terms[0]
            temperature_grad += terms[1]
            if heads_grad is None or z_grad is None:
                continue
            if norm is not None:  # back through the division by the norm
                norm = norm[:, : reached.shape[1]]
                z_grad -= reached * ((z_grad * reached).sum(-1, keepdim=True) * (norm > least))
                z_grad /= norm.clamp_min(least)
            if centered:
                heads_grad[part] = z_grad[:, :own] - z_grad.mean(1, keepdim=True)
        count = len(heads) * len(pool.anchors)
        if heads_grad is not None:
            ctx.save_for_backward(heads_grad.div_(temperature * count), temperature_grad / count)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        heads_grad, temperature_grad = ctx.saved_tensors
        return gradient * heads_grad, gradient * temperature_grad, None, None, None


class HeRALoss(AlignmentObjective):
    """Head-wise alignment loss, eq. 4 and 8 of the [HeRA paper](https://huggingface.co/papers/2606.23885).

    The teacher's `num_neighbors` nearest other samples of each sample are its positives, each with target probability
    `1 / num_neighbors`. The logits of a head are the dot products of its own representations divided by the
    temperature, the sample itself masked out. The loss is the cross-entropy between the two, averaged over samples and
    heads. Both sides of every dot product carry gradient; the teacher's neighbours carry none.

    Args:
        num_neighbors (`int`, *optional*, defaults to `10`):
            Number k of teacher neighbours that are positives of each sample.
        temperature (`float`, *optional*):
            Initial temperature, by default that of the similarity: 0.3 for `"centered_cosine"`, 0.07 for `"cosine"`, 1
            for `"dot"`.
        learn_temperature (`bool`, *optional*, defaults to `True`):
            Whether the logarithm of the temperature is trained.
        similarity (`str`, *optional*, defaults to `"centered_cosine"`):
            How head representations are compared: `"dot"`, dot products as eq. 4 is printed, where a few samples of
            large norm become everyone's neighbours; `"cosine"`, dot products of normalised vectors;
            `"centered_cosine"`, the same after the mean over the pool's valid samples, those of the queue included, is
            taken away, with gradient: heads whose vectors are nearly parallel differ in nothing else. Vectors that are
            then shorter than a hundredth of the head's mean norm are divided by that instead of their own norm, so that
            a head which says the same of all samples is not moved by rounding.
        teacher_similarity (`str`, *optional*, defaults to `"cosine"`):
            How teacher vectors are compared when neighbours are looked up, of the same three.

    References:
        - Mind the Heads: Topological Representation Alignment for Multimodal LLMs, arXiv 2606.23885.

    Requirements:
        More than `num_neighbors + 1` valid samples: with `num_neighbors + 1` every other sample is a positive and the
        loss carries no neighbourhood. With fewer than `num_neighbors + 2` the loss is a zero connected to the graph.

    Inputs:
        heads `[m, B, d_model]`, teacher `[B, d_teacher]`, valid `[B]` bool or `None`. Computed in float32 whatever the
        dtypes are.

    Example:

    ```python
    >>> criterion = HeRALoss(num_neighbors=10)
    >>> heads = torch.randn(5, 64, 512, requires_grad=True)
    >>> teacher = torch.randn(64, 1024)
    >>> criterion(heads, teacher).backward()
    ```
    """

    uses_queue: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "pulled towards the neighbourhoods of a frozen vision encoder, the teacher: samples whose images are alike for "
        "the teacher shall be alike for the {unit}"
    )

    def __init__(
        self,
        num_neighbors: int = 10,
        temperature: float | None = None,
        learn_temperature: bool = True,
        similarity: str = "centered_cosine",
        teacher_similarity: str = "cosine",
    ) -> None:
        super().__init__()
        if num_neighbors < 1:
            raise ValueError(f"`num_neighbors` must be at least 1, got {num_neighbors}.")
        for name, value in (("similarity", similarity), ("teacher_similarity", teacher_similarity)):
            if value not in SIMILARITIES:
                raise ValueError(f"`{name}` must be one of {SIMILARITIES}, got {value!r}.")
        temperature = TEMPERATURES[similarity] if temperature is None else temperature
        if not temperature >= MIN_TEMPERATURE:
            raise ValueError(f"`temperature` must be at least {MIN_TEMPERATURE}, got {temperature}.")
        self.num_neighbors = num_neighbors
        self.least_samples = num_neighbors + 2
        self.similarity = similarity
        self.teacher_similarity = teacher_similarity
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learn_temperature)

    @classmethod
    def from_config(cls, args: Any) -> Self:
        return cls(
            args.num_neighbors, args.temperature, args.learn_temperature, args.similarity, args.teacher_similarity
        )

    def extra_repr(self) -> str:
        return f"num_neighbors={self.num_neighbors}, similarity={self.similarity!r}"

    def forward(
        self, heads: Tensor, teacher: Tensor, valid: Tensor | None = None, queue: SampleQueue | None = None
    ) -> Tensor:
        """Computes the loss.

        Args:
            heads (`Tensor` of shape `[m, B, d_model]`):
                Pooled representations of the m aligned heads for B samples.
            teacher (`Tensor` of shape `[B, d_teacher]`):
                Frozen teacher's vectors of the samples' images.
            valid (`BoolTensor` of shape `[B]`, *optional*):
                Samples that take part; the others are neither anchor nor candidate.
            queue ([`~objectives.queue.SampleQueue`], *optional*):
                Past samples that are candidates too, but no anchors. A past sample of the anchor's own image is masked.

        Returns:
            `Tensor`: Scalar loss, float32.
        """
        with exact_products(heads.device):
            heads, teacher = valid_samples(heads, teacher, valid)
            if len(teacher) + len(queue or ()) < self.least_samples:
                return self._zero(heads)
            pool = self._pool_with_queue(teacher, queue) if queue else self._pool(teacher)
            if not len(pool.anchors):
                return self._zero(heads)
            log_temperature = self.log_temperature
            with_gradient = torch.is_grad_enabled() and (heads.requires_grad or log_temperature.requires_grad)
            return _CrossEntropy.apply(heads, log_temperature, pool, self.similarity, with_gradient)

    def _zero(self, heads: Tensor) -> Tensor:
        return zero_loss(heads) + 0.0 * self.log_temperature

    def _pool(self, teacher: Tensor) -> _Pool:
        positives = top_neighbors(compared(teacher, self.teacher_similarity), self.num_neighbors, normalize=False)
        return _Pool(torch.arange(len(teacher), device=teacher.device), positives)

    def _pool_with_queue(self, teacher: Tensor, queue: SampleQueue) -> _Pool:
        """B anchors at most, and B + Q candidates."""
        assert queue.heads is not None and queue.teacher is not None
        same_image = queue.same_image(teacher)  # [B, Q]
        others = len(teacher) - 1 + len(queue) - same_image.sum(1)
        anchors = (others > self.num_neighbors).nonzero().flatten()  # enough others, and not all of them positive
        same_image = same_image[anchors]
        teachers = compared(torch.cat([teacher, queue.teacher]), self.teacher_similarity)
        at_once = max(1, MAX_LOGITS // len(teachers))
        positives = [
            _hide(teachers[rows] @ teachers.T, rows, same).topk(self.num_neighbors, dim=-1).indices
            for rows, same in zip(anchors.split(at_once), same_image.split(at_once), strict=True)
        ]
        return _Pool(anchors, torch.cat(positives), queue.heads, same_image)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keeps the temperature at or above 0.01, in place: a clamp in the forward would have no gradient below its
        bound."""
        self.log_temperature.clamp_(min=math.log(MIN_TEMPERATURE))

    def metrics(self) -> dict[str, float]:
        return {"temperature": self.temperature}

    def advice(self, spread: Tensor) -> str | None:
        """Warns of heads whose representations are so nearly parallel that all logits are the same."""
        if self.similarity == "centered_cosine":
            return constant_heads(spread)
        flat = int((spread < _FLAT * self.temperature).sum())
        if self.similarity != "cosine" or 2 * flat < len(spread):
            return None
        return (
            f"The representations of {flat} of {len(spread)} aligned heads are nearly parallel: the cosines of two "
            f"samples differ from 1 by {spread.min():.2g} to {spread.max():.2g} in the mean (`alignment_spread`). A "
            f"temperature of {self.temperature:.2g} cannot tell samples apart by that, and the alignment loss hardly "
            "moves these heads. Set `similarity='centered_cosine'`, which takes their common part away."
        )

    @property
    def temperature(self) -> float:
        """The current temperature."""
        return self.log_temperature.exp().item()
