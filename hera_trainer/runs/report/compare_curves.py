"""Curves of several runs in one plot: of seeds, the mean and the range."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from .curves import (
    MOST_POINTS,
    SMOOTHED_FROM,
    Series,
    line_figure,
    lines_label,
    lines_table,
    running_mean,
    smoothing_window,
)
from .groups import PROCESSES, Group, NamedRun, training_differences
from .maps import CONTEXT_NAMES
from .parts import CURVE_HEIGHT, Missing, Plot, Section, score_text, spread
from .scalars import ALIGNMENT_LOSS, Scalar, head_scalars, scalars_of
from .scales import by_scale, of_scale

# Height of a line of a legend, in pixels.
_LEGEND_LINE = 19
# By these, alignment losses differ without any difference in what was learned.
_LOSS_SETTINGS = (
    *("alignment_objective", "num_neighbors", "similarity", "teacher_similarity", "temperature", "learn_temperature"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", PROCESSES, "contrast_scope", "queue_size"),
    *("neighbor_group_size", "alignment_granularity", "num_aligned_heads", "head_selection", "teacher"),
)


def compared_curves_section(runs: Sequence[NamedRun], groups: Sequence[Group]) -> Section:
    """Every logged number of all runs over steps, and the mutual k-NN of groups of heads.

    Args:
        runs (sequence of [`NamedRun`]): The runs.
        groups (sequence of [`Group`]): The same, by settings.
    """
    section = Section("training", "Training")
    plots = [_chart(scalar, groups, _note(scalar, runs)) for scalar in scalars_of(runs)]
    if plots:
        section.plots[""] = plots
    for context, name in CONTEXT_NAMES.items():
        found = by_scale(runs, context)
        for i, (scale, measured) in enumerate(found.items()):
            scalars = [s for s in head_scalars(context, str(i or "")) if any(s.curve(run)[0] for run in measured)]
            parts = [part for group in groups if (part := group.part(measured)) is not None]
            if scalars:
                title = of_scale(f"Mutual k-NN, {name[0].lower()}{name[1:]}", scale, list(found))
                rankings = [ranking for run in measured for ranking in run.record.monitored.get(context, {}).values()]
                note = f"{scale}; chance {score_text(rankings[0].chance)}." if rankings else f"{scale}."
                section.plots[title] = [_chart(scalar, parts, note, under=f"{title}: ") for scalar in scalars]
    if not section.plots:
        cure = "Wait for the first log of a run (logging_steps), or for its first checkpoint."
        section.missing.append(Missing("None of the runs has logged anything yet.", cure))
        return section
    section.notes.append("Dashed: control runs. Dotted: SFT. Drag over a plot to zoom in; double-click to go back.")
    if any(len(group.runs) > 1 for group in groups):
        section.notes.append(
            "Runs of the same settings but for the seed are one line, their mean, in a band from the least to the "
            "greatest of them, at the steps that all of them logged."
        )
    return section


def over_seeds(scalar: Scalar, group: Group) -> dict[int, list[float]]:
    """The values of all runs of a group by step, of the steps that each of them logged; runs without any are left out.

    Args:
        scalar ([`Scalar`]): What was logged.
        group ([`Group`]): The runs.
    """
    curves = [dict(zip(*curve, strict=True)) for run in group.runs if (curve := scalar.curve(run))[0]]
    shared = [step for step in curves[0] if all(step in curve for curve in curves)] if curves else []
    return {step: [curve[step] for curve in curves] for step in shared}


def _chart(scalar: Scalar, groups: Sequence[Group], note: str, under: str = "") -> Plot:
    lines: list[Any] = []
    shown: list[Series] = []
    tabled: list[Series] = []
    notes = [note] if note else []
    longest = 0
    for group in groups:
        values = over_seeds(scalar, group)
        count = sum(bool(scalar.curve(run)[0]) for run in group.runs)
        if not values:
            if count:
                notes.append(f"{group.name} is not drawn: its runs logged this at different steps.")
            continue
        if count < len(group.runs):
            notes.append(f"Of {group.name}, {count} logged this.")
        longest = max(longest, len(values))
        series = _mean_and_range(group, values)
        shown.append(series[0])
        tabled += series if len(group.runs) > 1 else series[:1]
        lines += _lines(group, values, scalar.noisy and len(values) >= SMOOTHED_FROM)
    if scalar.noisy and longest >= SMOOTHED_FROM:
        notes.insert(0, f"Mean of the last {smoothing_window(longest)} logs.")
    full_title = f"{under}{scalar.title}"
    figure = line_figure(lines, {}, legend=True)
    figure["layout"]["legend"]["traceorder"] = "normal"  # with bands, plotly would turn it round
    height = CURVE_HEIGHT + _LEGEND_LINE * len(shown)
    label, table = lines_label(full_title, shown), lines_table(full_title, tabled)
    return Plot(scalar.name, scalar.title, full_title, figure, height, label, table, " ".join(notes))


def _mean_and_range(group: Group, values: dict[int, list[float]]) -> list[Series]:
    steps, seeds = list(values), list(values.values())
    return [
        Series(group.name, group.color, steps, [_mean(each) for each in seeds]),
        Series(f"{group.name}, least", group.color, steps, [_extreme(min, each) for each in seeds]),
        Series(f"{group.name}, greatest", group.color, steps, [_extreme(max, each) for each in seeds]),
    ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def _extreme(choose: Any, values: Sequence[float]) -> float:
    return choose(values) if all(map(math.isfinite, values)) else math.nan


def _lines(group: Group, values: dict[int, list[float]], smooth: bool) -> list[Any]:
    """The line of a group, over the band of its range."""
    import plotly.graph_objects as go

    if smooth:
        runs = [running_mean(run, smoothing_window(len(values))) for run in zip(*values.values(), strict=True)]
        values = dict(zip(values, map(list, zip(*runs, strict=True)), strict=True))
    mean, least, greatest = _mean_and_range(group, values)
    points = spread(len(values), MOST_POINTS)
    x = [mean.steps[i] for i in points]

    def trace(series: Series, **style: Any) -> Any:
        name = html.escape(group.name)  # plotly reads tags in names
        return go.Scatter(x=x, y=[series.values[i] for i in points], name=name, meta=group.color, **style)

    hover = "%{y:.5~g}"
    few = len(points) < SMOOTHED_FROM
    band: list[Any] = []
    ranges = None
    if len(group.runs) > 1:
        hidden = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        band = [trace(least, **hidden), trace(greatest, fill="tonexty", **hidden)]
        hover += " (%{customdata[0]:.5~g} to %{customdata[1]:.5~g})"
        ranges = [[least.values[i], greatest.values[i]] for i in points]
    line = trace(
        mean,
        mode="lines+markers" if few else "lines",
        line={"width": 2, "dash": group.dash},
        marker={"size": 6, "symbol": group.symbol},
        hovertemplate=hover,
        customdata=ranges,
    )
    return [*band, line]


def _note(scalar: Scalar, runs: Sequence[NamedRun]) -> str:
    """What alignment losses of different runs mean beside each other."""
    if scalar is not ALIGNMENT_LOSS:
        return ""
    aligned = [run for run in runs if scalar.curve(run)[0]]
    notes = []
    if any(run.kind == "control" for run in aligned):
        notes.append("A control run's is that with other images' teacher vectors.")
    differ = [name for name in training_differences(aligned) if name in _LOSS_SETTINGS]
    if differ:
        notes.append(f"Not to be compared between runs that differ in {', '.join(differ)}.")
    return " ".join(notes)
