"""The samples of one optimizer step, seen twice: once to compare them all, once to train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ..data.batch import TeacherBatch
from .contrast import Contrast, PoolLoss

# Largest relative difference between the head representations of the two passes: rounding, where the kernels differ.
_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed` inside; outside, as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class StepWindow:
    """The micro-batches of one optimizer step, compared with each other and with those of the other processes.

    A first pass, without gradients and up to the deepest aligned head, collects all head representations; from them
    the loss and its gradient at each representation follow. The second pass is the ordinary training forward of each
    micro-batch, which carries these gradients on into the model. Weights do not move in between, and each micro-batch
    draws the same random numbers (dropout) in both passes, so the gradient is exactly that of one large batch. The idea
    is that of gradient caching (arXiv 2101.06983).

    Args:
        contrast ([`~alignment.contrast.Contrast`]): Compares the samples.
        first (sequence of `tuple`):
            What the first pass read of each micro-batch: head representations `[m, b, d_model]`, teacher vectors and
            the positions that were pooled, `[b, T]`.
        seeds (sequence of `int`): The seed with which each micro-batch's first forward ran.
        device (`torch.device`): Device of the model.
    """

    def __init__(
        self,
        contrast: Contrast,
        first: Sequence[tuple[Tensor, TeacherBatch, Tensor]],
        seeds: Sequence[int],
        device: torch.device,
    ) -> None:
        self.seeds = list(seeds)
        self.device = device
        self.position = 0
        sizes = torch.tensor([len(mask) for _, _, mask in first], device=device)
        self.starts: list[int] = (sizes.cumsum(0) - sizes).tolist()
        self.heads = torch.cat([heads for heads, _, _ in first], dim=1)
        self.pool: PoolLoss = contrast(
            self.heads,
            torch.cat([teacher.vectors for _, teacher, _ in first]),
            torch.cat([teacher.valid(mask) for _, teacher, mask in first]),
            torch.arange(len(first), device=device).repeat_interleave(sizes),
        )

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def is_open(self) -> bool:
        """Whether a micro-batch is left to train on."""
        return self.position < len(self)

    def same_randomness(self) -> AbstractContextManager:
        """Context in which the current micro-batch's second forward draws what its first one drew."""
        return seeded(self.seeds[self.position], self.device) if self.is_open else nullcontext()

    def check(self, heads: Tensor, dtype: torch.dtype) -> None:
        """Refuses a second forward of the current micro-batch that did not compute what the first one computed: the
        gradient would be that of other representations.

        Args:
            heads (`Tensor` of shape `[m, b, d_model]`): Representations of the second forward.
            dtype (`torch.dtype`): What the model computes in.

        Raises:
            `RuntimeError`: Naming what can be the cause.
        """
        start = self.starts[self.position]
        first = self.heads[:, start : start + heads.shape[1]]
        tolerance = _TOLERANCE.get(dtype, 1e-3)
        scale = torch.linalg.vector_norm(first, dim=(1, 2))
        difference = (torch.linalg.vector_norm(first - heads.detach(), dim=(1, 2)) / scale.clamp_min(1e-6)).max().item()
        if difference > tolerance:  # not so where a value is NaN, which the contrast leaves out and counts
            raise RuntimeError(
                f"The two passes of an optimizer step do not agree: head representations of the first pass, which runs "
                f"without gradients, differ from those of the training pass by {difference:.1%} (at most "
                f"{tolerance:.1%} is rounding). The forward pass depends on something besides the weights, the batch "
                "and torch's random numbers: random numbers drawn elsewhere (NumPy, attention dropout of a fused "
                "kernel), a state that each forward changes, code that asks whether gradients are on, or a "
                "`compute_loss` that does so. Remove it, or compare samples in one pass: set "
                "`contrast_scope='micro_batch'`, or `gradient_accumulation_steps=1`."
            )

    def carrier(self, leaves: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The current micro-batch's share of the loss ([`~alignment.contrast.PoolLoss.carrier`]), then the next."""
        start = self.starts[self.position]
        self.position += 1
        return self.pool.carrier(leaves, parameters, start, share=1.0 / len(self))
