"""Files that are either whole or not there, whenever a process dies."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
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
