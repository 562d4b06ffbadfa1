"""The column that holds the teacher vectors: its name and what it must look like."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .tables import stored_rows

TEACHER_COLUMN = "teacher_features"

_ROWS_PER_READ = 1024


def check_teacher_features(dataset: datasets.Dataset) -> int:
    """Checks the column `teacher_features` of a data set and returns the width of its vectors.

    Rows without a vector (null) are allowed; they take no part in the alignment loss.

    Args:
        dataset (`datasets.Dataset`): Data set with the column, a list of numbers (or null) a row.

    Returns:
        `int`: `d_teacher`, the one width of all vectors.

    Raises:
        ValueError: If the column holds no lists of numbers, a vector contains NaN, infinity or null or is zero, two
            vectors differ in width, or no row has a vector. Rows are named.
    """
    vectors = dataset.select_columns([TEACHER_COLUMN]).with_format("arrow")
    first_row = width = None
    for start in range(0, len(dataset), _ROWS_PER_READ):
        column = pa.concat_arrays(vectors[start : start + _ROWS_PER_READ][TEACHER_COLUMN].chunks)
        if pa.types.is_null(column.type):
            continue
        if not _is_list(column.type) or not _is_number(column.type.value_type):
            raise ValueError(
                f"Column `{TEACHER_COLUMN}` has type {column.type}, not a list of numbers a row. Rename or remove the "
                "column to have it computed, or store one vector (or null) a row."
            )
        present = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        if len(present) == 0:
            continue
        widths = pc.list_value_length(column).drop_null().to_numpy()
        if width is None:
            first_row, width = start + int(present[0]), int(widths[0])
        differing = np.flatnonzero(widths != width)
        if len(differing):
            raise ValueError(
                f"Column `{TEACHER_COLUMN}` has vectors of different widths: row {first_row} has {width} numbers, row "
                f"{start + present[differing[0]]} has {widths[differing[0]]}. Use one teacher for the whole data set."
            )
        if width == 0:
            raise ValueError(f"Column `{TEACHER_COLUMN}` has an empty vector in row {first_row}; use null instead.")
        values = pc.list_flatten(column).cast(pa.float64()).to_numpy(zero_copy_only=False)  # null becomes NaN
        values = values.reshape(-1, width)
        zero = np.flatnonzero((values == 0).all(axis=1))
        if len(zero):
            raise ValueError(
                f"Column `{TEACHER_COLUMN}` has a vector of zeros in row {start + present[zero[0]]}, which is near to "
                "and far from no other: its neighbours would be drawn by chance. Set it to null, as of a row without "
                "an image, or remove the column to have it computed."
            )
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise ValueError(
                f"Column `{TEACHER_COLUMN}` has NaN, infinity or null inside the vector of row "
                f"{start + present[bad[0]]}. Repair that row, set it to null, or remove the column to have it computed."
            )
    if width is None:
        raise ValueError(
            f"No row has a vector in column `{TEACHER_COLUMN}`. Remove the column to have it computed from the images, "
            "or set `alignment_weight=0` to train as SFTTrainer does."
        )
    return width


def rows_with_vectors(dataset: datasets.Dataset) -> np.ndarray:
    """Numbers of the rows of a data set that have a vector. No vector is read."""
    return np.flatnonzero(dataset.data.column(TEACHER_COLUMN).is_valid().to_numpy()[stored_rows(dataset)])


def _is_list(type_: pa.DataType) -> bool:
    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)


def _is_number(type_: pa.DataType) -> bool:
    return pa.types.is_floating(type_) or pa.types.is_integer(type_)
