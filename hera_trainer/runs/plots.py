"""Plots of head rankings and of runs, as papers and reports need them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..heads.heat_map import new_figure, saved
from .record import CONTEXTS, RunRecord, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..heads.ranking import HeadRanking

# Of Okabe and Ito: told apart by people with any colour vision, and with different lightness in grey.
_COLORS = {"aligned": "#D55E00", "top": "#0072B2", "all": "#666666"}
_LINE = "#0072B2"
_STYLES = {"aligned": "o-", "top": "s--", "all": "^:"}


def plot_run(
    run: RunRecord | str | os.PathLike, path: str | os.PathLike | None = None, title: str | None = None
) -> Figure:
    """Draws the curves of a run over its steps: losses, pull, spread and temperature, image gain, and what
    [`AlignmentMonitorCallback`] measured, with what unrelated spaces score: a line at `k / (N - 1)`, and a band up to
    the 95th percentile. What was not logged is left out.

    Args:
        run ([`~runs.record.RunRecord`] or path): A run, or its `output_dir`.
        path (`str`, *optional*): Where to write; the ending (`.png`, `.svg`, `.pdf`) decides the format.
        title (`str`, *optional*): Title of the figure, the model's name by default.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        `ImportError`: If matplotlib is not installed.
        `ValueError`: If nothing was logged.
    """
    if not isinstance(run, RunRecord):
        run = read_run(run)
    lm_loss = "lm_loss" if run.curve("lm_loss")[0] else "loss"
    single = {"language-model loss": lm_loss, "alignment loss": "alignment_loss", "pull": "alignment_pull"}
    single |= {"spread": "alignment_spread", "temperature": "temperature"}
    single["image gain, nats a token"] = "image_gain"
    panels = {name: key for name, key in single.items() if run.curve(key)[0]}
    contexts = [context for context in CONTEXTS if run.curve(f"{monitor_group(context)}/all")[0]]
    count = len(panels) + len(contexts)
    if not count:
        raise ValueError(f"{str(run.path)!r} has no logged losses and no measurements: there is nothing to draw.")
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = new_figure(3.4 * columns, 0.7 + 2.5 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axis, (name, key) in zip(axes, panels.items(), strict=False):
        steps, values = run.curve(key)
        axis.plot(steps, values, color=_LINE, lw=1.5, marker="o" if len(steps) < 3 else None)
        _finish_curve(axis, name)
    for axis, context in zip(axes[len(panels) :], contexts, strict=False):
        _draw_monitor(axis, run, context)
    for axis in axes[count:]:
        axis.remove()
    if contexts:  # one for all, where it hides no curve
        handles, labels = axes[len(panels)].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(run.record.get("model") or run.path.name if title is None else title, fontsize=11)
    return saved(figure, path)


def monitor_group(context: str) -> str:
    """Group of the names under which [`AlignmentMonitorCallback`] logs what it measures in a context."""
    return "alignment_mknn" if context == "text" else f"alignment_mknn_{context}"


def _draw_monitor(axis: Axes, run: RunRecord, context: str) -> None:
    for name, style in _STYLES.items():
        steps, values = run.curve(f"{monitor_group(context)}/{name}")
        if steps:
            axis.plot(steps, values, style, color=_COLORS[name], label=f"{name} heads", lw=1.5, ms=4)
    measured = run.monitored.get(context, {})
    if measured:
        _draw_null(axis, measured)
    _finish_curve(axis, f"mutual k-NN, {CONTEXTS[context]}")


def _draw_null(axis: Axes, measured: dict[int, HeadRanking]) -> None:
    """What unrelated spaces score: one level, or one from each measurement to the next where k or N changed."""
    steps, rankings = list(measured), list(measured.values())
    chances = [ranking.chance for ranking in rankings]
    highs = [ranking.null_p95 or ranking.chance for ranking in rankings]
    line: dict[str, Any] = {"color": "black", "lw": 0.8, "ls": (0, (1, 2))}
    band: dict[str, Any] = {"color": "black", "alpha": 0.1, "lw": 0}
    if len({ranking.scale for ranking in rankings}) == 1:
        axis.axhline(chances[0], label="chance", **line)
        axis.axhspan(chances[0], max(highs), label="95 % of chance", **band)
    else:
        axis.plot(steps, chances, drawstyle="steps-post", label="chance (k or N changed: do not compare)", **line)
        axis.fill_between(steps, chances, highs, step="post", label="95 % of chance", **band)


def _finish_curve(axis: Axes, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(name, fontsize=10)
    axis.set_xlabel("optimizer step")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
