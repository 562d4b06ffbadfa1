"""Streamed data sets: rows that can be named, and the teacher's vectors of images as they come."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..teacher.column import TEACHER_COLUMN
from ..teacher.encoder import VisionTeacher, cure_of, fault_of, to_rgb
from ..teacher.image_sources import decoded, images_beside, images_inside, is_url, url_refusal, without_payload
from ..teacher.images import mean_vector
from .collator import ROW_PLACE, TEACHER_IMAGES, checked_vector


class NumberedStream(datasets.IterableDataset):
    """A streamed data set whose rows say where they stand, so that a fault in one of them can be named.

    Rows are those of the original, in the same order, with `stream_place` beside their columns. To be made with
    [`NumberedStream.of`].

    Attributes:
        name (`str`): What the data set is called in messages.
        has_vectors (`bool`): Whether its rows bring `teacher_features`, null where a row lacks it.
        width (`int`): Width of the teacher vectors, once it is known.
    """

    name: str
    has_vectors: bool
    width: int = 0

    @classmethod
    def of(cls, dataset: datasets.IterableDataset, name: str, has_vectors: bool) -> NumberedStream:
        """The rows of `dataset`, which stays as it is, numbered. Nothing is read."""
        stream = cls.__new__(cls)
        # Not by the constructor, which does not take all of the state (epoch, position) that a stream has.
        stream.__dict__.update(vars(dataset))
        stream.name, stream.has_vectors = name, has_vectors
        return stream

    def shard(self, num_shards: int, index: int, contiguous: bool = True) -> NumberedStream:
        part = super().shard(num_shards, index, contiguous)
        return NumberedStream.of(part, f"part {index} of {num_shards} of {self.name}", self.has_vectors)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        name = self._name_in_worker()
        rows = super().__iter__()
        for number in itertools.count():
            place = f"Row {number} of {name}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # whatever reading, decoding or the user's own functions raise
                raise unreadable(place, error) from error
            row = {**row, ROW_PLACE: place}
            if self.has_vectors:
                row.setdefault(TEACHER_COLUMN, None)
            yield row

    def _name_in_worker(self) -> str:
        worker = get_worker_info()
        if worker is None or min(worker.num_workers, self.num_shards) == 1:
            return self.name
        return f"those rows of {self.name} that data loader worker {worker.id} reads"


def unreadable(place: str, error: Exception) -> ValueError:
    """The error for a row that the data set itself can't give out."""
    return ValueError(f"{place} can't be read: {type(error).__name__}: {without_payload(error)}. Repair or drop it.")


@dataclass
class TeacherImages:
    """The images of some rows, prepared for the teacher; equal images once.

    No mapping and no tensor, so that neither data loaders nor trainers move, cast or slice it.

    Args:
        rows (`list[list[bytes]]`): Digests of each row's images, none for a row that needs no vector.
        groups (`list` of `tuple`):
            For each combination of shapes that the image processor returned: the digests of n images, and its outputs,
            `[n, *shape]` each.
        places (`dict[bytes, str]`): Where each image was met first, for messages.
    """

    rows: list[list[bytes]]
    groups: list[tuple[list[bytes], dict[str, Tensor]]] = field(default_factory=list)
    places: dict[bytes, str] = field(default_factory=dict)


class ImagePreparer:
    """Decodes the images of streamed rows and prepares them for the teacher. It works in data loader workers, which the
    teacher itself, on a GPU, could not.

    Args:
        image_processor: The teacher's image processor.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> TeacherImages | None:
        """What the teacher needs for the rows that come from a stream and bring no vector; `None` if it needs nothing.

        Raises:
            `ValueError`: If an image can't be used; its row is named.
        """
        images = TeacherImages([])
        prepared: dict[Any, list[tuple[bytes, dict[str, Tensor]]]] = {}
        for row in rows:
            digests = []
            if ROW_PLACE in row and TEACHER_COLUMN not in row:
                for image in row_images(row):
                    digests.append(digest := image_digest(image))
                    if digest not in images.places:
                        images.places[digest] = row[ROW_PLACE]
                        inputs = self._prepare(image, row[ROW_PLACE])
                        shapes = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
                        prepared.setdefault(shapes, []).append((digest, inputs))
            images.rows.append(digests)
        for group in prepared.values():
            stacked = {name: torch.stack([inputs[name] for _, inputs in group]) for name in group[0][1]}
            images.groups.append(([digest for digest, _ in group], stacked))
        return images if images.groups else None

    def _prepare(self, image: PIL.Image.Image, place: str) -> dict[str, Tensor]:
        try:
            inputs = dict(self.image_processor(images=[image], return_tensors="pt"))
        except Exception as error:  # too small an image, for one: each processor has errors of its own
            raise ValueError(
                f"{place}: the teacher's image processor can't prepare an image of {image.size}: {error}"
            ) from error
        for name, value in inputs.items():
            if not torch.is_tensor(value):
                raise ValueError(
                    f"The teacher's image processor ({type(self.image_processor).__name__}) returns a "
                    f"{type(value).__name__} as {name!r}, not a tensor, so images cannot be prepared one by one as a "
                    "stream needs it. Set `teacher_model_name_or_path` to another encoder, such as DINOv2, load the "
                    f"data set without streaming, or bring a column `{TEACHER_COLUMN}`."
                )
        return inputs


class StreamTeacher:
    """Turns prepared images into teacher vectors when a batch arrives. The teacher stays in memory for it.

    Args:
        teacher ([`VisionTeacher`]): The teacher.
        batch_size (`int`): Images a forward pass.
    """

    def __init__(self, teacher: VisionTeacher, batch_size: int) -> None:
        self.teacher = teacher
        self.batch_size = batch_size

    def fill(self, batches: Sequence[MutableMapping[str, Any]]) -> None:
        """Puts the vectors that are missing into the `teacher_features` of batches. Equal images of all these batches
        are encoded once.

        Raises:
            `ValueError`: If the teacher returns NaN, infinity or zeros; the image's row is named.
        """
        waiting = [(batch, batch.pop(TEACHER_IMAGES)) for batch in batches if TEACHER_IMAGES in batch]
        vectors = self.encode([images for _, images in waiting])
        for batch, images in waiting:
            used = [i for i, digests in enumerate(images.rows) if digests]
            own = torch.stack([row_vector([vectors[digest] for digest in images.rows[i]]) for i in used])
            batch[TEACHER_COLUMN][used] = own.to(batch[TEACHER_COLUMN])

    def encode(self, waiting: Sequence[TeacherImages]) -> dict[bytes, np.ndarray]:
        """The vectors of all images, float32 `[d_teacher]` each, by digest."""
        places = {digest: place for images in reversed(waiting) for digest, place in images.places.items()}
        shapes: dict[Any, dict[bytes, dict[str, Tensor]]] = {}
        for digests, inputs in (group for images in waiting for group in images.groups):
            same = shapes.setdefault(tuple((name, value.shape[1:]) for name, value in inputs.items()), {})
            for i, digest in enumerate(digests):
                same.setdefault(digest, {name: value[i] for name, value in inputs.items()})
        vectors: dict[bytes, np.ndarray] = {}
        for prepared in shapes.values():
            items = list(prepared.items())
            for start in range(0, len(items), self.batch_size):
                batch = items[start : start + self.batch_size]
                inputs = {name: torch.cat([inputs[name] for _, inputs in batch]) for name in batch[0][1]}
                for (digest, _), vector in zip(batch, self._forward(inputs), strict=True):
                    if (what := fault_of(vector)) is not None:
                        raise ValueError(
                            f"{places[digest]}: the vision teacher returned {what} for an image. {cure_of(what)}"
                        )
                    vectors[digest] = vector.numpy()
        return vectors

    def _forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.teacher.forward_prepared(inputs).float().cpu()


def row_images(row: Mapping[str, Any]) -> list[PIL.Image.Image]:
    """The images of a streamed row that the teacher sees, decoded and in RGB: those in its columns and the sampled
    frames of its videos, and both where they lie in its messages. One of the column that lies in the messages as well
    counts once.

    Raises:
        `ValueError`: If one can't be used.
    """
    place = row[ROW_PLACE]
    try:
        beside, inside = images_beside(row), images_inside(row)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    shown = [_decoded(value, place) for value in inside]
    known = {image_digest(image) for image in shown}
    return [image for value in beside if image_digest(image := _decoded(value, place)) not in known] + shown


def stored_images(row: Mapping[str, Any]) -> list[Any]:
    """The images of [`row_images`] as they are stored, with those that are repeated.

    Raises:
        `ValueError`: If a video is no list of frames.
    """
    try:
        return images_beside(row) + images_inside(row)
    except ValueError as error:
        raise ValueError(f"{row[ROW_PLACE]}: {error}") from error


def _decoded(value: Any, place: str) -> PIL.Image.Image:
    path = value.get("path") if isinstance(value, Mapping) and not value.get("bytes") else value
    if isinstance(path, str) and is_url(path):
        raise ValueError(f"{place}: {url_refusal(path)}")
    try:
        image = decoded(value)
        if isinstance(image, PIL.Image.Image):
            return to_rgb(image)
    except Exception as error:  # PIL raises a different type for every way a file can be broken
        raise ValueError(
            f"{place}: the image can't be used: {without_payload(error)}. Repair the image, set it to null, or drop "
            "the row."
        ) from error
    raise ValueError(
        f"{place}: a {type(value).__name__} is no image. Give PIL images, paths or encoded bytes, as "
        "`datasets.Image()` does; a stream with a format (`with_format`) needs `with_format(None)`."
    )


def image_digest(image: PIL.Image.Image) -> bytes:
    """Tells images apart by their pixels."""
    return hashlib.sha256(f"{image.mode} {image.size}\n".encode() + image.tobytes()).digest()


def row_vector(vectors: Sequence[np.ndarray]) -> Tensor:
    """A row's vector, `[d_teacher]` float32, from those of its images: one as it is, of several the mean."""
    own = vectors[0] if len(vectors) == 1 else mean_vector(np.stack(vectors))
    return torch.from_numpy(np.asarray(own, dtype=np.float32))


def own_vector(row: Mapping[str, Any], width: int | None = None) -> Tensor | None:
    """The vector that a streamed row brings along, checked; `None` where it has none."""
    vector = row.get(TEACHER_COLUMN)
    return None if vector is None else checked_vector(vector, row[ROW_PLACE], width)
