"""The samples of one optimizer step, seen twice: once to compare them all, once to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .contrast import Contrast, PoolLoss
from .data import TeacherBatch
from .heads.capture import HeadCapture


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed` inside; outside, as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class StepWindow:
    """The micro-batches of one optimizer step, compared with each other and with those of the other processes.

    The first pass, without gradients and up to the deepest aligned head, collects all head representations; from them
    the loss and its gradient at each representation follow. The second pass is the ordinary training forward of each
    micro-batch, which carries these gradients on into the model. Weights do not move in between, and each micro-batch
    draws the same random numbers (dropout) in both passes, so the gradient is exactly that of one large batch.

    Args:
        capture ([`~heads.capture.HeadCapture`]): Reads the head representations.
        contrast ([`~contrast.Contrast`]): Compares them.
        batches (sequence of `tuple`): Model inputs, teacher vectors and positions to pool of each micro-batch.
        forward (`Callable`): Runs the model on inputs, in training mode and in the precision of training.
        stop_early (`bool`): Whether `forward` may be left after the deepest aligned head.
        device (`torch.device`): Device of the model.
        precision (`AbstractContextManager`, *optional*): Entered once around all forward passes.
    """

    def __init__(
        self,
        capture: HeadCapture,
        contrast: Contrast,
        batches: Sequence[tuple[dict[str, Any], TeacherBatch, Tensor]],
        forward: Callable[[dict[str, Any]], Any],
        stop_early: bool,
        device: torch.device,
        precision: AbstractContextManager | None = None,
    ) -> None:
        self.device = device
        self.seeds: list[int] = torch.randint(2**31, (len(batches),)).tolist()
        self.starts: list[int] = []
        self.position = 0
        heads = []
        with precision or nullcontext(), torch.no_grad():
            for (inputs, _, mask), seed in zip(batches, self.seeds, strict=True):
                with seeded(seed, device):
                    heads.append(capture.read(forward, inputs, mask, stop_early))
                self.starts.append(sum(vectors.shape[1] for vectors in heads[:-1]))
        self.pool: PoolLoss = contrast(
            torch.cat(heads, dim=1),
            torch.cat([teacher.vectors for _, teacher, _ in batches]),
            torch.cat([teacher.valid(mask) for _, teacher, mask in batches]),
            torch.arange(len(batches), device=device).repeat_interleave(
                torch.tensor([len(mask) for _, _, mask in batches], device=device)
            ),
        )

    def __len__(self) -> int:
        return len(self.seeds)

    def same_randomness(self) -> Any:
        """Context in which the current micro-batch's second forward draws what its first one drew."""
        return seeded(self.seeds[self.position], self.device)

    def carrier(self, leaves: Tensor, log_temperature: Tensor) -> Tensor:
        """The current micro-batch's share of the loss (see [`~contrast.PoolLoss.carrier`]), and on to the next one."""
        start = self.starts[self.position]
        self.position += 1
        return self.pool.carrier(leaves, log_temperature, start, share=1.0 / len(self))
