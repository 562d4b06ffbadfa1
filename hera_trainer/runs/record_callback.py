"""Keeps the record of a run while it trains."""

from __future__ import annotations

import json
import os
import platform
import re
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .. import __version__
from ..common.files import write_atomically
from ..common.plain import as_plain
from ..common.redaction import public_name, public_settings
from ..heads.head import AlignedUnit
from ..heads.registry import unwrap_model
from .record import defaults_of, read_if_whole
from .written_files import RUN_FILE, written_by

_LIBRARIES = ("trl", "transformers", "torch", "peft", "datasets", "accelerate")

_SECONDS_BETWEEN_STATES = 30.0

_HUB_SOURCE = re.compile(r"hf://datasets/([^@]+?)@")


class RunRecordCallback(TrainerCallback):
    """Keeps, in a run's `output_dir`, what [`read_run`] reads: who trains what with which settings, written when
    training begins, and the trainer's state, so that a run that goes on or was killed can be looked at.
    """

    def __init__(self) -> None:
        self.seconds = _SECONDS_BETWEEN_STATES
        self.begin(None)
        self._record: dict[str, Any] = {}
        self._written = -float("inf")
        self._began = 0.0
        self._earlier_seconds: float | None = 0.0

    def begin(
        self,
        dataset: Any,
        aligned_heads: Sequence[AlignedUnit] = (),
        teacher: str | None = None,
        resumed_from: str | None = None,
    ) -> None:
        """Says what is about to be trained.

        Args:
            dataset: The training data.
            aligned_heads (sequence of [`AttentionHead`] or of [`DecoderLayer`], *optional*):
                The heads or layers that are aligned.
            teacher (`str`, *optional*): Name of the teacher.
            resumed_from (`str`, *optional*): Checkpoint from which training goes on.
        """
        self.dataset = dataset
        self.aligned_heads = aligned_heads
        self.teacher = teacher
        self.resumed_from = resumed_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        earlier = self._earlier()
        # What an earlier part took is not known of a run that began before it was counted.
        self._earlier_seconds = earlier.get("seconds") if self.resumed_from is not None else 0.0
        self._began = time.monotonic()
        self._record = {
            **describe_run(args, model, self.dataset, self.aligned_heads),
            "teacher": public_name(self.teacher) if self.teacher else None,
            "started": earlier.get("started") or _now(),
            "finished": None,
            "resumed_from": None if self.resumed_from is None else Path(self.resumed_from).name,
            "files": _files(model, kwargs.get("processing_class")),
        }
        if before := _changed(earlier, self._record["config"]):
            self._record["earlier_config"] = before
        self._write_record(args)
        self._write_state(args, state)
        self._written = -float("inf")  # the first step that is logged is not waited for

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._record and time.monotonic() - self._written >= self.seconds:
            self._write_state(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._record:  # never behind a checkpoint
            self._write_record(args)
            self._write_state(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._record:
            self._record["finished"] = _now()
            self._write_record(args)
            self._write_state(args, state)
            self._record = {}  # what a later `evaluate` logs is not of this run

    def _earlier(self) -> dict[str, Any]:
        """The record of the run that goes on, as far as there is one."""
        found = None if self.resumed_from is None else read_if_whole(Path(self.resumed_from).parent / RUN_FILE)
        return found or {}

    def _write_record(self, args: TrainingArguments) -> None:
        # Of training itself: a run that goes on may have lain dead for days.
        earlier = self._earlier_seconds
        self._record["seconds"] = None if earlier is None else round(earlier + time.monotonic() - self._began, 1)
        _write(Path(str(args.output_dir), RUN_FILE), json.dumps(self._record, indent=1))

    def _write_state(self, args: TrainingArguments, state: TrainerState) -> None:
        # As `TrainerState.save_to_json` writes it, but for the folder of this computer.
        best = state.best_model_checkpoint
        content = {**vars(state), "best_model_checkpoint": None if best is None else Path(best).name}
        text = json.dumps(content, indent=2, sort_keys=True, default=as_plain) + "\n"  # callbacks may log tensors
        _write(Path(str(args.output_dir), TRAINER_STATE_NAME), text)
        self._written = time.monotonic()


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


def describe_run(
    args: TrainingArguments, model: nn.Module, dataset: Any, aligned_heads: Sequence[AlignedUnit]
) -> dict[str, Any]:
    """What is known of a run before its first step, as JSON can hold it. Tokens and the folders of this computer are
    left out (see [`~common.redaction.public_settings`]).

    Args:
        args ([`~transformers.TrainingArguments`]): The settings.
        model (`nn.Module`): The model, an adapter on it or not.
        dataset: The training data.
        aligned_heads (sequence of [`AttentionHead`] or of [`DecoderLayer`]): The heads or layers that are aligned.
    """
    config = public_settings(args.to_dict())
    if "temperature" in config and config["temperature"] is None:  # so that the record says which it was
        config["temperature"] = args.initial_temperature  # type: ignore[attr-defined]
    return {
        "model": public_name(unwrap_model(model).config.name_or_path),
        "dataset": _dataset_name(dataset),
        "rows": len(dataset) if hasattr(dataset, "__len__") else None,
        "adapter": _adapter(model),
        "aligned_heads": [str(head) for head in aligned_heads],
        "config": config,
        "versions": {
            "hera-trainer": __version__,
            **{name: version(name) for name in _LIBRARIES},
            "python": platform.python_version(),
        },
        "hardware": _hardware(args),
    }


def _changed(earlier: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The settings that the parts of a run before it was resumed had otherwise, as they began; of those that are as at
    first again, what they were in between."""
    last, first = earlier.get("config") or {}, earlier.get("earlier_config") or {}
    changed = {name: value for name, value in last.items() if name in config and config[name] != value}
    return {**first, **changed, **{name: value for name, value in first.items() if config.get(name) != value}}


def hub_names(dataset: Any) -> list[str]:
    """Names on the Hub of what a data set, or each of a dictionary of them, was loaded from."""
    parts = dataset.values() if isinstance(dataset, dict) else [dataset]
    infos = (getattr(part, "info", None) for part in parts)
    sources = (source for info in infos if info is not None for source in info.download_checksums or ())
    found = map(_HUB_SOURCE.match, map(str, sources))
    return sorted({match[1] for match in found if match is not None})


def _dataset_name(dataset: Any) -> str | None:
    """The data set's name on the Hub, or that of its loading script; `None` if it has no name."""
    info = getattr(dataset, "info", None)
    if info is None:
        return None
    if names := hub_names(dataset):
        return names[0]
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
    always = ("peft_type", "r", "lora_alpha", "lora_dropout")
    settings = {name: (getattr(config, name), default) for name, default in defaults_of(type(config)).items()}
    return public_settings({n: value for n, (value, default) in settings.items() if value != default or n in always})


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
