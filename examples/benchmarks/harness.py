"""What the benchmarks share: pairs of measurements in one process, the machine they ran on, and results as JSON."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass
class Row:
    """One line of a benchmark: a ratio of two measurements, and the bar it is held against.

    Args:
        what (`str`): What was measured.
        against (`str`): What it was measured against.
        ratio (`float`): Median of the pairs' ratios.
        low, high (`float`): Smallest and largest of them.
        pairs (`int`): Number of pairs.
        bar (`str`): The bar in words (`"<= 1.03"`), empty where there is none.
        met (`bool`, *optional*): Whether the median keeps it.
        note (`str`): What else there is to say: absolute times, settings.
    """

    what: str
    against: str
    ratio: float
    low: float
    high: float
    pairs: int
    bar: str = ""
    met: bool | None = None
    note: str = ""


@dataclass
class Result:
    """What a benchmark writes down.

    Args:
        name (`str`): Name of the benchmark and of its file.
        command (`str`): What makes it again.
        rows (`list[Row]`): Its lines.
        curves (`dict`): Measured points of scaling curves, `{name: {"x": [...], "y": [...], ...}}`.
        environment (`dict`): Machine and versions.
    """

    name: str
    command: str
    rows: list[Row]
    curves: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=lambda: environment())

    def save(self) -> None:
        """Writes `results/<name>.json` and prints the rows."""
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        for row in self.rows:
            verdict = {True: "met", False: "MISSED", None: ""}[row.met]
            print(
                f"{row.what}: {row.ratio:.3f} ({row.low:.3f} to {row.high:.3f}, {row.pairs} pairs) {row.bar} {verdict}"
            )
            print(f"    against {row.against}. {row.note}")


def environment() -> dict[str, Any]:
    """Processor, threads and versions."""
    name = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {library: version(library) for library in LIBRARIES}
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu, **versions}


def seconds(run: Callable[[], Any]) -> float:
    """Wall-clock time of one call, all of its work on a GPU included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclass
class Pairs:
    """Times of two ways to do the same, measured in turns.

    Args:
        ours, theirs (`list[float]`): Seconds (or any other cost) of each turn.
    """

    ours: list[float]
    theirs: list[float]

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    def row(
        self, what: str, against: str, at_most: float | None = None, at_least: float | None = None, note: str = ""
    ) -> Row:
        """The line of these pairs: ours divided by theirs, or theirs by ours for a speed-up (`at_least`)."""
        ratios = [1 / r for r in self.ratios] if at_least is not None else self.ratios
        middle = statistics.median(ratios)
        bar, met = "", None
        if at_most is not None:
            bar, met = f"<= {at_most:g}", middle <= at_most
        elif at_least is not None:
            bar, met = f">= {at_least:g}", middle >= at_least
        times = f"medians {statistics.median(self.ours):.4g} and {statistics.median(self.theirs):.4g}"
        note = f"{note} ({times})" if note else times
        return Row(what, against, middle, min(ratios), max(ratios), len(ratios), bar, met, note)


def paired(
    ours: Callable[[], Any], theirs: Callable[[], Any], pairs: int = 7, warmup: int = 1, cost: Callable = seconds
) -> Pairs:
    """Measures two functions in turns, each of them first in every second pair, so that drift hits both alike.

    Args:
        ours, theirs (`Callable`): What is measured.
        pairs (`int`, *optional*, defaults to `7`): Number of pairs.
        warmup (`int`, *optional*, defaults to `1`): Pairs before these that do not count.
        cost (`Callable`, *optional*): Takes a function, calls it and returns its cost; by default its seconds.
    """
    result = Pairs([], [])
    for turn in range(warmup + pairs):
        order = [(ours, result.ours), (theirs, result.theirs)]
        for run, costs in order if turn % 2 == 0 else reversed(order):
            spent = cost(run)
            if turn >= warmup:
                costs.append(spent)
    return result


def fresh_process(*arguments: str) -> dict[str, Any]:
    """Runs a Python script in a process of its own and returns the JSON object that it prints last: for peak memory and
    import times, which a process that has done other things cannot tell."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
