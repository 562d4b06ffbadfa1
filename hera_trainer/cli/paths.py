"""What a name on the command line may mean: a path here, or something on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

# Endings of data files, and the builders of `datasets` that read them.
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def data_files(folder: Path) -> list[Path]:
    """The files in a folder that may hold data, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix in FILE_FORMATS)


def local_path(path: str | os.PathLike) -> str:
    """A path as it is opened, or a name on the Hub as it is.

    Raises:
        `FileNotFoundError`: If it can only be a path, and nothing is there.
    """
    text = os.path.expanduser(os.fspath(path))
    looks_local = text.startswith((".", os.sep)) or text.count("/") > 1 or Path(text).suffix in FILE_FORMATS
    if looks_local and not os.path.exists(text):
        raise FileNotFoundError(f"There is no file or folder {text!r} (looked for in {os.getcwd()}).")
    return text
