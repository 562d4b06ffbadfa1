"""Tables of several runs: what differs between their settings, and what came out."""

from __future__ import annotations

from collections.abc import Sequence

from .groups import Group, NamedRun, differing
from .maps import CONTEXT_NAMES
from .parts import Missing, Section, Table, number_text, score_text, summary_text
from .scalars import Scalar, head_scalars, scalars_of
from .scales import UNKNOWN, by_scale, of_scale, scale_warnings
from .settings import WHERE_RECORDED, seconds_of, text_of

# What unrelated spaces score.
_REFERENCES = (("Chance, k / (N - 1)", "chance"), ("95th percentile of chance", "null_p95"))


def differences_section(runs: Sequence[NamedRun], groups: Sequence[Group]) -> Section:
    """What differs between the settings of runs, one column a group.

    Args:
        runs (sequence of [`NamedRun`]): The runs.
        groups (sequence of [`Group`]): The same, by settings.
    """
    section = Section("settings", "What differs")
    values = {
        name: dict(zip((run.name for run in runs), found, strict=True)) for name, found in differing(runs).items()
    }
    rows = [["runs", *(", ".join(run.name for run in group.runs) for group in groups)]]
    for name, by_run in values.items():
        texts = [dict.fromkeys(text_of(by_run[run.name]) for run in group.runs) for group in groups]
        rows.append([name, *(", ".join(text) for text in texts)])
    columns = ["Setting", *(group.name for group in groups)]
    section.tables.append(Table("Settings that are not the same in all runs", columns, rows, wide=True))
    unrecorded = [run.name for run in runs if run.kind == "run"]
    if unrecorded:
        cure = f"HeRATrainer writes them {WHERE_RECORDED}; SFTTrainer does not."
        section.missing.append(Missing(f"The settings of {', '.join(unrecorded)} were not recorded.", cure))
    section.missing += scale_warnings(runs)
    return section


def results_section(runs: Sequence[NamedRun], groups: Sequence[Group]) -> Section:
    """What came out, one row a group: mutual k-NN first and last, what was logged last, and the time it took.

    Args:
        runs (sequence of [`NamedRun`]): The runs.
        groups (sequence of [`Group`]): The same, by settings.
    """
    section = Section("results", "Results")
    section.tables = _tables(runs, groups)
    if len(groups) < len(runs):
        section.notes.append("Of runs of the same settings but for the seed: mean (least to greatest).")
        section.folded = _tables(runs, [Group([run]) for run in runs], ", each run")
    if any(run.record.best_step is not None for run in runs):
        section.notes.append(
            "Where the best weights were loaded in the end, held-out loss, image gain and mutual k-NN are theirs: the "
            "last up to their step. What training logs is of its last step."
        )
    section.missing += scale_warnings(runs)
    going_on = [run.name for run in runs if run.record.record and not _has_ended(run)]
    if going_on:
        what = f"No end is recorded of {', '.join(going_on)}: still running, or stopped early."
        section.missing.append(Missing(what, "Make the page again when they have ended."))
    return section


def _tables(runs: Sequence[NamedRun], groups: Sequence[Group], ending: str = "") -> list[Table]:
    tables = []
    for context, name in CONTEXT_NAMES.items():
        found = by_scale(runs, context)
        for scale, measured in found.items():
            parts = [part for group in groups if (part := group.part(measured)) is not None]
            title = of_scale(f"{name}: first and last mutual k-NN", scale, list(found))
            tables.append(_scores(f"{title}{ending}", context, scale, measured, parts))
    tables.append(_logged(f"Last logged{ending}", scalars_of(runs), groups))
    return tables


def _scores(title: str, context: str, scale: str, runs: Sequence[NamedRun], groups: Sequence[Group]) -> Table:
    scalars = head_scalars(context)
    columns = ["Run", "n", *(f"{scalar.title}: {when}" for scalar in scalars for when in ("first", "last"))]
    rows = []
    for group in groups:
        row = [group.name, str(len(group.runs))]
        for scalar in scalars:
            row.append(summary_text([scalar.first(run) for run in group.runs], score_text))
            row.append(summary_text([scalar.last(run) for run in group.runs], score_text))
        rows.append(row)
    footer = []
    known = [run.record for run in runs] if scale != UNKNOWN else []
    measured = [[each.monitored[context][step] for step in each.measured_steps(context)] for each in known]
    measured = [rankings for rankings in measured if rankings]
    for name, field in _REFERENCES if measured else ():
        first = summary_text([getattr(rankings[0], field) for rankings in measured], score_text)
        last = summary_text([getattr(rankings[-1], field) for rankings in measured], score_text)
        footer.append([f"{name}, {scale}", "", *([first, last] * len(scalars))])
    return Table(title, columns, rows, numeric=True, footer=footer)


def _logged(title: str, scalars: Sequence[Scalar], groups: Sequence[Group]) -> Table:
    columns = ["Run", "n", "Steps", *(scalar.title for scalar in scalars), "Seconds"]
    rows = []
    for group in groups:
        row = [group.name, str(len(group.runs)), summary_text([_steps(run) for run in group.runs], number_text)]
        row += [summary_text([scalar.last(run) for run in group.runs], number_text) for scalar in scalars]
        row.append(summary_text([seconds_of(run.record) for run in group.runs], number_text))
        rows.append(row)
    return Table(title, columns, rows, numeric=True)


def _steps(run: NamedRun) -> float | None:
    return max((entry.get("step", 0) for entry in run.record.log_history), default=None)


def _has_ended(run: NamedRun) -> bool:
    return bool(run.record.record.get("finished") or run.record.curve("train_runtime")[0])
