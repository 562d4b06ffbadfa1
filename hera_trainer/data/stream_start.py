"""The first rows of a streamed data set: what is checked on them, and the samples that heads are ranked on."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Hashable
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..common.processes import Team
from ..heads.text import TextColumns, TextTokens, answer_text
from ..teacher.column import TEACHER_COLUMN
from .collator import ROW_PLACE
from .streaming import (
    ImagePreparer,
    NumberedStream,
    StreamTeacher,
    TeacherImages,
    image_digest,
    own_vector,
    row_images,
    row_vector,
)

# A stream may be endless and without a usable row: so many are looked at before giving up.
_ROWS_TO_AN_IMAGE = 1000
_ROWS_PER_RANKED_SAMPLE = 20
_ROWS_COMPARED = 2


def column_names(dataset: datasets.Dataset | datasets.IterableDataset, name: str) -> set[str]:
    """Names of the columns; those of a stream, which may not know them, are read off its first row.

    Raises:
        `ValueError`: If a stream has no row, or its first one can't be read.
    """
    if isinstance(dataset, datasets.Dataset):
        return set(dataset.column_names)
    for row in NumberedStream.of(dataset, f"`{name}`", has_vectors=False):
        return set(row) - {ROW_PLACE}
    raise ValueError(f"`{name}` is a stream without any row.")


def open_stream(dataset: datasets.IterableDataset, name: str, columns: TextColumns | None = None) -> NumberedStream:
    """The stream with numbered rows. To be called by all processes alike.

    Args:
        dataset ([`~datasets.IterableDataset`]): The stream, which has a row.
        name (`str`): What the trainer calls it.
        columns ([`~heads.text.TextColumns`], *optional*): Which columns of text are trained on.

    Raises:
        `ValueError`: If the first rows can't be read, or the processes read different ones.
    """
    if isinstance(dataset, NumberedStream):
        return dataset
    team = Team(distributed=True)
    digest = hashlib.sha256()
    with team.together():
        stream = NumberedStream.of(dataset, f"`{name}`", has_vectors=False)
        for row in itertools.islice(stream, _ROWS_COMPARED):
            stream.has_vectors = TEACHER_COLUMN in row
            digest.update(f"{answer_text(row, columns)} {sorted(row)}\n".encode())
    _check_same(team, digest.digest(), f"`{name}`")
    return stream


def stream_width(stream: NumberedStream, teacher: StreamTeacher | None) -> int:
    """Width of the stream's teacher vectors, seen from the first row that has one.

    Args:
        stream ([`~data.streaming.NumberedStream`]): The stream.
        teacher ([`~data.streaming.StreamTeacher`], *optional*): Encodes the images of a stream without vectors.

    Raises:
        `ValueError`: If none of the first rows has a vector or an image, or one of them can't be used.
    """
    for row in itertools.islice(stream, _ROWS_TO_AN_IMAGE):
        if stream.has_vectors:
            vector = own_vector(row)
            if vector is not None:
                return len(vector)
            continue
        assert teacher is not None
        images = ImagePreparer(teacher.teacher.image_processor)([row])
        if images is not None:
            return len(next(iter(teacher.encode([images]).values())))
    raise ValueError(
        f"No row of the first {_ROWS_TO_AN_IMAGE:,} of {stream.name} has "
        f"{f'a vector in column `{TEACHER_COLUMN}`' if stream.has_vectors else 'an image'}. Shuffle the stream, or set "
        "`alignment_weight=0` to train as SFTTrainer does."
    )


def ranking_samples(
    stream: NumberedStream,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    teacher: StreamTeacher | None,
    columns: TextColumns | None = None,
) -> datasets.Dataset:
    """The first samples of a stream on which heads can be ranked: those with an image, distinct ones, and an answer
    text. To be called by all processes alike, which divide the teacher's work.

    Args:
        stream ([`~data.streaming.NumberedStream`]): The stream.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        num_samples (`int`): Number of samples. Fewer are returned, with a warning if the stream goes on, where twenty
            times as many rows don't have them.
        teacher ([`~data.streaming.StreamTeacher`], *optional*): Encodes the images of a stream without vectors.
        columns ([`~heads.text.TextColumns`], *optional*): Which columns of text are trained on.

    Returns:
        [`~datasets.Dataset`]: Columns `completion` and `teacher_features`. Its fingerprint is a digest of both.

    Raises:
        `ValueError`: If a row can't be read, none can be used, or the processes read different rows.
    """
    team = Team(distributed=True)
    with team.together():
        draw = _Draw(tokenizer, teacher, team, stream.width, columns or TextColumns())
        looked_at = 0
        for row in itertools.islice(stream, _ROWS_PER_RANKED_SAMPLE * num_samples):
            looked_at += 1
            draw.add(row)
            if len(draw.texts) == num_samples:
                break
        draw.encode()
    if not draw.texts:
        raise ValueError(
            f"None of the first {looked_at:,} rows of {stream.name} has both an image and an answer text "
            f"(`completion`, assistant turns of `messages`, or `{draw.columns.field}`): heads cannot be ranked. Bring "
            "texts, shuffle the stream, or choose heads with `aligned_heads` or `head_ranking_path`."
        )
    if len(draw.texts) < num_samples and looked_at == _ROWS_PER_RANKED_SAMPLE * num_samples:
        warnings.warn(
            f"Only {len(draw.texts)} of the first {looked_at:,} rows of {stream.name} have an image of their own and "
            f"an answer text: attention heads are ranked on these instead of {num_samples}. Shuffle the stream.",
            stacklevel=2,
        )
    vectors = draw.vectors()
    digest = hashlib.sha256()
    for text, vector in zip(draw.texts, vectors, strict=True):
        digest.update(f"{len(text)} {text}".encode() + vector.tobytes())
    _check_same(team, digest.digest(), stream.name)
    features = datasets.Features(
        {"completion": datasets.Value("string"), TEACHER_COLUMN: datasets.List(datasets.Value("float32"))}
    )
    samples = datasets.Dataset.from_dict({"completion": draw.texts, TEACHER_COLUMN: vectors}, features=features)
    return datasets.Dataset(samples.data, info=samples.info, fingerprint=digest.hexdigest()[:16])


class _Draw:
    """Samples drawn so far. Their images are encoded a batch at a time, each batch by one process."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher: StreamTeacher | None,
        team: Team,
        width: int,
        columns: TextColumns,
    ) -> None:
        self.texts: list[str] = []
        self.columns = columns
        self._tokens = TextTokens(tokenizer)
        self._teacher = teacher
        self._prepare = None if teacher is None else ImagePreparer(teacher.teacher.image_processor)
        self._team = team
        self._width = width
        self._keys: list[Any] = []  # of each sample: its vector, or the digests of its images
        self._known: set[Hashable] = set()
        self._digests: dict[bytes, int] = {}  # each distinct image, and the number of its batch
        self._pending: list[TeacherImages] = []
        self._vectors: dict[bytes, np.ndarray] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Takes a row if it is usable and its images are new."""
        text = answer_text(row, self.columns)
        if not self._tokens(text)[1].any():
            return
        if self._teacher is None:
            vector = own_vector(row, self._width)
            key: Any = None if vector is None else vector.numpy()
            images: Hashable = None if vector is None else key.tobytes()  # equal images have equal vectors
        else:
            stored = row_images(row)
            key = [image_digest(image) for image in stored]
            images = tuple(sorted(key)) or None
        if images is None or images in self._known:
            return
        self._known.add(images)
        self.texts.append(text)
        self._keys.append(key)
        if self._teacher is not None:
            new = {digest: i for i, digest in enumerate(key) if digest not in self._digests}
            self._collect(list(new), {"images": [stored[i] for i in new.values()], ROW_PLACE: row[ROW_PLACE]})

    def _collect(self, digests: list[bytes], row: dict[str, Any]) -> None:
        assert self._teacher is not None and self._prepare is not None
        number = len(self._digests) // self._teacher.batch_size
        self._digests |= dict.fromkeys(digests, number)
        images = self._prepare([row]) if number % self._team.count == self._team.index else None
        if images is not None:
            self._pending.append(images)
        if len(self._digests) // self._teacher.batch_size > number:
            self.encode()

    def encode(self) -> None:
        """Encodes what this process has collected."""
        if self._teacher is not None:
            self._vectors |= self._teacher.encode(self._pending)
            self._pending.clear()

    def vectors(self) -> list[np.ndarray]:
        """The samples' vectors, the same in all processes, which must call this alike."""
        if self._teacher is None:
            return self._keys
        owners = [
            [digest for digest, number in self._digests.items() if number % self._team.count == index]
            for index in range(self._team.count)
        ]
        own = torch.zeros(len(owners[self._team.index]), self._width)
        for i, digest in enumerate(owners[self._team.index]):
            own[i] = torch.from_numpy(self._vectors[digest])
        gathered = self._team.gather_rows(own).cpu().numpy()
        known = dict(zip(itertools.chain(*owners), gathered, strict=True))
        return [row_vector([known[digest] for digest in digests]).numpy() for digests in self._keys]


def _check_same(team: Team, digest: bytes, name: str) -> None:
    own = torch.tensor(list(digest))
    if team.any(not torch.equal(team.same(own), own)):
        raise ValueError(
            f"The processes of this run read different rows from {name}. Shuffle it with the same `seed` in all of "
            "them, and leave dividing it among them to the trainer (no `shard`, no `split_dataset_by_node`)."
        )
