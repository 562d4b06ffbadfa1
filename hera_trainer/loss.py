"""The alignment objective: multi-positive InfoNCE between attention heads and a frozen teacher's neighbourhoods."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .memory import SampleQueue, image_keys
from .metrics import top_neighbors

# As CLIP bounds its logit scale by 100.
MIN_TEMPERATURE = 0.01

# Norm below which a representation counts as zero: a pruned head's would get a gradient of 1e12 with torch's own.
_EPSILON = 1e-6


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
        self, heads: Tensor, teacher: Tensor, valid: Tensor | None = None, memory: SampleQueue | None = None
    ) -> Tensor:
        """Computes the loss.

        Args:
            heads (`Tensor` of shape `[m, B, d_model]`):
                Pooled representations of the m aligned heads for B samples.
            teacher (`Tensor` of shape `[B, d_teacher]`):
                Frozen teacher's vectors of the samples' images.
            valid (`BoolTensor` of shape `[B]`, *optional*):
                Samples that take part; the others are neither anchor nor candidate.
            memory ([`~memory.SampleQueue`], *optional*):
                Past samples that are candidates too, but no anchors. A past sample of the anchor's own image is masked.

        Returns:
            `Tensor`: Scalar loss, float32.
        """
        with torch.autocast(device_type=heads.device.type, enabled=False):
            heads, teacher = heads.float(), teacher.detach().float()
            if valid is not None:
                heads, teacher = heads[:, valid], teacher[valid]
            if teacher.shape[0] + len(memory or ()) < self.num_neighbors + 2:
                return self._zero(heads)
            if memory:
                return self._with_memory(heads, teacher, memory)
            positives = top_neighbors(teacher, self.num_neighbors, self.normalize)  # [B, k]
            if self.normalize:
                heads = F.normalize(heads, dim=-1, eps=_EPSILON)
            logits = heads @ heads.transpose(1, 2) / self.log_temperature.exp()  # [m, B, B]
            itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
            log_probs = logits.masked_fill(itself, -torch.inf).log_softmax(dim=-1)
            return -log_probs.gather(-1, positives.expand(len(heads), -1, -1)).mean()

    def _zero(self, heads: Tensor) -> Tensor:
        # An empty slice has a gradient (of zeros) even where the values are inf or NaN.
        return heads.flatten()[:0].sum() + 0.0 * self.log_temperature

    def _with_memory(self, heads: Tensor, teacher: Tensor, memory: SampleQueue) -> Tensor:
        """The same loss with B anchors and B + Q candidates."""
        assert memory.heads is not None and memory.teacher is not None and memory.keys is not None
        masked = torch.eye(len(teacher), dtype=torch.bool, device=teacher.device)  # an anchor itself
        same_image = image_keys(teacher)[:, None] == memory.keys  # [B, Q]
        masked = torch.cat([masked, same_image], dim=1)  # [B, B + Q]
        anchors = masked.shape[1] - masked.sum(1) > self.num_neighbors  # enough others, and not all of them positive
        if not anchors.any():
            return self._zero(heads)
        teachers, candidates = torch.cat([teacher, memory.teacher]), torch.cat([heads, memory.heads], dim=1)
        if self.normalize:
            teachers, candidates = F.normalize(teachers, dim=-1), F.normalize(candidates, dim=-1, eps=_EPSILON)
        similarity = teachers[: len(teacher)][anchors] @ teachers.T
        masked = masked[anchors]
        positives = similarity.masked_fill(masked, -torch.inf).topk(self.num_neighbors, dim=-1).indices
        logits = candidates[:, : len(teacher)][:, anchors] @ candidates.transpose(1, 2) / self.log_temperature.exp()
        log_probs = logits.masked_fill(masked, -torch.inf).log_softmax(dim=-1)  # [m, anchors, B + Q]
        return -log_probs.gather(-1, positives.expand(len(heads), -1, -1)).mean()

    @torch.no_grad()
    def clamp_temperature_(self) -> None:
        """Keeps the temperature at or above 0.01, in place. Called after each optimizer step: a clamp in the forward
        would have no gradient below its bound."""
        self.log_temperature.clamp_(min=math.log(MIN_TEMPERATURE))

    @property
    def temperature(self) -> float:
        """The current temperature."""
        return self.log_temperature.exp().item()
