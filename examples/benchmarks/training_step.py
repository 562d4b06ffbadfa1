"""What a training step of HeRATrainer costs beside the same step of trl's SFTTrainer, in time and peak memory.

    python examples/benchmarks/training_step.py                  # SmolLM2-135M + DINOv2-S, bf16, on the CPU
    python examples/benchmarks/training_step.py --four_bit       # LoRA on the 4-bit model
    python examples/benchmarks/training_step.py --device cuda    # the same on a GPU
    python examples/benchmarks/training_step.py --small          # tiny random models of the test suite, in a minute

Three comparisons, each of whole optimizer steps over the same collated batches of the demo's data (see
`training_step_parts.Steps` for what is timed):

1. One micro-batch, cached teacher vectors: HeRATrainer against SFTTrainer, time and peak memory.
2. Scope "step", 8 micro-batches: HeRATrainer against SFTTrainer. The first pass of a step costs a forward up to the
   deepest aligned head. Its share is measured in the same turns with a plain forward without gradients, and the bar is
   1 + 1.1 x that share; with all heads in the first third of the layers, it is 1.2 besides.
3. One micro-batch, the naive variant (projecting every token in the forward, teacher online) against HeRATrainer.

Peak memory is measured in a fresh process for each number.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from harness import Pairs, Result, Row, fresh_process, seconds
from training_step_parts import PlainForward, Setting, Steps, aligned_heads, build, make_trainer

PARTS = str(Path(__file__).resolve().parent / "training_step_parts.py")
FIRST_THIRD_BAR = 1.20


@dataclass
class Turns:
    """Costs of several functions, called in turns; the order is reversed in every second turn.

    Args:
        seconds (`dict[str, list[float]]`): Time of each call: wall-clock, or between CUDA events on a GPU.
        processor (`dict[str, list[float]]`): Processor time, which other programs of a busy machine disturb less.
    """

    seconds: dict[str, list[float]]
    processor: dict[str, list[float]]

    @classmethod
    def of(cls, functions: dict[str, Callable[[], Any]], turns: int, warmup: int = 1) -> Turns:
        result = cls({name: [] for name in functions}, {name: [] for name in functions})
        for turn in range(warmup + turns):
            for name in list(functions) if turn % 2 == 0 else reversed(functions):
                spent, processor = _cost(functions[name])
                if turn >= warmup:
                    result.seconds[name].append(spent)
                    result.processor[name].append(processor)
        return result

    def pairs(self, ours: str, theirs: str) -> Pairs:
        """Times of two of the functions."""
        return Pairs(self.seconds[ours], self.seconds[theirs])

    def note(self, ours: str, theirs: str) -> str:
        """The same ratio in processor time."""
        ratio = statistics.median(Pairs(self.processor[ours], self.processor[theirs]).ratios)
        return f"ratio of processor time {ratio:.3f}; seconds"


def _cost(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and processor seconds of one call."""
    found: list[float] = []

    def timed() -> None:
        start = time.process_time()
        if torch.cuda.is_available():
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            found.append(first.elapsed_time(last) / 1e3)
        else:
            run()
        found.append(time.process_time() - start)

    wall = seconds(timed)
    return (found[0] if len(found) > 1 else wall), found[-1]


@contextmanager
def running(setting: Setting, *kinds: str) -> Iterator[dict[str, Steps]]:
    """Steps of several trainers; their hooks are gone afterwards."""
    steps = {kind: Steps(make_trainer(kind, setting), setting) for kind in kinds}
    try:
        yield steps
    finally:
        for each in steps.values():
            each.hooks.close()


def one_micro_batch(setting: Setting, pairs: int) -> list[Row]:
    """Time of a step of one micro-batch: ours against SFTTrainer, the naive variant against ours."""
    with running(setting, "sft", "ours", "naive") as steps:
        turns = Turns.of(dict(steps), pairs)
    note = f"{setting.steps} steps of {setting.batch_size} samples"
    what = "training step, one micro-batch, cached teacher, 5 heads: time"
    naive = "naive step (every token projected, teacher online), one micro-batch: time"
    return [
        turns.pairs("ours", "sft").row(what, "SFTTrainer", at_most=1.03, note=f"{note}; {turns.note('ours', 'sft')}"),
        turns.pairs("naive", "ours").row(naive, "HeRATrainer", note=f"{note}; {turns.note('naive', 'ours')}"),
    ]


def whole_step(setting: Setting, pairs: int, where: str, layers: int, fixed_bar: float | None = None) -> list[Row]:
    """Time of a step of several micro-batches against SFTTrainer, held against the measured share of a forward."""
    with running(setting, "sft", "ours") as steps:
        forward = PlainForward(steps["sft"], setting.heads)
        turns = Turns.of({"ours": steps["ours"], "sft": steps["sft"], "forward": forward}, pairs)
    shares = turns.pairs("forward", "sft")
    bar = 1 + 1.1 * statistics.median(shares.ratios)
    depth = f"deepest layer {forward.layer} of {layers}, counted from 0; heads {' '.join(setting.heads)}"
    note = f"{depth}; {setting.accumulation} x {setting.batch_size} samples; {turns.note('ours', 'sft')}"
    what = f'training step, scope "step", accumulation {setting.accumulation}, {where}: time'
    row = turns.pairs("ours", "sft").row(what, "SFTTrainer", at_most=bar, note=note)
    row.bar = f"<= {bar:.3f} (1 + 1.1 x the share below)"
    what = f"share of a plain forward up to layer {forward.layer}, no gradients: time"
    share = shares.row(what, "a step of SFTTrainer", note=turns.note("forward", "sft"))
    rows = [row, share]
    if fixed_bar is not None:
        rows.insert(1, replace(row, bar=f"<= {fixed_bar:.2f}", met=row.ratio <= fixed_bar))
    return rows


def memory(setting: Setting, pairs: int) -> list[Row]:
    """Peak memory of steps of one micro-batch, a fresh process each."""
    peaks: dict[str, list[float]] = {"sft": [], "ours": [], "naive": []}
    before: dict[str, list[float]] = {kind: [] for kind in peaks}
    for _ in range(pairs):
        for kind in peaks:
            found = fresh_process(PARTS, json.dumps({"kind": kind, "setting": asdict(setting)}))
            peaks[kind].append(found["peak"])
            before[kind].append(found["before"])
    unit = "MB allocated" if setting.device == "cuda" else "MB resident in the whole process"
    grown = {kind: statistics.median(p - b for p, b in zip(peaks[kind], before[kind], strict=True)) for kind in peaks}

    def row(what: str, against: str, kinds: tuple[str, str], bar: float | None) -> Row:
        growth = " and ".join(f"{grown[kind]:.0f}" for kind in kinds)
        note = f"{unit}; of these, {growth} came with the steps"
        return Pairs(peaks[kinds[0]], peaks[kinds[1]]).row(what, against, at_most=bar, note=note)

    ours = "training step, one micro-batch, cached teacher, 5 heads: peak memory"
    naive = "naive step (every token projected, teacher online), one micro-batch: peak memory"
    return [row(ours, "SFTTrainer", ("ours", "sft"), 1.02), row(naive, "HeRATrainer", ("naive", "ours"), None)]


def measure(folder: Path, pairs: int, small: bool, device: str, four_bit: bool, parts: str = "all") -> list[Row]:
    """All rows of the benchmark.

    Args:
        folder (`Path`): Where the model and the data are kept.
        pairs (`int`): Measured pairs of each row.
        small (`bool`): Tiny random models.
        device (`str`): `"cpu"` or `"cuda"`.
        four_bit (`bool`): Whether the decoder's linear layers are quantized.
        parts (`str`, *optional*, defaults to `"all"`): `"time"`, `"memory"` or both.
    """
    build(folder, small)
    ranked, early, layers = aligned_heads(folder)
    single = Setting(
        str(folder),
        ranked,
        batch_size=8 if small else 16,
        accumulation=1,
        steps=1 if small else 2,
        num_neighbors=3 if small else 10,
        device=device,
        four_bit=four_bit,
    )
    whole = replace(single, batch_size=2 if small else 8, accumulation=8, steps=1)
    rows: list[Row] = []
    if parts != "memory":
        rows += one_micro_batch(single, pairs)
        first_third = replace(whole, heads=early)
        rows += whole_step(first_third, pairs, "heads in the first third", layers, FIRST_THIRD_BAR)
        rows += whole_step(whole, pairs, "heads as ranked", layers)
    if parts != "time":
        rows += memory(single, pairs)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny random models of the test suite")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--four_bit", action="store_true", help="LoRA on the 4-bit model")
    parser.add_argument("--folder", help="where model and data are kept for further runs; a temporary folder if unset")
    parser.add_argument("--parts", choices=("all", "time", "memory"), default="all")
    chosen = parser.parse_args(arguments)
    kind = "".join(f"_{word}" for word in ("small", "four_bit") if getattr(chosen, word))
    kind += "_cuda" if chosen.device == "cuda" else ""
    options = [f"--{word}" for word in ("small", "four_bit") if getattr(chosen, word)]
    if chosen.parts != "all":  # must not take the place of a whole run
        kind += f"_{chosen.parts}"
        options.append(f"--parts {chosen.parts}")
    command = ["python examples/benchmarks/training_step.py", f"--pairs {chosen.pairs}", *options]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(chosen.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = measure(folder, chosen.pairs, chosen.small, chosen.device, chosen.four_bit, chosen.parts)
    Result(f"training_step{kind}", " ".join([*command, f"--device {chosen.device}"]), rows).save()


if __name__ == "__main__":
    main()
