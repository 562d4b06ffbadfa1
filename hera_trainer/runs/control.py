"""The mark of a control run, beside whatever it saves: nobody should take that for an aligned model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..common.files import write_atomically
from .written_files import CONTROL_FILE, RUN_FILE


def mark_control(folder: str | os.PathLike, control: str) -> None:
    """Marks what is saved in a folder as a control run's, or takes the mark of what was there before away.

    Args:
        folder (`str` or `os.PathLike`): Where a model or an adapter is saved.
        control (`str`): `teacher_control` of the run that saves it; `"none"` takes the mark away.
    """
    path = Path(folder, CONTROL_FILE)
    if control == "none":
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"teacher_control": control})
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_control(folder: str | os.PathLike) -> str:
    """`teacher_control` of the run that saved what a folder holds: `"none"` if it is no control run's.

    Args:
        folder (`str` or `os.PathLike`):
            The `output_dir` of a run, a checkpoint, a folder that `save_model` wrote, or in one of these the folder of
            a named adapter.
    """
    folder = Path(folder).expanduser().resolve()
    mark, record = folder / CONTROL_FILE, folder / RUN_FILE
    if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and not record.is_file():
        record = folder.parent / RUN_FILE
    if mark.is_file():
        return str(json.loads(mark.read_text())["teacher_control"])
    if not record.is_file() and _is_part(folder):
        return read_control(folder.parent)
    return control_in((json.loads(record.read_text()).get("config") or {}) if record.is_file() else {})


def _is_part(folder: Path) -> bool:
    """Whether a folder is that of a named adapter, in the folder of what was saved: none lies there itself."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder.parent / ADAPTER_CONFIG).is_file()


def other_control_advice(then: str, now: str) -> str:
    """What to say where a run goes on that had other vectors than it has now."""
    return (
        f"The checkpoint was trained with `teacher_control={then!r}`, this run goes on with {now!r}: its heads have "
        "followed other vectors than they follow now. To compare a run with its control, train each from the start."
    )


def control_in(config: Mapping[str, Any]) -> str:
    """`teacher_control` of a run with these settings: `"none"` where nothing is aligned, whatever is set."""
    return "none" if config.get("alignment_weight") == 0 else str(config.get("teacher_control") or "none")
