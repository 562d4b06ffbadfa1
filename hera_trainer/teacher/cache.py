"""The cache of teacher vectors on disk: finished columns, and the chunks of runs that have not finished."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..common.files import write_atomically
from .column import TEACHER_COLUMN, check_teacher_features
from .images import Images

_METADATA_KEY = b"hera_trainer"


@dataclass
class Entry:
    """The cached vectors of one column by one teacher: one Arrow file, and the chunks of a run that has not finished.

    Every file is written under a name of its own and then renamed, so processes that work at the same time never see,
    or write into, each other's unfinished files.
    """

    directory: Path
    key: str
    num_rows: int

    @property
    def path(self) -> Path:
        return self.directory / f"{self.key}.arrow"

    def load(self) -> datasets.Dataset | None:
        """The finished column, memory-mapped; None if there is none. A faulty file is reported and removed."""
        if not self.path.exists():
            return None
        try:
            with pa.memory_map(str(self.path)) as file:
                metadata = json.loads((pa.ipc.open_stream(file).schema.metadata or {})[_METADATA_KEY])
            stored = datasets.Dataset.from_file(str(self.path))
            if metadata["key"] != self.key or len(stored) != self.num_rows:
                raise ValueError(f"it has {len(stored)} rows of entry {metadata['key']}")
            column = stored.data.column(TEACHER_COLUMN)
            if (check_teacher_features(stored), column.null_count) != (metadata["width"], metadata["nulls"]):
                raise ValueError("its vectors are not those that were written")
        except (OSError, ValueError, KeyError) as error:
            discard(self.path, error)
            return None
        return stored

    def save(self, images: Images, vectors: np.ndarray) -> None:
        metadata = {"key": self.key, "width": vectors.shape[1], "nulls": int((images.counts == 0).sum())}
        field = pa.field(TEACHER_COLUMN, pa.list_(pa.float32()))
        schema = pa.schema([field], metadata={_METADATA_KEY: json.dumps(metadata)})

        def write(path: Path) -> None:
            with pa.ipc.new_stream(str(path), schema) as stream:
                for rows in images.row_batches(vectors):
                    stream.write_batch(pa.record_batch([rows.cast(field.type)], schema=schema))

        write_atomically(self.path, write)
        for chunk in self.directory.glob(f"{self.key}-*.safetensors"):
            chunk.unlink(missing_ok=True)

    def _chunk_path(self, start: int, stop: int) -> Path:
        return self.directory / f"{self.key}-{start}-{stop}.safetensors"

    def has_chunk(self, start: int, stop: int) -> bool:
        return self._chunk_path(start, stop).exists()

    def load_chunk(self, start: int, stop: int) -> np.ndarray | None:
        path = self._chunk_path(start, stop)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                vectors = file.get_tensor("vectors")
                if (file.metadata() or {}).get("key") != self.key or len(vectors) != stop - start:
                    raise ValueError("it belongs to another entry")
            if not np.isfinite(vectors).all():
                raise ValueError("it holds NaN or infinity")
        except (OSError, ValueError, SafetensorError) as error:
            discard(path, error)
            return None
        return vectors

    def save_chunk(self, start: int, stop: int, vectors: np.ndarray) -> None:
        content = {"vectors": np.ascontiguousarray(vectors)}
        write_atomically(self._chunk_path(start, stop), lambda path: save_file(content, path, {"key": self.key}))


def discard(path: Path, error: Exception) -> None:
    warnings.warn(f"The cached teacher vectors in {path} are not usable ({error}); computing them again.", stacklevel=2)
    path.unlink(missing_ok=True)


def is_key(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None
