"""The control of a run: teacher vectors of other images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import datasets
import numpy as np

from .column import TEACHER_COLUMN, rows_with_vectors
from .tables import stored_rows, underlying
from .vectors import attach

_ROWS_PER_READ = 1024


def permuted_vectors(dataset: datasets.Dataset, seed: int) -> datasets.Dataset:
    """A data set in which each distinct image has the teacher vector of another one.

    Images are told apart by their vectors, so that an image that occurs in several rows gets the same other vector in
    all of them, in whatever order the rows are. No image keeps its own, and each vector is given to one image. What a
    contrast with these vectors does to a model, the teacher has not taught: everything else is as with the right ones.

    Args:
        dataset (`datasets.Dataset`): Rows with a column `teacher_features`.
        seed (`int`): Seed of the permutation.

    Returns:
        `datasets.Dataset`: The same rows; those without a vector have none.

    Raises:
        `ValueError`: If there are fewer than two distinct images.
    """
    rows = rows_with_vectors(dataset)
    first, numbers = _distinct(dataset, rows)
    if len(first) < 2:
        raise ValueError(
            "`teacher_control='permuted'` gives each image another image's teacher vector, but `train_dataset` has "
            f"only {len(first)} distinct image{'s' * (len(first) != 1)}. Add rows, or set `teacher_control='none'`."
        )
    # One cycle through all images: nobody's successor is itself.
    cycle = np.random.default_rng(seed).permutation(len(first))
    successor = np.empty_like(cycle)
    successor[cycle] = np.roll(cycle, -1)
    # As `attach` wants it: in the order of the rows underneath a shuffled or selected data set.
    places = stored_rows(dataset)
    below = underlying(dataset)
    sources = np.arange(len(below))
    sources[places[rows]] = places[first[successor[numbers]]]
    vectors = below.select_columns([TEACHER_COLUMN]).with_format(None).select(sources).flatten_indices()
    key = hashlib.sha256(f"permuted {seed}".encode()).hexdigest()
    return attach(dataset.remove_columns(TEACHER_COLUMN), vectors, key)


def distinct_vectors(dataset: datasets.Dataset) -> set[bytes]:
    """Digests of the vectors that the rows of a data set have."""
    return {digest for _, digest in _digests(dataset, rows_with_vectors(dataset))}


def _distinct(dataset: datasets.Dataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each distinct vector, and which of them each of `rows` has. They are numbered by their digests,
    so that a permutation of them is the same in whatever order the rows are."""
    first: dict[bytes, int] = {}
    digests = []
    for row, digest in _digests(dataset, rows):
        first.setdefault(digest, row)
        digests.append(digest)
    places = {digest: place for place, digest in enumerate(sorted(first))}
    numbers = [places[digest] for digest in digests]
    return np.asarray([first[digest] for digest in places], dtype=np.int64), np.asarray(numbers, dtype=np.int64)


def _digests(dataset: datasets.Dataset, rows: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Each of `rows`, and a digest of its vector."""
    table = dataset.select_columns([TEACHER_COLUMN]).with_format("numpy", dtype=np.float32)
    for start in range(0, len(rows), _ROWS_PER_READ):
        read = rows[start : start + _ROWS_PER_READ]
        for row, vector in zip(read, table[read][TEACHER_COLUMN], strict=True):
            yield row, hashlib.sha256(np.ascontiguousarray(vector).tobytes()).digest()
