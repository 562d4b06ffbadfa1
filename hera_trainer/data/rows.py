"""Rows as SFTTrainer's vision collator takes them: what it chokes on, or would pass over in silence, is put right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import datasets
import PIL.Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..heads.text import CONVERSATIONS, TextColumns, refuse_tools
from ..teacher.image_sources import (
    column_images,
    column_videos,
    decoded,
    frames_of,
    is_url,
    message_columns,
    part_value,
    turns,
    typed_parts,
    without_payload,
)

# Columns that SFTTrainer takes out of vision data, and that `collatable` makes use of or refuses.
CARRIED_COLUMNS = ("tools", "video", "videos")


def makes_its_own_rows(collator: Callable) -> bool:
    """Whether a collator is a subclass of SFTTrainer's that may make its texts of other columns."""
    theirs = DataCollatorForVisionLanguageModeling
    return isinstance(collator, theirs) and (
        type(collator).torch_call is not theirs.torch_call or type(collator).__call__ is not theirs.__call__
    )


def collatable(row: dict[str, Any], collator: Callable, columns: TextColumns | None = None) -> dict[str, Any]:
    """The row for SFTTrainer's collator of vision data; a collator of the user's own gets the row as it is, and so does
    a subclass of SFTTrainer's that makes its text of other columns.

    - Of several texts, that one stays which SFTTrainer trains on (see [`TextColumns`]).
    - `messages` may be JSON text.
    - Images may be missing (null, or a list with nulls in it), stored (bytes, paths, data URIs, base64, or
      `{"bytes", "path"}` of a column that is not decoded), a list in `image`, one without a list in `images`, or
      inside the messages. They are decoded and stand where the collator looks for them, in the order of their
      placeholders.
    - Keys that are null in the typed parts of messages, as Arrow has them, are left out: many chat templates ask
      whether a part has a key.
    - Videos, lists of frames, are put into the messages, where the processor's chat template looks for them: in the
      place of each `{"type": "video"}`, or before the first words of the user.

    Args:
        row (`dict`): A row of the data set.
        collator (`Callable`): The collator that it goes to.
        columns ([`TextColumns`], *optional*): Which columns are trained on. Default: those of the collator's settings.

    Returns:
        `dict`: A new row; the given one is not modified.

    Raises:
        `ValueError`: If the row has no text, its tools would not be shown, or its videos can't reach the model.
    """
    if not isinstance(collator, DataCollatorForVisionLanguageModeling):
        return row if columns is None else columns.without_unused(row)
    columns = columns or TextColumns(collator.dataset_text_field)
    trained = columns.trained(row)
    if not trained:
        if makes_its_own_rows(collator):
            return row
        raise ValueError(
            "Rows reach the collator without any text: they have none of the columns `messages`, `prompt` with "
            f"`completion`, and `{columns.field}`. Bring the text into one of them, or set `dataset_text_field`."
        )
    row = {name: row[name] for name in row if name in trained or name not in (*CONVERSATIONS, columns.field)}
    refuse_tools(row.pop("tools", None))
    if "messages" in row:
        row["messages"] = turns(row["messages"])
    for name in CONVERSATIONS:
        if isinstance(row.get(name), list):
            row[name] = [_copied(message) for message in row[name]]
    row["images"] = _place_images(row)
    _place_videos(row, column_videos(row), collator.processor)
    for name in ("image", "video", "videos"):
        row.pop(name, None)
    return row


def check_tools(dataset: datasets.Dataset, collator: Callable) -> None:
    """Refuses definitions of tools in any row, which SFTTrainer's collator of vision data would leave out in silence.

    Raises:
        `ValueError`: With what to do instead.
    """
    if isinstance(collator, DataCollatorForVisionLanguageModeling) and "tools" in dataset.column_names:
        for row in dataset.select_columns(["tools"]).with_format(None):
            refuse_tools(row["tools"])


def readable(image: Any) -> Any:
    """A stored image as the model's processor takes it. One in text (a path, data URI or base64) becomes RGB, as the
    processor itself would read it; a URL is left to it.

    Raises:
        `ValueError`: If it can't be decoded.
    """
    if isinstance(image, str) and is_url(image):
        return image
    try:
        return decoded(image).convert("RGB") if isinstance(image, str) else decoded(image)
    except Exception as error:  # PIL raises a different type for every way a file can be broken
        raise ValueError(
            f"An image can't be used: {without_payload(error)}. Repair the image, set it to null, or drop the row."
        ) from error


def _copied(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose typed parts can be changed, without the keys that only fill up Arrow's one set of keys."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = [{key: value for key, value in part.items() if value is not None} for part in content]
    return {**message, "content": parts}


def _place_images(row: Mapping[str, Any]) -> list[Any]:
    """The images that SFTTrainer is to fill into the placeholders of a row, in their order. Those inside of `messages`
    are decoded in their place, where the processor finds them; those inside of a `prompt` it would never look for, so
    they become some of the list."""
    column = [readable(image) for image in column_images(row)]
    inside: list[Any] = []
    order: list[Any] = []  # of the images of a prompt; `None` for a placeholder that waits for one of the column
    free = 0
    for part, role in typed_parts(row, "image", "image_url"):
        value = part_value(part)
        if value is None:
            if role != "tool":  # SFTTrainer fills no placeholders there
                free += 1
                order.append(None)
            continue
        image = readable(value)
        inside.append(image)
        part.clear()
        part["type"] = "image"
        if role == "tool" or "messages" in row:
            part["image"] = image
        else:
            order.append(image)
    if inside and not _writes_placeholders(row):
        column = _without_repeats(column, inside, len(column) - free)
    waiting = iter(column)
    if "messages" not in row:
        filled = [next(waiting, None) if image is None else image for image in order]
        column = [image for image in (*filled, *waiting) if image is not None]
    return column


def _writes_placeholders(row: Mapping[str, Any]) -> bool:
    """Whether SFTTrainer writes as many placeholders as there are images, before a user's turn of plain text."""
    return any(
        message["role"] == "user" and isinstance(message.get("content"), str)
        for name in message_columns(row)[:1]
        for message in (row[name] if isinstance(row.get(name), list) else ())
    )


def _without_repeats(images: list[Any], inside: list[Any], excess: int) -> list[Any]:
    """The images of a column but for those, at most so many, that stand inside of the messages as well."""
    kept = []
    for image in images:
        if excess > 0 and any(_is_same(image, other) for other in inside):
            excess -= 1
        else:
            kept.append(image)
    return kept


def _is_same(a: Any, b: Any) -> bool:
    are_images = isinstance(a, PIL.Image.Image) and isinstance(b, PIL.Image.Image)
    return are_images and (a.mode, a.size) == (b.mode, b.size) and a.tobytes() == b.tobytes()


def _place_videos(row: dict[str, Any], videos: list[Any], processor: Any) -> None:
    """Puts videos into the messages of a row and decodes the frames of those that are there."""
    parts = [part for part, _ in typed_parts(row, "video")]
    if not videos and not parts:
        return
    if getattr(processor, "video_processor", None) is None:
        raise ValueError(
            f"The data has videos, but {type(processor).__name__} cannot process any. Train a model that takes videos, "
            "such as Qwen2.5-VL, or store a few frames of each video as `images`."
        )
    if not isinstance(row.get("messages"), list):
        raise ValueError(
            "SFTTrainer does not pass videos of `prompt` and `completion` on to the processor. Join both in "
            "`messages`, and set `assistant_only_loss=True` to train on the answers alone."
        )
    waiting = iter(videos)
    if not parts:
        parts = _with_video_parts(row["messages"], len(row["images"]), len(videos))
    for part in parts:
        frames = frames_of(part_value(part)) or next(waiting, [])
        if not frames:
            raise ValueError(f"A row has {len(videos)} videos, but {len(parts)} placeholders for them in its messages.")
        part["video"] = [readable(frame) for frame in frames if frame is not None]
    if next(waiting, None) is not None:
        raise ValueError(f"A row has {len(videos)} videos, but {len(parts)} placeholders for them in its messages.")


def _with_video_parts(messages: list[dict[str, Any]], num_images: int, num_videos: int) -> list[dict[str, Any]]:
    """Writes video placeholders before the first words of the user, behind those of images, where SFTTrainer has
    them. Returns the new parts."""
    parts: list[dict[str, Any]] = [{"type": "video"} for _ in range(num_videos)]
    is_first = True
    for message in messages:
        if message["role"] != "user":
            continue
        lead = parts if is_first else []
        if isinstance(message["content"], str):  # SFTTrainer writes image placeholders before plain text only
            images = [{"type": "image"} for _ in range(num_images)] if is_first else []
            message["content"] = [*images, *lead, {"type": "text", "text": message["content"]}]
        else:
            message["content"] = [*lead, *message["content"]]
        is_first = False
    return [] if is_first else parts
