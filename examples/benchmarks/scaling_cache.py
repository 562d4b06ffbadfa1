"""Simulated caches of teacher vectors, up to ten million rows, and what it costs to attach and to read them.

A part of `scaling.py`. The data set is an Arrow file in which every row holds the same small PNG, the cache an entry
of random vectors, written by the library's own writer: both are memory-mapped, and attaching reads no image.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from teacher import tiny_pngs

from hera_trainer import add_teacher_features
from hera_trainer.teacher.cache import Entry
from hera_trainer.teacher.images import ImageColumn
from hera_trainer.teacher.vectors import TEACHER_COLUMN

# Narrower than any real teacher, so that ten million vectors fit on a disk.
WIDTH = 32
READS = 1000


class Simulated:
    """What the writer of an entry asks for: rows of random vectors, one image each."""

    def __init__(self, rows: int) -> None:
        self.counts = np.ones(rows, dtype=np.int64)

    def row_batches(self, vectors: np.ndarray) -> Iterator[pa.ListArray]:
        values = np.random.default_rng(0).standard_normal((1024, WIDTH), dtype=np.float32)
        for start in range(0, len(self.counts), len(values)):
            rows = min(len(values), len(self.counts) - start)
            offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * WIDTH)
            yield pa.ListArray.from_arrays(offsets, pa.array(values[:rows].ravel()))


class NamedTeacher:
    """A teacher of which only the name is asked, since all vectors are there."""

    identity = "simulated"


def build(folder: Path, rows: int) -> None:
    """Writes the data set and its cache to a folder."""
    image = {"bytes": tiny_pngs(1)[0], "path": None}
    batch = pa.record_batch({"image": pa.array([image] * 1000, datasets.Image.pa_type)})
    with pa.ipc.new_stream(str(folder / "data.arrow"), batch.schema) as stream:
        for start in range(0, rows, 1000):
            stream.write_batch(batch.slice(0, min(1000, rows - start)))
    key = hashlib.sha256(str(rows).encode()).hexdigest()
    images: Any = Simulated(rows)
    Entry(folder, key, rows).save(images, np.empty((0, WIDTH), dtype=np.float32))
    fast_key = ImageColumn(_load(folder)).fast_key(NamedTeacher.identity)
    (folder / f"{fast_key}.key").write_text(key)


def _load(folder: Path) -> datasets.Dataset:
    info = datasets.DatasetInfo(features=datasets.Features({"image": datasets.Image()}))
    return datasets.Dataset.from_file(str(folder / "data.arrow"), info=info)


def _anonymous() -> float:
    """MB of memory of its own that this process holds: without the pages of memory-mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) / 1000


def measure(folder: Path, runs: int) -> dict[str, list[float]]:
    """What this process needs for `runs` times attaching the vectors and reading some of them, in any order.

    Returns:
        `dict` of lists: `attach` (seconds), `read` (microseconds a row) and `memory` (MB).
    """
    dataset = _load(folder)
    teacher: Any = NamedTeacher()
    places = np.random.default_rng(0).integers(0, len(dataset), READS).tolist()
    found: dict[str, list[float]] = {"attach": [], "read": [], "memory": []}
    gc.collect()
    before = _anonymous()
    for _ in range(runs):
        start = time.perf_counter()
        result = add_teacher_features(dataset, teacher, cache_dir=folder)
        found["attach"].append(time.perf_counter() - start)
        vectors = result.select_columns([TEACHER_COLUMN]).with_format("numpy")
        start = time.perf_counter()
        width = sum(len(vectors[place][TEACHER_COLUMN]) for place in places)
        found["read"].append((time.perf_counter() - start) / READS * 1e6)
        if width != READS * WIDTH:
            raise AssertionError("The rows read are not those that were cached.")
        found["memory"].append(max(_anonymous() - before, 0.1))
    return found
