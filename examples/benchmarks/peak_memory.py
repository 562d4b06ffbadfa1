"""Peak resident memory of a call, for benchmarks that run themselves in a fresh process. Linux only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def extra_bytes(call: Callable[[], Any]) -> int:
    """Bytes by which resident memory grew at most while `call` ran.

    Not `resource.getrusage`: its maximum starts at that of the process which started this one.
    """
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    call()
    return _status("VmHWM") - before
