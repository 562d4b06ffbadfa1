"""How time and memory grow, beside the growth that docs/scaling.md predicts.

    python examples/benchmarks/scaling.py            # a few minutes; draws docs/assets/scaling.svg
    python examples/benchmarks/scaling.py --small    # few and small points, in seconds

Each curve is measured at several sizes in turn, `--pairs` times over. The exponent is the slope of a line fitted to the
points on log-log axes, once for each time; its median, smallest and largest value are kept. A curve agrees with a
prediction of size^p if the median is within 0.25 of p, or not above p + 0.25 where p is a bound.

Ranking and passes run a Llama of SmolLM2-135M's shape with random weights, in bf16 autocast: neither time nor memory
depends on the weights. Memory is the most that the process held during the call, above what it held before (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import datasets
import numpy as np
import torch
from harness import Result, Row, fresh_process, seconds
from scaling_cache import WIDTH, build, measure
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hera_trainer import AttentionHead, HeadCapture, HeRALoss, get_head_accessor, mutual_knn, rank_heads
from hera_trainer.teacher.vectors import TEACHER_COLUMN

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "assets" / "scaling.svg"
WORDS = [f"word{number}" for number in range(1000)]
TOKENS = 8  # of a caption
TOLERANCE = 0.25


@dataclass
class Curve:
    """Measured points, and the growth that was predicted.

    Args:
        title, x_name, y_name (`str`): What was measured.
        predicted (`float`): Exponent.
        x (`list`): Sizes.
        is_bound (`bool`): Whether the prediction is an upper bound.
        runs (`list[list[float]]`): What was measured at each size, once for each repetition.
    """

    title: str
    x_name: str
    y_name: str
    predicted: float
    x: list[int]
    is_bound: bool = False
    runs: list[list[float]] = field(default_factory=list)

    @property
    def y(self) -> list[float]:
        return [statistics.median(points) for points in zip(*self.runs, strict=True)]

    @property
    def exponents(self) -> list[float]:
        """Slope of each repetition's points on log-log axes."""
        return [float(np.polyfit(np.log(self.x), np.log(np.maximum(points, 1e-9)), 1)[0]) for points in self.runs]

    def row(self) -> Row:
        found = self.exponents
        middle = statistics.median(found)
        above, below = middle - self.predicted <= TOLERANCE, self.predicted - middle <= TOLERANCE
        bar = f"<= {self.predicted:g} + {TOLERANCE}" if self.is_bound else f"{self.predicted:g} ± {TOLERANCE}"
        ends = f"{self.y_name}: {self.y[0]:.3g} at {self.x[0]:,}, {self.y[-1]:.3g} at {self.x[-1]:,}"
        what, against = f"exponent of {self.title} over {self.x_name}", "docs/scaling.md"
        met = above and (below or self.is_bound)
        return Row(what, against, middle, min(found), max(found), len(found), bar, met, f"an exponent; {ends}")


def peak_memory(run: Callable[[], Any]) -> float:
    """MB that the process held at most during the call, above what it held before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest value so far
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0.0)


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1000


def llama(layers: int, small: bool, intermediate_size: int = 1536) -> LlamaForCausalLM:
    """A random Llama as wide as SmolLM2-135M, or a tiny one."""
    wide: dict[str, Any] = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    wide["intermediate_size"] = intermediate_size
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=len(WORDS) + 1, num_hidden_layers=layers, **(tiny if small else wide))
    return LlamaForCausalLM(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: number for number, word in enumerate([*WORDS, "<unk>"])}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")


def captions(count: int) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, TOKENS)) for _ in range(count)]
    vectors = rng.standard_normal((count, 384)).astype(np.float32)
    return datasets.Dataset.from_dict({"text": texts, TEACHER_COLUMN: list(vectors)})


def ranking(model: LlamaForCausalLM, samples: int, bf16: bool = True) -> Callable[[], Any]:
    data, words = captions(samples), tokenizer()

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return rank_heads(model, words, data, num_samples=samples, progress=False)

    return run


def scoring(samples: int) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    head, teacher = (torch.randn(samples, d, generator=generator) for d in (64, 384))
    return lambda: mutual_knn(head, teacher)


def loss(heads: int, samples: int, width: int = 576) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(heads, samples, width, generator=generator).requires_grad_()
    teacher, criterion = torch.randn(samples, 384, generator=generator), HeRALoss()
    return lambda: torch.autograd.grad(criterion(z, teacher), [z])


def first_pass(model: LlamaForCausalLM, layers: int, samples: int, tokens: int) -> Callable[[], Any]:
    """The first pass of scope "step" when the deepest aligned head lies in the last of so many layers."""
    capture = HeadCapture(get_head_accessor(model), [AttentionHead(layers - 1, 0)], "llama")
    ids = torch.randint(len(WORDS), (samples, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)

    def forward(inputs: dict[str, Any]) -> Any:
        return model.model(**inputs, use_cache=False)

    def run() -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), capture.attached():
            return capture.read(forward, {"input_ids": ids}, mask, stop_early=True)

    return run


def measured(curve: Curve, makers: Callable[[int], Callable[[], Any]], runs: int, cost: Callable = seconds) -> Curve:
    """The curve with its points: every size in turn, several times over, after one round that does not count (none
    where there is a single one)."""
    each = [makers(size) for size in curve.x]
    warmup = min(runs - 1, 1)
    for turn in range(warmup + runs):
        points = [cost(run) for run in each]
        if turn >= warmup:
            curve.runs.append(points)
    return curve


def ranking_curves(runs: int, small: bool) -> list[Curve]:
    """Ranking over samples (time, memory) and layers, and the scoring of one head alone."""
    samples = [32, 64] if small else [128, 256, 512, 1024]
    layers = [2, 4] if small else [4, 8, 15, 30]
    scored = [256, 512] if small else [2000, 4000, 8000, 16_000]
    model = llama(layers[1], small)

    def of_layers(count: int) -> Callable[[], Any]:
        return ranking(llama(count, small), samples[0])

    by_samples = Curve(f"ranking, {layers[1]} layers: time", "samples N", "seconds", 1, samples)
    # Autocast keeps copies of the weights, and a narrow feed-forward spares time: what ranking itself holds remains.
    narrow = llama(layers[-1], small, intermediate_size=64)
    by_memory = Curve(f"ranking, {layers[-1]} layers: memory", "samples N", "MB", 1, samples, is_bound=True)
    return [
        measured(by_samples, lambda size: ranking(model, size), runs),
        measured(by_memory, lambda size: ranking(narrow, size, bf16=False), runs, peak_memory),
        measured(Curve("scoring one head: time", "samples N", "seconds", 2, scored), scoring, runs),
        measured(Curve(f"ranking, N = {samples[0]}: time", "layers L", "seconds", 1, layers), of_layers, runs),
    ]


def step_curves(runs: int, small: bool) -> list[Curve]:
    """The first pass over layers; the loss with its gradient over heads and pool."""
    layers = [2, 4] if small else [4, 8, 15, 30]
    heads = [2, 4] if small else [5, 10, 20, 40]
    pool = [64, 128] if small else [512, 1024, 2048, 4096]
    model = llama(layers[-1], small)
    shape = (2, 8) if small else (4, 64)

    def of_pool(size: int) -> Callable[[], Any]:
        return loss(5, size)

    def of_heads(count: int) -> Callable[[], Any]:
        return loss(count, pool[0])

    deepest = "layers up to the deepest aligned head"
    memory = Curve("alignment loss, m = 5: memory", "pool B", "MB", 2, pool[-3:], is_bound=True)
    return [
        measured(
            Curve('first pass of scope "step": time', deepest, "seconds", 1, layers),
            lambda count: first_pass(model, count, *shape),
            runs,
        ),
        measured(Curve(f"alignment loss, B = {pool[0]}: time", "heads m", "seconds", 1, heads), of_heads, runs),
        measured(Curve("alignment loss, m = 5: time", "pool B", "seconds", 2, pool), of_pool, runs),
        measured(memory, of_pool, runs, peak_memory),
    ]


def cache_curves(runs: int, small: bool) -> list[Curve]:
    """Attaching and reading cached vectors, one fresh process for each size."""
    sizes = [2000, 4000] if small else [10_000, 100_000, 1_000_000, 10_000_000]
    found = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), size)
            alone = not small  # other work in this process would change its memory, which a try does not mind
            call = ("--cache", folder, "--pairs", str(runs))
            found.append(fresh_process(__file__, *call) if alone else measure(Path(folder), runs))
    name = "cached vectors"
    attach = Curve(f"{name}: attaching", f"rows of {WIDTH} numbers", "seconds", 1, sizes, is_bound=True)
    read = Curve(f"{name}: reading one row", f"rows of {WIDTH} numbers", "microseconds", 0, sizes)
    memory = Curve(f"{name}: memory but for mapped files", f"rows of {WIDTH} numbers", "MB", 1, sizes, is_bound=True)
    for curve, kind in ((attach, "attach"), (read, "read"), (memory, "memory")):
        curve.runs = [list(points) for points in zip(*(each[kind] for each in found), strict=True)]
    return [attach, read, memory]


def draw(curves: list[Curve], path: Path) -> None:
    """One small panel a curve: the measured points, and the predicted slope through the last of them, dashed."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "scaling"  # the same figure from the same numbers
    columns = 4
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, curve in zip(panels, curves, strict=False):
        x, y = np.array(curve.x, dtype=float), curve.y
        word = "at most" if curve.is_bound else "predicted"
        panel.loglog(x, y[-1] * (x / x[-1]) ** curve.predicted, "--", color="0.5", label=f"{word}: {curve.predicted:g}")
        fitted = f"measured: {statistics.median(curve.exponents):.2f}"
        panel.loglog(x, y, "o-", color="tab:blue", markersize=4, linewidth=1.2, label=fitted)
        panel.set_ylim(10 ** np.floor(np.log10(min(y))), 10 ** np.ceil(np.log10(max(y)) + 0.01))
        panel.set_xticks(x, [f"{size:,}" if size < 1e5 else f"{size:.0e}" for size in curve.x])
        panel.minorticks_off()
        panel.set_title(curve.title, fontsize=8)
        panel.set_xlabel(curve.x_name, fontsize=8)
        panel.set_ylabel(curve.y_name, fontsize=8)
        panel.tick_params(labelsize=7, which="both")
        panel.legend(fontsize=7, title="exponent", title_fontsize=7)
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    figure.savefig(path, **({"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 110}))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7, help="repetitions of each curve")
    parser.add_argument("--small", action="store_true", help="few and small points")
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--figure", type=Path, help="where to draw; docs/assets/scaling.svg, or nowhere if small")
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    if chosen.cache:
        print(json.dumps(measure(chosen.cache, chosen.pairs)))
        return
    curves = [
        *ranking_curves(chosen.pairs, chosen.small),
        *step_curves(chosen.pairs, chosen.small),
        *cache_curves(chosen.pairs, chosen.small),
    ]
    figure = chosen.figure or (None if chosen.small else FIGURE)
    if figure is not None:
        draw(curves, figure)
    command = f"python examples/benchmarks/scaling.py --pairs {chosen.pairs}" + (" --small" if chosen.small else "")
    rows = [curve.row() for curve in curves]
    points = {curve.title: {**asdict(curve), "y": curve.y} for curve in curves}
    Result("scaling_small" if chosen.small else "scaling", command, rows, points).save()


if __name__ == "__main__":
    main()
