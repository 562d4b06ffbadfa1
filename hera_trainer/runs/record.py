"""What a run leaves in its output folder for those who look at it later: a report, a model card, a plot."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..common.files import rename_with_number, write_atomically
from ..common.redaction import public_name
from ..evaluation.image_gain import ImageGain
from ..heads.head import AlignedUnit, parse_unit
from ..heads.ranking import HeadRanking
from .written_files import MONITOR_FOLDER, RANKING_FILE, RUN_FILE

CONTEXTS = {"text": "text only", "image": "image in context"}  # and how they are called

_MEASUREMENT = re.compile(r"step-(\d+)-(text|image|gain)\.json")


@dataclass
class RunRecord:
    """What a training run left behind.

    Args:
        path (`Path`): The run's folder.
        record (`dict[str, Any]`):
            Content of `hera_run.json`: `model`, `dataset`, `rows` (of the training data), `adapter`, `aligned_heads`,
            `config`, `earlier_config` (what of it was another setting before the run was resumed, if any was),
            `versions`, `hardware`, `started`, `finished`, `seconds` (of training, so far), `resumed_from`,
            `files` (what saving the result writes). Empty where there is no such file.
        log_history (`list[dict]`): What was logged, as `TrainerState.log_history` has it.
        head_ranking ([`HeadRanking`] or `None`): The ranking that the aligned heads were chosen from.
        monitored (`dict[str, dict[int, HeadRanking]]`):
            What [`AlignmentMonitorCallback`] measured: context (`"text"` or `"image"`), then step, ascending.
        image_gains (`dict[int, ImageGain]`):
            Step, ascending, and by how much the held-out loss rose there when the images were permuted.
        best_step (`int`, *optional*):
            Step of the weights, where training ended with loading the best ones (`load_best_model_at_end`).
    """

    path: Path
    record: dict[str, Any]
    log_history: list[dict[str, Any]]
    head_ranking: HeadRanking | None = None
    monitored: dict[str, dict[int, HeadRanking]] = field(default_factory=dict)
    image_gains: dict[int, ImageGain] = field(default_factory=dict)
    best_step: int | None = None

    @property
    def aligned_heads(self) -> list[AlignedUnit]:
        """The heads or layers that were aligned, in the order of the run; empty if it is not known."""
        return [parse_unit(name) for name in self.record.get("aligned_heads") or ()]

    def leads_to_result(self, step: int) -> bool:
        """Whether the run's weights come from those of a step: they do not where better ones of before were loaded."""
        return self.best_step is None or step <= self.best_step

    def measured_steps(self, context: str) -> list[int]:
        """The steps, ascending, of the measurements in a context that lead to the run's weights.

        Args:
            context (`str`): `"text"` or `"image"`.
        """
        return [step for step in self.monitored.get(context, {}) if self.leads_to_result(step)]

    def before_after(self, context: str) -> tuple[HeadRanking, HeadRanking] | None:
        """The first and the last measurement in a context, without those of weights that were given up for better ones.

        Args:
            context (`str`): `"text"` or `"image"`.

        Returns:
            `tuple` of two [`HeadRanking`], or `None` if fewer than two such steps were measured in this context, or
            their scores are of different scales ([`HeadRanking.scale`]) or teachers.
        """
        steps = self.measured_steps(context)
        if len(steps) < 2:
            return None
        before, after = (self.monitored[context][step] for step in (steps[0], steps[-1]))
        return (before, after) if (before.scale, before.teacher) == (after.scale, after.teacher) else None

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
    record = _read_json(run_file) if run_file.is_file() else {}
    run = RunRecord(
        path=folder,
        record=record,
        log_history=[] if state is None else state.get("log_history") or [],
        head_ranking=HeadRanking.load(ranking) if ranking.is_file() else None,
        monitored=read_rankings(folder),
        image_gains=read_image_gains(folder),
        best_step=_best_step(record, state),
    )
    if state is None and not run.record and run.head_ranking is None and not run.monitored:
        raise ValueError(
            f"{str(run_dir)!r} holds no training run: there is neither `{RUN_FILE}` nor `{TRAINER_STATE_NAME}` in it. "
            "Name the `output_dir` of a run of HeRATrainer."
        )
    return run


def _best_step(record: dict[str, Any], state: dict[str, Any] | None) -> int | None:
    """The step of the weights that a finished run has loaded in the end, if it has loaded any."""
    loads = record.get("finished") and (record.get("config") or {}).get("load_best_model_at_end")
    # Not `best_global_step`: a better step need not have been saved.
    found = re.search(r"-(\d+)$", state.get("best_model_checkpoint") or "") if loads and state is not None else None
    return None if found is None else int(found[1])


def other_heads_advice(folder: str, heads: Sequence[AlignedUnit], objective_folder: str | None = None) -> str | None:
    """What to say where a run in the folder has aligned other heads than are about to be measured, or the same ones by
    an objective whose parameters it has trained, too.

    Args:
        folder (`str`): The run's `output_dir`.
        heads (sequence of [`AttentionHead`] or [`DecoderLayer`]): What is about to be measured.
        objective_folder (`str`, *optional*):
            Where in the folder what an objective has learned is saved, if it learns something.
    """
    path = Path(folder, RUN_FILE)
    trained = (_read_json(path) if path.is_file() else {}).get("aligned_heads") or []
    if not trained:
        return None
    if set(trained) == set(map(str, heads)):
        if objective_folder is None:
            return None
        saved = Path(folder, objective_folder).is_dir()
        where = f"taken by `trainer.alignment.load_objective({folder!r})`" if saved else "in its checkpoints alone"
        return (
            "The alignment loss is measured with the objective's parameters (such as the temperature) that a run "
            f"begins with, not with those that the run in {folder!r} has trained; they are {where}."
        )
    return (
        f"The alignment loss is measured at the heads {' '.join(map(str, heads))}, chosen now, while the run in "
        f"{folder!r} has aligned {' '.join(trained)}. To measure these, set `aligned_heads` or `head_ranking_path`."
    )


def measurement_path(folder: str | os.PathLike, step: int, kind: str) -> Path:
    """Where a measurement of a step is kept in a run's `output_dir`: the ranking of a context, or `"gain"`."""
    return Path(folder, MONITOR_FOLDER, f"step-{step:08d}-{kind}.json")


def measurements(folder: str | os.PathLike) -> Iterator[tuple[int, str, Path]]:
    """Step, kind (see [`measurement_path`]) and file of each measurement in a run's `output_dir`, by step."""
    for path in sorted(Path(folder, MONITOR_FOLDER).glob("step-*.json")):
        name = _MEASUREMENT.fullmatch(path.name)
        if name is not None:
            yield int(name[1]), name[2], path


def read_rankings(folder: str | os.PathLike) -> dict[str, dict[int, HeadRanking]]:
    """The `monitored` of [`RunRecord`] in a run's `output_dir`."""
    found: dict[str, dict[int, HeadRanking]] = {context: {} for context in CONTEXTS}
    for step, kind, path in measurements(folder):
        if kind in CONTEXTS:
            found[kind][step] = HeadRanking.load(path)
    return {context: steps for context, steps in found.items() if steps}


def read_image_gains(folder: str | os.PathLike) -> dict[int, ImageGain]:
    """The `image_gains` of [`RunRecord`] in a run's `output_dir`."""
    return {step: ImageGain.load(path) for step, kind, path in measurements(folder) if kind == "gain"}


def _longest_state(folder: Path) -> dict[str, Any] | None:
    """The newest trainer state of the run: that of its folder, or that of a checkpoint which goes on from there.

    A checkpoint whose log does not begin with the folder's is of an earlier run into the same folder.
    """
    own = read_if_whole(folder / TRAINER_STATE_NAME)
    found = [read_if_whole(path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    states = [state for state in found if state is not None]
    if own is not None:
        log = own.get("log_history") or []
        states = [state for state in states if log and (state.get("log_history") or [])[: len(log)] == log]
        states.insert(0, own)
    return max(states, key=lambda state: state.get("global_step") or 0, default=None)


def read_if_whole(path: Path) -> dict[str, Any] | None:
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


def defaults_of(config_class: type) -> dict[str, Any]:
    """The defaults of a dataclass, `dataclasses.MISSING` for a field without one."""
    return {s.name: s.default if s.default_factory is MISSING else s.default_factory() for s in fields(config_class)}


def forget_measurements(folder: str | os.PathLike, after: int) -> None:
    """Removes the measurements of later steps than `after`, which the run made before it went back to that step.

    Args:
        folder (`str` or `os.PathLike`): The run's `output_dir`.
        after (`int`): The step from which training goes on.
    """
    for step, _, path in list(measurements(folder)):
        if step > after:
            path.unlink(missing_ok=True)


def go_on_with_measurements(folder: str | os.PathLike, checkpoint: str | os.PathLike | None, step: int) -> None:
    """Leaves in a run's `output_dir` the measurements that led to the checkpoint from which it goes on, and no others.
    They are those of the run that wrote it, which may be in another folder. An earlier run's get another name.

    Args:
        folder (`str` or `os.PathLike`): The run's `output_dir`.
        checkpoint (`str` or `os.PathLike`, *optional*): The checkpoint; `None` for a new run.
        step (`int`): The step at which it was saved; -1 for a new run.
    """
    source = None if checkpoint is None else Path(checkpoint).parent
    if source is not None and source.resolve() == Path(folder).resolve():
        forget_measurements(folder, after=step)
        return
    leave_out(folder, [MONITOR_FOLDER])
    for measured, kind, path in () if source is None else measurements(source):
        if measured <= step:
            target = measurement_path(folder, measured, kind)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, partial(shutil.copyfile, path))


def leave_out(folder: str | os.PathLike, names: Sequence[str]) -> None:
    """Gives files and folders in a run's `output_dir` other names, under which they are no part of the run. To be
    called for what an earlier run, or the user, has left there and this run does not replace.

    Args:
        folder (`str` or `os.PathLike`): The run's `output_dir`.
        names (sequence of `str`): Their names.
    """
    for path in (Path(folder, name) for name in names):
        if path.exists():
            rename_with_number(path)


def public_ranking(ranking: HeadRanking) -> HeadRanking:
    """A ranking as others may read it: of folders of this computer, it names the last part only."""
    return replace(
        ranking,
        model=public_name(ranking.model),
        teacher=public_name(ranking.teacher),
        ceiling_model=public_name(ranking.ceiling_model),
    )
