"""Rows as SFTTrainer's vision collator takes them: what it chokes on, or would pass over in silence, is put right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import datasets
import PIL.Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from .picture_sources import VIDEO_FORM, sampled_frames

# Columns that SFTTrainer takes out of vision data, and that `collatable` makes use of or refuses.
CARRIED_COLUMNS = ("tools", "video", "videos")

_CONVERSATIONS = ("messages", "prompt", "completion")


def collatable(row: dict[str, Any], collator: Callable) -> dict[str, Any]:
    """The row for SFTTrainer's collator of vision data; a collator of the user's own gets the row as it is.

    - Images may be missing (null, or a list with nulls in it), stored (bytes, or `{"bytes", "path"}` of a column that
      is not decoded), a list in `image`, one without a list in `images`, or inside the messages. They become the list
      `images` of decoded ones, in the order of their placeholders.
    - Keys that are null in the typed parts of messages, as Arrow has them, are left out: many chat templates ask
      whether a part has a key.
    - Videos, lists of frames, are put into the messages, where the processor's chat template looks for them: in the
      place of each `{"type": "video"}`, or before the first words of the user.

    Args:
        row (`dict`): A row of the data set.
        collator (`Callable`): The collator that it goes to.

    Returns:
        `dict`: A new row; the given one is not modified.

    Raises:
        `ValueError`: If the row has no text, its tools would not be shown, or its videos can't reach the model.
    """
    if not isinstance(collator, DataCollatorForVisionLanguageModeling):
        return row
    row = dict(row)
    known = ("messages", "prompt", collator.dataset_text_field)
    if not any(name in row for name in known):
        raise ValueError(
            "Rows reach the collator without any text: they have none of the columns `messages`, `prompt` and "
            f"`{collator.dataset_text_field}`. Bring the text into one of them, or set `dataset_text_field`."
        )
    _refuse_tools(row.pop("tools", None))
    for name in _CONVERSATIONS:
        if isinstance(row.get(name), list):
            row[name] = [_copied(message) for message in row[name]]
    row["images"] = _all_images(row, _own_images(row))
    _place_videos(row, [frames for video in _own_videos(row) if (frames := _frames(video))], collator.processor)
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
            _refuse_tools(row["tools"])


def _refuse_tools(tools: Any) -> None:
    if tools and tools not in ("[]", "null"):
        raise ValueError(
            "The data has a column `tools`, which SFTTrainer does not show to vision-language models. Write the "
            "definitions into a system turn of each row, as the chat template would, and remove the column with "
            "`dataset.remove_columns('tools')`."
        )


def pictures(row: Mapping[str, Any]) -> list[Any]:
    """What the teacher sees of a row, as it is stored: its images, the sampled frames of its videos, and both where
    they lie in its messages. The same as [`~picture_sources.find_sources`] finds in a whole data set.

    Raises:
        `ValueError`: If a video is no list of frames.
    """
    found = [*_own_images(row), *(part.get("image") for part, _ in _parts(row, "image"))]
    for video in (*_own_videos(row), *(part.get("video") for part, _ in _parts(row, "video"))):
        frames = _frames(video)
        found += [frames[index] for index in sampled_frames(len(frames))]
    return [picture for picture in found if picture is not None]


def readable(image: Any) -> Any:
    """A stored image (bytes, or a dictionary of `bytes` and `path`) decoded as `datasets.Image` does it; anything
    else, such as an image of PIL, as it is."""
    if isinstance(image, bytes):
        image = {"bytes": image, "path": None}
    if isinstance(image, Mapping):
        return datasets.Image().decode_example({"bytes": image.get("bytes"), "path": image.get("path")})
    return image


def _own_images(row: Mapping[str, Any]) -> list[Any]:
    """What stands in the row's column of images, which may hold one image or a list."""
    if "image" in row:
        return list(row["image"]) if isinstance(row["image"], (list, tuple)) else [row["image"]]
    return _listed(row.get("images"))


def _own_videos(row: Mapping[str, Any]) -> list[Any]:
    return [row["video"]] if "video" in row else _listed(row.get("videos"))


def _listed(value: Any) -> list[Any]:
    if isinstance(value, (PIL.Image.Image, str, bytes, Mapping)):
        return [value]
    return [] if value is None else list(value)  # of tensors or arrays as well, where the data set has a format


def _frames(video: Any) -> list[Any]:
    """The frames of a video, none where it is null."""
    if video is None or isinstance(video, (list, tuple)):
        return list(video or ())
    raise ValueError(
        f"A row has a {type(video).__name__} as a video. {VIDEO_FORM} Data with a format needs `with_format(None)`."
    )


def _copied(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose typed parts can be changed, without the keys that only fill up Arrow's one set of keys."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = [{key: value for key, value in part.items() if value is not None} for part in content]
    return {**message, "content": parts}


def _parts(row: Mapping[str, Any], kind: str) -> Iterator[tuple[dict[str, Any], str]]:
    """All parts of one type in the row's conversations, and the role of their messages."""
    for name in _CONVERSATIONS:
        for message in row[name] if isinstance(row.get(name), list) else ():
            content = message.get("content")
            for part in content if isinstance(content, list) else ():
                if part.get("type") == kind:
                    yield part, message["role"]


def _all_images(row: Mapping[str, Any], images: Iterable[Any]) -> list[Any]:
    """The images of a row in the order of their placeholders; those inside the messages are taken out of them."""
    found = []
    waiting = iter([readable(image) for image in images if image is not None])
    for part, role in _parts(row, "image"):
        own = part.pop("image", None)
        if role == "tool":  # SFTTrainer fills no placeholders there
            if own is not None:
                part["image"] = readable(own)
        elif own is not None:
            found.append(readable(own))
        else:
            found.extend(itertools.islice(waiting, 1))
    return [*found, *waiting]


def _place_videos(row: dict[str, Any], videos: list[Any], processor: Any) -> None:
    """Puts videos into the messages of a row and decodes the frames of those that are there."""
    parts = [part for part, _ in _parts(row, "video")]
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
        frames = _frames(part.get("video")) or next(waiting, [])
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
