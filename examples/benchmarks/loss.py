"""What the alignment loss costs, forward and backward, beside the matrix products that it cannot do without.

    python examples/benchmarks/loss.py            # m up to 50, B up to 4,096, d up to 8,192
    python examples/benchmarks/loss.py --small    # in seconds

m heads of B samples in d dimensions need three products of 2 m B^2 d operations: the logits, and their gradient's two
ways to the representations. They are timed in the same turns, as plain matrix products of the same shapes into memory
that is there already. Memory is the growth of a fresh process while the loss runs forward and backward, without its
inputs, in units of the logits `[m, B, B]` in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from harness import Pairs, Result, Row, fresh_process, paired
from peak_memory import extra_bytes

from hera_trainer.objectives.contrastive import HeRALoss

Shape = tuple[int, int, int]  # heads m, samples B, width d
TIMED: list[Shape] = [(m, batch, d) for batch in (16, 128) for m in (5, 50) for d in (576, 8192)]
TIMED += [(5, 1024, 576), (50, 1024, 576), (5, 1024, 8192), (50, 2048, 576), (5, 2048, 8192), (5, 4096, 576)]
MEMORY: list[Shape] = [(5, 1024, 576), (5, 4096, 576), (50, 4096, 576)]
SMALL: list[Shape] = [(2, 16, 32), (2, 64, 32)]
BAR, BAR_FROM = 2.0, 1024
NEIGHBORS = 10
_OPERATIONS = 2e9  # in one measurement at least: a single call on a small pool is too short to time
_LOGITS = 2**24  # held at a time by the plain products


def _loss(shape: Shape, device: str) -> Callable[[], None]:
    m, batch, d = shape
    criterion = HeRALoss(num_neighbors=NEIGHBORS, similarity="cosine").to(device)
    heads = torch.randn(m, batch, d, device=device, requires_grad=True)
    teacher = torch.randn(batch, 384, device=device)

    def run() -> None:
        criterion(heads, teacher).backward()
        heads.grad = criterion.log_temperature.grad = None

    return run


def _products(shape: Shape, device: str) -> Callable[[], None]:
    m, batch, d = shape
    at_once = max(1, min(m, _LOGITS // batch**2))
    z = torch.randn(m, batch, d, device=device)
    square, wide = (torch.empty(at_once, batch, width, device=device) for width in (batch, d))

    def run() -> None:
        for part in z.split(at_once):
            logits, gradient = square[: len(part)], wide[: len(part)]
            torch.bmm(part, part.transpose(1, 2), out=logits)
            torch.bmm(logits, part, out=gradient)
            torch.bmm(logits.transpose(1, 2), part, out=gradient)

    return run


def _repeated(run: Callable[[], None], times: int) -> Callable[[], None]:
    def several() -> None:
        for _ in range(times):
            run()

    return several


def time_row(shape: Shape, pairs: int, device: str) -> Row:
    """The loss of one shape against its three products."""
    m, batch, d = shape
    operations = 3 * 2 * m * batch**2 * d
    times = max(1, int(_OPERATIONS / operations))
    measured = paired(_repeated(_loss(shape, device), times), _repeated(_products(shape, device), times), pairs)
    each = Pairs(*([cost / times for cost in costs] for costs in (measured.ours, measured.theirs)))
    speed = operations / sorted(each.theirs)[pairs // 2] / 1e9
    return each.row(
        f"alignment loss, m = {m}, B = {batch}, d = {d}: time",
        "three products of 2 m B^2 d operations",
        at_most=BAR if batch >= BAR_FROM else None,
        note=f"seconds; the products ran at {speed:.0f} GFLOPS",
    )


def memory_row(shape: Shape, pairs: int) -> Row:
    """Peak memory of the loss against one copy of the logits."""
    m, batch, d = shape
    numbers = ",".join(map(str, shape))
    ours = [fresh_process(__file__, "--memory", numbers)["bytes"] for _ in range(pairs)]
    inputs = f"the heads themselves are {4e-6 * m * batch * d:.0f} MB"
    return Pairs([cost / 1e6 for cost in ours], [4e-6 * m * batch**2] * pairs).row(
        f"alignment loss, m = {m}, B = {batch}, d = {d}: peak memory without its inputs",
        "one copy of the logits [m, B, B]",
        at_most=1.0 if batch >= 4 * BAR_FROM else None,
        note=f"MB; {inputs}",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny pools")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    if chosen.memory:
        m, batch, d = map(int, chosen.memory.split(","))
        _loss((2, 64, 32), "cpu")()  # what is loaded and started once
        print(json.dumps({"bytes": extra_bytes(_loss((m, batch, d), "cpu"))}))
        return
    rows = [time_row(shape, chosen.pairs, chosen.device) for shape in (SMALL if chosen.small else TIMED)]
    if chosen.device == "cpu":
        rows += [memory_row(shape, min(chosen.pairs, 3)) for shape in (SMALL[1:] if chosen.small else MEMORY)]
    name = "loss" + ("_small" if chosen.small else "") + ("_cuda" if chosen.device == "cuda" else "")
    options = (" --small" if chosen.small else "") + f" --device {chosen.device}"
    Result(name, f"python examples/benchmarks/loss.py --pairs {chosen.pairs}{options}", rows).save()


if __name__ == "__main__":
    main()
