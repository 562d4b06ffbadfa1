"""Rows held out of the training data, whose images are held out with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset

from ..common.files import write_atomically
from ..teacher.image_sources import find_sources
from ..teacher.images import ImageColumn, Images
from ..teacher.vectors import cache_root

logger = get_logger(__name__)


def split_by_image(dataset: Dataset, test_size: float, seed: int) -> tuple[Dataset, Dataset]:
    """Draws rows to hold out, with all rows that show one of their images: several questions about an image would have
    it both trained on and held out.

    Args:
        dataset ([`~datasets.Dataset`]): The rows. Those without an image are drawn one by one.
        test_size (`float`): Share of the rows to hold out or, from 1 on, their number, which is not exceeded.
        seed (`int`): Seed of the draw.

    Returns:
        `tuple` of two [`~datasets.Dataset`]: What to train on, and what is held out, in the order of the rows.

    Raises:
        `ValueError`: If there are too few rows, or too many of them show the same images.
    """
    count = int(test_size) if test_size >= 1 else math.ceil(test_size * len(dataset))
    if not 0 < count < len(dataset):
        raise ValueError(
            f"`test_split_size` ({test_size:g}) would hold out {count:,} of {len(dataset):,} rows. Choose a share "
            "between 0 and 1, or a smaller number."
        )
    groups = _sharing_images(_images_of_rows(dataset))
    held_out: list[int] = []
    for i in np.random.default_rng(seed).permutation(len(groups)):
        if len(held_out) + len(groups[i]) <= count:
            held_out += groups[i]
    if not held_out:
        raise ValueError(
            f"No row can be held out with its images: at least {min(map(len, groups)):,} rows show the same ones, and "
            f"`test_split_size` ({test_size:g}) allows for {count:,}. Raise it, or name a split to evaluate on."
        )
    is_held_out = np.zeros(len(dataset), dtype=bool)
    is_held_out[held_out] = True
    return dataset.select(np.flatnonzero(~is_held_out)), dataset.select(np.flatnonzero(is_held_out))


def _images_of_rows(dataset: Dataset) -> Sequence[np.ndarray]:
    """Numbers of the distinct images of each row; none where they cannot be read here."""
    none = [np.empty(0, dtype=np.int64)] * len(dataset)
    try:
        column = ImageColumn(dataset) if find_sources(dataset.features) else None
        if column is None or not column.has_images():
            return none
        return column.by_row(_found_before(column))
    except ValueError as error:
        logger.warning(
            f"Rows are held out one by one, and images may be in both parts, since these cannot be compared: {error}"
        )
        return none


def _found_before(column: ImageColumn) -> Images:
    """The images of a column, read once for all processes and later starts, where files tell whether they changed."""
    key = column.fast_key("held out")
    path = None if key is None else cache_root() / "held_out" / f"{key}.npz"
    if path is not None and path.is_file():
        with np.load(path) as stored:
            return Images([], np.empty((0, 3), np.int64), stored["counts"], stored["ids"])
    images = column.scan("Rows to hold out")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, counts=images.counts, ids=images.ids)

        write_atomically(path, write)
    return images


def _sharing_images(images: Sequence[np.ndarray]) -> list[list[int]]:
    """Rows that have an image in common, also by way of other rows."""
    above = list(range(len(images)))

    def root(row: int) -> int:
        while above[row] != row:
            above[row] = row = above[above[row]]
        return row

    first: dict[int, int] = {}
    for row, shown in enumerate(images):
        for image in shown.tolist():
            above[root(row)] = root(first.setdefault(image, row))
    groups: dict[int, list[int]] = {}
    for row in range(len(images)):
        groups.setdefault(root(row), []).append(row)
    return list(groups.values())
