"""The images of a data set as they are stored: which ones are equal, what they hash to, and their vectors."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import datasets
import fsspec
import numpy as np
import PIL.Image
import pyarrow as pa
from datasets.utils import tqdm

from .column import TEACHER_COLUMN
from .encoder import TeacherOutputError, VisionTeacher, to_rgb
from .image_sources import (
    MAX_FRAMES,
    VIDEO_FORM,
    check_one_image_column,
    find_sources,
    is_url,
    url_refusal,
    without_payload,
    written_image,
)
from .tables import stored_rows, underlying

# Part of every cache key: raised whenever the cached files or their meaning change.
_CACHE_VERSION = 3
_ROWS_PER_READ = 256
_ROWS_PER_WRITE = 1024
_DECODE_THREADS = min(8, os.cpu_count() or 1)
# Pixels decoded at a time (three bytes each), beside as many that the teacher is at work on. One image may be larger.
_PIXELS_AT_A_TIME = 1 << 25

_Place = tuple[int, int, int]  # row of the underlying table, source, position in that row of that source


@dataclass
class Images:
    """The distinct images of a column and who uses them.

    Args:
        digests: sha256 of each distinct image, in order of first appearance.
        places: `[n_distinct, 3]`, where it appears first: row, source of the column, position in row and source.
        counts: `[n_rows]`, images of each row.
        ids: `[sum(counts)]`, distinct image of each image of each row.
    """

    digests: list[bytes]
    places: np.ndarray
    counts: np.ndarray
    ids: np.ndarray

    def key(self, teacher: str) -> str:
        digest = hashlib.sha256(f"{_CACHE_VERSION} {teacher} {len(self.counts)}\n".encode())
        digest.update(self.counts.data)
        digest.update(self.ids.data)
        digest.update(b"".join(self.digests))
        return digest.hexdigest()

    def row_batches(self, vectors: np.ndarray) -> Iterator[pa.ListArray]:
        """Yields the rows' vectors, some rows at a time, from those of the distinct images `[n_distinct, d]`."""
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        for begin in range(0, len(self.counts), _ROWS_PER_WRITE):
            counts = self.counts[begin : begin + _ROWS_PER_WRITE]
            used = np.flatnonzero(counts)
            values = np.empty((len(used), vectors.shape[1]), dtype=np.float32)
            for out, row in zip(values, begin + used, strict=True):
                own = vectors[self.ids[starts[row] : starts[row + 1]]]
                out[:] = own[0] if len(own) == 1 else mean_vector(own)
            offsets = np.concatenate([[0], np.cumsum(counts > 0)]) * vectors.shape[1]
            yield pa.ListArray.from_arrays(
                pa.array(offsets, type=pa.int32()), pa.array(values.ravel()), mask=pa.array(counts == 0)
            )


def mean_vector(vectors: np.ndarray) -> np.ndarray:
    """Mean direction of the rows of `[n, d]`, as long as they are on average. Dot products without normalisation would
    tell how many images a row has by a shorter vector: unlike images cancel each other out."""
    wide, tiny = vectors.astype(np.float64), np.finfo(np.float64).tiny
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    mean = (wide / np.maximum(norms, tiny)).mean(axis=0)
    return mean * (norms.mean() / max(np.linalg.norm(mean), tiny))


class ImageColumn:
    """The images of a data set, read as stored (encoded bytes or paths), row by row of the underlying table.

    They lie in image columns, in the frames of videos and in messages, see [`find_sources`]. Rows that the data set's
    indices mapping leaves out count as rows without an image.
    """

    def __init__(self, dataset: datasets.Dataset):
        if dataset.format["type"] == "custom":
            raise ValueError(
                "The data set has a custom transform (`with_transform`), which hides the stored images. Call "
                f"`add_teacher_features` before `with_transform`, and let the transform return `{TEACHER_COLUMN}`, too."
            )
        check_one_image_column(dataset)
        self._sources = find_sources(dataset.features)
        if not self._sources:
            raise ValueError(
                "The data set has no image column. Add a column `image` or `images`, or set `alignment_weight=0` to "
                "train as SFTTrainer does."
            )
        self._dataset = dataset
        names = list(dict.fromkeys(source.column for source in self._sources))
        self._stored = underlying(dataset).select_columns(names).with_format("arrow")
        self._places = stored_rows(dataset)
        self._rows = np.unique(self._places).astype(np.int64)

    def __len__(self) -> int:
        return len(self._stored)

    def _row_error(self, row: int, source: int, cause: object) -> ValueError:
        """The error for a row of the underlying table, named by its number in the user's data set."""
        number = int(np.flatnonzero(self._places == row)[0])
        return ValueError(
            f"Row {number} of the data set, column `{self._sources[source].column}`: the image can't be used: "
            f"{without_payload(cause)}. Repair the image, set it to null, or drop the row."
        )

    def _stored_images(
        self, desc: str | None = None, only_paths: bool = False
    ) -> Iterator[tuple[_Place, pa.Scalar, str | None]]:
        """Yields place, bytes and path of each image that the data set uses, or of those in files of their own, row by
        row."""
        for start in tqdm(range(0, len(self._rows), _ROWS_PER_READ), desc=desc, disable=desc is None, leave=False):
            rows = self._rows[start : start + _ROWS_PER_READ]
            first, last = int(rows[0]), int(rows[-1])
            # Gathering cuts a table into as many pieces as rows: a slice with unused rows in it is far cheaper to walk.
            dense = last - first < 8 * len(rows)
            table = self._stored[first : last + 1] if dense else self._stored[rows.tolist()]
            numbers = np.arange(first, last + 1) if dense else rows
            is_used = np.isin(numbers, rows)
            found: list[list[tuple[_Place, pa.Scalar, str | None]]] = [[] for _ in numbers]
            for index, source in enumerate(self._sources):
                for owners, counts, structs in source.images(table):
                    data, paths = structs.field("bytes"), structs.field("path")
                    positions = np.arange(len(owners)) - np.searchsorted(owners, owners)
                    wanted = counts & is_used[owners]
                    if only_paths:
                        wanted &= data.is_null().to_numpy(zero_copy_only=False)
                    for i in np.flatnonzero(wanted).tolist():
                        place = (int(numbers[owners[i]]), index, int(positions[i]))
                        path = paths[i].as_py()
                        if not only_paths or self._written(place, path) is None:
                            found[owners[i]].append((place, data[i], path))
            for row in found:
                yield from row

    def has_images(self) -> bool:
        """Whether a row of the data set has an image. None is read."""
        return next(self._stored_images(), None) is not None

    def rows_with_images(self) -> np.ndarray:
        """Which rows of the data set have an image, `[n_rows]` bool. None is read."""
        found = np.zeros(len(self), dtype=bool)
        found[[row for (row, _, _), _, _ in self._stored_images()]] = True
        return found[self._places]

    def fast_key(self, teacher: str) -> str | None:
        """Key that is found without reading an image, or None if only the images themselves can be trusted.

        That is so for data of which a part lies in memory, whose fingerprint may come from a function rather than from
        the content, and for images on remote file systems, which have neither size nor time. Columns without images
        may lie there, and so may the rows' numbers, which are looked at.
        """
        files = _files(self._stored.data)
        if files is None:
            return None
        head = {
            "version": _CACHE_VERSION,
            "fingerprint": self._dataset._fingerprint,
            "files": [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in files],
            "sources": [(source.column, source.steps, source.mode) for source in self._sources],
            "frames": MAX_FRAMES,
            "teacher": teacher,
        }
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        digest.update(self._rows.data)
        for (row, source, position), _, path in self._stored_images(only_paths=True):
            if path is None or "://" in path:
                return None
            try:
                stat = os.stat(path)
            except OSError as error:
                raise self._row_error(row, source, _with_folder(error, path)) from error
            # The path's length keeps two lists of files apart even if a path holds a line like these. JSON is slower.
            file = f"{row} {source} {position} {stat.st_size} {stat.st_mtime_ns} {len(path)} {path}\n"
            digest.update(file.encode())
        return digest.hexdigest()

    def scan(self, desc: str) -> Images:
        """Reads every image once, without decoding it, and finds the distinct ones."""
        counts = np.zeros(len(self), dtype=np.int64)
        known: dict[bytes, int] = {}
        places, ids = [], []
        stored = self._stored_images(f"{desc} (looking for distinct images)")
        for row, images in itertools.groupby(stored, key=lambda image: image[0][0]):
            digests = [(place, self._digest(*place[:2], data, path)) for place, data, path in images]
            for place, digest in self._shown_once(digests):
                if digest not in known:
                    known[digest] = len(known)
                    places.append(place)
                ids.append(known[digest])
                counts[row] += 1
        if not known:
            names = ", ".join(f"`{name}`" for name in self._stored.column_names)
            raise ValueError(
                f"No row of the data set has an image in column {names}. Add images, or set `alignment_weight=0` to "
                "train as SFTTrainer does."
            )
        return Images(list(known), np.array(places), counts, np.array(ids, dtype=np.int64))

    def by_row(self, images: Images) -> list[np.ndarray]:
        """The distinct images of each row of the data set, by their numbers in what `scan` has found."""
        stored = np.split(images.ids, images.counts.cumsum()[:-1])
        return [stored[row] for row in self._places.tolist()]

    def _digest(self, row: int, source: int, data: pa.Scalar, path: str | None) -> bytes:
        content = hashlib.sha256(self._content(row, source, data, path))
        content.update((self._sources[source].mode or "").encode())  # the same file read in another mode
        return content.digest()

    def _shown_once(self, images: list[tuple[_Place, bytes]]) -> list[tuple[_Place, bytes]]:
        """A row's images but for those of its columns that lie inside of its messages as well."""
        inside = {digest for (_, source, _), digest in images if self._sources[source].is_inside}
        return [
            (place, digest) for place, digest in images if digest not in inside or self._sources[place[1]].is_inside
        ]

    def _content(self, row: int, source: int, data: pa.Scalar, path: str | None) -> bytes | pa.Buffer:
        if self._sources[source].is_video_file:
            raise self._row_error(row, source, VIDEO_FORM.rstrip("."))
        if data.is_valid:
            return data.as_buffer()
        if path is None:
            raise self._row_error(row, source, "it has neither bytes nor a path")
        if is_url(path):
            raise self._row_error(row, source, url_refusal(path))
        written = self._written((row, source, 0), path)
        if written is not None:
            return written
        try:
            with fsspec.open(path) if "://" in path else open(path, "rb") as file:
                return file.read()
        except Exception as error:  # each file system behind fsspec has errors of its own
            raise self._row_error(row, source, _with_folder(error, path)) from error

    def _written(self, place: _Place, path: str | None) -> bytes | None:
        """The image that stands in the place of a path itself, if it does."""
        try:
            return None if path is None else written_image(path)
        except ValueError as error:
            raise self._row_error(*place[:2], error) from error

    def _open(self, row: int, source: int, position: int) -> PIL.Image.Image:
        """The image at a place. Its pixels are not decoded yet, unless the column's feature asks for a PIL mode."""
        mode = self._sources[source].mode
        _, _, structs = next(self._sources[source].images(self._stored[row : row + 1]))
        image = structs[position]
        content = self._content(row, source, image["bytes"], image["path"].as_py())
        try:
            if mode is None:
                return PIL.Image.open(io.BytesIO(content))
            return datasets.Image(mode=mode).decode_example({"bytes": bytes(content), "path": None})
        except Exception as error:  # PIL raises a different type for every way a file can be broken
            raise self._row_error(row, source, error) from error

    def _decode(self, row: int, source: int, image: PIL.Image.Image) -> PIL.Image.Image:
        try:
            return to_rgb(image)
        except Exception as error:
            raise self._row_error(row, source, error) from error

    def _groups(self, places: np.ndarray, batch_size: int) -> Iterator[list[tuple[_Place, PIL.Image.Image]]]:
        """Yields the opened images of each batch, cut where they would take too much memory. The cuts depend on the
        batch alone, since a vector can depend, in its last bits, on the images that it is encoded with."""
        for start in range(0, len(places), batch_size):
            group: list[tuple[_Place, PIL.Image.Image]] = []
            pixels = 0
            for row, source, position in places[start : start + batch_size].tolist():
                image = self._open(row, source, position)
                size = image.width * image.height
                if group and pixels + size > _PIXELS_AT_A_TIME:
                    yield group
                    group, pixels = [], 0
                group.append(((row, source, position), image))
                pixels += size
            yield group

    def encode(self, places: np.ndarray, teacher: VisionTeacher, batch_size: int) -> Iterator[np.ndarray]:
        """Yields the vectors `[b, d]` of the images at `places`, at most a batch at a time, while the images of the
        following ones are decoded."""
        with ThreadPoolExecutor(_DECODE_THREADS) as pool:
            waiting: list[tuple[_Place, Future[PIL.Image.Image]]] = []
            for group in self._groups(places, batch_size):
                loading = [(place, pool.submit(self._decode, place[0], place[1], image)) for place, image in group]
                group.clear()  # an opened image keeps its pixels once they are decoded
                if waiting:
                    yield self._encode(waiting, teacher, batch_size)
                waiting = loading
            yield self._encode(waiting, teacher, batch_size)

    def _encode(
        self, loading: list[tuple[_Place, Future[PIL.Image.Image]]], teacher: VisionTeacher, batch_size: int
    ) -> np.ndarray:
        images = [future.result() for _, future in loading]
        try:
            return teacher.encode(images, batch_size=batch_size).numpy()
        except TeacherOutputError as error:
            row, source, _ = loading[error.index][0]
            raise self._row_error(row, source, error) from error


def _files(table: datasets.table.Table) -> list[str] | None:
    """The files that a table lies in, or None if a part of it lies in memory."""
    blocks = itertools.chain(*table.blocks) if isinstance(table, datasets.table.ConcatenationTable) else [table]
    used = [block for block in blocks if block.num_columns]
    mapped = [block.path for block in used if isinstance(block, datasets.table.MemoryMappedTable)]
    return mapped if len(mapped) == len(used) else None


def _with_folder(error: Exception, path: str) -> str:
    """What went wrong with a file; a relative path depends on where the program was started."""
    return f"{error}" if os.path.isabs(path) else f"{error} (a relative path, looked for in {os.getcwd()})"
