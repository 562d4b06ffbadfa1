"""Rows of a data set as questions to a model: messages with images, and the answer that is right."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
from trl.data_utils import prepare_multimodal_messages

from ..heads.text import answer_text, refuse_tools
from ..teacher.image_sources import (
    IMAGE_COLUMNS,
    check_one_image_column,
    decoded,
    part_value,
    turns,
    typed_parts,
    written_image,
)
from ..teacher.json_columns import decoded_json, is_list, may_hold_turns
from ..teacher.tables import stored_rows

PROMPT_COLUMNS = ("messages", "prompt", "question", "query", "text")
ANSWER_COLUMNS = ("answer", "answers", "label", "completion", "messages")
ID_COLUMNS = ("id", "question_id")
_IMAGE_FILE = re.compile(r"^[^\n]*\.(bmp|gif|jpe?g|png|tiff?|webp)$", re.IGNORECASE)


class Questions:
    """A data set as questions.

    Rows are read as they are stored, and images are decoded when a question is asked for. Questions come in one of
    these columns: `messages` or `prompt` (a conversation or a text), `question`, `query` or `text`. Where the last turn
    of a conversation is the assistant's, that turn is the answer, and what stands before it is asked. Images stand in
    `image` or `images`, or inside the messages.

    Args:
        dataset ([`~datasets.Dataset`]): The rows.
        prompt_column (`str`, *optional*): Column of the question; the first that there is of those above.
        answer_column (`str`, *optional*):
            Column of what is right, or several, separated by commas, for a dictionary of them. By default the first
            that there is of `answer`, `answers`, `label`, `completion` and `messages`; without any, references are
            `None`.
        image_columns (sequence of `str`, *optional*): Columns of images, in the order in which the model sees them.
        system (`str`, *optional*): System turn before each question.
        suffix (`str`, *optional*, defaults to `""`): Text behind each question, such as how to answer.

    Raises:
        `ValueError`: If a column is missing, a row has no question or its images in the column that does not count, or
            rows have videos or tools.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        prompt_column: str | None = None,
        answer_column: str | None = None,
        image_columns: Sequence[str] | None = None,
        system: str | None = None,
        suffix: str = "",
    ) -> None:
        names = dataset.column_names
        self.dataset = dataset
        self.prompt_column = _column(names, prompt_column, PROMPT_COLUMNS, "question", "--prompt-column")
        self.answer_columns = _answer_columns(names, answer_column)
        self.image_columns = _image_columns(names, image_columns)
        self.id_column = next((name for name in ID_COLUMNS if name in names), None)
        self.system, self.suffix = system, suffix
        if "video" in names or "videos" in names:
            raise ValueError("The data has videos, which are not evaluated here. Store frames of them as `images`.")
        if image_columns is None:
            check_one_image_column(dataset)
        _check_prompts(dataset, self.prompt_column)
        self._stored = dataset.with_format("arrow")
        if "tools" in names:
            for stored in self._stored.select_columns(["tools"]).iter(batch_size=256):
                for tools in stored["tools"].to_pylist():
                    refuse_tools(decoded_json(tools, dataset.features["tools"]))
        labels = {name: _element(dataset.features[name]) for name in self.answer_columns}
        self._class_names = {name: label for name, label in labels.items() if isinstance(label, datasets.ClassLabel)}

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> dict[str, Any]:
        """A row as it is stored, images as dictionaries of bytes and path; `messages` that are JSON text are read."""
        row = self._decoded(self._stored[index : index + 1].to_pylist()[0])
        asked = row[self.prompt_column]
        if not isinstance(asked, (str, int, float)) and not _is_conversation(asked):
            raise ValueError(f"Row {index} has no question: column `{self.prompt_column}` holds {asked!r:.80}.")
        return row

    def _decoded(self, row: dict[str, Any]) -> dict[str, Any]:
        return _with_turns({name: decoded_json(value, self.dataset.features[name]) for name, value in row.items()})

    def describe(self, index: int) -> dict[str, Any]:
        """What is saved of a question besides its answer: `row` (its number), `id` (what the data set calls it, if it
        does), `prompt` (its text), `reference`, and `digest`, which changes with the conversation, its images and the
        reference."""
        row = self.row(index)
        messages, images = self._conversation(row)[0], self.images(index)
        entry = {"row": index, "prompt": _text(messages), "reference": self._reference(row)}
        if self.id_column is not None:
            entry["id"] = row[self.id_column]
        digest = hashlib.sha256(json.dumps([messages, entry], sort_keys=True, default=str).encode())
        for image in images:
            digest.update(image_content(image))
        return {**entry, "digest": digest.hexdigest()[:16]}

    def references(self) -> list[Any]:
        """What is right, of every row; images are not read."""
        if not self.answer_columns:
            return [None] * len(self)
        batches = self._stored.select_columns(self.answer_columns).iter(batch_size=256)
        return [self._reference(self._decoded(row)) for batch in batches for row in batch.to_pylist()]

    def messages(self, index: int) -> list[dict[str, Any]]:
        """The conversation that is put before the model, RGB images in the places of their placeholders.

        Raises:
            `ValueError`: If the row has another number of images than placeholders, or an image can't be read.
        """
        messages = self._conversation(self.row(index))[0]
        try:
            return prepare_multimodal_messages(messages, [_decoded(image) for image in self.images(index)])
        except (ValueError, OSError) as error:
            raise ValueError(f"Row {index}: {error}") from error

    def images(self, index: int) -> list[Any]:
        """The images of a question as they are stored, in the order of their placeholders."""
        return self._conversation(self.row(index))[1]

    def has_images(self, index: int) -> bool:
        """Whether a question comes with an image."""
        return bool(self._conversation(self.row(index))[1])

    def unseen_images(self) -> list[str]:
        """Columns of no other use that seem to hold images, where no question comes with one."""
        if any(self.has_images(index) for index in range(len(self))):
            return []
        stored = self.row(0)
        used = {*self.image_columns, *self.answer_columns, self.prompt_column, self.id_column}
        return [
            name
            for name, feature in self.dataset.features.items()
            if name not in used
            and (
                isinstance(_element(feature), datasets.Image)
                or any(isinstance(value, str) and _IMAGE_FILE.search(value) for value in _listed(stored[name]))
            )
        ]

    def _conversation(self, row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
        """The turns before the answer, without images, and the images in the order of their placeholders."""
        value = row[self.prompt_column]
        if not isinstance(value, list):
            asked = [{"role": "user", "content": str(value)}]
        else:
            asked = [_clean(turn) for turn in value]
            if asked and asked[-1]["role"] == "assistant":  # the answer, which must not be shown
                asked.pop()
        waiting = [image for name in self.image_columns for image in _listed(row[name])]
        parts = [(part, part_value(part)) for part, _ in typed_parts({"messages": asked}, "image", "image_url")]
        waiting = _without_repeats(waiting, [own for _, own in parts if own is not None], len(parts))
        images: list[Any] = []
        for part, own in parts:
            images += [own] if own is not None else waiting[:1]
            waiting = waiting if own is not None else waiting[1:]
            part.clear()
            part["type"] = "image"
        images += waiting
        if self.suffix:
            _append(asked, self.suffix)
        if self.system is not None:
            asked = [{"role": "system", "content": self.system}, *(t for t in asked if t["role"] != "system")]
        return asked, images

    def _reference(self, row: Mapping[str, Any]) -> Any:
        values = {}
        for name in self.answer_columns:
            value = row[name]
            if name in self._class_names:
                names = self._class_names[name].names
                labels = value if isinstance(value, list) else [value]
                texts = [names[label] if label is not None and label >= 0 else None for label in labels]  # -1: none
                value = texts if isinstance(value, list) else texts[0]
            elif _is_conversation(value):
                last = _clean(value[-1])
                value = answer_text({"messages": [last]}) if last["role"] == "assistant" else None
            values[name] = value
        return next(iter(values.values()), None) if len(values) < 2 else values


def _column(names: list[str], given: str | None, known: Sequence[str], what: str, option: str) -> str:
    name = given or next((name for name in known if name in names), None)
    if name is None or name not in names:
        missing = f"no column `{given}`" if given else f"none of the columns {', '.join(known)} for the {what}"
        raise ValueError(f"The data has {missing}. It has {', '.join(names)}: name one of them with `{option}`.")
    return name


def _answer_columns(names: list[str], given: str | None) -> list[str]:
    if given is None:
        return [name for name in ANSWER_COLUMNS if name in names][:1]
    return [_column(names, name.strip(), (), "answer", "--answer-column") for name in given.split(",")]


def _image_columns(names: list[str], given: Sequence[str] | None) -> list[str]:
    if given is None:
        return [name for name in IMAGE_COLUMNS if name in names][:1]
    return [_column(names, name, (), "images", "--image-column") for name in given]


def _check_prompts(dataset: datasets.Dataset, column: str) -> None:
    """Refuses a column that holds no questions, or not in every row."""
    feature = dataset.features[column]
    if not isinstance(feature, datasets.Value) and not may_hold_turns(feature):
        raise ValueError(
            f"Column `{column}` holds {feature}, and no questions: these are texts, or lists of turns with `role` and "
            "`content`. Name another column with `--prompt-column`, or make one with `dataset.map`."
        )
    rows = dataset.data.column(column).is_null().to_numpy()[stored_rows(dataset)]
    if rows.any():
        raise ValueError(
            f"Row {int(rows.argmax())} has no question: column `{column}` is null. Leave such rows out "
            "(`dataset.filter`), or name another column with `--prompt-column`."
        )


def _listed(value: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if item is not None]


def _with_turns(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "messages": turns(row["messages"])} if isinstance(row.get("messages"), str) else row


def _clean(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn that can be changed, without the nulls that only fill up Arrow's one set of keys."""
    content = turn.get("content")
    if isinstance(content, list):
        content = [{key: value for key, value in part.items() if value is not None} for part in content]
    others = {key: value for key, value in turn.items() if value is not None}  # calls of tools, among others
    return {**others, "content": "" if content is None else content}


def _element(feature: Any) -> Any:
    """The feature of a column, or of what its lists hold."""
    return feature.feature if is_list(feature) else feature


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _without_repeats(images: list[Any], inside: list[Any], placeholders: int) -> list[Any]:
    """The images of columns but for those beyond the placeholders that stand inside of the messages as well."""
    excess, known = len(images) + len(inside) - placeholders, {image_content(image) for image in inside}
    kept = []
    for image in images:
        if excess > 0 and image_content(image) in known:
            excess -= 1
        else:
            kept.append(image)
    return kept


def _append(turns: list[dict[str, Any]], suffix: str) -> None:
    """Writes `suffix` behind the user's last words."""
    turn = next((turn for turn in reversed(turns) if turn["role"] == "user"), None)
    if turn is None:
        turns.append({"role": "user", "content": suffix})
    elif isinstance(turn["content"], str):
        turn["content"] += suffix
    else:
        turn["content"].append({"type": "text", "text": suffix})


def _text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The words of a conversation; turns of others than the user are marked."""
    lines = []
    for turn in messages:
        content = turn["content"]
        words = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
        lines.append(words if turn["role"] == "user" else f"[{turn['role']}] {words}")
    return "\n".join(lines)


def image_content(image: Any) -> bytes:
    """The stored bytes of an image."""
    data = image.get("bytes") if isinstance(image, Mapping) else image
    if isinstance(data, bytes):
        return hashlib.sha256(data).digest()
    path = image.get("path") if isinstance(image, Mapping) else image
    written = written_image(path) if isinstance(path, str) else None
    if written is not None:
        return hashlib.sha256(written).digest()
    if isinstance(path, str) and os.path.isfile(path):
        return hashlib.sha256(Path(path).read_bytes()).digest()
    return str(path).encode()


def _decoded(image: Any) -> PIL.Image.Image:
    return decoded(image).convert("RGB")
