"""Which checkpoints are complete. A process may die at any moment; at least one complete checkpoint stays on disk."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from .. import __version__
from ..common.files import write_atomically
from ..heads.ranking import HeadRanking
from .written_files import EARLIER_FOLDER, RUN_FILE

MARKER_FILE = "hera_complete"

# A complete checkpoint waits under the second name while another one of the same step is written.
_REPLACED = "replaced-"
_NAME = re.compile(rf"({_REPLACED})?{PREFIX_CHECKPOINT_DIR}-(\d+)")


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint has the marker that is written last."""
    return Path(checkpoint, MARKER_FILE).is_file()


def checkpoints_in(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints in a folder, complete or not, those that wait to be replaced among them."""
    folder = Path(output_dir)
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if _NAME.fullmatch(path.name) and path.is_dir()]


def put_aside(
    output_dir: str | os.PathLike, used: Collection[str | os.PathLike] = (), records: Collection[str] = ()
) -> None:
    """Moves the checkpoints of an earlier run, and what it has recorded, into a folder of their own. To be called where
    a run begins there that does not go on from them: it would take them for its own when it looks for the best of its
    steps, or is resumed.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the checkpoints.
        used (collection of `str`): Folders that stay: of the model that is trained.
        records (collection of `str`): Names of what the earlier run has recorded there, as far as it has.
    """
    output_dir = Path(output_dir)
    stays = {place for path in used for place in (Path(path).resolve(), *Path(path).resolve().parents)}
    found = [path for path in checkpoints_in(output_dir) if path.resolve() not in stays]
    is_run = bool(found) or (output_dir / RUN_FILE).is_file()  # a log alone may be of any trainer
    recorded = [path for path in (output_dir / name for name in records) if is_run and path.exists()]
    if not found and not recorded:
        return
    names = (EARLIER_FOLDER if number == 1 else f"{EARLIER_FOLDER}-{number}" for number in itertools.count(1))
    aside = next(path for path in (output_dir / name for name in names) if not path.exists())
    newest = max(found, key=lambda path: (is_complete(path), *_place(path)), default=None)
    aside.mkdir()
    for path in (*found, *recorded):
        _move(path, aside / path.name)
    if newest is not None:
        shown = ", ".join(sorted(path.name for path in found))
        warnings.warn(
            f"{str(output_dir)!r} holds checkpoints of an earlier run ({shown}), which this one does not go on from. "
            f"They lie in its folder `{aside.name}` now, with what that run has recorded, until you delete it. To go "
            f"on with one, set `resume_from_checkpoint={str(aside / newest.name)!r}`.",
            stacklevel=4,
        )


def _place(checkpoint: Path) -> tuple[int, bool]:
    """Its step, and whether it has its own name: the greater, the newer."""
    name = _NAME.fullmatch(checkpoint.name)
    assert name is not None
    return int(name[2]), name[1] is None


def _move(path: Path, target: Path) -> None:
    if path.is_symlink():  # a relative one would lead elsewhere from there
        target.symlink_to(path.resolve())
        path.unlink()
    else:
        os.replace(path, target)


def is_own(checkpoint: str | os.PathLike | None, output_dir: str | os.PathLike) -> bool:
    """Whether a run that goes on from a checkpoint goes on in the folder where it was saved."""
    return checkpoint is not None and Path(checkpoint).resolve().parent == Path(output_dir).resolve()


def best_checkpoint(checkpoint: str | os.PathLike | None) -> str | None:
    """The best checkpoint of the run that saved `checkpoint`, as far as it is there. It lies beside it, also where both
    were moved; where it was saved, another run may have saved another one since.

    Args:
        checkpoint (`str` or `os.PathLike`, *optional*): The checkpoint.
    """
    state = _saved_state(checkpoint)
    if checkpoint is None or state is None or state.best_model_checkpoint is None:
        return None
    saved, beside = Path(state.best_model_checkpoint), Path(checkpoint).parent
    for path in (beside / saved.name, beside / f"{_REPLACED}{saved.name}", saved):
        then = _state_if_whole(path)
        # As text: a NaN in a log equals no other.
        if then is not None and str(then.log_history) == str(state.log_history[: len(then.log_history)]):
            return str(path)
    return None


def clear_half(checkpoint: Path) -> None:
    """Removes what a killed run has left in the place of a complete checkpoint that waits to be replaced, from which
    training goes on. `Trainer` would take it for the best one, if that was.

    Args:
        checkpoint (`Path`): Folder of the complete checkpoint.
    """
    half = checkpoint.with_name(checkpoint.name.removeprefix(_REPLACED))
    if half != checkpoint and not is_complete(half):
        _remove(half)


def make_room(checkpoint: Path) -> None:
    """Clears the place of a checkpoint that is about to be written. What a killed run left there goes; a complete
    checkpoint is put aside until `mark_complete`, and so is one with the trainer's state but no marker, which may be a
    whole one of `SFTTrainer`, unless it would take the place of a complete one.

    `Trainer` writes the new one under its name, bit by bit, so [`~common.files.replacing_folder`] does not fit here.

    Args:
        checkpoint (`Path`): Folder of the checkpoint.
    """
    aside = checkpoint.with_name(_REPLACED + checkpoint.name)
    if is_complete(checkpoint) or (Path(checkpoint, TRAINER_STATE_NAME).is_file() and not is_complete(aside)):
        _remove(aside)
        os.replace(checkpoint, aside)
    else:
        _remove(checkpoint)


def mark_complete(checkpoint: Path, step: int) -> None:
    """Writes the marker into a checkpoint in which everything else is written.

    Args:
        checkpoint (`Path`): Folder of the checkpoint.
        step (`int`): Its optimizer step.
    """
    content = json.dumps({"step": step, "hera_trainer": __version__})
    write_atomically(checkpoint / MARKER_FILE, lambda path: path.write_text(content))
    _remove(checkpoint.with_name(_REPLACED + checkpoint.name))


def rotate(output_dir: str | os.PathLike, limit: int | None, keep: Collection[Path]) -> None:
    """`transformers.trainer_utils.rotate_checkpoints`, but incomplete checkpoints go before complete ones, and it is
    told what to keep instead of guessing the newest from times. To be called when the new checkpoint is complete.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the checkpoints.
        limit (`int` or `None`): Most checkpoints to leave; `None` or 0 for all.
        keep (collection of `Path`): Checkpoints that stay in any case.
    """
    if not limit or limit < 0:
        return
    checkpoints = [Path(path) for path in sort_checkpoints(str(output_dir), use_mtime=True)]
    others = [path for path in checkpoints if path not in keep]
    others.sort(key=is_complete)  # stable: the oldest first among both kinds
    for path in others[: max(0, len(checkpoints) - max(limit, sum(path in keep for path in checkpoints)))]:
        _remove(path)


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint, its marker first: half of one must not look complete."""
    (checkpoint / MARKER_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def find_checkpoint(resume_from: str | os.PathLike | bool | None, output_dir: str | os.PathLike) -> str | None:
    """The checkpoint that `train(resume_from_checkpoint=...)` means.

    Args:
        resume_from (`str`, `bool` or `None`): Folder of a checkpoint; `True` for the newest complete one.
        output_dir (`str`): Where `True` looks for one.

    Returns:
        `str` or `None`: Its folder. Warns if newer checkpoints are passed over because their writing was interrupted,
        or if a named one has no marker.

    Raises:
        `ValueError`: If there is no complete checkpoint, a named one lacks the trainer's state, or it is the folder of
            the whole run.
    """
    if not resume_from:
        return None
    if resume_from is True:
        return _newest_complete(Path(output_dir))
    if Path(resume_from, RUN_FILE).is_file():
        raise ValueError(
            f"{str(resume_from)!r} is the output folder of a run, not a checkpoint. Name one of the checkpoints in it, "
            "or set `output_dir` to it and `resume_from_checkpoint=True` to take the newest complete one."
        )
    if not Path(resume_from, TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"The checkpoint {str(resume_from)!r} has no `{TRAINER_STATE_NAME}`, so it is not there or its writing was "
            "interrupted. Name an earlier one, or set `resume_from_checkpoint=True` to take the newest complete one."
        )
    if not is_complete(resume_from):
        warnings.warn(
            f"The checkpoint {str(resume_from)!r} has no `{MARKER_FILE}`: SFTTrainer wrote it, or its writing was "
            "interrupted at the very end.",
            stacklevel=3,
        )
    return str(resume_from)


def _newest_complete(output_dir: Path) -> str:
    checkpoints = sorted(checkpoints_in(output_dir), key=_place, reverse=True)
    if not checkpoints:
        raise ValueError(
            f"No valid checkpoint found in output directory ({output_dir}). Train without `resume_from_checkpoint`."
        )
    complete = next((path for path in checkpoints if is_complete(path)), None)
    newer = checkpoints if complete is None else checkpoints[: checkpoints.index(complete)]
    names = ", ".join(path.name for path in newer)
    if complete is None:
        raise ValueError(
            f"No checkpoint in {str(output_dir)!r} is complete: {names} have no `{MARKER_FILE}`. Train without "
            "`resume_from_checkpoint` (teacher vectors and ranking are cached), or name a checkpoint of SFTTrainer."
        )
    if newer:
        warnings.warn(
            f"Resuming from {complete.name}: the writing of {names} was interrupted (no `{MARKER_FILE}`).",
            stacklevel=4,
        )
    return str(complete)


def checkpoint_ranking(checkpoint: str | os.PathLike | None, file_name: str) -> HeadRanking | None:
    """The ranking that a checkpoint carries, if it carries one."""
    path = None if checkpoint is None else Path(checkpoint, file_name)
    return HeadRanking.load(path) if path is not None and path.is_file() else None


def saved_step(checkpoint: str | os.PathLike | None) -> int:
    """The step at which a checkpoint was saved; -1 if there is none, or that is not known."""
    state = _saved_state(checkpoint)
    return -1 if state is None else state.global_step


def place_in_stream(checkpoint: str | os.PathLike | None, accumulation: int) -> tuple[int, int] | None:
    """How often a run had gone through its stream when it saved a checkpoint, and how many micro-batches it had taken
    of the pass under way. `None` if there is no checkpoint, or that is not known.

    `Trainer` itself takes all passes through a stream for one when it resumes, and would begin the stream anew where a
    checkpoint is of a later one.

    Args:
        checkpoint (`str` or `os.PathLike`, *optional*): The checkpoint.
        accumulation (`int`): Micro-batches of an optimizer step.
    """
    state = _saved_state(checkpoint)
    if state is None or not state.max_steps:
        return None
    # An "epoch" of a stream is a pass through it, and all steps of the run its whole length.
    length = state.max_steps * accumulation
    passes, taken = divmod(round((state.epoch or 0.0) * length), length)
    return (passes, taken) if taken or not passes else (passes - 1, length)


def _state_if_whole(checkpoint: Path) -> TrainerState | None:
    try:
        return _saved_state(checkpoint)
    except ValueError:  # a killed run may have left half of one
        return None


def _saved_state(checkpoint: str | os.PathLike | None) -> TrainerState | None:
    path = None if checkpoint is None else Path(checkpoint, TRAINER_STATE_NAME)
    return TrainerState.load_from_json(str(path)) if path is not None and path.is_file() else None
