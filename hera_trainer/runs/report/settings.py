"""Configuration, versions and hardware of a run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ...common.redaction import public_settings
from ...heads.ranking import HeadRanking
from ...objectives.contrastive import TEMPERATURES
from ..record import RunRecord, defaults_of
from .parts import Missing, Section, Table

# In the report already, or a matter of the machine.
NOT_SHOWN = ("output_dir", "logging_dir", "run_name", "local_rank")
# What `__post_init__` makes of a default: no one has set these.
_FILLED_IN = {
    "activation_checkpointing": True,
    "bf16": True,
    "debug": [],
    "disable_tqdm": False,
    "pad_to_multiple_of": None,
    "report_to": [],
}
# Where settings, versions and hardware of a run are found, and which runs have none.
WHERE_RECORDED = (
    "to hera_run.json when training begins, unless alignment is off (alignment_weight=0) and there is no monitor"
)
# What `TrainingArguments.to_dict` writes for any value of `hub_token`, `eos_token` and their like.
_PLACEHOLDER = re.compile(r"<[A-Z_]+>")


def settings_section(run: RunRecord) -> Section:
    """The configuration: what differs from the defaults, and everything."""
    section = Section("configuration", "Configuration")
    config = run.record.get("config") or {}
    if not config:
        cure = f"HeRATrainer writes it {WHERE_RECORDED}; SFTTrainer does not."
        section.missing.append(Missing("The configuration was not recorded.", cure))
        return section
    config = {name: value for name, value in config.items() if name not in NOT_SHOWN}
    defaults = _defaults()
    names = names_in_order(config)
    filled_in = {**_FILLED_IN, "temperature": TEMPERATURES.get(config.get("similarity", ""))}
    changed = [name for name in names if not _is_default(name, config[name], defaults, filled_in)]
    rows = [[name, text_of(config[name]), text_of(defaults.get(name))] for name in changed]
    section.tables.append(Table("Settings that differ from the defaults", ["Setting", "Value", "Default"], rows))
    everything = [[name, text_of(config[name])] for name in names]
    section.folded.append(Table(f"All {len(everything)} settings", ["Setting", "Value"], everything))
    if run.record.get("adapter"):
        rows = [[name, text_of(value)] for name, value in run.record["adapter"].items()]
        section.tables.append(Table("Adapter", ["Setting", "Value"], rows))
    return section


def environment_section(run: RunRecord) -> Section:
    """Versions, hardware and times."""
    section = Section("environment", "Environment")
    for key, caption in (("versions", "Versions"), ("hardware", "Hardware")):
        if run.record.get(key):
            rows = [[name.replace("_", " "), text_of(value)] for name, value in run.record[key].items()]
            section.tables.append(Table(caption, ["Name", "Value"], rows))
    times = [("started", run.record.get("started")), ("finished", run.record.get("finished"))]
    rows = [[name, time_text(value)] for name, value in times if value]
    if duration(run):
        rows.append(["duration", duration(run)])
    if run.record.get("resumed_from"):
        rows.append(["resumed from", text_of(run.record["resumed_from"])])
    if rows:
        section.tables.append(Table("Time", ["Name", "Value"], rows))
    if not run.record.get("versions"):
        cure = f"HeRATrainer writes them {WHERE_RECORDED}; `hera env` prints those of this machine."
        section.missing.append(Missing("Versions and hardware were not recorded.", cure))
    return section


def time_text(value: Any) -> str:
    """A recorded time without its fractions of a second."""
    time = _time(value)
    return str(value) if time is None else time.strftime("%Y-%m-%d %H:%M %Z").strip()


def seconds_of(run: RunRecord) -> float | None:
    """How long training took in seconds, without the time that a run lay dead before it went on; `None` if it is not
    known."""
    finished = _time(run.record.get("finished"))
    if finished is not None and run.record.get("seconds") is not None:
        return float(run.record["seconds"])
    started = None if run.record.get("resumed_from") else _time(run.record.get("started"))
    if started is not None and finished is not None:
        return (finished - started).total_seconds()
    runtimes = run.curve("train_runtime")[1]
    return runtimes[-1] if runtimes and not run.record.get("resumed_from") else None


def duration(run: RunRecord) -> str:
    """How long the run took, `""` if it is not known."""
    seconds = seconds_of(run)
    if seconds is None:
        return ""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _time(value: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None


def _defaults() -> dict[str, Any]:
    from transformers.trainer_pt_utils import AcceleratorConfig

    from ...config import HeRAConfig

    values = {name: value for name, value in defaults_of(HeRAConfig).items() if value is not dataclasses.MISSING}
    values["accelerator_config"] = AcceleratorConfig().to_dict()
    return public_settings(values)


def names_in_order(config: Mapping[str, Any]) -> list[str]:
    """Names of settings, those that `HeRAConfig` adds to `SFTConfig` first, the others by name."""
    own = _of_alignment(config)
    return [*own, *sorted(set(config) - set(own))]


def teacher_of(run: RunRecord) -> str:
    """Name of the teacher, empty where there was none or it is not known."""
    if "teacher" in run.record:
        return run.record["teacher"] or ""
    teacher = next((ranking.teacher for ranking in rankings_of(run) if ranking.teacher), "")
    config = run.record.get("config") or {}
    if not teacher and config.get("alignment_weight"):
        teacher = config.get("teacher_model_name_or_path") or ""
    return teacher


def measured_with(ranking: HeadRanking, teacher: str) -> str:
    """What scores were measured with, such as `"k = 10, N = 1,000"`, and the teacher if it is another one.

    Args:
        ranking ([`HeadRanking`]): The scores.
        teacher (`str`): Name of the teacher that they are taken to be of, empty if none is named.
    """
    return ranking.scale + other_teacher(ranking, teacher)


def other_teacher(ranking: HeadRanking, teacher: str) -> str:
    """`", teacher X"` if scores are known to be of another teacher X than they are taken to be of, else empty. A
    monitor may have a teacher of its own.

    Args:
        ranking ([`HeadRanking`]): The scores.
        teacher (`str`): Name of the teacher that they are taken to be of, empty if none is named.
    """
    return f", teacher {ranking.teacher}" if ranking.teacher not in ("", teacher) else ""


def rankings_of(run: RunRecord) -> list[HeadRanking]:
    """All rankings that a run left, what was measured first."""
    found = [*(ranking for steps in run.monitored.values() for ranking in steps.values()), run.head_ranking]
    return [ranking for ranking in found if ranking is not None]


def _of_alignment(config: Mapping[str, Any]) -> list[str]:
    """The settings that `HeRAConfig` adds to those of `SFTConfig`."""
    from trl import SFTConfig

    from ...config import HeRAConfig

    inherited = {setting.name for setting in dataclasses.fields(SFTConfig)}
    return [s.name for s in dataclasses.fields(HeRAConfig) if s.name in config and s.name not in inherited]


def _is_default(name: str, value: Any, defaults: Mapping[str, Any], filled_in: Mapping[str, Any]) -> bool:
    if isinstance(value, str) and _PLACEHOLDER.fullmatch(value):
        return True
    if name in filled_in and value == filled_in[name]:
        return True
    default = defaults.get(name)
    if isinstance(value, Mapping) and isinstance(default, Mapping):  # some entries are left out when it is recorded
        return all(item == default.get(key) for key, item in value.items())
    return name in defaults and (value == default or str(value) == str(default))


def text_of(value: Any) -> str:
    """A setting as it is shown."""
    if value is None:
        return "None"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {text_of(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(text_of(item) for item in value)
    return str(value)
