"""The way of the teacher vectors: from the data sets, or from the images of a stream, into each batch."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..config import HeRAConfig
from ..heads.pooling import pooling_mask
from ..heads.text import CONVERSATIONS, TextColumns, from_llava, special_tokens, words
from ..teacher.column import TEACHER_COLUMN, check_teacher_features, rows_with_vectors
from ..teacher.control import distinct_vectors, permuted_vectors
from ..teacher.encoder import VisionTeacher, teacher_identity
from ..teacher.image_sources import IMAGE_COLUMNS
from ..teacher.images import ImageColumn
from .checks import check_dataset, check_width, warn_of_missing_vectors, with_teacher_features
from .collator import ROW_PLACE, TEACHER_IMAGES, RowCollator, TeacherCollator, check_collator, check_ranked_text
from .pool import RowCounts, check_expected_pool
from .rows import CARRIED_COLUMNS, check_tools, makes_its_own_rows
from .stream_start import open_stream, ranking_samples, stream_width
from .streaming import ImagePreparer, NumberedStream, StreamTeacher, own_vector, stored_images, unreadable

logger = get_logger(__name__)

# To see how many rows can take part: read of a stream, and collated of those with an image.
_ROWS_OF_A_STREAM = 256
_ROWS_COLLATED = 32


def text_columns(args: HeRAConfig, collator: Any) -> TextColumns:
    """Which columns of text a collator trains on."""
    inner = collator.inner if isinstance(collator, RowCollator) else collator
    named = None if args.dataset_text_field == "text" else args.dataset_text_field
    if isinstance(inner, DataCollatorForVisionLanguageModeling):
        field = inner.dataset_text_field
        own = makes_its_own_rows(inner) and named != field
        return TextColumns(field, not args.remove_unused_columns, named if own else None)
    return TextColumns(args.dataset_text_field, not args.remove_unused_columns, named)


def signature_columns(args: HeRAConfig, collator: Any) -> list[str]:
    """Columns that must reach the collator besides those that SFTTrainer lets through."""
    return [TEACHER_COLUMN, ROW_PLACE, *CARRIED_COLUMNS, text_columns(args, collator).field]


def without_vectors(args: HeRAConfig, collator: Any) -> Any:
    """The collator of a run without alignment, which takes rows in the same forms as one with it: SFTTrainer's own is
    wrapped, and any other left as it is."""
    if not isinstance(collator, DataCollatorForVisionLanguageModeling) or makes_its_own_rows(collator):
        return collator
    return RowCollator(collator, text_columns(args, collator))


class TeacherVectors:
    """Attaches teacher vectors to the data sets of a run, or computes them as batches come, and carries them along.

    Args:
        args ([`HeRAConfig`]): The settings.
        teacher ([`VisionTeacher`], `str` or path): The teacher, or its name or path.
        accelerator ([`~accelerate.Accelerator`]): Of the run.
        processing_class: The model's processor.
        placeholder_ids (sequence of `int`): See [`~heads.pooling.placeholder_token_ids`].

    Attributes:
        train_dataset, eval_dataset, data_collator: What `prepare` made of those of the run.
        right_rows: The training data with the right vectors, also in a control run.
        width (`int` or `None`): Numbers of a teacher vector, once the training data is prepared.
        eval_brings_vectors (`bool`): Whether the data to evaluate on, if it is a single set, brought its vectors.
        identity (`str`): Tells teachers apart, where past samples are kept (`queue_size`).
    """

    def __init__(
        self,
        args: HeRAConfig,
        teacher: VisionTeacher | str | os.PathLike,
        accelerator: Accelerator,
        processing_class: Any,
        placeholder_ids: Sequence[int],
    ) -> None:
        self.args = args
        self.teacher = os.fspath(teacher) if isinstance(teacher, os.PathLike) else teacher
        self.accelerator = accelerator
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.placeholder_ids = placeholder_ids
        self.train_dataset: Any = None
        self.eval_dataset: Any = None
        self.data_collator: Any = None
        self.width: int | None = None
        self.identity = ""
        self._stream_teacher: StreamTeacher | None = None
        self.right_rows: Any = None
        self._brings_vectors = False
        self.eval_brings_vectors = False
        self._said: set[str] = set()
        self._attached: set[str] = set()
        self._passed_columns: Collection[str] | None = None

    @property
    def name(self) -> str:
        """Name of the teacher; empty where the training data brought their vectors, of which no more is known."""
        if self._brings_vectors:
            return ""
        return self.teacher if isinstance(self.teacher, str) else self.teacher.name

    # Before training

    def prepare(
        self,
        train_dataset: Any,
        eval_dataset: Any,
        data_collator: Any,
        columns: Collection[str] | None = None,
        ranks_heads: bool = False,
    ) -> tuple[Any, Any, Any]:
        """Gives teacher vectors to data sets and a collator, unless they have them. To be called again whenever one of
        the three may have been replaced.

        Args:
            train_dataset, eval_dataset, data_collator: As a trainer holds them.
            columns (collection of `str`, *optional*): Columns that reach the collator. All by default.
            ranks_heads (`bool`, *optional*, defaults to `False`):
                Whether heads will be ranked on the texts of the training data.

        Returns:
            `tuple`: What to train on, to evaluate on, and to collate with.

        Raises:
            `ValueError`: If the data or the teacher cannot be used.
        """
        prepared = self.train_dataset, self.eval_dataset, self.data_collator
        if (train_dataset, eval_dataset, data_collator) == prepared:
            return prepared
        is_new = train_dataset is not self.train_dataset
        is_collated_anew = is_new or data_collator is not self.data_collator
        if type(data_collator) is RowCollator:  # of a run without alignment
            data_collator = data_collator.inner
        collator, self.data_collator = data_collator, data_collator
        self._passed_columns = columns
        rows: Any = train_dataset
        is_control = self.args.teacher_control == "permuted"
        if is_new:
            is_derived = self._is_derived(rows, self.train_dataset)
            if is_control:
                _check_control(rows, is_derived)
            if not is_derived:  # the column names of a stream may not be known before it is opened
                self._brings_vectors = TEACHER_COLUMN in (getattr(rows, "column_names", None) or ())
            check_dataset(rows, "train_dataset")
            if isinstance(rows, Dataset) and TEACHER_COLUMN in rows.column_names:
                warn_of_missing_vectors(rows, "train_dataset")
            if isinstance(rows, IterableDataset):
                rows = open_stream(rows, "train_dataset", self.columns)
        if not isinstance(collator, TeacherCollator):
            collator = TeacherCollator(collator, width=self.width or 0, columns=self.columns)
        # Before the teacher has worked for hours.
        self._check_first_rows(rows, collator, ranks_heads)
        # Own columns first: a fault in one of them is said before the teacher has worked for hours on another.
        if is_new:
            rows = self.attach(rows, "train_dataset", self.width)
            self.right_rows = rows
            if is_control:
                rows = permuted_vectors(rows, self.args.seed)
        if isinstance(rows, NumberedStream):
            self._brings_vectors = rows.has_vectors
            self.width = rows.width
        else:
            self.width = check_teacher_features(rows)
        if eval_dataset is not self.eval_dataset:
            names = getattr(eval_dataset, "column_names", None) or ()
            is_derived = self._is_derived(eval_dataset, self.eval_dataset) and not self.eval_brings_vectors
            self.eval_brings_vectors = TEACHER_COLUMN in names and not is_derived
        if eval_dataset is not None:
            eval_dataset = self.attach(eval_dataset, "eval_dataset", self.width)
        collator.width = self.width
        self.train_dataset, self.eval_dataset, self.data_collator = rows, eval_dataset, collator
        self._prepare_images()
        if self.args.queue_size:  # now: looking a teacher up while training could fail
            self.identity = self._identify_teacher()
        if is_collated_anew:
            check_expected_pool(self.args, self.count_rows())
        return rows, eval_dataset, collator

    def _is_derived(self, rows: Any, before: Any) -> bool:
        """Whether rows have the column from what was prepared here before, as `train_dataset.select(...)` has."""
        if not isinstance(before, Dataset) or not isinstance(rows, Dataset) or TEACHER_COLUMN not in rows.column_names:
            return False
        check_teacher_features(rows)
        return distinct_vectors(rows) <= distinct_vectors(before)

    def prepare_eval(self, dataset: Any) -> Any:
        """What to evaluate on where another data set is named than the run's.

        Args:
            dataset: A data set, or the key of one in the run's dictionary of them, where it may have been put since.
        """
        if self.width is None or dataset is None:  # nothing was prepared yet
            return dataset
        if not isinstance(dataset, str):
            return self.attach(dataset, "eval_dataset", self.width)
        name = f"eval_dataset[{dataset!r}]"
        self.eval_dataset[dataset] = self.attach(self.eval_dataset[dataset], name, self.width)
        return dataset

    def can_attach(self, dataset: Any) -> bool:
        """Whether a data set that need not be aligned can get vectors without asking for what training did not need."""
        if self.width is None or not isinstance(dataset, (Dataset, IterableDataset)):
            return False
        names = getattr(dataset, "column_names", None) or ()
        return TEACHER_COLUMN in names or (not self._brings_vectors and not set(IMAGE_COLUMNS).isdisjoint(names))

    @property
    def columns(self) -> TextColumns:
        """Which columns of text the collator trains on."""
        return text_columns(self.args, self.data_collator)

    def attach(self, dataset: Any, name: str, width: int | None = None) -> Any:
        """A data set, or each one of a dictionary, with teacher vectors of `width`; or a stream that will have them."""
        if isinstance(dataset, dict):
            return {key: self.attach(value, f"{name}[{key!r}]", width) for key, value in dataset.items()}
        if not isinstance(dataset, NumberedStream):  # one that is opened has been looked at
            check_dataset(dataset, name)
            if name != "train_dataset" and self._has_no_images(dataset, name):
                return dataset
            self._warn_of_another_teacher(dataset, name)
        if not isinstance(dataset, IterableDataset):
            check_tools(dataset, self.data_collator)
            rows = with_teacher_features(dataset, name, self.teacher, self.args.teacher_batch_size, width)
            _check_not_hidden(rows, name)
            self._attached.add(rows._fingerprint)
            return rows
        self._forbid_dispatching()
        stream = open_stream(dataset, name, self.columns)
        if not stream.width:
            stream.width = stream_width(stream, None if stream.has_vectors else self._load_stream_teacher())
        check_width(stream.width, name, width)
        return stream

    def _has_no_images(self, dataset: Dataset | IterableDataset, name: str) -> bool:
        """Whether no row of what is evaluated has an image, as of a split of texts. It has a loss all the same."""
        if isinstance(dataset, IterableDataset):
            return False
        if TEACHER_COLUMN in dataset.column_names:
            if len(rows_with_vectors(dataset)):
                return False
        elif ImageColumn(dataset).has_images():
            return False
        self._warn_once(f"No row of `{name}` has an image: its alignment loss is not measured.")
        return True

    def _warn_of_another_teacher(self, dataset: Any, name: str) -> None:
        """Vectors that came with data are anyone's; what they are held against is not to be another's."""
        names = getattr(dataset, "column_names", None)  # not known of every stream
        if names is None or name == "train_dataset" or self._brings_vectors == (TEACHER_COLUMN in names):
            return
        teacher = self.teacher if isinstance(self.teacher, str) else self.teacher.name
        if self._brings_vectors:
            self._warn_once(
                f"The training data brings its own `{TEACHER_COLUMN}`, and `{name}` has none: its images are encoded "
                f"by {teacher}. If another encoder made those of the training data, name it in "
                f"`teacher_model_name_or_path`, or give `{name}` the column, too (`hera_trainer.add_teacher_features`)."
            )
            return
        message = (
            f"`{name}` brings its own `{TEACHER_COLUMN}`, and the training data has none: its images are encoded by "
            f"{teacher}. If another encoder made those of `{name}`, its alignment loss says nothing of training: drop "
            f"the column (`remove_columns({TEACHER_COLUMN!r})`), and its images are encoded, too."
        )
        if message not in self._said and not self._was_prepared(dataset):
            self._warn_once(message)

    def _was_prepared(self, dataset: Any) -> bool:
        """Whether a data set's vectors were attached to it, or to what it was taken from, here."""
        if getattr(dataset, "_fingerprint", None) in self._attached:
            return True
        known = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return any(self._is_derived(dataset, rows) for rows in (*known, self.right_rows) if rows is not dataset)

    def _warn_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)

    def _check_first_rows(self, rows: Any, collator: TeacherCollator, ranks_heads: bool) -> None:
        """Collates two rows as they are trained on. What the labels of a collator of the user's own cover is compared
        with the texts that heads would be ranked on."""
        first = _first_rows(rows)
        columns = self.columns
        names = set().union(*first, getattr(rows, "column_names", None) or ())
        is_theirs = _is_theirs(collator)
        if is_theirs and not columns.trained(names) and (advice := from_llava(names)):
            raise ValueError(f"There is no text to train on.{advice}")
        if ranks_heads:
            columns.required(names - {TEACHER_COLUMN, ROW_PLACE})
        without = _without_placeholder(first, columns, self.tokenizer) if is_theirs else None
        try:
            batch = check_collator(collator, [self._as_trained(row) for row in first])
        except Exception as error:  # whatever the processor raises
            if without is not None:
                raise ValueError(f"{without} (The batch could not be made: {error})") from error
            raise
        placeholders = torch.tensor(list(self.placeholder_ids), dtype=batch["input_ids"].dtype)
        if without is not None and len(placeholders) and not torch.isin(batch["input_ids"], placeholders).any():
            raise ValueError(without)
        if ranks_heads and not is_theirs:
            check_ranked_text(batch, first, columns, self.tokenizer, self.placeholder_ids)

    def _as_trained(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with those columns that `Trainer` lets through to the collator."""
        if self._passed_columns is None:
            return row
        return {name: value for name, value in row.items() if name in self._passed_columns}

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
            if not isinstance(self.teacher, VisionTeacher):
                self.teacher = VisionTeacher.from_pretrained(self.teacher, device=self.args.device)
            self._stream_teacher = StreamTeacher(self.teacher, self.args.teacher_batch_size)
            self._prepare_images()
        return self._stream_teacher

    def _prepare_images(self) -> None:
        if self._stream_teacher is not None and isinstance(self.data_collator, TeacherCollator):
            self.data_collator.prepare = ImagePreparer(self._stream_teacher.teacher.image_processor)

    def _first_image_row(self) -> dict[str, Any]:
        """The first row that has a teacher vector or, in a stream without vectors, an image."""
        rows = self.train_dataset
        if isinstance(rows, NumberedStream):
            return next(row for row in rows if _has_image(row, rows.has_vectors))
        return rows[int(rows_with_vectors(rows)[0])]

    def _identify_teacher(self) -> str:
        """Tells teachers apart; of vectors that the data brought, nothing but the first of them can."""
        if self._brings_vectors:
            first = np.asarray(self._first_image_row()[TEACHER_COLUMN], np.float32)
            identity = hashlib.sha256(first.tobytes()).hexdigest()
        else:
            identity = teacher_identity(self.teacher) if isinstance(self.teacher, str) else self.teacher.identity
        is_control = self.args.teacher_control != "none"
        return f"{identity} {self.args.teacher_control} {self.args.seed}" if is_control else identity

    @property
    def rows_without_image(self) -> int:
        """Training rows without an image, where that is known: not of streams and of vectors that the data brought."""
        rows = self.train_dataset
        known = isinstance(rows, Dataset) and not self._brings_vectors
        return len(rows) - len(rows_with_vectors(rows)) if known else 0

    def count_rows(self) -> RowCounts:
        """How many rows of the training data have an image and, as far as some of these tell, labels. Of a stream, its
        first rows are looked at."""
        rows = self.train_dataset
        is_stream = isinstance(rows, NumberedStream)
        if is_stream:
            vectors, rows = rows.has_vectors, list(itertools.islice(rows, _ROWS_OF_A_STREAM))
            with_image: Any = [i for i, row in enumerate(rows) if _has_image(row, vectors)]
        else:
            with_image = rows_with_vectors(rows)
        # At random: at equal distances, data of alternating kinds would show one of them.
        chosen = [int(i) for i in np.random.default_rng(0).permutation(with_image)[:_ROWS_COLLATED]]
        tokens, writes_placeholder = [], False
        for i in chosen:  # one at a time: pixels of many rows may be large
            row = rows[i]
            writes_placeholder |= any("<image>" in str(row.get(name)) for name in CONVERSATIONS)
            batch = self.data_collator([self._as_trained(row)])
            tokens.append(int(pooling_mask(batch["labels"], batch["input_ids"], self.placeholder_ids).sum()))
        if writes_placeholder:
            self._warn_of_written_placeholders()
        with_label = sum(count > 0 for count in tokens)
        return RowCounts(len(rows), len(with_image), len(chosen), with_label, sum(tokens), is_stream)

    def _warn_of_written_placeholders(self) -> None:
        """LLaVA's data has its placeholder in the texts. Other models read it as words, beside the image."""
        if _is_theirs(self.data_collator) and "<image>" not in self.tokenizer.get_vocab():
            logger.warning(
                "Texts of the training data hold `<image>`, which this model reads as words: its placeholder is "
                "another, and SFTTrainer writes that by itself. Take `<image>` out of the texts (docs/data.md)."
            )

    # What heads are chosen on

    def ranking_samples(self) -> Dataset:
        """Rows with teacher vectors on which heads are ranked: the training data, or the first samples of a stream."""
        rows = self.right_rows
        columns = self.columns
        if isinstance(rows, NumberedStream):
            teacher = None if rows.has_vectors else self._load_stream_teacher()
            return ranking_samples(rows, self.tokenizer, self.args.ranking_num_samples, teacher, columns)
        column = columns.required(rows.column_names)
        if column == TextColumns().ranked(rows.column_names):
            return rows
        # By the name under which a ranking looks for plain text.
        rows = rows.select_columns([column, TEACHER_COLUMN])
        return rows if column == "text" else rows.rename_column(column, "text")

    def image_batch(self) -> dict[str, Any]:
        """Inputs of the model for the first row with an image."""
        batch = self.data_collator([self._as_trained(self._first_image_row())])
        return {name: value for name, value in batch.items() if name not in (TEACHER_COLUMN, TEACHER_IMAGES, "labels")}

    # While training

    def fill(self, batches: list[dict[str, Any]]) -> None:
        """Encodes the images that streamed batches carry, if any."""
        if self._stream_teacher is not None:
            self._stream_teacher.fill(batches)

    def take(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Takes a batch's vectors out of the model's inputs, on the device of the run.

        DeepSpeed casts floating-point inputs to the model's dtype; teacher vectors stay float32.
        """
        if TEACHER_IMAGES in inputs:  # of evaluation
            self.fill([inputs])
        vectors = inputs.pop(TEACHER_COLUMN, None)
        return None if vectors is None else vectors.to(self.args.device)


def _is_theirs(collator: TeacherCollator) -> bool:
    """Whether texts are made by SFTTrainer's collator, as it comes."""
    return type(collator.inner) is DataCollatorForVisionLanguageModeling


def _without_placeholder(rows: list[dict[str, Any]], columns: TextColumns, tokenizer: Any) -> str | None:
    """What to say of plain texts that do not show where the images of their rows belong, if these are such."""
    special = special_tokens(tokenizer)
    for row in rows:
        trained = [name for name in columns.trained(row) if name in row]
        texts = [row[name] for name in trained if name != "messages"]  # which may be turns as JSON
        is_plain = bool(texts) and all(isinstance(text, str) for text in texts)
        if is_plain and all(words(text, special) == text for text in texts) and stored_images(row):
            return (
                f"Column `{trained[-1]}` holds plain texts without the placeholder of an image, and SFTTrainer writes "
                'it into turns alone. Make turns of them, in columns `prompt` and `completion` (docs/data.md, "A '
                'folder of images with captions").'
            )
    return None


def _check_control(rows: Any, is_derived: bool) -> None:
    if is_derived:
        raise ValueError(
            f"`train_dataset` was replaced by rows of what it was, which may have other images' `{TEACHER_COLUMN}` "
            "already: `teacher_control='permuted'` was applied to them. Choose rows before the trainer prepares its "
            f"data, or remove the column (`remove_columns({TEACHER_COLUMN!r})`) to have it computed anew."
        )
    if isinstance(rows, IterableDataset):
        raise ValueError(
            "`teacher_control='permuted'` gives each image another image's teacher vector, for which all images must be"
            " known, but `train_dataset` is a stream. Load the data set (`streaming=False`), or take rows of it: "
            "`Dataset.from_list(list(stream.take(10000)), features=stream.features)`."
        )
    logger.warning(
        "Control run: `teacher_control='permuted'` trains with other images' teacher vectors. Ranking, evaluation and "
        "monitor keep the right ones."
    )


def _first_rows(rows: Any) -> list[dict[str, Any]]:
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


def _check_not_hidden(rows: Dataset, name: str) -> None:
    """Refuses a transform or format that leaves the vectors out: nothing would be aligned, without a word."""
    number = int(rows_with_vectors(rows)[0])
    place = f"Row {number} of `{name}`"
    try:
        row = rows[number]
    except Exception as error:  # whatever decoding or the user's own transforms raise
        raise unreadable(place, error) from error
    if row.get(TEACHER_COLUMN) is None:
        raise ValueError(
            f"{place} comes without its teacher vector: the data set's transform or format leaves out column "
            f"`{TEACHER_COLUMN}`. Let it return that column, too."
        )


def count_with_image(rows: Any, enough: int) -> int:
    """How many rows can be compared, of a data set or a stream that is prepared; of a stream, not further than
    `enough`."""
    if isinstance(rows, NumberedStream):
        return sum(1 for _ in itertools.islice((row for row in rows if _has_image(row, rows.has_vectors)), enough))
    return len(rows_with_vectors(rows)) if isinstance(rows, Dataset) and TEACHER_COLUMN in rows.column_names else 0


def _has_image(row: dict[str, Any], has_vectors: bool) -> bool:
    """Whether a row of a stream, which has vectors or images, has one."""
    return own_vector(row) is not None if has_vectors else bool(stored_images(row))
