"""Which data sets can have teacher vectors."""

from __future__ import annotations

from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from ..config import HeRAConfig
from ..teacher.column import TEACHER_COLUMN, check_teacher_features, rows_with_vectors
from ..teacher.encoder import VisionTeacher
from ..teacher.image_sources import IMAGE_COLUMNS, check_one_image_column, find_sources
from ..teacher.images import ImageColumn
from ..teacher.vectors import add_teacher_features
from .stream_start import column_names

logger = get_logger(__name__)


def check_dataset(dataset: Any, name: str) -> None:
    """Refuses data that cannot have teacher vectors. Of a stream, one row is read.

    Raises:
        `ValueError`: Naming the cure.
    """
    if isinstance(dataset, dict):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__} of {', '.join(map(repr, dataset)) or 'nothing'}. Pass one of its "
            "splits."
        )
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}, but head alignment needs a `datasets.Dataset` or a streamed "
            "`datasets.IterableDataset`, as SFTTrainer does. `Dataset.from_list` makes one of a list of rows."
        )
    if not {*IMAGE_COLUMNS, TEACHER_COLUMN} & column_names(dataset, name):
        raise ValueError(
            f"`{name}` has no column `image`, `images` or `{TEACHER_COLUMN}`, so there is nothing to align with. Add "
            "one, or set `alignment_weight=0` to train as SFTTrainer does. If all images lie in videos or inside of "
            "messages, let it be a column `images` of empty lists: that is how SFTTrainer knows vision data."
        )
    if isinstance(dataset, Dataset):
        check_one_image_column(dataset, f"`{name}`")


def warn_of_missing_vectors(dataset: Dataset, name: str) -> None:
    """Says how many rows of data that brings its vectors have an image and no vector, as where a part without any was
    put to it."""
    if dataset.format["type"] == "custom":
        return
    try:
        if not find_sources(dataset.features):
            return
    except ValueError:  # what its own collator makes images of is not known here
        return
    missing = ImageColumn(dataset).rows_with_images()
    missing[rows_with_vectors(dataset)] = False
    if missing.any():
        logger.warning(
            f"{missing.sum():,} of {len(dataset):,} rows of `{name}` have an image, and null in column "
            f"`{TEACHER_COLUMN}`: they are trained on, and take no part in the alignment. Remove the column to have "
            "all images encoded."
        )


def check_formatting(formatting_func: Any, dataset: Any) -> None:
    """Refuses a function that SFTTrainer would never call.

    Raises:
        `ValueError`: With what to do instead.
    """
    if formatting_func is not None and set(IMAGE_COLUMNS) & column_names(dataset, "train_dataset"):
        raise ValueError(
            "`formatting_func` is not applied to data with images by SFTTrainer. Make the texts with `dataset.map`, in "
            "a column `messages`, or `prompt` and `completion`."
        )


def check_steps(dataset: Any, args: HeRAConfig) -> None:
    """Refuses a stream without `max_steps`, which `Trainer` would do after the model is loaded.

    Raises:
        `ValueError`: Naming the setting.
    """
    if isinstance(dataset, IterableDataset) and args.max_steps <= 0:
        raise ValueError(
            "`max_steps` must be set: `train_dataset` is a stream (`IterableDataset`), whose length is not known, and "
            "the learning-rate schedule needs the number of steps."
        )


def with_teacher_features(
    dataset: Any, name: str, teacher: VisionTeacher | str, batch_size: int, width: int | None = None
) -> Dataset:
    """A data set with teacher vectors, computed, read from the cache, or brought along. To be called by all processes
    alike, which divide the work.

    Args:
        dataset ([`~datasets.Dataset`]): The data set, which has passed [`check_dataset`].
        name (`str`): What the trainer calls it, for messages.
        teacher ([`VisionTeacher`] or `str`): The teacher.
        batch_size (`int`): Images encoded at a time.
        width (`int`, *optional*): Width that the vectors must have.

    Raises:
        `ValueError`: If the data or the teacher cannot be used, or the vectors have another width.
    """
    dataset = add_teacher_features(
        dataset, teacher, batch_size=batch_size, desc=f"Teacher vectors of {name}", distributed=True
    )
    if width is not None:
        check_width(check_teacher_features(dataset), name, width)
    return dataset


def check_width(found: int, name: str, width: int | None) -> None:
    """Refuses teacher vectors of another width than the training data's, if that is known.

    Raises:
        `ValueError`: Naming both.
    """
    if width is not None and found != width:
        raise ValueError(
            f"The teacher vectors of `{name}` have {found} dimensions, those of `train_dataset` {width}. Compute both "
            "with the same teacher."
        )
