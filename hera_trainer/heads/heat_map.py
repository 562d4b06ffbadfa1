"""Heat maps of head scores, as papers and reports need them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .head import AlignedUnit, AttentionHead, granularity_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .ranking import HeadRanking

_DPI = 150


def new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib. Install it with `pip install "hera-trainer[plot]"`.') from error
    return Figure(figsize=(width, height), layout="constrained")


def plot_head_scores(
    rankings: HeadRanking | Mapping[str, HeadRanking],
    path: str | os.PathLike | None = None,
    heads: Sequence[AlignedUnit] = (),
    title: str = "Alignment of attention heads with the vision teacher",
    difference: bool = False,
) -> Figure:
    """Draws heat maps of head scores, one a ranking, on a common colour scale. Beside it stands what unrelated spaces
    score, of several rankings the highest 95th percentile.

    Args:
        rankings ([`HeadRanking`] or `dict[str, HeadRanking]`):
            One ranking, or several with their panel titles, such as before and after training.
        path (`str`, *optional*): Where to write; the ending (`.png`, `.svg`, `.pdf`) decides the format.
        heads (sequence of [`AttentionHead`] or of [`DecoderLayer`], *optional*):
            Heads to outline, such as the aligned ones. Of a layer, its whole row is.
        title (`str`, *optional*): Title of the figure.
        difference (`bool`, *optional*, defaults to `False`):
            Whether one more panel shows the last ranking minus the first, on a scale of its own.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        `ImportError`: If matplotlib is not installed.
        `ValueError`: If there is no ranking, they are of different models, or their scores are of different scales
            ([`HeadRanking.scale`]).
    """
    panels = dict(rankings) if isinstance(rankings, Mapping) else {"": rankings}
    if not panels:
        raise ValueError("There is no head ranking to draw.")
    shapes = {tuple(ranking.scores.shape) for ranking in panels.values()}
    if len(shapes) > 1:
        raise ValueError(f"Head rankings of different models cannot be compared: their scores have shapes {shapes}.")
    scales = {ranking.scale: None for ranking in panels.values()}
    if len(scales) > 1:
        raise ValueError(
            f"Scores that were measured with {' and with '.join(scales)} cannot be compared. Rank the heads again with "
            "the same settings, or draw each ranking by itself."
        )
    ((layers, widest),) = shapes
    drawn = list(panels.values())
    first, last = drawn[0], drawn[-1]
    columns = len(panels) + difference
    figure = new_figure(1.4 + columns * max(2.8, 0.13 * widest) + difference, max(2.9, 1.5 + 0.17 * layers))
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    low = min(np.nanmin(ranking.scores.numpy()) for ranking in panels.values())
    high = max(np.nanmax(ranking.scores.numpy()) for ranking in panels.values())
    for axis, (name, ranking) in zip(axes, panels.items(), strict=False):
        image = _draw_map(axis, ranking.scores, heads, name, cmap="viridis", vmin=low, vmax=high)
    axes[0].set_ylabel("layer")
    widest_null = max(drawn, key=lambda ranking: ranking.null_p95 or 0.0)
    label = "\n".join([f"mutual k-NN, {first.scale}", *widest_null.references(digits=3)])
    figure.colorbar(image, ax=list(axes[: len(panels)]), label=label, fraction=0.08, aspect=30)
    if difference:
        change = last.scores - first.scores
        most = max(float(np.nanmax(np.abs(change.numpy()))), 1e-3)  # a map without any change is of the middle colour
        image = _draw_map(axes[-1], change, heads, "difference", cmap="PuOr_r", vmin=-most, vmax=most)
        figure.colorbar(image, ax=axes[-1], label="change", fraction=0.08, aspect=30)
    note = f"\naligned {granularity_of(heads)}s outlined" if heads else ""
    figure.suptitle(title + note, fontsize=11)
    return saved(figure, path)


def columns_of(unit: AlignedUnit, widest: int) -> tuple[int, int]:
    """First column and number of columns of a unit in a map of `widest` heads a layer: one, or the whole row."""
    return (unit.head, 1) if isinstance(unit, AttentionHead) else (0, widest)


def _draw_map(axis: Axes, scores: Tensor, heads: Sequence[AlignedUnit], name: str, **colors: Any) -> Any:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, withStroke
    from matplotlib.ticker import MaxNLocator

    axis.set_facecolor("0.85")  # layers without heads
    image = axis.imshow(np.ma.masked_invalid(scores.numpy()), aspect="auto", interpolation="nearest", **colors)
    # White in a black frame stands out from every colour of both maps.
    edges = [withStroke(linewidth=3.2, foreground="black"), Normal()]
    for head in heads:
        left, width = columns_of(head, scores.shape[1])
        style: dict[str, Any] = {"edgecolor": "white", "lw": 1.4, "path_effects": edges, "clip_on": False, "zorder": 3}
        axis.add_patch(Rectangle((left - 0.5, head.layer - 0.5), width, 1, fill=False, **style))
    axis.set_xlabel("head")
    axis.set_title(name, fontsize=10)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return image


def saved(figure: Figure, path: str | os.PathLike | None) -> Figure:
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
