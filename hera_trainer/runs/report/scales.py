"""Which scores of several runs may be compared: those with the same teacher, of the same number k of neighbours among
the same number N of samples, clipped and centred alike."""

from __future__ import annotations

from collections.abc import Sequence

from ...heads.ranking import HeadRanking
from ..plots import monitor_group
from ..record import RunRecord
from .groups import NamedRun
from .maps import CONTEXT_NAMES
from .parts import Missing
from .settings import measured_with, teacher_of

UNKNOWN = "k and N not recorded"


def by_scale(runs: Sequence[NamedRun], context: str) -> dict[str, list[NamedRun]]:
    """Runs whose scores in a context may be compared, by what they were measured with. A run whose measurements are not
    of one scale is in none.

    Args:
        runs (sequence of [`NamedRun`]): The runs.
        context (`str`): `"text"` or `"image"`.
    """
    found: dict[str, list[NamedRun]] = {}
    several = _by_several_teachers([run.record for run in runs], context)
    for run in runs:
        scales = _scales(run.record, context, several)
        if len(scales) == 1:
            found.setdefault(scales[0], []).append(run)
    return found


def of_scale(title: str, scale: str, scales: Sequence[str]) -> str:
    """A title that says what was measured with, where that is not the same for all."""
    return f"{title} ({scale})" if len(scales) > 1 else title


def scale_warnings(runs: Sequence[NamedRun]) -> list[Missing]:
    """Says which scores are not compared, and why."""
    warnings = []
    for context, name in CONTEXT_NAMES.items():
        found = by_scale(runs, context)
        if len(found) > 1:
            kinds = " and ".join(f"with {scale} ({', '.join(run.name for run in found[scale])})" for scale in found)
            cure = (
                "They stand apart on this page, and no differences are taken between them. Give all runs the same "
                "num_neighbors, metric, teacher and held-out rows."
            )
            warnings.append(Missing(f"Scores that were measured otherwise cannot be compared. {name}: {kinds}.", cure))
        for run in runs:
            scales = _scales(run.record, context, _by_several_teachers([run.record], context))
            if len(scales) > 1:
                what = f"{name}: the scores of {run.name} are left out, since it was measured with "
                cure = "Resume a run with the settings of the monitor that it began with."
                warnings.append(Missing(f"{what}{' and with '.join(scales)}.", cure))
    return warnings


def _measured(run: RunRecord, context: str) -> list[HeadRanking]:
    return list(run.monitored.get(context, {}).values())


def _by_several_teachers(runs: Sequence[RunRecord], context: str) -> bool:
    """Whether scores of these runs are with different teachers, or with others than the runs were trained with, as far
    as their names are known."""
    measured = {ranking.teacher for run in runs for ranking in _measured(run, context)}
    return len((measured | {teacher_of(run) for run in runs}) - {""}) > 1


def _scales(run: RunRecord, context: str, with_teacher: bool) -> list[str]:
    """What a run was measured with in a context: once the same, or several."""
    rankings = _measured(run, context)
    scales = list(dict.fromkeys(measured_with(each, "" if with_teacher else each.teacher) for each in rankings))
    logged = run.curve(f"{monitor_group(context)}/all")[0]
    return scales or ([UNKNOWN] if logged else [])
