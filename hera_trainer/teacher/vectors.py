"""Teacher vectors as a column of the data set: computed once, cached on disk, memory-mapped ever after."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from datasets.utils import tqdm

from ..common.files import write_atomically
from ..common.processes import Team
from .cache import Entry, is_key
from .column import TEACHER_COLUMN, check_teacher_features
from .encoder import VisionTeacher, teacher_identity
from .images import ImageColumn, Images
from .tables import underlying

__all__ = ["TEACHER_COLUMN", "add_teacher_features", "cache_root", "cached_teacher_features", "check_teacher_features"]


def cache_root() -> Path:
    """The folder of all that this package caches: `hera_trainer` in the Hugging Face cache (`HF_HOME`)."""
    return Path(datasets.config.HF_CACHE_HOME) / "hera_trainer"


def add_teacher_features(
    dataset: datasets.Dataset,
    teacher: VisionTeacher | str | os.PathLike,
    *,
    batch_size: int = 32,
    chunk_size: int = 512,
    cache_dir: str | os.PathLike | None = None,
    desc: str = "Teacher vectors",
    distributed: bool = False,
    device: str | torch.device | None = None,
) -> datasets.Dataset:
    """Adds the column `teacher_features`: the teacher's vector of each row's image, a list of float32, or null.

    A row's images are those of its column `image` (one image or null) or else `images` (a list, may be empty or null),
    those inside its messages (`{"type": "image", "image": ...}`, or with another key that transformers loads), and
    frames of its videos: of a column `video` (a list of frames) or else `videos` (a list of such lists), and of
    `{"type": "video", "video": ...}`. Of a video with more than eight frames, eight are taken at equal distances, the
    first and the last included. An image of a column that stands inside of the messages as well counts once.

    One image gives the teacher's own vector; several, images and frames alike, give the direction of the mean of their
    L2-normalised vectors, with the mean of their norms, so that dot products of rows can be compared with and without
    normalisation; none gives null. Equal images are encoded once and get equal vectors, bit for bit.

    Results are cached on disk and memory-mapped. An entry is found by the images' content (sha256), in order, and the
    teacher's identity. For a data set backed by files, its fingerprint together with the size and time of all files it
    refers to spares reading the images again. While vectors are computed they are saved in chunks, so that a run that
    was killed loses at most one.

    A data set that already has the column is checked and returned as it is; the teacher is not even looked up.

    Args:
        dataset (`datasets.Dataset`): The data set. Selections, shuffles and formats are kept, nothing is copied.
        teacher ([`VisionTeacher`] or `str`): A teacher, which stays yours; or the name or path of one, which is loaded
            only if a vector is missing in the cache, and freed before this function returns.
        batch_size (`int`, *optional*, defaults to `32`): Images a forward pass of the teacher.
        chunk_size (`int`, *optional*, defaults to `512`): Vectors saved at a time while computing.
        cache_dir (`str` or `os.PathLike`, *optional*): Where the cache lies. Default: `hera_trainer/teacher_features`
            in the Hugging Face cache (`HF_HOME`).
        desc (`str`, *optional*): Text beside the progress bar.
        distributed (`bool`, *optional*, defaults to `False`): Divide the missing images among all processes of the run,
            each of which must then call this function alike. All get the same column. Processes that do not share a
            file system work for their own cache each.
        device (`str` or `torch.device`, *optional*):
            Where a teacher that is named runs, as in [`VisionTeacher.from_pretrained`]. One that is given stays where
            it is.

    Returns:
        `datasets.Dataset`: The data set with one more column.

    Raises:
        ValueError: If the existing column is faulty (see [`check_teacher_features`]), no row has an image, an image
            can't be read (its row is named), the teacher can't be loaded or returns NaN, or the data set is streaming
            or has a custom transform.
    """
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise ValueError(f"Expected a `datasets.Dataset`, got {type(dataset).__name__}. Pass each split by itself.")
    if isinstance(dataset, datasets.IterableDataset):
        if TEACHER_COLUMN not in (dataset.column_names or next(iter(dataset), {})):
            raise ValueError(
                "Streaming data sets (`IterableDataset`) cannot have a column added. Give the data set to HeRATrainer "
                f"as it is, which computes the vectors as rows come, bring a column `{TEACHER_COLUMN}` (one list of "
                "numbers a row), or load the data set without streaming."
            )
        return dataset
    if TEACHER_COLUMN in dataset.column_names:
        check_teacher_features(dataset)
        return dataset
    if min(batch_size, chunk_size) < 1:
        raise ValueError(f"`batch_size` and `chunk_size` must be at least 1, not {batch_size} and {chunk_size}.")

    column = ImageColumn(dataset)
    source = _TeacherSource(teacher, device)
    directory = Path(cache_dir or _vectors_root())
    directory.mkdir(parents=True, exist_ok=True)

    team = Team(distributed)
    sharers = team.sharers(directory)
    with team.together():
        alias, key, vectors = _known(directory, column, source.identity)
    if team.any(vectors is None):
        with team.together():
            images = column.scan(desc)
            key = images.key(source.identity)
            entry = Entry(directory, key, len(column))
            vectors = entry.load()
        if team.any(vectors is None):
            encoder = _Encoder(entry, column, images, source, batch_size, chunk_size, desc)
            try:
                vectors = encoder.run(team, sharers, done=vectors is not None)
            finally:
                source.release()
        if alias and team.index == sharers[0]:
            write_atomically(alias, lambda path: path.write_text(key))
    assert vectors is not None
    return attach(dataset, vectors, key)


def cached_teacher_features(dataset: datasets.Dataset, teacher: str | os.PathLike) -> datasets.Dataset | None:
    """What [`add_teacher_features`] returns, where it needs to read no image for it: the vectors of all rows are in the
    cache, and files and their times are those of before. `None` otherwise.

    Args:
        dataset (`datasets.Dataset`): The data set.
        teacher (`str` or `os.PathLike`): Name or path of a teacher.
    """
    _, key, vectors = _known(_vectors_root(), ImageColumn(dataset), teacher_identity(teacher))
    return None if vectors is None else attach(dataset, vectors, key)


def _vectors_root() -> Path:
    return cache_root() / "teacher_features"


def _known(directory: Path, column: ImageColumn, teacher: str) -> tuple[Path | None, str, datasets.Dataset | None]:
    """What can be known of a column's cached vectors without reading an image: the file that names their key, if there
    can be one; the key, if it is there; and the vectors, if they are."""
    fast_key = column.fast_key(teacher)
    alias = directory / f"{fast_key}.key" if fast_key else None
    key = alias.read_text(errors="replace") if alias and alias.exists() else ""
    return alias, key, Entry(directory, key, len(column)).load() if is_key(key) else None


def attach(dataset: datasets.Dataset, vectors: datasets.Dataset, key: str) -> datasets.Dataset:
    """A data set with a column of teacher vectors.

    Args:
        dataset (`datasets.Dataset`): The rows.
        vectors (`datasets.Dataset`): The column, laid out like the rows underneath those of `dataset`.
        key (`str`): What tells these vectors from others.
    """
    # `concatenate_datasets(axis=1)` first rewrites a data set that has an indices mapping (shuffle, select, split),
    # images and all. The vectors are laid out like the rows underneath it, so both share it and nothing is copied.
    joined = datasets.concatenate_datasets([underlying(dataset), vectors], axis=1)
    fingerprint = hashlib.sha256(f"{dataset._fingerprint} {key}".encode()).hexdigest()[:16]
    info = dataset.info.copy()  # the joined one does not say where the rows come from
    info.features = joined.features
    result = datasets.Dataset(
        joined.data, info=info, split=dataset.split, indices_table=dataset._indices, fingerprint=fingerprint
    )
    style = dataset.format
    if style["type"] is None and style["columns"] == dataset.column_names:
        return result
    columns = [*style["columns"], TEACHER_COLUMN]
    return result.with_format(style["type"], columns, style["output_all_columns"], **style["format_kwargs"])


class _TeacherSource:
    """The teacher of one call: a given one, or a name that is loaded when the first vector is missing."""

    def __init__(self, teacher: VisionTeacher | str | os.PathLike, device: str | torch.device | None = None):
        self._device = device
        self._name: str | os.PathLike | None = None
        self._teacher: VisionTeacher | None = None
        if isinstance(teacher, (str, os.PathLike)):
            self._name = teacher
            self.identity = teacher_identity(teacher)
        else:
            self._teacher = teacher
            self.identity = teacher.identity

    def get(self) -> VisionTeacher:
        if self._teacher is None:
            assert self._name is not None  # a teacher that was given is never released
            self._teacher = VisionTeacher.from_pretrained(self._name, self._device)
            if self._teacher.identity != self.identity:
                raise ValueError(f"The vision teacher {str(self._name)!r} changed while it was loaded. Run again.")
        return self._teacher

    def release(self) -> None:
        if self._name is not None and self._teacher is not None:
            self._teacher = None
            clear_device_cache(garbage_collection=True)


@dataclass
class _Encoder:
    """Encodes the distinct images, chunk by chunk, writes the finished entry and loads it."""

    entry: Entry
    column: ImageColumn
    images: Images
    source: _TeacherSource
    batch_size: int
    chunk_size: int
    desc: str

    def run(self, team: Team, sharers: list[int], done: bool) -> datasets.Dataset:
        """The finished column. To be called by all processes of the team alike.

        Args:
            team ([`~common.processes.Team`]): The processes.
            sharers (list of `int`): Those that share the cache's folder with this one.
            done (`bool`): Whether these have the column already.
        """
        several, leads = len(sharers) > 1, team.index == sharers[0]
        chunks = self._chunks(len(sharers))
        missing = [chunk for chunk in chunks if several and not done and not self.entry.has_chunk(*chunk)]
        own = missing[sharers.index(team.index) :: len(sharers)]
        team.wait()  # all have looked what is missing before one begins to write
        with team.together(), self._progress(sum(stop - start for start, stop in own), shown=several and leads) as bar:
            for start, stop in own:
                self.entry.save_chunk(start, stop, self._encode(start, stop, bar))
        with team.together():
            if leads and not done:
                self._assemble(chunks, shown=not several)
        vectors = self.entry.load()
        if vectors is None:
            raise ValueError(
                f"The teacher vectors written to {self.entry.path} can't be read back. Set another `cache_dir`."
            )
        return vectors

    def _chunks(self, sharers: int) -> list[tuple[int, int]]:
        """Where each chunk of distinct images begins and ends. Shared, there are equally many for each process, cut
        between two batches: an image's vector can depend, in its last bits, on the batch that it is encoded in."""
        total, size = len(self.images.digests), self.chunk_size
        if sharers > 1:
            rounds = -(-total // (size * sharers))
            size = -(-total // (rounds * sharers))
            size = -(-size // self.batch_size) * self.batch_size
        return [(start, min(start + size, total)) for start in range(0, total, size)]

    def _progress(self, total: int, shown: bool) -> tqdm:
        return tqdm(total=total, desc=self.desc, unit="image", disable=not shown)

    def _encode(self, start: int, stop: int, progress: tqdm) -> np.ndarray:
        batches = []
        for batch in self.column.encode(self.images.places[start:stop], self.source.get(), self.batch_size):
            batches.append(batch)
            progress.update(len(batch))
        return np.concatenate(batches)

    def _assemble(self, chunks: list[tuple[int, int]], shown: bool) -> None:
        """Writes the finished entry. Chunks that are missing, or not usable, are encoded."""
        total, width = len(self.images.digests), 0
        # A nameless file: the vectors need not fit into memory, and nothing is left behind if the process is killed.
        with tempfile.TemporaryFile(dir=self.entry.directory) as scratch, self._progress(total, shown) as progress:
            for start, stop in chunks:
                chunk = self.entry.load_chunk(start, stop)
                if chunk is None:
                    chunk = self._encode(start, stop, progress)
                    self.entry.save_chunk(start, stop, chunk)
                else:
                    progress.update(len(chunk))
                scratch.write(chunk.tobytes())
                width = chunk.shape[1]
            scratch.flush()
            self.entry.save(self.images, np.memmap(scratch, dtype=np.float32, mode="r", shape=(total, width)))
