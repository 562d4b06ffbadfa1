"""Head maps of several runs side by side: what training changed in each, and what the teacher added to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...heads.head import AlignedUnit, parse_unit
from ...heads.ranking import HeadRanking
from .groups import Group, NamedRun, controls, pair_differences
from .maps import CONTEXT_NAMES, heat_map, hover_data, map_plot
from .parts import Missing, Plot, Section, Table, change_text, score_text, summary_text
from .scalars import head_scalars
from .scales import UNKNOWN, by_scale, of_scale

# More settings than this do not help to find what was meant to be equal.
_MOST_NAMES = 5

Pair = tuple[NamedRun, NamedRun]


@dataclass
class _Difference:
    """Scores of one measurement less those of another."""

    title: str
    first: HeadRanking
    second: HeadRanking
    aligned: Sequence[AlignedUnit]

    def grid(self) -> list[list[float]]:
        return (self.second.scores - self.first.scores).tolist()


def compared_heads_section(runs: Sequence[NamedRun]) -> Section:
    """For each run, how the scores of its heads changed from the first measurement to the last.

    Args:
        runs (sequence of [`NamedRun`]): The runs.
    """
    section = Section("heads", "What training changed")
    for context, name in CONTEXT_NAMES.items():
        found = by_scale(runs, context)
        for i, (scale, measured) in enumerate(found.items()):
            changes = []
            for run in measured:
                pair = run.record.before_after(context)
                if pair is not None:
                    changes.append(_Difference(run.title, *pair, _outlined(run)))
            if changes:
                lines = "before %{customdata[0]:.4f}<br>after %{customdata[1]:.4f}<br>change %{customdata[2]}"
                title = of_scale(name, scale, list(found))
                section.plots[title] = _maps(f"change-{context}{i or ''}", f"{title}, change", changes, lines)
    if section.plots:
        section.notes.append(
            "The last measurement less the first, under each subheading on one scale of colours; where the best "
            "weights were loaded in the end, the last up to their step. Aligned heads are outlined. Blank: the layer "
            "has no such head. Point at a cell for its values."
        )
    without = [
        run.name for run in runs if all(len(run.record.measured_steps(context)) < 2 for context in CONTEXT_NAMES)
    ]
    if without:
        cure = "Set monitor_steps and give the trainer held-out data."
        section.missing.append(Missing(f"The heads were not measured before and after: {', '.join(without)}.", cure))
    return section


def teacher_section(runs: Sequence[NamedRun], groups: Sequence[Group]) -> Section:
    """The last measurement of each aligned run less that of its control, which is trained with other images' vectors.

    Args:
        runs (sequence of [`NamedRun`]): The runs.
        groups (sequence of [`Group`]): The same, by settings.
    """
    section = Section("teacher", "What the teacher adds")
    pairs = controls(runs)
    for context, name in CONTEXT_NAMES.items():
        found = by_scale(runs, context)
        for i, (scale, measured) in enumerate(found.items()):
            names = {run.name for run in measured}
            here = [pair for pair in pairs if scale != UNKNOWN and {run.name for run in pair} <= names]
            differences = [_added(run, control, context) for run, control in here]
            title = of_scale(name, scale, list(found))
            maps = [difference for difference in differences if difference is not None]
            if maps:
                lines = "with its teacher %{customdata[1]:.4f}<br>control %{customdata[0]:.4f}<br>"
                lines += "difference %{customdata[2]}"
                section.plots[title] = _maps(f"teacher-{context}{i or ''}", f"{title}, less the control", maps, lines)
            if here:
                section.tables.append(_table(title, groups, here, context))
    if any(table.footer for table in section.tables):
        section.notes.append("Of runs of the same settings but for the seed: mean (least to greatest).")
    if section.tables:
        section.notes.insert(
            0,
            "The last measurement of a run less that of its control, the run of equal settings and seed in which each "
            "image had another image's teacher vector: of the last step that both were measured at. What both have in "
            "common is no work of the teacher's.",
        )
    section.missing += _unpaired(runs, pairs)
    return section


def _outlined(run: NamedRun) -> list[AlignedUnit]:
    """The heads or layers that a run aligned; of SFT, those that it only measured, if its settings name them."""
    named = (run.record.record.get("config") or {}).get("aligned_heads") or ()
    return run.record.aligned_heads or [parse_unit(str(head)) for head in named]


def _added(run: NamedRun, control: NamedRun, context: str) -> _Difference | None:
    step = _last_of_both(run, control, context)
    if step is None:
        return None
    first, second = (each.record.monitored[context][step] for each in (control, run))
    if first.scores.shape != second.scores.shape:
        return None
    title = f"{run.name} less {control.title}{_at(run, control, context)}"
    return _Difference(title, first, second, _outlined(run))


def _last_of_both(run: NamedRun, control: NamedRun, context: str) -> int | None:
    """The last step that both were measured at: one of them may have trained for longer."""
    others = set(control.record.measured_steps(context))
    return next((step for step in reversed(run.record.measured_steps(context)) if step in others), None)


def _at(run: NamedRun, control: NamedRun, context: str) -> str:
    """Says which step it is that is compared, where it is not the last of both."""
    step = _last_of_both(run, control, context)
    last = {each.record.measured_steps(context)[-1:] == [step] for each in (run, control)}
    return "" if step is None or last == {True} else f", step {step:,}"


def _maps(name: str, what: str, differences: Sequence[_Difference], lines: str) -> list[Plot]:
    grids = [difference.grid() for difference in differences]
    sizes = [abs(number) for grid in grids for row in grid for number in row if not math.isnan(number)]
    widest = max(sizes, default=0.0) or 1e-4
    plots = []
    for i, (each, grid) in enumerate(zip(differences, grids, strict=True)):
        hover = hover_data(each.first.scores.tolist(), each.second.scores.tolist(), each.aligned)
        figure = heat_map(grid, "difference", (-widest, widest), each.aligned, hover, lines)
        full = f"{what}: {each.title}"
        plots.append(map_plot(f"{name}-{i}", each.title, full, grid, figure, each.aligned, signed=True))
    return plots


def _table(title: str, groups: Sequence[Group], pairs: Sequence[Pair], context: str) -> Table:
    """Last scores of groups of heads: of each run, of its control, and the difference; of seeds also their mean."""
    scalars = head_scalars(context)
    columns = ["Run and control"]
    for scalar in scalars:
        columns += [f"{scalar.title}: {part}" for part in ("run", "control", "difference")]
    rows, added = [], []
    for run, control in pairs:
        row = [f"{run.name} and {control.title}{_at(run, control, context)}"]
        scores = [scalar.last_of_both(run, control) or (None, None) for scalar in scalars]
        for own, other in scores:
            row += [score_text(own), score_text(other), change_text(other, own)]
        rows.append(row)
        added.append([None if own is None or other is None else own - other for own, other in scores])
    footer = []
    for group in groups:
        part = group.part(run for run, _ in pairs)
        of_group = [each for (run, _), each in zip(pairs, added, strict=True) if part is not None and run in part.runs]
        if part is not None and len(of_group) > 1:
            row = [f"Mean of {part.name}"]
            for differences in zip(*of_group, strict=True):
                row += ["", "", summary_text(differences, lambda difference: f"{difference:+.4f}")]
            footer.append(row)
    return Table(f"{title}: last mutual k-NN of runs and their controls", columns, rows, numeric=True, footer=footer)


def _unpaired(runs: Sequence[NamedRun], pairs: Sequence[Pair]) -> list[Missing]:
    """Control runs that are nobody's control, and what keeps each from being that of the run most like it."""
    paired = {control.name for _, control in pairs}
    aligned = [run for run in runs if run.kind == "aligned"]
    missing = []
    for control in runs:
        if control.kind != "control" or control.name in paired:
            continue
        what = f"None of the aligned runs has the settings and the seed of {control.title}."
        cure = "Report it together with the run that it is the control of."
        if aligned:
            differences = {run.name: pair_differences(run, control) for run in aligned}
            nearest = min(differences, key=lambda name: len(differences[name]))
            names = differences[nearest]
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            cure = f"It differs from {nearest} in {', '.join(names[:_MOST_NAMES])}{more}."
        missing.append(Missing(what, cure))
    return missing
