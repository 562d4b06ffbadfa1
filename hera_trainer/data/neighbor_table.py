"""The teacher's nearest neighbours in a whole data set: looked for once, and cached on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from datasets import Dataset

from ..common.files import write_atomically
from ..common.processes import Team
from ..objectives.metrics import nearest_neighbors
from ..objectives.similarity import comparison
from ..teacher.column import TEACHER_COLUMN
from ..teacher.vectors import cache_root

logger = get_logger(__name__)

_TABLE_FORMAT = 1  # part of every cache key: raised whenever the cached files or their meaning change
_ROWS_PER_READ = 1024


@dataclass
class NeighborTable:
    """The images of a data set and the nearest other ones of each. Equal images have equal teacher vectors, bit for
    bit, so rows with equal vectors are rows of one image.

    Args:
        image_of (`np.ndarray` of shape `[N]`, int64): Image of each row, numbered from 0; -1 for rows without one.
        neighbors (`np.ndarray` of shape `[M, k]`, int32): The k nearest other images of each, most similar first.
    """

    image_of: np.ndarray
    neighbors: np.ndarray


def neighbor_table(dataset: Dataset, k: int, similarity: str, device: torch.device) -> NeighborTable:
    """The nearest neighbours of all images of a data set, from the cache where they were looked for before. To be
    called by all processes alike; the first one works, and all get its result.

    The search is exact. Its time grows with M * M * d for M distinct images with vectors of d numbers. It needs their
    vectors in memory (2.7 GB for M = 665,000 and d = 1024) and on the device
    once more, or twice for cosines. The
    cache goes by the vectors: neither the order of the rows nor their repetitions matter, and a resumed run finds what
    the interrupted one has used.

    Args:
        dataset ([`~datasets.Dataset`]): Rows with a column `teacher_features`.
        k (`int`): Neighbours to look for. Where there are no more than k images, all others are taken.
        similarity (`str`): How vectors are compared, as `teacher_similarity` says it.
        device (`torch.device`): Where to look.

    Returns:
        [`NeighborTable`]

    Raises:
        `ValueError`: If all rows have the same image.
    """
    image_of, key = _images(dataset)
    count = int(image_of.max()) + 1
    if count < 2:
        raise ValueError(
            "All images of the data set are equal, so none has neighbours. Set `neighbor_group_size=0`, or add images."
        )
    k = min(k, count - 1)
    key = hashlib.sha256(f"{_TABLE_FORMAT} {k} {similarity} {key}".encode()).hexdigest()
    path = cache_root() / "neighbors" / f"{key}.npy"
    team, neighbors = Team(distributed=True), torch.zeros(count, k, dtype=torch.int32)
    with team.together():
        if team.is_main:
            cached = _load(path, (count, k))
            if cached is None:
                logger.info(f"Looking for the {k} nearest neighbours of {count:,} images.")
                vectors = torch.from_numpy(_vectors(dataset, image_of, count)).to(device)
                cached = nearest_neighbors(vectors, k, **comparison(similarity)).int().cpu().numpy()
                _save(path, cached)
            neighbors = torch.from_numpy(cached)
    return NeighborTable(image_of, team.same(neighbors).numpy())


def _images(dataset: Dataset) -> tuple[np.ndarray, str]:
    """The image of each row, numbered in the order of their vectors' digests, and a digest of all of these."""
    rows, digests = [], []
    for numbers, vectors in _read(dataset):
        rows.append(numbers)
        digests += [hashlib.blake2b(vector, digest_size=16).digest() for vector in vectors]
    distinct, images = np.unique(np.array(digests, dtype="S16"), return_inverse=True)
    image_of = np.full(len(dataset), -1, dtype=np.int64)
    image_of[np.concatenate(rows)] = images
    return image_of, hashlib.sha256(distinct.tobytes()).hexdigest()


def _vectors(dataset: Dataset, image_of: np.ndarray, count: int) -> np.ndarray:
    """The vector of each image, `[count, d]`, float32."""
    result: np.ndarray | None = None
    for rows, vectors in _read(dataset):
        if result is None:
            result = np.empty((count, vectors.shape[1]), dtype=np.float32)
        result[image_of[rows]] = vectors
    assert result is not None
    return result


def _read(dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields numbers of rows that have a vector, and their vectors `[n, d]` in float32, some at a time."""
    stored = dataset.select_columns([TEACHER_COLUMN]).with_format("arrow")
    for start in range(0, len(dataset), _ROWS_PER_READ):
        column = pa.concat_arrays(stored[start : start + _ROWS_PER_READ][TEACHER_COLUMN].chunks)
        rows = start + np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        if len(rows):
            values = pc.list_flatten(column).to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
            yield rows, values.reshape(len(rows), -1)


def _load(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """A cached table; None if there is none, or a file that is not whole."""
    try:
        table = np.load(path)
    except (OSError, EOFError, ValueError):
        return None
    return table if table.shape == shape and table.dtype == np.int32 else None


def _save(path: Path, table: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, table, allow_pickle=False)

    write_atomically(path, write)
