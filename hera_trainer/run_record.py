"""What a run leaves in its output folder for those who look at it later: a report, a model card, a plot."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoints import RANKING_FILE
from .completion import RUN_FILE
from .files import write_atomically
from .heads.head import AttentionHead
from .heads.ranking import HeadRanking
from .heads.registry import unwrap_model
from .published_files import MONITOR_FOLDER, written_by
from .redaction import public_name, public_settings
from .version import __version__

CONTEXTS = ("text", "image")

_LIBRARIES = ("trl", "transformers", "torch", "peft", "datasets", "accelerate")
_SECONDS_BETWEEN_STATES = 30.0
_HUB_SOURCE = re.compile(r"hf://datasets/([^@/]+/[^@/]+)")
_MEASUREMENT = re.compile(r"step-(\d+)-(text|image)\.json")


@dataclass
class RunRecord:
    """What a training run left behind.

    Args:
        path (`Path`): The run's folder.
        record (`dict[str, Any]`):
            Content of `hera_run.json`: `model`, `dataset`, `adapter`, `aligned_heads`, `config`, `versions`,
            `hardware`, `started`, `finished`, `resumed_from`, `files` (what saving the result writes). Empty where
            there is no such file.
        log_history (`list[dict]`): What was logged, as `TrainerState.log_history` has it.
        head_ranking ([`HeadRanking`] or `None`): The ranking that the aligned heads were chosen from.
        monitored (`dict[str, dict[int, HeadRanking]]`):
            What [`AlignmentMonitorCallback`] measured: context (`"text"` or `"image"`), then step, ascending.
    """

    path: Path
    record: dict[str, Any]
    log_history: list[dict[str, Any]]
    head_ranking: HeadRanking | None = None
    monitored: dict[str, dict[int, HeadRanking]] = field(default_factory=dict)

    @property
    def aligned_heads(self) -> list[AttentionHead]:
        """The heads that were aligned, in the order of the run; empty if it is not known."""
        return [AttentionHead.parse(head) for head in self.record.get("aligned_heads") or ()]

    def before_after(self, context: str) -> tuple[HeadRanking, HeadRanking] | None:
        """The first and the last measurement in a context.

        Args:
            context (`str`): `"text"` or `"image"`.

        Returns:
            `tuple` of two [`HeadRanking`], or `None` if fewer than two steps were measured in this context.
        """
        steps = self.monitored.get(context, {})
        return (steps[min(steps)], steps[max(steps)]) if len(steps) > 1 else None

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a value was logged, and the values.

        Args:
            name (`str`): Key of `log_history`, such as `"alignment_loss"`.
        """
        points = {entry["step"]: entry[name] for entry in self.log_history if entry.get(name) is not None}
        return list(points), list(points.values())


def read_run(run_dir: str | os.PathLike) -> RunRecord:
    """Reads what a run, finished or not, left in its `output_dir`.

    Args:
        run_dir (`str` or `os.PathLike`): The run's `output_dir`, or one of its checkpoints.

    Returns:
        [`RunRecord`].

    Raises:
        `ValueError`: If nothing of a run is there, or a file of it cannot be read.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ValueError(f"{str(run_dir)!r} is not a folder. Name the `output_dir` of a training run.")
    run_file, ranking = folder / RUN_FILE, folder / RANKING_FILE
    state = _longest_state(folder)
    run = RunRecord(
        path=folder,
        record=_read_json(run_file) if run_file.is_file() else {},
        log_history=[] if state is None else state.get("log_history") or [],
        head_ranking=HeadRanking.load(ranking) if ranking.is_file() else None,
        monitored=_measurements(folder),
    )
    if state is None and not run.record and run.head_ranking is None and not run.monitored:
        raise ValueError(
            f"{str(run_dir)!r} holds no training run: there is neither `{RUN_FILE}` nor `{TRAINER_STATE_NAME}` in it. "
            "Name the `output_dir` of a run of HeRATrainer."
        )
    return run


def measurement_path(folder: str | os.PathLike, step: int, context: str) -> Path:
    """Where the measurement of a step is kept in a run's `output_dir`."""
    return Path(folder, MONITOR_FOLDER, f"step-{step:08d}-{context}.json")


def measurements(folder: str | os.PathLike) -> Iterator[tuple[int, str, Path]]:
    """Step, context and file of each measurement in a run's `output_dir`, by step."""
    for path in sorted(Path(folder, MONITOR_FOLDER).glob("step-*.json")):
        name = _MEASUREMENT.fullmatch(path.name)
        if name is not None:
            yield int(name[1]), name[2], path


def _measurements(folder: Path) -> dict[str, dict[int, HeadRanking]]:
    found: dict[str, dict[int, HeadRanking]] = {}
    for step, context, path in measurements(folder):
        found.setdefault(context, {})[step] = HeadRanking.load(path)
    return found


def _longest_state(folder: Path) -> dict[str, Any] | None:
    """The newest trainer state of the run: that of its folder, or that of a checkpoint which goes on from there.

    A checkpoint whose log does not begin with the folder's is of an earlier run into the same folder.
    """
    own = _read_if_whole(folder / TRAINER_STATE_NAME)
    found = [_read_if_whole(path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    states = [state for state in found if state is not None]
    if own is not None:
        log = own.get("log_history") or []
        states = [state for state in states if log and (state.get("log_history") or [])[: len(log)] == log]
        states.insert(0, own)
    return max(states, key=lambda state: state.get("global_step") or 0, default=None)


def _read_if_whole(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return _read_json(path)
    except ValueError as error:  # transformers writes its state in place: a killed run may leave half of one
        warnings.warn(f"{error} It is left out.", stacklevel=2)
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object.")
    return content


class RunRecordCallback(TrainerCallback):
    """Keeps, in a run's `output_dir`, what [`read_run`] reads: who trains what with which settings, written when
    training begins, and the trainer's state, so that a run that goes on or was killed can be looked at.

    Args:
        seconds (`float`, *optional*, defaults to `30.0`):
            Least time between two writings of the state while training goes on.
    """

    def __init__(self, seconds: float = _SECONDS_BETWEEN_STATES) -> None:
        self.seconds = seconds
        self.dataset: Any = None
        self.aligned_heads: Sequence[AttentionHead] = ()
        self.teacher: str | None = None
        self.resumed_from: str | None = None
        self._record: dict[str, Any] = {}
        self._written = -float("inf")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._record = {
            **describe_run(args, model, self.dataset, self.aligned_heads),
            "teacher": public_name(self.teacher) if self.teacher else None,
            "started": self._started(args),
            "finished": None,
            "resumed_from": None if self.resumed_from is None else Path(self.resumed_from).name,
            "files": _files(model, kwargs.get("processing_class")),
        }
        self._write_record(args)
        self._write_state(args, state)
        self._written = -float("inf")  # the first step that is logged is not waited for

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._record and time.monotonic() - self._written >= self.seconds:
            self._write_state(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._record:  # never behind a checkpoint
            self._write_state(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._record:
            self._record["finished"] = _now()
            self._write_record(args)
            self._write_state(args, state)
            self._record = {}  # what a later `evaluate` logs is not of this run

    def _started(self, args: TrainingArguments) -> str:
        earlier = None if self.resumed_from is None else _read_if_whole(Path(str(args.output_dir), RUN_FILE))
        return (earlier or {}).get("started") or _now()

    def _write_record(self, args: TrainingArguments) -> None:
        _write(Path(str(args.output_dir), RUN_FILE), json.dumps(self._record, indent=1))

    def _write_state(self, args: TrainingArguments, state: TrainerState) -> None:
        # As `TrainerState.save_to_json` writes it, but for the folder of this computer.
        best = state.best_model_checkpoint
        content = {**vars(state), "best_model_checkpoint": None if best is None else Path(best).name}
        text = json.dumps(content, indent=2, sort_keys=True, default=_plain) + "\n"
        _write(Path(str(args.output_dir), TRAINER_STATE_NAME), text)
        self._written = time.monotonic()


def _plain(value: Any) -> Any:
    """What JSON does not know, as it does: a callback of the user's may log tensors and NumPy's numbers."""
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    return str(value)


def _files(model: nn.Module, processor: Any) -> list[str] | None:
    try:
        return written_by(model, processor)
    except OSError as error:  # there is no room for temporary files
        warnings.warn(f"The files of this run could not be recorded ({error}). Training goes on.", stacklevel=3)
        return None


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_text(text))
    except OSError as error:  # a full disk, a file system that is away: no reason to end a run
        warnings.warn(f"The record of this run could not be written ({error}). Training goes on.", stacklevel=2)


def forget_measurements(folder: str | os.PathLike, after: int) -> None:
    """Removes the measurements of later steps than `after`, which an earlier run left in its `output_dir`.

    Args:
        folder (`str` or `os.PathLike`): The run's `output_dir`.
        after (`int`): The step from which training goes on; -1 for a new run.
    """
    for step, _, path in list(measurements(folder)):
        if step > after:
            path.unlink(missing_ok=True)


def describe_run(
    args: TrainingArguments, model: nn.Module, dataset: Any, aligned_heads: Sequence[AttentionHead]
) -> dict[str, Any]:
    """What is known of a run before its first step, as JSON can hold it. Tokens and the folders of this computer are
    left out (see [`~redaction.public_settings`]).

    Args:
        args ([`~transformers.TrainingArguments`]): The settings.
        model (`nn.Module`): The model, an adapter on it or not.
        dataset: The training data.
        aligned_heads (sequence of [`AttentionHead`]): The heads that are aligned.
    """
    return {
        "model": public_name(unwrap_model(model).config.name_or_path),
        "dataset": _dataset_name(dataset),
        "adapter": _adapter(model),
        "aligned_heads": [str(head) for head in aligned_heads],
        "config": public_settings(args.to_dict()),
        "versions": {
            "hera-trainer": __version__,
            **{name: version(name) for name in _LIBRARIES},
            "python": platform.python_version(),
        },
        "hardware": _hardware(args),
    }


def _dataset_name(dataset: Any) -> str | None:
    """The data set's name on the Hub, or that of its loading script; `None` if it has no name."""
    info = getattr(dataset, "info", None)
    if info is None:
        return None
    for source in info.download_checksums or ():
        found = _HUB_SOURCE.match(str(source))
        if found is not None:
            return found[1]
    name = info.dataset_name or info.builder_name
    unnamed = name in (None, "generator", "parquet", "json", "csv", "imagefolder", "arrow")
    return None if unnamed else public_name(name)


def _adapter(model: nn.Module) -> dict[str, Any] | None:
    """The active adapter's settings that are not PEFT's defaults, and those that everyone asks for."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    name = next(iter(configs))
    active = getattr(model, "active_adapter", name)
    config = configs.get(active if isinstance(active, str) else name, configs[name])
    summary: dict[str, Any] = {}
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        default = setting.default
        if setting.default_factory is not dataclasses.MISSING:
            default = setting.default_factory()
        if value != default or setting.name in ("peft_type", "r", "lora_alpha", "lora_dropout"):
            summary[setting.name] = value
    return public_settings(summary)


def _hardware(args: TrainingArguments) -> dict[str, Any]:
    hardware: dict[str, Any] = {"processes": args.world_size, "cpu_cores": os.cpu_count(), "accelerator": None}
    if args.device.type == "cuda":
        properties = torch.cuda.get_device_properties(args.device)
        hardware["accelerator"] = properties.name
        hardware["accelerator_memory_gib"] = round(properties.total_memory / 2**30, 1)
    elif args.device.type != "cpu":
        hardware["accelerator"] = args.device.type
    return hardware


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
