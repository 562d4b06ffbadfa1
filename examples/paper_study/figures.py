"""The figures of docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from records import (
    ACCURACY,
    BESIDE_THE_START,
    HEADS,
    NAMES,
    Record,
    aligned,
    aligned_heads,
    before_training,
    by_arm,
    can_be_shown,
    interval,
    measures_of,
    mknn,
    pairs,
    top,
    worst,
)

COLORS = {"SFT": "#888888", "aligned": "#1f77b4", "aligned control": "#ff7f0e", "uniformity": "#2ca02c"}
LABELS = {"aligned": "aligned (HeRA)", "aligned control": "control: permuted teacher"}
SEARCHES = ("temperature", "pull", "similarity", "neighbors", "pool", "heads")
SHOWN = ("aligned five", "aligned five, by the other encoder", "image gain", ACCURACY, "held-out loss")


def draw(results: dict[str, list[Record]], folder: Path) -> None:
    """Writes a PNG for each question that has results."""
    folder.mkdir(parents=True, exist_ok=True)
    searched = {name: pairs(results[name]) for name in SEARCHES if pairs(results.get(name, []))}
    if searched:
        _save(_searched(searched, results["references"]), folder / "results-search.png")
    for name in BESIDE_THE_START:
        if can_be_shown(name, results):
            drawn = _signature if name == "signature" else _confirmed
            _save(drawn(results[name]), folder / f"results-{name.replace('_', '-')}.png")
    if can_be_shown("head_map", results):
        _save(_firm(results["head_map"]), folder / "results-head-map.png")


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": ""})
    plt.close(figure)


def _signature(records: Sequence[Record]) -> plt.Figure:
    """Mutual k-NN on the way: each seed as a thin line, the mean as a thick one."""
    start = before_training(records)
    null = start["references"]["null"][0]
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.4), sharey=True, layout="constrained")
    groups: dict[str, Callable[[Record], Sequence[int]]]
    groups = {"the five heads that are aligned": aligned, "the five best heads": lambda record: top(record, start)}
    for axes, (title, group) in zip(panels, groups.items(), strict=True):
        for arm, runs in by_arm(records).items():
            steps = [0, *sorted(map(int, runs[0]["measured"]))]
            curves = [_curve(run, start, group(run), steps[1:]) for run in runs]
            for curve in curves:
                axes.plot(steps, curve, color=COLORS[arm], linewidth=0.8, alpha=0.5)
            means = [mean(values) for values in zip(*curves, strict=True)]
            axes.plot(steps, means, color=COLORS[arm], linewidth=2.5, marker="o", label=LABELS.get(arm, arm))
        axes.axhline(null, color="#888888", linestyle=":", label="unrelated spaces")
        axes.set(title=title, xlabel="optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0, 1.02 * panels[0].get_ylim()[1])
    panels[0].set_ylabel("mutual k-NN with DINOv2, held-out images")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _curve(run: Record, start: Record, group: Sequence[int], steps: Sequence[int]) -> list[float]:
    taught = {**start, "config": run["config"]}
    return [mknn(taught, group), *(mknn(run, group, step=step) for step in steps)]


def _searched(found: dict[str, list[tuple[Record, Record]]], references: Sequence[Record]) -> plt.Figure:
    """A line for each setting: from the control's mutual k-NN to the aligned run's."""
    runs = [(name, run, control) for name, some in found.items() for run, control in some]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.28 * len(runs)))
    for place, (_, run, control) in enumerate(runs):
        low, high = aligned_heads(control), aligned_heads(run)
        axes.plot([low, high], [place, place], color="#bbbbbb", zorder=1)
        axes.scatter(low, place, facecolors="white", edgecolors=COLORS["aligned control"], zorder=2)
        axes.scatter(high, place, color=COLORS["aligned"], zorder=3)
    axes.set_yticks(range(len(runs)), [_label(run) for _, run, _ in runs])
    axes.invert_yaxis()
    null = references[0]["references"]["null"][0]
    axes.axvline(null, color="#888888", linestyle=":", label="unrelated spaces")
    sft = next(({**run, "config": runs[0][1]["config"]} for run in references if run["arm"] == "SFT"), None)
    if sft is not None:
        axes.axvline(aligned_heads(sft), color=COLORS["SFT"], linestyle="--", linewidth=1, label="SFT, worst five")
    axes.scatter([], [], color=COLORS["aligned"], label="aligned")
    axes.scatter([], [], facecolors="white", edgecolors=COLORS["aligned control"], label="control: permuted teacher")
    axes.set_xlabel("mutual k-NN of the aligned heads with their teacher, held-out images; one seed")
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.06 - 0.8 / len(runs)), ncols=4, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _label(run: Record) -> str:
    """The setting, and the teacher where it is the encoder that the model looks through."""
    teacher = run["config"]["teacher"]
    return run["arm"] + (f" ({NAMES[teacher]})" if teacher == "dinov2" else "")


def _firm(records: Sequence[Record]) -> plt.Figure:
    """Of how many of the worst five two rankings on other samples agree, by the number of samples."""
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    drawn = [record for record in records if record["arm"] == "captions"]
    counts = sorted({record["config"]["samples"] for record in drawn})
    for count in counts:
        maps = [record for record in drawn if record["config"]["samples"] == count]
        common = [len(worst(one) & worst(other)) for one, other in combinations(maps, 2)]
        places = [counts.index(count) + 0.08 * (i - (len(common) - 1) / 2) for i in range(len(common))]
        axes.scatter(places, common, color=COLORS["aligned"])
    axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.set(xlabel="samples", ylabel="of the worst five in common", ylim=(-0.2, HEADS + 0.2))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _confirmed(records: Sequence[Record]) -> plt.Figure:
    """Each seed as a dot, the mean with its 95 % interval beside it."""
    start = before_training(records)
    shown = [measure for measure in measures_of(records) if measure[0] in SHOWN]
    figure, panels = plt.subplots(1, len(shown), figsize=(2.6 * len(shown), 3.2), layout="constrained")
    for axes, (name, _, value) in zip(panels, shown, strict=True):
        if name != "held-out loss":  # far above
            axes.axhline(value(start, start), color="#888888", linestyle="--", linewidth=1)
        for place, (arm, runs) in enumerate(by_arm(records).items()):
            values = [value(run, start) for run in runs]
            _dots(axes, place, values, _color(arm))
        axes.set_xticks(range(len(by_arm(records))), list(by_arm(records)), rotation=45, ha="right")
        axes.set_title(name.replace(", ", ",\n"), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    null = start["references"]["null"][0]
    panels[0].axhline(null, color="#888888", linestyle=":", linewidth=1)
    return figure


def _color(arm: str) -> str:
    """Of the arms of a stage: as of those that are trained at once."""
    if arm.endswith(("control", "uniformity")):
        return COLORS["uniformity" if arm.endswith("uniformity") else "aligned control"]
    return COLORS["SFT" if arm.endswith(("SFT", "neither")) else "aligned"]


def _dots(axes: Axes, place: int, values: Sequence[float], color: str) -> None:
    axes.scatter([place - 0.12] * len(values), values, color=color, alpha=0.5, s=18)
    half = interval(values)
    axes.errorbar(place + 0.12, mean(values), yerr=half, color=color, marker="o", capsize=3)
