"""The images of a data set as they are stored: which ones are equal, what they hash to, and their vectors."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import datasets
import fsspec
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
from datasets.utils import tqdm

from .teacher import TeacherOutputError, VisionTeacher, to_rgb
from .teacher_column import TEACHER_COLUMN

# Part of every cache key: raised whenever the cached files or their meaning change.
_CACHE_VERSION = 1
_ROWS_PER_READ = 256
_ROWS_PER_WRITE = 1024
_DECODE_THREADS = min(8, os.cpu_count() or 1)


@dataclass
class Images:
    """The distinct images of a column and who uses them.

    Args:
        digests: sha256 of each distinct image, in order of first appearance.
        places: `[n_distinct, 2]`, row and position in the row of its first appearance.
        counts: `[n_rows]`, images of each row.
        ids: `[sum(counts)]`, distinct image of each image of each row.
        mode: PIL mode that the column's feature asks for.
    """

    digests: list[bytes]
    places: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    mode: str | None

    def key(self, teacher: str) -> str:
        digest = hashlib.sha256(f"{_CACHE_VERSION} {teacher} {self.mode} {len(self.counts)}\n".encode())
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
                out[:] = own[0] if len(own) == 1 else _mean_direction(own)
            offsets = np.concatenate([[0], np.cumsum(counts > 0)]) * vectors.shape[1]
            yield pa.ListArray.from_arrays(
                pa.array(offsets, type=pa.int32()), pa.array(values.ravel()), mask=pa.array(counts == 0)
            )


def _mean_direction(vectors: np.ndarray) -> np.ndarray:
    """Mean of the L2-normalised rows of `[n, d]`; a zero vector stays zero."""
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return (wide / np.maximum(norms, np.finfo(np.float64).tiny)).mean(axis=0)


class ImageColumn:
    """The image column of a data set, read as stored (encoded bytes or paths), row by row of the underlying table.

    Rows that the data set's indices mapping leaves out count as rows without an image.
    """

    def __init__(self, dataset: datasets.Dataset):
        if dataset.format["type"] == "custom":
            raise ValueError(
                "The data set has a custom transform (`with_transform`), which hides the stored images. Call "
                f"`add_teacher_features` before `with_transform`, or add a column `{TEACHER_COLUMN}` yourself."
            )
        name = next((name for name in ("image", "images") if name in dataset.column_names), None)
        if name is None:
            raise ValueError(
                "The data set has no image column. Add a column `image` or `images`, or set `alignment_weight=0` to "
                "train as SFTTrainer does."
            )
        self.name: str = name
        feature = dataset.features[name]
        self._is_list = isinstance(feature, (datasets.List, datasets.LargeList))
        element = feature.feature if self._is_list else feature
        if not _is_image_like(element):
            raise ValueError(
                f"Column `{self.name}` holds {feature}, not images. Make it one with `dataset.cast_column("
                f'"{self.name}", datasets.Image())`, or with `datasets.List(datasets.Image())` for lists of images.'
            )
        self.mode = element.mode if isinstance(element, datasets.Image) else None
        self._dataset = dataset
        self._stored = underlying(dataset).select_columns([self.name]).with_format("arrow")
        self._indices = None if dataset._indices is None else dataset._indices.column(0).to_numpy()
        used = np.arange(len(self._stored)) if self._indices is None else np.unique(self._indices)
        self._rows = used.astype(np.int64)

    def __len__(self) -> int:
        return len(self._stored)

    def _row_error(self, row: int, cause: object) -> ValueError:
        """The error for a row of the underlying table, named by its number in the user's data set."""
        number = row if self._indices is None else int(np.flatnonzero(self._indices == row)[0])
        return ValueError(
            f"Row {number} of the data set, column `{self.name}`: the image can't be used: {cause}. Repair the image, "
            "set it to null, or drop the row."
        )

    def _structs(self, table: pa.Table) -> Iterator[tuple[np.ndarray, pa.StructArray]]:
        """Yields, chunk by chunk without copying, how many images each row has, and the flat (bytes, path) structs."""
        for chunk in table[self.name].chunks:
            lengths = np.ones(len(chunk), dtype=np.int64)
            if self._is_list:
                lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False).astype(np.int64)
                chunk = pc.list_flatten(chunk)
            if pa.types.is_null(chunk.type):
                chunk = pa.nulls(len(chunk), datasets.Image.pa_type)
            yield lengths, datasets.Image().cast_storage(chunk)

    def _stored_images(self, desc: str | None = None) -> Iterator[tuple[int, int, pa.Scalar, str | None]]:
        """Yields row, position in the row, bytes and path of each image that the data set uses."""
        for start in tqdm(range(0, len(self._rows), _ROWS_PER_READ), desc=desc, disable=desc is None, leave=False):
            rows = self._rows[start : start + _ROWS_PER_READ]
            first, last = int(rows[0]), int(rows[-1])
            # Gathering cuts a table into as many pieces as rows: a slice with unused rows in it is far cheaper to walk.
            dense = last - first < 8 * len(rows)
            table = self._stored[first : last + 1] if dense else self._stored[rows.tolist()]
            used = set(rows.tolist())
            remaining = iter(range(first, last + 1) if dense else rows.tolist())
            for lengths, structs in self._structs(table):
                present = structs.is_valid().to_numpy(zero_copy_only=False)
                data, paths = structs.field("bytes"), structs.field("path").to_pylist()
                flat = 0
                for length in lengths:
                    row = next(remaining)
                    for position in range(length):
                        if present[flat] and row in used:
                            yield row, position, data[flat], paths[flat]
                        flat += 1

    def fast_key(self, teacher: str) -> str | None:
        """Key that is found without reading an image, or None if only the images themselves can be trusted.

        That is so for data in memory, whose fingerprint may come from a function rather than from the content, and for
        images at a URL, which have neither size nor time.
        """
        files = [file["filename"] for file in self._dataset.cache_files]
        if not files:
            return None
        head = {
            "version": _CACHE_VERSION,
            "fingerprint": self._dataset._fingerprint,
            "files": [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in files],
            "column": self.name,
            "teacher": teacher,
        }
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        for row, position, data, path in self._stored_images():
            if data.is_valid:
                continue
            if path is None or "://" in path:
                return None
            try:
                stat = os.stat(path)
            except OSError as error:
                raise self._row_error(row, error) from error
            digest.update(json.dumps([row, position, path, stat.st_size, stat.st_mtime_ns]).encode())
        return digest.hexdigest()

    def scan(self, desc: str) -> Images:
        """Reads every image once, without decoding it, and finds the distinct ones."""
        counts = np.zeros(len(self), dtype=np.int64)
        known: dict[bytes, int] = {}
        places, ids = [], []
        for row, position, data, path in self._stored_images(f"{desc} (looking for distinct images)"):
            digest = hashlib.sha256(self._content(row, data, path)).digest()
            if digest not in known:
                known[digest] = len(known)
                places.append((row, position))
            ids.append(known[digest])
            counts[row] += 1
        if not known:
            raise ValueError(
                f"No row of the data set has an image in column `{self.name}`. Add images, or set `alignment_weight=0` "
                "to train as SFTTrainer does."
            )
        return Images(list(known), np.array(places), counts, np.array(ids, dtype=np.int64), self.mode)

    def _content(self, row: int, data: pa.Scalar, path: str | None) -> bytes | pa.Buffer:
        if data.is_valid:
            return data.as_buffer()
        if path is None:
            raise self._row_error(row, "it has neither bytes nor a path")
        try:
            with fsspec.open(path) if "://" in path else open(path, "rb") as file:
                return file.read()
        except Exception as error:  # each file system behind fsspec has errors of its own
            raise self._row_error(row, error) from error

    def load(self, places: np.ndarray, pool: ThreadPoolExecutor) -> list[Callable[[], PIL.Image.Image]]:
        """Starts decoding the images at `places` in the pool; each returned function waits for one of them."""
        table = self._stored[places[:, 0].tolist()]
        lengths: list[int] = []
        flat: list[tuple[pa.Scalar, pa.Scalar]] = []
        for row_lengths, structs in self._structs(table):
            lengths.extend(row_lengths)
            flat.extend(zip(structs.field("bytes"), structs.field("path"), strict=True))
        first = np.concatenate([[0], np.cumsum(lengths)])[:-1]
        return [
            pool.submit(self._decode, int(row), *flat[start + position]).result
            for start, (row, position) in zip(first, places, strict=True)
        ]

    def _decode(self, row: int, data: pa.Scalar, path: pa.Scalar) -> PIL.Image.Image:
        content = self._content(row, data, path.as_py())
        try:
            if self.mode is None:
                return to_rgb(PIL.Image.open(io.BytesIO(content)))
            return to_rgb(datasets.Image(mode=self.mode).decode_example({"bytes": bytes(content), "path": None}))
        except Exception as error:  # PIL raises a different type for every way a file can be broken
            raise self._row_error(row, error) from error

    def encode(self, places: np.ndarray, teacher: VisionTeacher, batch_size: int) -> Iterator[np.ndarray]:
        """Yields the vectors `[b, d]` of the images at `places`, batch by batch, decoding one batch ahead."""
        with ThreadPoolExecutor(_DECODE_THREADS) as pool:
            batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
            loading = self.load(batches[0], pool)
            for batch, following in zip(batches, [*batches[1:], None], strict=True):
                images = [wait() for wait in loading]
                loading = [] if following is None else self.load(following, pool)
                try:
                    yield teacher.encode(images, batch_size=batch_size).numpy()
                except TeacherOutputError as error:
                    raise self._row_error(int(batch[error.index, 0]), error) from error


def underlying(dataset: datasets.Dataset) -> datasets.Dataset:
    """All rows of the data set's table, in the order in which they lie there."""
    return datasets.Dataset(dataset.data, info=dataset.info.copy(), fingerprint=dataset._fingerprint)


def _is_image_like(feature: object) -> bool:
    """Whether `datasets.Image` can read what the feature stores: images, paths, bytes, {bytes, path}, or only null."""
    if isinstance(feature, dict):
        return bool(feature) and set(feature) <= {"bytes", "path"}
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("string", "large_string", "binary", "large_binary", "null")
    return isinstance(feature, datasets.Image)
