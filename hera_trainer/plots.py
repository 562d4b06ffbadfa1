"""Pictures of head rankings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from .heads.head import AttentionHead
from .heads.ranking import HeadRanking


def plot_head_scores(
    rankings: HeadRanking | Mapping[str, HeadRanking],
    path: str | os.PathLike,
    heads: Sequence[AttentionHead] = (),
    title: str = "Alignment of attention heads with the vision teacher",
) -> None:
    """Draws heat maps of head scores, one a ranking, on a common colour scale.

    Args:
        rankings ([`HeadRanking`] or `dict[str, HeadRanking]`):
            One ranking, or several with their panel titles, such as before and after training.
        path (`str`): Where to write; the ending (`.png`, `.svg`, `.pdf`) decides the format.
        heads (sequence of [`AttentionHead`], *optional*): Heads to outline, such as the aligned ones.
        title (`str`, *optional*): Title of the figure.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError('Plots need matplotlib. Install it with `pip install "hera-trainer[plot]"`.') from error
    panels = {"": rankings} if isinstance(rankings, HeadRanking) else dict(rankings)
    layers, widest = next(iter(panels.values())).scores.shape
    figure = Figure(figsize=(1.8 + len(panels) * max(3.2, 0.22 * widest), max(3.0, 1.6 + 0.17 * layers)))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    low = min(ranking.scores.nan_to_num(1.0).min().item() for ranking in panels.values())
    high = max(ranking.scores.nan_to_num(0.0).max().item() for ranking in panels.values())
    for axis, (name, ranking) in zip(axes, panels.items(), strict=True):
        axis.set_facecolor("0.85")  # layers without heads
        image = axis.imshow(ranking.scores.numpy(), cmap="viridis", aspect="auto", vmin=low, vmax=high)
        for head in heads:
            axis.add_patch(Rectangle((head.head - 0.5, head.layer - 0.5), 1, 1, fill=False, edgecolor="red", lw=1.8))
        axis.set_xlabel("head")
        axis.set_title(name, fontsize=10)
    axes[0].set_ylabel("layer")
    ranking = next(iter(panels.values()))
    figure.colorbar(image, ax=list(axes), label=f"mutual {ranking.k}-NN, N = {ranking.num_samples}")
    note = "\naligned heads outlined" if heads else ""
    figure.suptitle(title + note, fontsize=11)
    figure.savefig(path, dpi=130, bbox_inches="tight")
