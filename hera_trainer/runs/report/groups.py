"""Runs side by side: what each is called, which have the same settings but for the seed, and which is whose control."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...common.redaction import public_name
from ...objectives.registry import get_objective
from ..control import control_in
from ..record import RunRecord
from .settings import NOT_SHOWN, names_in_order, teacher_of

# Where a run is kept and shown, not what is trained.
_BESIDE = re.compile(
    r"report_to|project|disable_tqdm|resume_from_checkpoint|push_to_hub|publish_control|(hub|log|logging|save|trackio)_.+"
)
PROCESSES = "hardware: processes"
_SEEDS = ("seed", "data_seed")
_RANKED_BY = ("head_ranking_path",)
_NOT_OF_A_PAIR = ("teacher_control", *_RANKED_BY)
_SAVED = ("save_strategy", "save_steps")  # they decide which of the best weights there are

# Told apart by people with any colour vision, in both schemes; from the first again where there are more groups.
_COLORS = ("--series-1", "--aligned", "--series-3", "--series-2", "--series-4", "--series-5", "--series-6")
_DASHES = {"control": "dash", "without teacher": "dash", "SFT": "dot"}
_SYMBOLS = ("circle", "square", "diamond", "cross")


def _uses_teacher(config: dict[str, Any]) -> bool:
    try:
        return get_objective(config.get("alignment_objective", "contrastive")).uses_teacher
    except ValueError:  # a name that another program has registered
        return True


@dataclass(eq=False)
class NamedRun:
    """A run and what it is called beside others.

    Args:
        name (`str`): The name of its folder, or its path below the folder of all runs where names are the same.
        record ([`~runs.record.RunRecord`]): What it left.
    """

    name: str
    record: RunRecord

    @property
    def kind(self) -> str:
        """`"control"`, `"SFT"` (`alignment_weight=0`), `"without teacher"` (`alignment_objective="uniformity"`),
        `"aligned"`, or `"run"` where settings are not recorded."""
        config = _config(self.record)
        if config.get("alignment_weight") == 0:
            return "SFT"
        if control_of(self.record):
            return "control"
        if not _uses_teacher(config):
            return "without teacher"
        return "aligned" if config else "run"

    @property
    def title(self) -> str:
        """Its name behind what it is, which no legend and no table may leave out."""
        return Group([self]).name


@dataclass
class Group:
    """Runs of the same settings but for the seed.

    Args:
        runs (list of [`NamedRun`]): The runs.
        color (`str`): The colour they take of the page.
        dash (`str`): Plotly's name of their kind's dashes.
        symbol (`str`): Plotly's name of their marker.
    """

    runs: list[NamedRun]
    color: str = _COLORS[0]
    dash: str = "solid"
    symbol: str = _SYMBOLS[0]

    @property
    def name(self) -> str:
        """What the runs are, and their names."""
        names = [run.name for run in self.runs]
        if len(names) > 2:
            names = [f"{names[0]} \N{HORIZONTAL ELLIPSIS} {names[-1]}", f"{len(names)} runs"]
        return f"{self.runs[0].kind} ({', '.join(names)})"

    def part(self, runs: Iterable[NamedRun]) -> Group | None:
        """The group of those of its runs that are among some, `None` if none is."""
        names = {run.name for run in runs}
        kept = [run for run in self.runs if run.name in names]
        return replace(self, runs=kept) if kept else None


def control_of(run: RunRecord) -> str:
    """Name of the control that a run was; empty for any other run."""
    control = control_in(_config(run))
    return "" if control == "none" else control


def named_runs(records: Sequence[RunRecord]) -> list[NamedRun]:
    """Gives each run a name that no other one has.

    Args:
        records (sequence of [`~runs.record.RunRecord`]): Runs in different folders.
    """
    folders = [record.path.resolve() for record in records]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        above = os.path.commonpath([folder.parent for folder in folders])
        names = [folder.relative_to(above).as_posix() for folder in folders]
    return [NamedRun(public_name(name), record) for name, record in zip(names, records, strict=True)]


def grouped(runs: Iterable[NamedRun]) -> list[Group]:
    """Runs of the same settings but for the seed, in the order in which the first of each was given.

    Args:
        runs (iterable of [`NamedRun`]):
            The runs. One whose settings are not recorded stays by itself, and so does one of a seed that the group
            has: what tells them apart is not recorded, and no matter of chance.
    """
    found: dict[str, list[NamedRun]] = {}
    for run in runs:
        key = _key(run.record, without=_SEEDS) if _config(run.record) else run.name
        if any(_seeds(run) == _seeds(other) for other in found.get(key, ())):
            key = f"{key} {run.name}"
        found.setdefault(key, []).append(run)
    groups = []
    for i, members in enumerate(_with_the_same_heads(found.values())):
        turn, color = divmod(i, len(_COLORS))
        dash = _DASHES.get(members[0].kind, "solid")
        groups.append(Group(members, _COLORS[color], dash, _SYMBOLS[turn % len(_SYMBOLS)]))
    return groups


def _with_the_same_heads(found: Iterable[list[NamedRun]]) -> list[list[NamedRun]]:
    """Runs that differ in nothing but by whom their heads were ranked are of one group, if these are the same: the
    first of several seeds often ranks for the others."""
    joined: dict[str, list[NamedRun]] = {}
    for members in found:
        heads = {tuple(_heads(run.record)) for run in members}
        key = f"alone {members[0].name}"
        if len(heads) == 1 and () not in heads:
            key = f"{_key(members[0].record, without=(*_SEEDS, *_RANKED_BY))} {heads}"
            if any(_seeds(run) == _seeds(other) for run in members for other in joined.get(key, ())):
                key = f"{key} {members[0].name}"
        joined.setdefault(key, []).extend(members)
    return list(joined.values())


def controls(runs: Sequence[NamedRun]) -> list[tuple[NamedRun, NamedRun]]:
    """Aligned runs with their controls: settings and seed equal but for `teacher_control`.

    Args:
        runs (sequence of [`NamedRun`]): The runs.

    Returns:
        `list` of pairs, the aligned run first.
    """
    # By whom heads were ranked is no matter, if they are the same.
    keys = {run.name: (_key(run.record, without=_NOT_OF_A_PAIR), _heads(run.record)) for run in runs}
    return [
        (run, other)
        for run in runs
        for other in runs
        if run.kind == "aligned" and other.kind == "control" and keys[run.name] == keys[other.name]
    ]


def settings_of(run: RunRecord) -> dict[str, Any]:
    """What a run was trained with, by name: model, data set, teacher, adapter, settings, versions, hardware."""
    record, config = run.record, _config(run)
    settings = {"model": record.get("model"), "data set": record.get("dataset"), "teacher": teacher_of(run) or None}
    settings["data set rows"] = record.get("rows")
    settings["aligned heads"] = " ".join(record.get("aligned_heads") or ()) or None
    settings.update({f"adapter: {name}": value for name, value in (record.get("adapter") or {}).items()})
    settings.update({name: config[name] for name in names_in_order(config) if name not in NOT_SHOWN})
    before = record.get("earlier_config") or {}
    settings.update({f"{name}, before it was resumed": before[name] for name in before if is_of_training(name)})
    for part in ("versions", "hardware"):
        settings.update({f"{part}: {name}": value for name, value in (record.get(part) or {}).items()})
    return settings


def differing(runs: Sequence[NamedRun]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, and their values, `None` where a run has none.

    Args:
        runs (sequence of [`NamedRun`]): The runs. Those whose settings are not recorded differ in nothing.
    """
    settings = [settings_of(run.record) for run in runs]
    names = dict.fromkeys(name for each, run in zip(settings, runs, strict=True) for name in each if run.kind != "run")
    values = {name: [each.get(name) for each in settings] for name in names}
    return {
        name: found
        for name, found in values.items()
        if len({_as_text(value) for value, run in zip(found, runs, strict=True) if run.kind != "run"}) > 1
    }


def pair_differences(run: NamedRun, control: NamedRun) -> list[str]:
    """Names of what keeps a run and a control from being a pair."""
    first, second = (_kept(each.record, without=_NOT_OF_A_PAIR) for each in (run, control))
    names = [name for name in dict.fromkeys((*first, *second)) if first.get(name) != second.get(name)]
    return [*names, "aligned heads"] if _heads(run.record) != _heads(control.record) else names


def training_differences(runs: Sequence[NamedRun]) -> list[str]:
    """Names of the settings that change what is trained, the seed among them, and are not the same in all runs."""
    return [name for name in differing(runs) if is_of_training(name)]


def _key(run: RunRecord, without: Iterable[str]) -> str:
    return _as_text(_kept(run, without))


def _kept(run: RunRecord, without: Iterable[str]) -> dict[str, Any]:
    """The settings that change what is trained, by name."""
    settings = settings_of(run)
    kept = {name: settings[name] for name in sorted(settings) if is_of_training(name) and name not in without}
    if settings.get("load_best_model_at_end"):
        kept |= {name: settings.get(name) for name in _SAVED}
    return kept


def _heads(run: RunRecord) -> list[str]:
    return sorted(run.record.get("aligned_heads") or ())


def _seeds(run: NamedRun) -> list[Any]:
    return [_config(run.record).get(name) for name in _SEEDS]


def is_of_training(name: str) -> bool:
    """Whether a setting changes what is trained, the seed among them."""
    if name == PROCESSES:  # so many batches make a step
        return True
    # The aligned heads follow from the settings and the seed.
    return not _BESIDE.fullmatch(name) and name != "aligned heads" and not name.startswith(("versions:", "hardware:"))


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _config(run: RunRecord) -> dict[str, Any]:
    return run.record.get("config") or {}
