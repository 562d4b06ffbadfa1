"""Work that all processes of a run do together, outside of training steps."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather, gather_object, pad_across_processes
from torch import Tensor

# What is done before or beside training takes the processes different times: one downloads a data set, or has larger
# images. The default of the communication library, ten minutes on GPUs, is meant for steps.
_PATIENCE = timedelta(hours=12)


class Team:
    """The processes that divide a piece of work. All of them must make the same calls in the same order.

    Args:
        distributed (`bool`):
            Whether all processes of the run take part. Otherwise, or if there is only one, this process is alone, and
            nothing is communicated.

    Attributes:
        index (`int`): Number of this process.
        count (`int`): Number of processes.
    """

    def __init__(self, distributed: bool) -> None:
        self._state = PartialState(timeout=_PATIENCE) if distributed else None  # if it is not there yet
        self.index: int = 0 if self._state is None else self._state.process_index
        self.count: int = 1 if self._state is None else self._state.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that does what only one may do."""
        return self.index == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in any process."""
        return any(self._exchange(flag))

    def wait(self) -> None:
        """Waits until all processes are there."""
        self._exchange(None)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of all processes, those of the first process first.

        Args:
            rows (`Tensor` of shape `[n, ...]`): This process's rows; n may differ between processes.
        """
        if self._state is None or self.count == 1:
            return rows
        rows = rows.to(self._state.device)
        lengths = gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        padded = gather(pad_across_processes(rows, dim=0).contiguous()).split(max(lengths))
        return torch.cat([part[:length] for part, length in zip(padded, lengths, strict=True)])

    def same(self, value: Tensor) -> Tensor:
        """The first process's `value` in all processes, on the device of `value`."""
        if self._state is None or self.count == 1:
            return value
        return broadcast(value.to(self._state.device)).to(value.device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Waits at its end until all processes are there. An error in one of them is raised in all, so that none waits
        for a process that is gone."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        messages = self._exchange(None if error is None else str(error))
        if error is not None:
            raise error
        for index, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"Process {index} failed: {message}")

    def sharers(self, directory: Path) -> list[int]:
        """Processes that see the same files in `directory` as this one, ascending: all of them where it lies on a
        shared file system, those of one machine otherwise.

        Args:
            directory (`Path`): An existing folder.
        """
        if self.count == 1:
            return [self.index]
        name = f".{uuid.uuid4().hex}.probe"
        with self.together():
            (directory / name).touch()
        try:
            names = self._exchange(name)
            seen = [index for index, other in enumerate(names) if (directory / other).exists()]
            self.wait()  # nobody looks any more
        finally:
            (directory / name).unlink(missing_ok=True)
        return seen

    def _exchange(self, value: Any) -> list[Any]:
        return [value] if self.count == 1 else gather_object([value])
