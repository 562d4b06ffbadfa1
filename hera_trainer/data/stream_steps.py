"""Whole optimizer steps of a streamed data set, whose length nobody knows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

logger = get_logger(__name__)


class StreamSteps:
    """Takes the micro-batches of an optimizer step from a stream, if all processes have as many as a step has.

    What is left at the stream's end is not trained on: `Trainer` would add its gradient to that of the next step, which
    would be no mean any more, and whose samples would not all be compared; and where a process has none, the others
    would wait for it.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Tells how much the other processes have.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._has_ended = self._has_warned = False

    def begin_epoch(self) -> None:
        """The stream begins anew."""
        self._has_ended = False

    def take(self, stream: Iterator, num_batches: int, is_first: bool) -> list[dict[str, Any]]:
        """The micro-batches of the next step; none where the stream has ended in any process. To be called by all.

        Args:
            stream (`Iterator` of `dict`): Micro-batches.
            num_batches (`int`): How many a step has.
            is_first (`bool`): Whether it is the first step of training.

        Raises:
            `ValueError`: If the stream does not give the first step.
        """
        if self._has_ended:
            return []
        batches = list(itertools.islice(stream, num_batches))
        least, most = self._counted(len(batches))
        if least == num_batches:
            return batches
        self._has_ended = True
        if is_first:
            raise ValueError(_too_short(least, num_batches))
        if most and not self._has_warned:
            self._has_warned = True
            logger.warning(self._left_out(least, most))
        return []

    def _counted(self, own: int) -> tuple[int, int]:
        counts = torch.tensor([own], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(counts)
        return int(counts.min()), int(counts.max())

    def _left_out(self, least: int, most: int) -> str:
        if self.accelerator.num_processes == 1:
            return (
                f"The last {least} micro-batches of the stream are fewer than an optimizer step, and are left out in "
                "each epoch."
            )
        return (
            f"The last {least or most} micro-batches of a process's part of the stream are fewer than an optimizer "
            "step, and are left out in each epoch, as is what other processes have left."
        )


def _too_short(least: int, num_batches: int) -> str:
    if least:
        return (
            f"The stream gives {least} micro-batches an epoch, fewer than the {num_batches} of an optimizer step. "
            "Lower `gradient_accumulation_steps`."
        )
    return (
        "The stream gives a process no row to train on. Give it more rows, or as many files as there are "
        "processes, or fewer data loader workers (`dataloader_num_workers`)."
    )
