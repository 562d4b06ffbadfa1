"""What of a sample is pooled, and how its teacher vector reaches the training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..heads.pooling import pooling_mask
from ..heads.text import TextColumns, answers
from ..teacher.column import TEACHER_COLUMN
from .rows import collatable

# What rows and batches of streamed data carry besides: where a row stands, for messages, and images that are prepared
# for the teacher but not yet encoded.
ROW_PLACE = "stream_place"
TEACHER_IMAGES = "teacher_images"

# What the wrappers hold themselves.
_OWN = ("inner", "width", "prepare", "columns")


class RowCollator:
    """Wraps a data collator so that it gets rows in the form that SFTTrainer's takes (see [`~data.rows.collatable`]).

    Args:
        inner (`Callable`): The collator that makes the batch.
        columns ([`~heads.text.TextColumns`], *optional*): Which columns of text are trained on.
    """

    def __init__(self, inner: Callable[[list[dict[str, Any]]], Any], columns: TextColumns | None = None) -> None:
        self.inner = inner
        self.columns = columns

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        # Without alignment, definitions of tools are passed over, as SFTTrainer does.
        left_out = (TEACHER_COLUMN, "tools")
        rows = [{name: value for name, value in row.items() if name not in left_out} for row in examples]
        return self.inner([self.prepared(row) for row in rows])

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row, without its teacher vector, as the inner collator gets it."""
        place = row.pop(ROW_PLACE, None)
        try:
            return collatable(row, self.inner, self.columns)
        except ValueError as error:
            raise error if place is None else ValueError(f"{place}: {error}") from error

    def __getattr__(self, name: str) -> Any:
        # Trainers read and set attributes of their collator. Underscored names are left out: copying and unpickling
        # (data loader workers) look for them before `inner` exists.
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Set on the trainer's collator, a setting is meant for the one that reads it.
        if name not in _OWN and hasattr(self.inner, name):
            setattr(self.inner, name, value)
        else:
            super().__setattr__(name, value)


class TeacherCollator(RowCollator):
    """Wraps a data collator so that each sample's teacher vector reaches the batch beside it.

    The vector is taken out before the inner collator sees the rows and put back under `teacher_features` as
    `[B, d_teacher]` float32, rows of NaN for samples without an image (no teacher vector is ever NaN).

    Args:
        inner (`Callable`): The collator that makes the batch.
        width (`int`): Width of the teacher vectors.
        columns ([`~heads.text.TextColumns`], *optional*): Which columns of text are trained on.
    """

    def __init__(
        self,
        inner: Callable[[list[dict[str, Any]]], Any],
        width: int,
        columns: TextColumns | None = None,
    ) -> None:
        super().__init__(inner, columns)
        self.width = width
        # Makes, of rows of streamed data, what the teacher needs to compute those vectors that are not there yet (see
        # `data.streaming.ImagePreparer`). It rides under `teacher_images`.
        self.prepare: Callable[[list[dict[str, Any]]], Any] | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        vectors = torch.full((len(examples), self.width), torch.nan)
        rows = []
        for i, example in enumerate(examples):
            row = dict(example)
            vector = row.pop(TEACHER_COLUMN, None)
            if vector is not None:
                vectors[i] = checked_vector(vector, row.get(ROW_PLACE, "A row"), self.width)
            rows.append(row)
        images = None if self.prepare is None else self.prepare(examples)
        batch = self.inner([self.prepared(row) for row in rows])
        if "input_ids" in batch and len(batch["input_ids"]) != len(rows):
            raise ValueError(
                f"The `data_collator` made {len(batch['input_ids'])} samples from {len(rows)} rows, so it is not known "
                "whose teacher vectors these are. Drop rows from the data set (`filter`), not in the collator."
            )
        batch[TEACHER_COLUMN] = vectors
        if images is not None:
            batch[TEACHER_IMAGES] = images
        return batch


def checked_vector(vector: Any, place: str, width: int | None = None) -> Tensor:
    """A row's own teacher vector, `[d_teacher]` float32.

    Args:
        vector (sequence of `float`): What the row has in column `teacher_features`.
        place (`str`): Which row it is, for messages.
        width (`int`, *optional*): Numbers that it must have.

    Raises:
        `ValueError`: If it is no list of finite numbers, is zero, or has another width.
    """
    try:
        values = torch.as_tensor(vector, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{place}: column `{TEACHER_COLUMN}` holds no list of numbers ({error}).") from error
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{place}: column `{TEACHER_COLUMN}` holds no list of numbers. Store one vector, or null.")
    if width is not None and len(values) != width:  # would be stretched where it is one number
        raise ValueError(
            f"{place}: the vector in column `{TEACHER_COLUMN}` has {len(values)} numbers, the training data has "
            f"{width}. Compute all of them with the same teacher."
        )
    if not values.isfinite().all():
        raise ValueError(
            f"{place}: the vector in column `{TEACHER_COLUMN}` has NaN or infinity. Repair it, or set it to null."
        )
    if not values.any():
        raise ValueError(
            f"{place}: the vector in column `{TEACHER_COLUMN}` is zero, which has no neighbours. Set it to null."
        )
    return values


def check_collator(collator: TeacherCollator, rows: list[dict[str, Any]]) -> Mapping[str, Any]:
    """Collates a few rows and checks that their teacher vectors can ride along.

    Returns:
        `Mapping`: The batch of these rows.

    Raises:
        `ValueError`: If the collator returns no mapping, no labels, or another number of samples.
    """
    own = [{k: v for k, v in row.items() if k != TEACHER_COLUMN} for row in rows]
    batch: Any = collator.inner([collator.prepared(row) for row in own])
    problem = None
    if not isinstance(batch, Mapping):
        problem = f"it returns a {type(batch).__name__} instead of a dictionary"
    elif "labels" not in batch or "input_ids" not in batch:
        problem = "its batches have no `labels` or no `input_ids`"
    elif not all(torch.is_tensor(batch[name]) for name in ("labels", "input_ids")):
        problem = "its `labels` or `input_ids` are no tensors"
    elif batch["labels"].shape != batch["input_ids"].shape or len(batch["labels"]) != len(rows):
        problem = (
            f"it makes labels of shape {list(batch['labels'].shape)} and input ids of shape "
            f"{list(batch['input_ids'].shape)} from {len(rows)} rows"
        )
    if problem is not None:
        raise ValueError(
            f"Teacher vectors cannot ride through this `data_collator`: {problem}. Return a dictionary with "
            "`input_ids` and `labels` of one row a sample, in order, or set `alignment_weight=0`."
        )
    return batch


def check_ranked_text(
    batch: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    columns: TextColumns,
    tokenizer: PreTrainedTokenizerBase,
    placeholder_ids: Sequence[int],
) -> None:
    """Refuses to rank heads on texts that are not trained on: of a collator that is not SFTTrainer's own, only a batch
    tells what its labels cover.

    Args:
        batch (`Mapping`): What the collator makes of the rows.
        rows (sequence of `Mapping`): The rows, with all of their columns.
        columns ([`~heads.text.TextColumns`]): Which columns of text are ranked.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        placeholder_ids (sequence of `int`): See [`placeholder_token_ids`].

    Raises:
        `ValueError`: If the labels of no row cover its text.
    """
    mask = pooling_mask(batch["labels"], batch["input_ids"], placeholder_ids)
    compared = []
    for row, ids, labelled in zip(rows, batch["input_ids"], mask, strict=True):
        texts = answers(row, columns)
        text = _compact(tokenizer, tokenizer(texts[0], add_special_tokens=False)["input_ids"]) if texts else ""
        covered = _compact(tokenizer, ids[labelled])
        if text and covered:
            compared.append((text, covered))
    if compared and not any(_covers(covered, text) for text, covered in compared):
        text, covered = compared[0]
        raise ValueError(
            f"Attention heads would be ranked on column `{columns.ranked(rows[0])}`, whose text the labels of your "
            f"`data_collator` do not cover: they cover {covered[:80]!r}, the text is {text[:80]!r} (without spaces). "
            "Set `dataset_text_field` to a column of the text that is trained on (`dataset.map` makes one), or choose "
            "heads with `aligned_heads`, `head_ranking` or `head_ranking_path`."
        )


def _compact(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    """Text of tokens, by which texts are compared that chat templates space differently."""
    return "".join(str(tokenizer.decode(ids, skip_special_tokens=True)).split()).casefold()


def _covers(covered: str, text: str) -> bool:
    """Whether a text, or its beginning where the sequence was cut, stands in what the labels cover."""
    beginnings = range(min(len(text), len(covered)), 7, -1)
    return text in covered or any(covered.endswith(text[:length]) for length in beginnings)
