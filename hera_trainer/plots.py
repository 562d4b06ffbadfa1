"""Pictures of head rankings and of runs, as papers and reports need them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .heads.head import AttentionHead
from .heads.ranking import HeadRanking
from .run_record import CONTEXTS, RunRecord, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito: told apart by people with any colour vision, and with different lightness in grey.
_COLORS = {"aligned": "#D55E00", "top": "#0072B2", "all": "#666666"}
_LINE = "#0072B2"
_STYLES = {"aligned": "o-", "top": "s--", "all": "^:"}
_CONTEXT_NAMES = {"text": "text only", "image": "image in context"}
_DPI = 150


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib. Install it with `pip install "hera-trainer[plot]"`.') from error
    return Figure(figsize=(width, height), layout="constrained")


def plot_head_scores(
    rankings: HeadRanking | Mapping[str, HeadRanking],
    path: str | os.PathLike | None = None,
    heads: Sequence[AttentionHead] = (),
    title: str = "Alignment of attention heads with the vision teacher",
    difference: bool = False,
) -> Figure:
    """Draws heat maps of head scores, one a ranking, on a common colour scale.

    Args:
        rankings ([`HeadRanking`] or `dict[str, HeadRanking]`):
            One ranking, or several with their panel titles, such as before and after training.
        path (`str`, *optional*): Where to write; the ending (`.png`, `.svg`, `.pdf`) decides the format.
        heads (sequence of [`AttentionHead`], *optional*): Heads to outline, such as the aligned ones.
        title (`str`, *optional*): Title of the figure.
        difference (`bool`, *optional*, defaults to `False`):
            Whether one more panel shows the last ranking minus the first, on a scale of its own.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        `ImportError`: If matplotlib is not installed.
        `ValueError`: If there is no ranking, or they are of different models.
    """
    panels = {"": rankings} if isinstance(rankings, HeadRanking) else dict(rankings)
    if not panels:
        raise ValueError("There is no head ranking to draw.")
    shapes = {tuple(ranking.scores.shape) for ranking in panels.values()}
    if len(shapes) > 1:
        raise ValueError(f"Head rankings of different models cannot be compared: their scores have shapes {shapes}.")
    ((layers, widest),) = shapes
    drawn = list(panels.values())
    first, last = drawn[0], drawn[-1]
    columns = len(panels) + difference
    figure = _figure(1.4 + columns * max(2.8, 0.13 * widest) + difference, max(2.9, 1.5 + 0.17 * layers))
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    low = min(np.nanmin(ranking.scores.numpy()) for ranking in panels.values())
    high = max(np.nanmax(ranking.scores.numpy()) for ranking in panels.values())
    for axis, (name, ranking) in zip(axes, panels.items(), strict=False):
        image = _draw_map(axis, ranking.scores, heads, name, cmap="viridis", vmin=low, vmax=high)
    axes[0].set_ylabel("layer")
    label = f"mutual {first.k}-NN, N = {first.num_samples}"
    figure.colorbar(image, ax=list(axes[: len(panels)]), label=label, fraction=0.08, aspect=30)
    if difference:
        change = last.scores - first.scores
        most = max(float(np.nanmax(np.abs(change.numpy()))), 1e-3)  # a map without any change is of the middle colour
        image = _draw_map(axes[-1], change, heads, "difference", cmap="PuOr_r", vmin=-most, vmax=most)
        figure.colorbar(image, ax=axes[-1], label="change", fraction=0.08, aspect=30)
    note = "\naligned heads outlined" if heads else ""
    figure.suptitle(title + note, fontsize=11)
    return _saved(figure, path)


def _draw_map(axis: Axes, scores: Tensor, heads: Iterable[AttentionHead], name: str, **colors: Any) -> Any:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, withStroke
    from matplotlib.ticker import MaxNLocator

    axis.set_facecolor("0.85")  # layers without heads
    image = axis.imshow(np.ma.masked_invalid(scores.numpy()), aspect="auto", interpolation="nearest", **colors)
    # White in a black frame stands out from every colour of both maps.
    edges = [withStroke(linewidth=3.2, foreground="black"), Normal()]
    for head in heads:
        place = (head.head - 0.5, head.layer - 0.5)
        axis.add_patch(
            Rectangle(place, 1, 1, fill=False, edgecolor="white", lw=1.4, path_effects=edges, clip_on=False, zorder=3)
        )
    axis.set_xlabel("head")
    axis.set_title(name, fontsize=10)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return image


def plot_run(
    run: RunRecord | str | os.PathLike, path: str | os.PathLike | None = None, title: str | None = None
) -> Figure:
    """Draws the curves of a run over its steps: language-model loss, alignment loss, temperature, and what
    [`AlignmentMonitorCallback`] measured, with the level of chance. What was not logged is left out.

    Args:
        run ([`~run_record.RunRecord`] or path): A run, or its `output_dir`.
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
    single = {"language-model loss": lm_loss, "alignment loss": "alignment_loss", "temperature": "temperature"}
    panels = {name: key for name, key in single.items() if run.curve(key)[0]}
    contexts = [context for context in CONTEXTS if run.curve(f"{monitor_group(context)}/all")[0]]
    count = len(panels) + len(contexts)
    if not count:
        raise ValueError(f"{str(run.path)!r} has no logged losses and no measurements: there is nothing to draw.")
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = _figure(3.4 * columns, 0.7 + 2.5 * rows)
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
    return _saved(figure, path)


def monitor_group(context: str) -> str:
    """Group of the names under which [`AlignmentMonitorCallback`] logs what it measures in a context."""
    return "alignment_mknn" if context == "text" else f"alignment_mknn_{context}"


def _draw_monitor(axis: Axes, run: RunRecord, context: str) -> None:
    for name, style in _STYLES.items():
        steps, values = run.curve(f"{monitor_group(context)}/{name}")
        if steps:
            axis.plot(steps, values, style, color=_COLORS[name], label=f"{name} heads", lw=1.5, ms=4)
    rankings = list(run.monitored.get(context, {}).values())
    if rankings:
        chance = rankings[0].k / (rankings[0].num_samples - 1)
        axis.axhline(chance, color="black", lw=0.8, ls=(0, (1, 2)), label="chance")
    _finish_curve(axis, f"mutual k-NN, {_CONTEXT_NAMES[context]}")


def _finish_curve(axis: Axes, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(name, fontsize=10)
    axis.set_xlabel("optimizer step")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _saved(figure: Figure, path: str | os.PathLike | None) -> Figure:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI, bbox_inches="tight")
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """A figure as an image.

    Args:
        figure (`matplotlib.figure.Figure`): A figure.

    Returns:
        `np.ndarray` of shape `[height, width, 3]`, uint8.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
