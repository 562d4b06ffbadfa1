"""Curves of what a run logged."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import Any

import numpy as np

from ..plots import monitor_group
from ..record import RunRecord
from .parts import CURVE_HEIGHT, Missing, Plot, Section, Table, number_text, plain_figure, spread
from .settings import measured_with, teacher_of

# More points than a screen has columns only make the page slow.
MOST_POINTS = 2000
MOST_ROWS = 60
# Curves with fewer points are read without a running mean.
SMOOTHED_FROM = 50

_COLORS = tuple(f"--series-{i}" for i in range(2, 7))  # the first is that of training
_EVALUATED, _ALIGNMENT = r"eval(_.+)?_loss", "_alignment_loss"
_GAIN = "By how much the held-out loss rises, in nats a token, when each row gets the images of another one."


@dataclass
class Series:
    """One line of a chart: its name, the colour it takes of the page, and its points."""

    name: str
    color: str
    steps: Sequence[int]
    values: Sequence[float]
    noisy: bool = False


def curves_section(run: RunRecord) -> Section:
    """Losses, pull, spread, temperature, pool, skipped steps, the mutual k-NN of groups of heads, and image gain."""
    section = Section("training", "Training")
    plots = [
        _chart("loss", "Language-model loss", _loss(run)),
        _chart("alignment-loss", "Alignment loss", _alignment_loss(run), note=_band(run)),
        _chart("mknn-text", "Mutual k-NN, text only", _groups(run, "text"), note=_reference(run, "text")),
        _chart("mknn-image", "Mutual k-NN, image in context", _groups(run, "image"), note=_reference(run, "image")),
        _chart("image-gain", "Image gain", [_series(run, "image_gain", "gain", "--series-1")], note=_GAIN, zero=True),
        _chart("pull", "Pull at the aligned heads", _pull(run), note=_PULL_NOTE, zero=True),
        _chart("spread", "Spread of the aligned heads", [_series(run, "alignment_spread", "spread", "--series-1")]),
        _chart("temperature", "Temperature", [_series(run, "temperature", "temperature", "--series-1")]),
        _chart("pool", "Samples compared at a time", [_series(run, "alignment_pool", "pool", "--series-1")], zero=True),
        _chart("skipped", "Without alignment loss, running total", _skipped(run), note=_left_out(run), zero=True),
    ]
    found = [plot for plot in plots if plot is not None]
    if found:
        section.plots[""] = found
    section.missing += _missing(run, {plot.name for plot in found})
    if any(len(line["x"]) > 2 for plot in found for line in plot.figure["data"]):
        section.notes.append("Drag over a plot to zoom in; double-click to go back.")
    return section


def _series(run: RunRecord, key: str, name: str, color: str, noisy: bool = False) -> Series:
    steps, values = run.curve(key)
    return Series(name, color, steps, values, noisy)


def _keys(run: RunRecord, pattern: str) -> list[str]:
    return sorted({key for entry in run.log_history for key in entry if re.fullmatch(pattern, key)})


def _evaluations(keys: Iterable[str], ending: str) -> dict[str, str]:
    """What the evaluation sets are called that a loss was logged of, by its keys: `eval_loss`, or `eval_<name>_loss` of
    several."""
    names = {key: key.removeprefix("eval").removesuffix(ending).strip("_") for key in keys}
    return {key: f"evaluation, {name}" if name else "evaluation" for key, name in names.items()}


def _beside_training(run: RunRecord, names: Mapping[str, str]) -> list[Series]:
    """One series a key, in the colours of the page that training leaves, in turn."""
    return [_series(run, key, name, color) for (key, name), color in zip(names.items(), cycle(_COLORS), strict=False)]


def held_out_losses(run: RunRecord) -> list[str]:
    """Keys of the language-model losses of all evaluation sets."""
    of_alignment = _held_out_alignment_losses(run)
    return [key for key in _keys(run, _EVALUATED) if key not in of_alignment]


def _held_out_alignment_losses(run: RunRecord) -> list[str]:
    """Keys of the alignment losses of all evaluation sets. Each has a language-model loss beside it: by itself,
    `eval_alignment_loss` is that of a set with the name `alignment`."""
    keys = _keys(run, _EVALUATED)
    return [key for key in keys if key.endswith(_ALIGNMENT) and f"{key.removesuffix(_ALIGNMENT)}_loss" in keys]


def _loss(run: RunRecord) -> list[Series]:
    key = "lm_loss" if run.curve("lm_loss")[0] else "loss"  # plain SFTTrainer has the latter only
    evaluations = _evaluations(held_out_losses(run), "_loss")
    return [_series(run, key, "training", "--series-1", noisy=True), *_beside_training(run, evaluations)]


def _alignment_loss(run: RunRecord) -> list[Series]:
    evaluations = _evaluations(_held_out_alignment_losses(run), _ALIGNMENT)
    terms = {key: key.split("/")[1] for key in _keys(run, r"alignment_loss/.+")}
    training = _series(run, "alignment_loss", "training", "--series-1", noisy=True)
    return [training, *_beside_training(run, {**evaluations, **terms})]


def _groups(run: RunRecord, context: str) -> list[Series]:
    names = (
        ("aligned", "aligned heads", "--aligned"),
        ("top", "top heads", "--series-1"),
        ("all", "all heads", "--quiet"),
    )
    groups = [_series(run, f"{monitor_group(context)}/{key}", name, color) for key, name, color in names]
    if not any(line.steps for line in groups):
        return []
    measured = run.monitored.get(context, {})
    high = {step: ranking.null_p95 for step, ranking in measured.items() if ranking.null_p95 is not None}
    return [*groups, Series("95th percentile of chance", "--series-2", list(high), list(high.values()))]


def _reference(run: RunRecord, context: str) -> str:
    """What the scores of a context can be held against."""
    rankings = list(run.monitored.get(context, {}).values())
    scales = list(dict.fromkeys(measured_with(ranking, teacher_of(run)) for ranking in rankings))
    if len(scales) > 1:
        return f"Measured with {' and with '.join(scales)}, which cannot be compared."
    return f"{scales[0]}; {', '.join(rankings[0].references())}." if rankings else ""


def _skipped(run: RunRecord) -> list[Series]:
    not_finite = dict(zip(*run.curve("alignment_not_finite"), strict=True))
    steps, skipped = run.curve("alignment_skipped")  # for whatever reason
    too_few = [value - not_finite.get(step, 0) for step, value in zip(steps, skipped, strict=True)]
    return [
        Series("too few samples", "--series-1", steps, list(accumulate(too_few))),
        Series("not finite", "--series-2", list(not_finite), list(accumulate(not_finite.values()))),
    ]


def _left_out(run: RunRecord) -> str:
    total = sum(run.curve("alignment_left_out")[1])
    if not total:
        return ""
    return f"{total:,.0f} samples were left out of the alignment loss: no image, or no token with a label."


_PULL_NOTE = "The alignment loss's gradient over the language-model loss's, at the aligned heads."


def _pull(run: RunRecord) -> list[Series]:
    """The pull, and the weight where it follows a target."""
    pull = _series(run, "alignment_pull", "pull", "--series-1", noisy=True)
    return [pull, _series(run, "alignment_weight", "weight", "--series-2")]


def _band(run: RunRecord) -> str:
    """What the values of the alignment loss can be compared with."""
    config, (_, pools) = run.record.get("config", {}), run.curve("alignment_pool")
    neighbors = config.get("num_neighbors")
    objective = config.get("alignment_objective", "contrastive")
    if not isinstance(neighbors, int) or not pools or objective != "contrastive":
        return ""
    note = f"The least possible value is ln {neighbors} = {math.log(neighbors):.2f}"
    candidates = round(sorted(pools)[len(pools) // 2]) - 1
    if config.get("queue_size") == 0 and candidates > neighbors:
        note += f"; equal similarities with all {candidates} others give {math.log(candidates):.2f}"
    return note + "."


def _chart(name: str, title: str, series: Sequence[Series], note: str = "", zero: bool = False) -> Plot | None:
    """A line chart, `None` if there is nothing to draw."""
    series = [line for line in series if line.steps]
    if not series:
        return None
    lines: list[Any] = []
    for line in series:
        lines += _lines(line)
    layout: dict[str, Any] = {"rangemode": "tozero"} if zero else {}
    if zero and not any(value for line in series for value in line.values):
        layout = {"range": [0, 1]}  # a flat zero at the bottom, not in the middle of a scale from -1 to 1
    figure = line_figure(lines, layout, legend=len(series) > 1)
    longest = max(series, key=lambda line: len(line.steps))
    if any(line.noisy and len(line.steps) >= SMOOTHED_FROM for line in series):
        note = f"Pale: as logged; strong: mean of the last {smoothing_window(len(longest.steps))} logs. {note}".strip()
    if len(longest.steps) > MOST_POINTS:
        note = f"{MOST_POINTS:,} of {len(longest.steps):,} logged points are drawn. {note}".strip()
    return Plot(name, title, title, figure, CURVE_HEIGHT, lines_label(title, series), lines_table(title, series), note)


def line_figure(lines: Sequence[Any], yaxis: Mapping[str, Any], legend: bool) -> dict[str, Any]:
    """A figure of lines over steps.

    Args:
        lines (sequence of plotly traces): The lines.
        yaxis (`dict`): What differs from plotly's y axis.
        legend (`bool`): Whether a legend stands above the lines.
    """
    return plain_figure(
        lines,
        xaxis={"title": {"text": "step"}},
        yaxis=yaxis,
        hovermode="x unified",
        showlegend=legend,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"l": 52, "r": 12, "t": 28 if legend else 10, "b": 40},
    )


def _lines(line: Series) -> list[Any]:
    import plotly.graph_objects as go

    shown = spread(len(line.steps), MOST_POINTS)
    few = len(line.steps) < SMOOTHED_FROM

    def trace(values: Sequence[float], **style: Any) -> Any:
        x, y = [line.steps[i] for i in shown], [values[i] for i in shown]
        name = html.escape(line.name)  # plotly reads tags in names
        return go.Scatter(x=x, y=y, name=name, meta=line.color, hovertemplate="%{y:.5~g}", line={"width": 2}, **style)

    raw = trace(line.values, mode="lines+markers" if few else "lines", marker={"size": 5 if few else 3})
    if few or not line.noisy:
        return [raw]
    raw.update(line={"width": 1}, opacity=0.4, showlegend=False, name=f"{raw.name}, as logged")
    return [raw, trace(running_mean(line.values, smoothing_window(len(line.values))), mode="lines")]


def smoothing_window(count: int) -> int:
    """Over how many of `count` logs a mean is taken."""
    return max(5, count // 25)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Means over the last `window` values, fewer at the beginning; what is not finite is left out."""
    numbers = np.asarray(values, dtype=float)
    finite = np.isfinite(numbers)
    counts = _sums_of_last(finite.astype(float), window)
    means = np.full(len(numbers), math.nan)
    np.divide(_sums_of_last(np.where(finite, numbers, 0.0), window), counts, out=means, where=counts > 0)
    return means.tolist()


def _sums_of_last(values: np.ndarray, window: int) -> np.ndarray:
    """Sums over the last `window` values `[N]`, fewer at the beginning.

    They are cumulative in blocks as long as the window, which reaches back into one block at most. Differences of sums
    over all values would keep the rounding of one huge loss for ever.
    """
    blocks = np.pad(values, (window, -len(values) % window)).reshape(-1, window)  # a block of zeros first
    up_to = blocks.cumsum(axis=1)
    after = np.zeros_like(blocks)
    after[:, :-1] = blocks[:, :0:-1].cumsum(axis=1)[:, ::-1]
    return (up_to[1:] + after[:-1]).ravel()[: len(values)]


def lines_label(title: str, series: Sequence[Series]) -> str:
    """What is to be seen in a chart of lines, in words."""
    parts = []
    for line in series:
        last = f" to {number_text(line.values[-1])} at step {line.steps[-1]:,}" if len(line.steps) > 1 else ""
        parts.append(f"{line.name} from {number_text(line.values[0])} at step {line.steps[0]:,}{last}")
    return f"Line chart. {title}: {'; '.join(parts)}."


def lines_table(title: str, series: Sequence[Series]) -> Table:
    """The values of a chart of lines, at most `MOST_ROWS` steps of them a line."""
    points = [dict(zip(line.steps, line.values, strict=True)) for line in series]
    steps = sorted({line.steps[i] for line in series for i in spread(len(line.steps), MOST_ROWS)})
    rows = [[f"{step:,}", *(number_text(line.get(step)) for line in points)] for step in steps]
    logged = len({step for line in series for step in line.steps})
    share = f", {len(steps)} of {logged:,} logged steps" if logged > len(steps) else ""
    return Table(f"{title}{share}", ["Step", *(line.name for line in series)], rows, numeric=True)


def _missing(run: RunRecord, found: set[str]) -> list[Missing]:
    if not run.log_history:
        return [
            Missing(
                "Nothing was logged yet: there is no trainer_state.json with a log in this folder or its checkpoints.",
                "Wait for the first log of the run (logging_steps), or for its first checkpoint.",
            )
        ]
    missing = []
    if "alignment-loss" not in found:
        off = run.record.get("config", {}).get("alignment_weight") == 0
        what = "There is no alignment loss, temperature, pool or count of skipped steps"
        cure = "HeRATrainer logs them; with SFTTrainer, or with alignment_weight=0, there is no such loss."
        missing.append(Missing(f"{what}: alignment was off." if off else f"{what} in the log.", cure))
    if not {"mknn-text", "mknn-image"} & found:
        cure = "Set monitor_steps, or give the trainer an AlignmentMonitorCallback."
        missing.append(Missing("The mutual k-NN of the heads was not logged.", cure))
    return missing
