"""Draws the figure of the method page: neighbourhoods of a teacher, of a head before and after, and the way of a run.

    python examples/method_figure.py --folder docs/assets

Nothing in the upper row is drawn by hand: sixteen samples have random vectors on a circle in a head's space, and the
package's own `HeRALoss` moves them; the shares of common neighbours are what `mutual_knn` says of them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from hera_trainer import HeRALoss, mutual_knn, nearest_neighbors

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

KINDS, EACH, K, STEPS = 4, 4, 3, 400
MARKERS = ("o", "s", "^", "D")


@dataclass(frozen=True)
class Theme:
    """Colours of one variant; the background stays transparent."""

    ink: str
    soft: str
    box: str
    accent: str
    kinds: tuple[str, ...]


LIGHT = Theme("#1f2430", "#8a90a0", "#f3f4f8", "#c2255c", ("#1c7ed6", "#e8890c", "#2b8a3e", "#7048e8"))
DARK = Theme("#e9ecf2", "#8f96a8", "#2a2f3a", "#ff6b9d", ("#74c0fc", "#ffc078", "#8ce99a", "#b197fc"))


def at(angles: Tensor) -> Tensor:
    """Points of the unit circle, `[N, 2]`."""
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def spread(angles: Tensor, least: float = 0.23) -> Tensor:
    """Angles at least `least` apart, for drawing alone: samples that agree would lie upon each other."""
    order = angles.argsort()
    shown = angles[order].clone()
    for _ in range(200):
        gaps = torch.roll(shown, -1) - shown
        gaps[-1] += 2 * math.pi
        push = (least - gaps).clamp_min(0) / 2
        shown = shown - push + torch.roll(push, 1)
    result = torch.empty_like(angles)
    result[order] = shown
    return result


def samples() -> tuple[Tensor, list[Tensor]]:
    """The teacher's vectors `[N, 2]`, and the head's while the loss pulls them, one tensor a step."""
    generator = torch.Generator().manual_seed(3)
    kind = torch.arange(KINDS).repeat_interleave(EACH)
    teacher = at(kind * 2 * math.pi / KINDS + math.pi / 4 + 0.22 * torch.randn(len(kind), generator=generator))
    head = at(2 * math.pi * torch.rand(len(kind), generator=generator)).requires_grad_()
    criterion = HeRALoss(num_neighbors=K, temperature=0.5, learn_temperature=False, similarity="cosine")
    optimizer = torch.optim.SGD([head], lr=0.3)
    steps = []
    for _ in range(STEPS):
        steps.append(head.detach() / head.detach().norm(dim=1, keepdim=True))
        optimizer.zero_grad()
        criterion(head[None], teacher).backward()
        optimizer.step()
    return teacher, steps


def angles_of(points: Tensor) -> Tensor:
    return torch.atan2(points[:, 1], points[:, 0]) % (2 * math.pi)


def draw_circle(axis: Any, theme: Theme, points: Tensor, neighbors: Tensor, title: str, below: str) -> None:
    """Samples on their circle, each joined with its teacher neighbours."""
    axis.set_aspect("equal")
    axis.axis("off")
    axis.set_xlim(-1.35, 1.35)
    axis.set_ylim(-1.62, 1.5)
    axis.add_patch(Circle((0, 0), 1.0, fill=False, ec=theme.soft, lw=0.8, alpha=0.6))
    shown = at(spread(angles_of(points)))
    for i, row in enumerate(neighbors.tolist()):
        for j in row:
            start, end = shown[i].tolist(), shown[j].tolist()
            middle = [(a + b) / 2 * 0.55 for a, b in zip(start, end, strict=True)]  # bent towards the centre
            path = matplotlib.path.Path([start, middle, end], [1, 3, 3])
            colour = theme.kinds[i // EACH]
            axis.add_patch(matplotlib.patches.PathPatch(path, fill=False, ec=colour, lw=1.1, alpha=0.55))
    for kind, (marker, colour) in enumerate(zip(MARKERS, theme.kinds, strict=True)):
        part = shown[kind * EACH : (kind + 1) * EACH]
        axis.scatter(part[:, 0], part[:, 1], s=62, marker=marker, color=colour, zorder=3)
    axis.text(0, 1.36, title, ha="center", va="center", fontsize=13, color=theme.ink, weight="bold")
    axis.text(0, -1.40, below, ha="center", va="center", fontsize=11.5, color=theme.ink, linespacing=1.35)


def box(axis: Any, theme: Theme, x: float, width: float, title: str, text: str) -> None:
    shape = FancyBboxPatch((x, 0), width, 1.86, boxstyle="round,pad=0,rounding_size=0.09", fc=theme.box, ec="none")
    axis.add_patch(shape)
    axis.text(x + 0.14, 1.63, title, fontsize=11.8, color=theme.ink, weight="bold", va="center")
    axis.text(x + 0.14, 0.25, text, fontsize=10.2, color=theme.ink, va="center", linespacing=1.3)


def arrow(axis: Any, colour: str, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    settings = {"arrowstyle": "-|>", "mutation_scale": 9, "lw": 1.2, "color": colour, "shrinkA": 0, "shrinkB": 0}
    axis.add_patch(FancyArrowPatch(start, end, **{**settings, **style}))


def micro_batches(axis: Any, theme: Theme, x: float, y: float, filled: bool) -> None:
    """Four micro-batches of four samples."""
    for i in range(4):
        axis.add_patch(Rectangle((x + 0.27 * i, y), 0.22, 0.22, fc="none", ec=theme.soft, lw=0.8))
        for j in range(4):
            centre = (x + 0.27 * i + 0.06 + 0.10 * (j % 2), y + 0.06 + 0.10 * (j // 2))
            colour = theme.kinds[(i + j) % KINDS]
            axis.add_patch(Circle(centre, 0.033, fc=colour, ec="none", alpha=1.0 if filled else 0.55))


def draw_pipeline(axis: Any, theme: Theme) -> None:
    """Teacher vectors, ranking, choice, and the two passes of a step."""
    axis.set_xlim(0, 11.9)
    axis.set_ylim(-0.05, 1.95)
    axis.set_aspect("equal")
    axis.axis("off")

    box(axis, theme, 0.0, 2.7, "1  See", "a frozen vision encoder,\none vector an image")
    for i, (marker, colour) in enumerate(zip(MARKERS, theme.kinds, strict=True)):
        y = 1.37 - 0.23 * i
        axis.add_patch(Rectangle((0.22, y - 0.085), 0.17, 0.17, fc="none", ec=theme.soft, lw=0.8))
        axis.scatter([0.305], [y], s=18, marker=marker, color=colour)
        arrow(axis, theme.soft, (0.5, y), (0.98, y), mutation_scale=7, lw=0.9)
        for j in range(8):
            strength = 0.25 + 0.75 * abs(math.sin(3.1 * i + 1.7 * j + 0.4))
            axis.add_patch(Rectangle((1.08 + 0.15 * j, y - 0.07), 0.13, 0.14, fc=colour, ec="none", alpha=strength))

    box(axis, theme, 2.95, 2.7, "2  Rank", "every head by its share\nof common neighbours")
    scores = torch.rand(6, 12, generator=torch.Generator().manual_seed(8)) * 0.5
    scores += torch.linspace(0.05, 0.5, 6)[:, None]  # in the paper, the least aligned heads lie early
    worst = {divmod(i, 12) for i in scores.flatten().argsort()[:5].tolist()}
    for layer in range(6):
        for head in range(12):
            corner = (3.2 + 0.183 * head, 0.58 + 0.145 * layer)
            cell = {"fc": theme.kinds[0], "ec": "none", "alpha": 0.12 + 0.85 * scores[layer, head].item()}
            axis.add_patch(Rectangle(corner, 0.16, 0.127, **cell))

    box(axis, theme, 5.9, 2.3, "3  Choose", "the five least aligned,\nfor the whole run")
    for layer in range(6):
        for head in range(12):
            corner = (6.08 + 0.163 * head, 0.58 + 0.145 * layer)
            chosen = (layer, head) in worst
            style = {"fc": theme.accent, "ec": "none"} if chosen else {"fc": theme.soft, "ec": "none", "alpha": 0.25}
            axis.add_patch(Rectangle(corner, 0.14, 0.127, **style))

    passes = "first, all samples of the step\nin one pool; then its gradient"
    box(axis, theme, 8.45, 3.45, "4  Train, in two passes", passes)
    micro_batches(axis, theme, 8.65, 1.13, filled=False)
    micro_batches(axis, theme, 8.65, 0.62, filled=True)
    pool = (10.95, 1.02)
    axis.add_patch(Circle(pool, 0.34, fc="none", ec=theme.accent, lw=1.3))
    for i in range(16):
        turn, radius = 2.4 * i, 0.066 * math.sqrt(i)
        centre = (pool[0] + radius * math.cos(turn), pool[1] + radius * math.sin(turn))
        axis.add_patch(Circle(centre, 0.032, fc=theme.kinds[i % KINDS], ec="none"))
    arrow(axis, theme.ink, (9.8, 1.25), (10.56, 1.17))
    arrow(axis, theme.accent, (10.56, 0.86), (9.8, 0.74))
    axis.text(10.22, 1.31, "z", fontsize=11, color=theme.ink, ha="center", style="italic")
    axis.text(10.14, 0.995, "∂L/∂z", fontsize=10.5, color=theme.accent, ha="center", va="center", style="italic")
    for x in (2.70, 5.65, 8.20):
        arrow(axis, theme.soft, (x + 0.03, 0.93), (x + 0.23, 0.93))


def draw(theme: Theme, path: Path) -> None:
    """One variant of the figure."""
    teacher, steps = samples()
    neighbors = nearest_neighbors(teacher, K)
    figure = plt.figure(figsize=(10.6, 6.0))
    upper = figure.add_gridspec(1, 3, left=0.02, right=0.98, top=1.0, bottom=0.33, wspace=0.0)
    panels = [
        (teacher, "The vision teacher", f"each sample joined with its\n{K} nearest in the teacher's space"),
        (steps[0], "An attention head, before", "the same joins in the head's space\n{}"),
        (steps[-1], "The same head, trained", "neighbours have come together\n{}"),
    ]
    for place, (points, title, below) in zip(upper, panels, strict=True):
        share = f"{100 * mutual_knn(points, teacher, K):.0f} % of neighbours in common"
        axis = figure.add_subplot(place)
        draw_circle(axis, theme, points, neighbors, title, below.format(share))
    for x in (0.345, 0.665):
        text = "compare" if x < 0.5 else "pull"
        figure.text(x, 0.705, "→", fontsize=17, color=theme.soft, ha="center", va="center")
        figure.text(x, 0.745, text, fontsize=11, color=theme.soft, ha="center", va="center")
    draw_pipeline(figure.add_axes((0.012, 0.0, 0.976, 0.30)), theme)
    figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs/assets"))
    parser.add_argument("--format", choices=("svg", "png", "pdf"), default="svg")
    args = parser.parse_args(arguments)
    matplotlib.rcParams["svg.hashsalt"] = "hera"  # the same file every time
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, theme in (("light", LIGHT), ("dark", DARK)):
        draw(theme, args.folder / f"method-{name}.{args.format}")


if __name__ == "__main__":
    main()
