"""Files and folders that are either whole or not there, whenever a process dies."""

from __future__ import annotations

import glob
import itertools
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Writes a file under a name of its own and then renames it, so that neither a killed process nor several that
    write the same file leave half of one under its name.

    Args:
        path (`str` or `os.PathLike`): Where the file is to be.
        write (`Callable`): Writes it to the path that it is given, in the same folder.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` at the end, or vanishes after an error.

    A folder can't be renamed onto another one that holds files. So the old one is put aside under a hidden name, and
    goes only when the new one has its name. An error puts it back at once; after a kill, [`restore_folder`] does.

    Args:
        folder (`str` or `os.PathLike`): The folder to replace, which may also not exist.

    Yields:
        `Path`: The new folder, beside the old one.

    Raises:
        `OSError`: If the new folder can't be put in the place of the old one.
    """
    target = Path(folder).resolve()  # of a link, what it points to is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    restore_folder(target)
    new, old = (target.with_name(f".{target.name}.{uuid.uuid4().hex}.{part}") for part in ("new", "old"))
    try:
        new.mkdir()
        yield new
        try:
            if target.exists():
                os.replace(target, old)
            os.replace(new, target)
        except BaseException:
            restore_folder(target)
            raise
        for done_with in _put_aside(target):
            shutil.rmtree(done_with, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def restore_folder(folder: str | os.PathLike) -> None:
    """Puts back the folder that [`replacing_folder`] put aside, if its process died before the new one had its place.

    Args:
        folder (`str` or `os.PathLike`): The folder that was to be replaced.
    """
    target = Path(folder).resolve()
    waiting = _put_aside(target)
    if waiting and not target.exists():
        os.replace(max(waiting, key=lambda path: path.stat().st_mtime), target)


def _put_aside(target: Path) -> list[Path]:
    return list(target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 32}.old"))


def rename_with_number(path: Path) -> None:
    """Gives a file or folder the first free name with a number: `a.json` becomes `a.1.json`."""
    others = (path.with_suffix(f".{number}{path.suffix}") for number in itertools.count(1))
    path.rename(next(other for other in others if not other.exists()))
