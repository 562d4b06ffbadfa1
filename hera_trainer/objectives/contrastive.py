"""The alignment objective: multi-positive InfoNCE between attention heads and a frozen teacher's neighbourhoods."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .metrics import top_neighbors
from .queue import SampleQueue

# As CLIP bounds its logit scale by 100.
MIN_TEMPERATURE = 0.01

# Norm below which a representation counts as zero: a pruned head's would get a gradient of 1e12 with torch's own.
_EPSILON = 1e-6

# Logits held at a time: 2**22 float32 numbers are 16 MiB, which a cache holds, whatever the pool and the heads are.
_MAX_LOGITS = 2**22


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
        z_grad (`Tensor` of shape `[h, B, d_model]`, *optional*):
            The gradient with respect to the first B rows of `z`, times `temperature`, is added to it. Without it no
            gradient is computed.

    Returns:
        The sum, and its gradient with respect to the logarithm of the temperature.
    """
    total, temperature_grad = torch.zeros_like(temperature), torch.zeros_like(temperature)
    k = pool.positives.shape[1]
    at_once = max(1, _MAX_LOGITS // z.shape[1])
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


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of heads `[m, B, d_model]`, a few heads at a time.

    Its gradient is computed along with it. What waits for the backward is then as large as the heads, and no logits,
    which grow with the square of the pool.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, log_temperature: Tensor, pool: _Pool, normalize: bool, with_gradient: bool
    ) -> Tensor:
        temperature = log_temperature.exp()
        loss, temperature_grad = torch.zeros_like(temperature), torch.zeros_like(temperature)
        heads_grad = torch.zeros_like(heads) if with_gradient else None
        candidates = heads.shape[1] + (0 if pool.past is None else pool.past.shape[1])
        at_once = max(1, _MAX_LOGITS // (len(pool.anchors) * candidates))
        for start in range(0, len(heads), at_once):
            part = slice(start, start + at_once)
            z = heads[part] if pool.past is None else torch.cat([heads[part], pool.past[part]], dim=1)
            z_grad = None if heads_grad is None else heads_grad[part]
            norm = None
            if normalize:
                norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
                z = z / norm.clamp_min(_EPSILON)
            terms = _terms(z, temperature, pool, z_grad)
            loss += terms[0]
            temperature_grad += terms[1]
            if z_grad is not None and norm is not None:  # back through the division by the norm
                z, norm = z[:, : heads.shape[1]], norm[:, : heads.shape[1]]
                z_grad -= z * ((z_grad * z).sum(-1, keepdim=True) * (norm > _EPSILON))
                z_grad /= norm.clamp_min(_EPSILON)
        count = len(heads) * len(pool.anchors)
        if heads_grad is not None:
            ctx.save_for_backward(heads_grad.div_(temperature * count), temperature_grad / count)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        heads_grad, temperature_grad = ctx.saved_tensors
        return gradient * heads_grad, gradient * temperature_grad, None, None, None


class HeRALoss(nn.Module):
    """Head-wise alignment loss, eq. 4 and 8 of the [HeRA paper](https://huggingface.co/papers/2606.23885).

    The teacher's `num_neighbors` nearest other samples of each sample are its positives, each with target probability
    `1 / num_neighbors`. The logits of a head are the dot products of its own representations divided by the
    temperature, the sample itself masked out. The loss is the cross-entropy between the two, averaged over samples and
    heads. Both sides of every dot product carry gradient; the teacher's neighbours carry none.

    Args:
        num_neighbors (`int`, *optional*, defaults to `10`):
            Number k of teacher neighbours that are positives of each sample.
        temperature (`float`, *optional*, defaults to `0.07`):
            Initial temperature.
        learn_temperature (`bool`, *optional*, defaults to `True`):
            Whether the logarithm of the temperature is trained.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether head representations and teacher vectors are L2-normalised before dot products. The paper leaves it
            open; without it, a few samples of large norm become everyone's neighbours.

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

    def __init__(
        self,
        num_neighbors: int = 10,
        temperature: float = 0.07,
        learn_temperature: bool = True,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if num_neighbors < 1:
            raise ValueError(f"`num_neighbors` must be at least 1, got {num_neighbors}.")
        if not temperature >= MIN_TEMPERATURE:
            raise ValueError(f"`temperature` must be at least {MIN_TEMPERATURE}, got {temperature}.")
        self.num_neighbors = num_neighbors
        self.normalize = normalize
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learn_temperature)

    def extra_repr(self) -> str:
        return f"num_neighbors={self.num_neighbors}, normalize={self.normalize}"

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
        with torch.autocast(device_type=heads.device.type, enabled=False):
            heads, teacher = heads.float(), teacher.detach().float()
            if valid is not None:
                heads, teacher = heads[:, valid], teacher[valid]
            if teacher.shape[0] + len(queue or ()) < self.num_neighbors + 2:
                return self._zero(heads)
            pool = self._pool_with_queue(teacher, queue) if queue else self._pool(teacher)
            if not len(pool.anchors):
                return self._zero(heads)
            log_temperature = self.log_temperature
            with_gradient = torch.is_grad_enabled() and (heads.requires_grad or log_temperature.requires_grad)
            return _CrossEntropy.apply(heads, log_temperature, pool, self.normalize, with_gradient)

    def _zero(self, heads: Tensor) -> Tensor:
        # An empty slice has a gradient (of zeros) even where the values are inf or NaN.
        return heads.flatten()[:0].sum() + 0.0 * self.log_temperature

    def _pool(self, teacher: Tensor) -> _Pool:
        positives = top_neighbors(teacher, self.num_neighbors, self.normalize)
        return _Pool(torch.arange(len(teacher), device=teacher.device), positives)

    def _pool_with_queue(self, teacher: Tensor, queue: SampleQueue) -> _Pool:
        """B anchors at most, and B + Q candidates."""
        assert queue.heads is not None and queue.teacher is not None
        same_image = queue.same_image(teacher)  # [B, Q]
        others = len(teacher) - 1 + len(queue) - same_image.sum(1)
        anchors = (others > self.num_neighbors).nonzero().flatten()  # enough others, and not all of them positive
        same_image = same_image[anchors]
        teachers = torch.cat([teacher, queue.teacher])
        if self.normalize:
            teachers = F.normalize(teachers, dim=-1)
        at_once = max(1, _MAX_LOGITS // len(teachers))
        positives = [
            _hide(teachers[rows] @ teachers.T, rows, same).topk(self.num_neighbors, dim=-1).indices
            for rows, same in zip(anchors.split(at_once), same_image.split(at_once), strict=True)
        ]
        return _Pool(anchors, torch.cat(positives), queue.heads, same_image)

    @torch.no_grad()
    def clamp_temperature_(self) -> None:
        """Keeps the temperature at or above 0.01, in place. Called after each optimizer step: a clamp in the forward
        would have no gradient below its bound."""
        self.log_temperature.clamp_(min=math.log(MIN_TEMPERATURE))

    @property
    def temperature(self) -> float:
        """The current temperature."""
        return self.log_temperature.exp().item()
