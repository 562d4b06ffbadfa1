"""The heads of a run: maps before, after and of the difference, and the table of the aligned heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...heads.head import AlignedUnit, AttentionHead, granularity_of
from ...heads.heat_map import columns_of
from ...heads.ranking import HeadRanking
from ..record import CONTEXTS, RunRecord
from .parts import Missing, Plot, Section, Table, change_text, plain_figure, score_text
from .settings import measured_with, other_teacher, teacher_of

CONTEXT_NAMES = {context: name.capitalize() for context, name in CONTEXTS.items()}

_MONITOR_CODE = """\
args = HeRAConfig(..., monitor_steps=50)
trainer = HeRATrainer(model, args, train_dataset=train, eval_dataset=held_out)"""

# White in a black frame stands out from every colour of both maps, in either scheme.
_OUTLINE = (("#000000", 3.6), ("#ffffff", 1.6))

Grid = list[list[float]]


def heads_section(run: RunRecord) -> Section:
    """Head maps of every context of a run."""
    section = Section("heads", "Attention heads")
    aligned = run.aligned_heads
    for context in CONTEXTS:
        pair = run.before_after(context)
        if pair is not None:
            steps = run.measured_steps(context)
            section.plots[CONTEXT_NAMES[context]] = _three_maps(context, *pair, (steps[0], steps[-1]), aligned)
        elif run.monitored.get(context):
            step, ranking = next(iter(run.monitored[context].items()))
            section.plots[CONTEXT_NAMES[context]] = [_single_map(context, f"at step {step:,}", ranking, aligned)]
    if not section.plots and run.head_ranking is not None:
        title = "before training, as the heads were chosen"
        name = CONTEXT_NAMES[run.head_ranking.context]
        section.plots[name] = [_single_map(run.head_ranking.context, title, run.head_ranking, aligned)]
    rankings = _rankings(run)
    if rankings:
        section.notes.append(_about(rankings[0], teacher_of(run), granularity_of(aligned)))
    if run.best_step is not None and run.monitored:
        section.notes.append(
            f"Training ended with loading the weights of step {run.best_step:,}, the best in evaluation. What was "
            "measured later is not theirs: it is in the curves only."
        )
    section.missing += _missing(run)
    return section


def chosen_section(run: RunRecord) -> Section:
    """The table of the aligned heads or layers, with their scores before and after."""
    aligned = run.aligned_heads
    granularity = granularity_of(aligned)
    section = Section("aligned", f"Aligned {granularity}s")
    if not aligned:
        return section
    pairs = {context: pair for context in CONTEXTS if (pair := run.before_after(context)) is not None}
    columns, rows = [granularity.capitalize()], [[str(head)] for head in aligned]
    if run.head_ranking is not None:
        columns.append("Score in the ranking")
    for context in pairs:
        columns += [f"{CONTEXT_NAMES[context]}: {name}" for name in ("before", "after", "change")]
    for head, row in zip(aligned, rows, strict=True):
        if run.head_ranking is not None:
            row.append(score_text(score_of(run.head_ranking, head)))
        for before, after in pairs.values():
            a, b = score_of(before, head), score_of(after, head)
            row += [score_text(a), score_text(b), change_text(a, b)]
    section.notes += _measured_with([each for each in _columns(run, pairs) if each is not None], teacher_of(run))
    caption = f"The {len(aligned)} aligned {granularity}s and their mutual k-NN with the teacher"
    section.tables.append(Table(caption, columns, rows, numeric=True, footer=_means(run, pairs, aligned)))
    return section


def _measured_with(rankings: Sequence[HeadRanking], teacher: str) -> list[str]:
    """Says what the columns of the table were measured with, where they differ or are of another teacher."""
    scales = dict.fromkeys(measured_with(ranking, teacher) for ranking in rankings)
    notes = [f"The columns were measured with {' and with '.join(scales)}."]
    if len(scales) > 1:
        return [f"{notes[0]} Hold each against its own chance, and not against a column of the other kind."]
    return notes if any(other_teacher(ranking, teacher) for ranking in rankings) else []


def score_of(ranking: HeadRanking, head: AlignedUnit) -> float | None:
    """The score of a head or layer, `None` if the ranking has none."""
    layers, width = ranking.scores.shape
    score = ranking.score(head) if head.layer < layers and columns_of(head, width)[0] < width else math.nan
    return None if math.isnan(score) else score


def mean_of(ranking: HeadRanking, heads: Sequence[AlignedUnit]) -> float | None:
    """The mean score of heads or layers, `None` if one of them has none."""
    scores = [score_of(ranking, head) for head in heads]
    return None if not scores or None in scores else math.fsum(s for s in scores if s is not None) / len(scores)


Pairs = dict[str, tuple[HeadRanking, HeadRanking]]


def _columns(run: RunRecord, pairs: Pairs) -> list[HeadRanking | None]:
    """The ranking that each column of the table shows, `None` for a change."""
    chosen = [] if run.head_ranking is None else [run.head_ranking]
    return [*chosen, *(ranking for pair in pairs.values() for ranking in (*pair, None))]


def _means(run: RunRecord, pairs: Pairs, aligned: Sequence[AlignedUnit]) -> list[list[str]]:
    """Rows of means: the aligned heads, as many of the most aligned before training, all heads; and what to hold them
    against."""
    granularity = granularity_of(aligned)

    def top(ranking: HeadRanking) -> list[AlignedUnit]:  # the group `alignment_mknn/top` of the monitor
        return (run.head_ranking or ranking).select("top", len(aligned), granularity=granularity)

    rows = []
    for name, choose in (
        (f"Mean of the aligned {granularity}s", lambda ranking: aligned),
        (f"Mean of the {len(aligned)} {granularity}s that were most aligned", top),
        (f"Mean of all {granularity}s", lambda ranking: ranking.units(granularity)),
    ):
        row = [name]
        if run.head_ranking is not None:
            row.append(score_text(mean_of(run.head_ranking, choose(run.head_ranking))))
        for before, after in pairs.values():
            heads = choose(before)
            a, b = mean_of(before, heads), mean_of(after, heads)
            row += [score_text(a), score_text(b), change_text(a, b)]
        rows.append(row)
    columns = _columns(run, pairs)
    references = [("Chance, k / (N - 1)", "chance"), ("95th percentile of chance", "null_p95")]
    encoders = {each.ceiling_model: None for each in columns if each is not None and each.ceiling is not None}
    if encoders:
        references.append((f"Ceiling, {', '.join(encoders)}", "ceiling"))
    for name, field in references:
        rows.append([name, *("" if each is None else score_text(getattr(each, field)) for each in columns)])
    return rows


def _rankings(run: RunRecord) -> list[HeadRanking]:
    found = [ranking for steps in run.monitored.values() for ranking in steps.values()]
    return found or ([run.head_ranking] if run.head_ranking is not None else [])


def _about(ranking: HeadRanking, teacher: str, granularity: str) -> str:
    return (
        "A score is the mutual k-NN of a head with the teacher: the share of a sample's k nearest neighbours that both "
        f"agree on, over N samples ({measured_with(ranking, teacher)}). To hold it against: "
        f"{', '.join(ranking.references())}. Aligned {granularity}s are outlined. Blank: the layer has no such head. "
        "Point at a cell for its values."
    )


def _three_maps(
    context: str, before: HeadRanking, after: HeadRanking, steps: tuple[int, int], aligned: Sequence[AlignedUnit]
) -> list[Plot]:
    change = (after.scores - before.scores).tolist()
    first, last = before.scores.tolist(), after.scores.tolist()
    values = [score for grid in (first, last) for row in grid for score in row if not math.isnan(score)]
    limits = (min(values), max(values))
    widest = max((abs(score) for row in change for score in row if not math.isnan(score)), default=0.0) or 1e-4
    hover = hover_data(first, last, aligned)
    lines = "before %{customdata[0]:.4f}<br>after %{customdata[1]:.4f}<br>change %{customdata[2]}"
    plots = []
    for name, title, grid, bounds in (
        ("before", f"Before (step {steps[0]:,})", first, limits),
        ("after", f"After (step {steps[1]:,})", last, limits),
        ("difference", "Difference, after - before", change, (-widest, widest)),
    ):
        scale = "difference" if name == "difference" else "score"
        figure = heat_map(grid, scale, bounds, aligned, hover, lines)
        what = f"{CONTEXT_NAMES[context]}, {title[0].lower()}{title[1:]}"
        plots.append(
            map_plot(f"heads-{context}-{name}", title, what, grid, figure, aligned, signed=scale == "difference")
        )
    return plots


def _single_map(context: str, when: str, ranking: HeadRanking, aligned: Sequence[AlignedUnit]) -> Plot:
    grid = ranking.scores.tolist()
    values = [score for row in grid for score in row if not math.isnan(score)]
    hover = hover_data(grid, grid, aligned)
    figure = heat_map(grid, "score", (min(values), max(values)), aligned, hover, "score %{customdata[0]:.4f}")
    title = f"{when[0].upper()}{when[1:]}"
    return map_plot(f"heads-{context}", title, f"{CONTEXT_NAMES[context]}, {when}", grid, figure, aligned)


def hover_data(before: Grid, after: Grid, aligned: Sequence[AlignedUnit]) -> list[list[list[Any]]]:
    """For each cell its score before and after, their difference as text, and whether the head is aligned."""
    chosen = set(map(tuple, aligned))
    return [
        [
            [round(a, 6), round(b, 6), change_text(a, b), ", aligned" if {(layer, head), (layer,)} & chosen else ""]
            for head, (a, b) in enumerate(zip(row, after[layer], strict=True))
        ]
        for layer, row in enumerate(before)
    ]


def heat_map(
    grid: Grid,
    scale: str,
    bounds: tuple[float, float],
    aligned: Sequence[AlignedUnit],
    hover: list[list[list[Any]]],
    lines: str,
) -> dict[str, Any]:
    """A map of all heads as a figure.

    Args:
        grid (list of lists of `float`): A number for each head, by layer and head.
        scale (`str`): `"score"` or `"difference"`, which decides the colours.
        bounds (`tuple` of two `float`): Least and greatest number of the scale.
        aligned (sequence of [`AttentionHead`]): Heads to outline.
        hover (list of lists of lists): What [`hover_data`] makes.
        lines (`str`): What is shown of it at a cell, as plotly's hover template.
    """
    import plotly.graph_objects as go

    layers, widest = len(grid), len(grid[0])
    trace = go.Heatmap(
        z=[[round(score, 6) for score in row] for row in grid],
        x=list(range(widest)),
        y=list(range(layers)),
        customdata=hover,
        meta=scale,  # the page chooses the colours
        zmin=bounds[0],
        zmax=bounds[1],
        xgap=1 if widest <= 40 else 0,
        ygap=1 if layers <= 60 else 0,
        hoverongaps=False,
        hovertemplate="<b>L%{y}H%{x}</b>%{customdata[3]}<br>layer %{y}, head %{x}<br>" + lines + "<extra></extra>",
        colorbar={"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom", "thickness": 10, "len": 1},
    )
    outlines = [
        {
            "type": "rect",
            "name": str(head),
            "x0": columns_of(head, widest)[0] - 0.5,
            "x1": sum(columns_of(head, widest)) - 0.5,
            "y0": head.layer - 0.5,
            "y1": head.layer + 0.5,
            "line": {"color": color, "width": width},
        }
        for head in aligned
        for color, width in _OUTLINE
    ]
    return plain_figure(
        [trace],
        shapes=outlines,
        xaxis=_axis("head", [-0.5, widest - 0.5]),
        yaxis=_axis("layer", [layers - 0.5, -0.5]),
        margin={"l": 44, "r": 8, "t": 6, "b": 92},
    )


def _axis(name: str, limits: list[float]) -> dict[str, Any]:
    ticks = {"dtick": 1} if max(limits) < 12 else {}  # of its own, plotly would set ticks at halves
    return {"title": {"text": name}, "range": limits, "fixedrange": True, "showgrid": False, **ticks}


def map_plot(
    name: str,
    title: str,
    what: str,
    grid: Grid,
    figure: dict[str, Any],
    aligned: Sequence[AlignedUnit],
    signed: bool = False,
) -> Plot:
    """A map of all heads on the page, with its table and what it shows in words.

    Args:
        name (`str`): See [`Plot`].
        title (`str`): See [`Plot`].
        what (`str`): The title as it is understood without what stands around it.
        grid (list of lists of `float`): A number for each head, by layer and head.
        figure (`dict`): What [`heat_map`] makes of it.
        aligned (sequence of [`AttentionHead`]): Heads whose mean is given.
        signed (`bool`, *optional*, defaults to `False`): Whether the numbers are differences.
    """
    layers, width = len(grid), len(grid[0])
    scores = {AttentionHead(i, j): s for i, row in enumerate(grid) for j, s in enumerate(row) if not math.isnan(s)}
    low, high = min(scores, key=lambda head: scores[head]), max(scores, key=lambda head: scores[head])
    sign = "+" if signed else ""
    label = (
        f"Heat map. {what}: {layers} layers by {width} heads. Lowest {low} {scores[low]:{sign}.4f}, highest {high} "
        f"{scores[high]:{sign}.4f}, mean {math.fsum(scores.values()) / len(scores):{sign}.4f}."
    )
    chosen = [scores[head] for head in aligned if isinstance(head, AttentionHead) and head in scores]
    if chosen:
        label += f" Mean of the aligned heads {math.fsum(chosen) / len(chosen):{sign}.4f}."
    rows = [
        [f"Layer {i}", *("-" if math.isnan(score) else f"{score:{sign}.4f}" for score in row)]
        for i, row in enumerate(grid)
    ]
    table = Table(f"{what}: score of each head", ["", *(f"Head {j}" for j in range(width))], rows, numeric=True)
    return Plot(name, title, what, figure, min(max(13 * layers, 240), 760) + 98, label, table)


def _missing(run: RunRecord) -> list[Missing]:
    if run.best_step is not None and any(len(run.measured_steps(context)) < 2 for context in run.monitored):
        what = (
            f"Up to step {run.best_step:,}, the weights of which were loaded in the end, nothing was measured but once."
        )
        cure = "Set monitor_steps to the steps between two evaluations."
        return [Missing(what, cure)]
    if any(len(steps) == 1 for steps in run.monitored.values()):
        cure = "The difference appears with the next one, or at the end of training."
        return [Missing("The heads have been measured only once so far.", cure)]
    changed = [context for context in run.monitored if run.before_after(context) is None]
    if changed:
        measured, steps = run.monitored[changed[0]], run.measured_steps(changed[0])
        first, last = (measured_with(measured[step], teacher_of(run)) for step in (steps[0], steps[-1]))
        scales = f"{first} at first, {last} at last"
        cure = "Resume a run with the settings of the monitor that it began with."
        return [Missing(f"Before and after cannot be compared, since they were measured otherwise: {scales}.", cure)]
    if run.monitored:
        return []
    if (run.record.get("config") or {}).get("alignment_weight") == 0:
        what = "Alignment was off in this run (alignment_weight=0), and its heads were not measured."
    elif run.head_ranking is not None:
        what = "The heads were not measured during training, so there is no map after it."
    else:
        what = "This folder holds no scores of heads: no ranking, and no measurements of the monitor."
    return [Missing(what, "Set monitor_steps and give the trainer held-out data:", _MONITOR_CODE)]
