"""The way of the teacher's vectors: from the data sets, or from the images of a stream, into each batch."""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import Trainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from .alignment import Alignment
from .config import HeRAConfig
from .data import (
    ROW_PLACE,
    TEACHER_COLUMN,
    TEACHER_IMAGES,
    TeacherCollator,
    check_collator,
    check_ranked_text,
    pooling_mask,
)
from .features import check_teacher_features
from .preparation import check_dataset, check_expected_pool, check_width, with_teacher_features
from .randomness import same_randomness
from .rows import CARRIED_COLUMNS, TextColumns, check_tools
from .stream_start import open_stream, ranking_samples, stream_width
from .streaming import ImagePreparer, NumberedStream, StreamTeacher, own_vector, stored_images, unreadable
from .teacher import VisionTeacher, teacher_identity
from .teacher_column import rows_with_vectors

logger = get_logger(__name__)

# To see how many rows can take part: read of a stream, and collated of those with an image.
_ROWS_OF_A_STREAM = 256
_ROWS_COLLATED = 32

# The mixin calls on to a Trainer: type checkers must see it, the class hierarchy must not repeat it.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class TeacherVectorsMixin(_Base):
    """Attaches teacher vectors to a trainer's data sets, or computes them as batches come, and carries them along."""

    args: HeRAConfig
    alignment: Alignment | None
    eval_dataset: Any
    processing_class: Any
    _signature_columns: Any
    _teacher: VisionTeacher | str
    _teacher_width: int | None = None
    _stream_teacher: StreamTeacher | None = None
    _brings_vectors = False
    _prepared_data: tuple[Any, Any, Any] = (None, None, None)

    @property
    def teacher_name(self) -> str:
        """Name of the teacher; empty where the training data brought their vectors, of which no more is known."""
        if self._brings_vectors:
            return ""
        return self._teacher if isinstance(self._teacher, str) else self._teacher.name

    @property
    def _text_columns(self) -> TextColumns:
        """Which columns of text the collator trains on."""
        args, collator = self.args, self.data_collator
        inner = collator.inner if isinstance(collator, TeacherCollator) else collator
        if isinstance(inner, DataCollatorForVisionLanguageModeling):
            return TextColumns(inner.dataset_text_field, not args.remove_unused_columns)
        named = None if args.dataset_text_field == "text" else args.dataset_text_field
        return TextColumns(args.dataset_text_field, not args.remove_unused_columns, named)

    def _prepare_data(self, ranks_heads: bool = False) -> None:
        """Gives teacher vectors to the data sets and the collator that the trainer holds now, unless they have them.
        Any of the three may have been replaced since the last time.

        Args:
            ranks_heads (`bool`, *optional*, defaults to `False`):
                Whether heads will be ranked on the texts of the training data.
        """
        if (self.train_dataset, self.eval_dataset, self.data_collator) == self._prepared_data:
            return
        is_new = self.train_dataset is not self._prepared_data[0]
        if is_new:
            # The column names of a stream may not be known before it is opened.
            self._brings_vectors = TEACHER_COLUMN in (getattr(self.train_dataset, "column_names", None) or ())
            check_dataset(self.train_dataset, "train_dataset")
            if isinstance(self.train_dataset, IterableDataset):
                self.train_dataset = open_stream(self.train_dataset, "train_dataset", self._text_columns)
        collator = self.data_collator
        if not isinstance(collator, TeacherCollator):
            collator = TeacherCollator(collator, width=self._teacher_width or 0, columns=self._text_columns)
        # Before the teacher has worked for hours.
        self._check_first_rows(collator, ranks_heads)
        # Own columns first: a fault in one of them is said before the teacher has worked for hours on another.
        if is_new:
            self.train_dataset = self._with_teacher_features(self.train_dataset, "train_dataset", self._teacher_width)
        rows: Any = self.train_dataset
        if isinstance(rows, NumberedStream):
            self._brings_vectors = rows.has_vectors
            self._teacher_width = rows.width
        else:
            self._teacher_width = check_teacher_features(rows)
        if self.eval_dataset is not None:
            self.eval_dataset = self._with_teacher_features(self.eval_dataset, "eval_dataset", self._teacher_width)
        collator.width = self._teacher_width
        self.data_collator = collator
        self._prepare_images()
        assert self.alignment is not None
        self.alignment.teacher_width = self._teacher_width
        if self.args.queue_size:  # now: looking a teacher up while training could fail
            self.alignment.teacher_identity = self._identify_teacher()
        check_expected_pool(self.args, *self._usable_rows(), isinstance(self.train_dataset, IterableDataset))
        self._prepared_data = self.train_dataset, self.eval_dataset, self.data_collator

    def get_train_dataloader(self) -> Any:
        self._prepare_replaced_data()
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        self._prepare_replaced_data()
        if self._teacher_width is not None and eval_dataset is not None:
            # A named one may have been put into the dictionary since.
            given = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
            prepared = self._with_teacher_features(given, "eval_dataset", self._teacher_width)
            if isinstance(eval_dataset, str):
                self.eval_dataset[eval_dataset] = prepared
            else:
                eval_dataset = prepared
        return super().get_eval_dataloader(eval_dataset)

    def _prepare_replaced_data(self) -> None:
        if self._teacher_width is not None:  # otherwise, nothing was prepared yet
            with same_randomness(self.args.device):
                self._prepare_data()

    def _check_first_rows(self, collator: TeacherCollator, ranks_heads: bool) -> None:
        """Collates two rows as they are trained on. What the labels of a collator of the user's own cover is compared
        with the texts that heads would be ranked on."""
        assert self.alignment is not None
        rows = self._first_rows()
        columns = self._text_columns
        if ranks_heads:
            names = set().union(*rows, getattr(self.train_dataset, "column_names", None) or ())
            columns.required(names - {TEACHER_COLUMN, ROW_PLACE})
        batch = check_collator(collator, [self._as_trained(row) for row in rows])
        if ranks_heads and type(collator.inner) is not DataCollatorForVisionLanguageModeling:
            check_ranked_text(batch, rows, columns, self._ranking_tokenizer, self.alignment.placeholder_ids)

    def _first_rows(self) -> list[dict[str, Any]]:
        rows: Any = self.train_dataset
        if isinstance(rows, NumberedStream):
            return list(itertools.islice(rows, 2))
        first = []
        for number in range(min(2, len(rows))):
            place = f"Row {number} of `train_dataset`"
            try:
                first.append({**rows[number], ROW_PLACE: place})
            except Exception as error:  # whatever decoding or the user's own transforms raise
                raise unreadable(place, error) from error
        return first

    def _as_trained(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with those columns that `Trainer` lets through to the collator."""
        if not self.args.remove_unused_columns:
            return row
        self._set_signature_columns_if_needed()
        return {name: value for name, value in row.items() if name in self._signature_columns}

    def _with_teacher_features(self, dataset: Any, name: str, width: int | None = None) -> Any:
        """A data set, or each one of a dictionary, with teacher vectors of `width`; or a stream that will have them."""
        if isinstance(dataset, dict):
            return {
                key: self._with_teacher_features(value, f"{name}[{key!r}]", width) for key, value in dataset.items()
            }
        if not isinstance(dataset, NumberedStream):  # one that is opened has been looked at
            check_dataset(dataset, name)
        if not isinstance(dataset, IterableDataset):
            check_tools(dataset, self.data_collator)
            return with_teacher_features(dataset, name, self._teacher, self.args.teacher_batch_size, width)
        self._forbid_dispatching()
        stream = open_stream(dataset, name, self._text_columns)
        if not stream.width:
            stream.width = stream_width(stream, None if stream.has_vectors else self._load_stream_teacher())
        check_width(stream.width, name, width)
        return stream

    def _forbid_dispatching(self) -> None:
        # Prepared images are no tensors that could be sliced for other processes. SFTTrainer says and does the same if
        # the training data is a stream.
        loading = self.accelerator.dataloader_config
        if loading.dispatch_batches:
            logger.warning("`dispatch_batches` is set to `False`, since a data set is an `IterableDataset`.")
        loading.dispatch_batches = False

    def _load_stream_teacher(self) -> StreamTeacher:
        """The teacher that stays in memory, loaded for the first stream that brings no vectors."""
        if self._stream_teacher is None:
            if not isinstance(self._teacher, VisionTeacher):
                self._teacher = VisionTeacher.from_pretrained(self._teacher, device=self.args.device)
            self._stream_teacher = StreamTeacher(self._teacher, self.args.teacher_batch_size)
            self._prepare_images()
        return self._stream_teacher

    def _prepare_images(self) -> None:
        if self._stream_teacher is not None and isinstance(self.data_collator, TeacherCollator):
            self.data_collator.prepare = ImagePreparer(self._stream_teacher.teacher.image_processor)

    def _ranking_samples(self) -> Dataset:
        """Rows with teacher vectors on which heads are ranked: the training data, or the first samples of a stream."""
        rows: Any = self.train_dataset
        columns = self._text_columns
        if isinstance(rows, NumberedStream):
            teacher = None if rows.has_vectors else self._load_stream_teacher()
            return ranking_samples(rows, self._ranking_tokenizer, self.args.ranking_num_samples, teacher, columns)
        column = columns.required(rows.column_names)
        if column == TextColumns().ranked(rows.column_names):
            return rows
        # By the name under which a ranking looks for plain text.
        rows = rows.select_columns([column, TEACHER_COLUMN])
        return rows if column == "text" else rows.rename_column(column, "text")

    @property
    def _ranking_tokenizer(self) -> Any:
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    def _first_image_row(self) -> dict[str, Any]:
        """The first row that has a teacher vector or, in a stream without vectors, an image."""
        rows: Any = self.train_dataset
        if isinstance(rows, NumberedStream):
            return next(row for row in rows if _has_image(row, rows.has_vectors))
        return rows[int(rows_with_vectors(rows)[0])]

    def _identify_teacher(self) -> str:
        """Tells teachers apart; of vectors that the data brought, nothing but the first of them can."""
        if self._brings_vectors:
            return hashlib.sha256(np.asarray(self._first_image_row()[TEACHER_COLUMN], np.float32).tobytes()).hexdigest()
        return teacher_identity(self._teacher) if isinstance(self._teacher, str) else self._teacher.identity

    def _usable_rows(self) -> tuple[int, int]:
        """How many rows, out of how many, can take part in the alignment loss: those that have an image and, as far as
        some of these tell, a label. Of a stream, its first rows are looked at."""
        assert self.alignment is not None
        rows: Any = self.train_dataset
        if isinstance(rows, NumberedStream):
            vectors, rows = rows.has_vectors, list(itertools.islice(rows, _ROWS_OF_A_STREAM))
            usable: Any = [i for i, row in enumerate(rows) if _has_image(row, vectors)]
        else:
            usable = rows_with_vectors(rows)
        # At random: at equal distances, data of alternating kinds would show one of them.
        chosen = [int(i) for i in np.random.default_rng(0).permutation(usable)[:_ROWS_COLLATED]]
        batches = (self.data_collator([self._as_trained(rows[i])]) for i in chosen)
        masks = [pooling_mask(batch["labels"], batch["input_ids"], self.alignment.placeholder_ids) for batch in batches]
        return round(len(usable) * sum(bool(mask.any()) for mask in masks) / max(1, len(chosen))), len(rows)

    def _image_batch(self) -> dict[str, Any]:
        """Inputs of the model for the first row with an image."""
        batch = self.data_collator([self._as_trained(self._first_image_row())])
        return {name: value for name, value in batch.items() if name not in (TEACHER_COLUMN, TEACHER_IMAGES, "labels")}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.alignment is not None:
            columns: list[str] = self._signature_columns or []
            own = (TEACHER_COLUMN, ROW_PLACE, *CARRIED_COLUMNS, self._text_columns.field)
            self._signature_columns = [*columns, *(name for name in own if name not in columns)]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self._stream_teacher is not None:  # here, so that those batches that resuming skips are never encoded
            self._stream_teacher.fill(batches)
        return batches, num_items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self._stream_teacher is not None and TEACHER_IMAGES in inputs:  # of evaluation
            self._stream_teacher.fill([inputs])
        # DeepSpeed casts floating-point inputs to the model's dtype; teacher vectors stay float32.
        vectors: torch.Tensor | None = inputs.pop(TEACHER_COLUMN, None)
        inputs = super()._prepare_inputs(inputs)
        if vectors is not None:
            inputs[TEACHER_COLUMN] = vectors.to(self.args.device)
        return inputs


def _has_image(row: dict[str, Any], has_vectors: bool) -> bool:
    """Whether a row of a stream, which has vectors or images, has one."""
    return own_vector(row) is not None if has_vectors else bool(stored_images(row))
