"""Where images lie in a row: image columns, frames of videos, and typed parts of messages.

The rules stand here once, and are read in two ways: of a row as Python has it (what the model is shown, and the rows of
streams), and of a whole table without copying it (what the teacher is shown of a data set).
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc

from .json_columns import decoded_json, has_parts_in_json, is_list
from .tables import stored_rows

# Frames of a video that the teacher sees.
MAX_FRAMES = 8

# What is said wherever a video is stored in another way.
VIDEO_FORM = (
    "A video must be stored as the list of its frames: decode video files first, and make a column `video` of type "
    "`datasets.List(datasets.Image())`, or `videos` of type `datasets.List(datasets.List(datasets.Image()))`."
)

# Keys of a typed part under which transformers' chat templates look for what the model is shown, the first one first.
_PART_KEYS = {
    "image": ("image", "url", "path", "base64"),
    "image_url": ("image_url",),
    "video": ("video", "url", "path"),
}
# Steps from a column to its images; any other step is the name of a struct's field.
_EACH, _FRAMES, _JSON, _OF_TYPE = "*", "frames", "json", "type="

# A JSON text without any of these keys holds no image, and need not be parsed.
_JSON_KEYS = re.compile(r'"(?:image|image_url|url|path|base64|video)"\s*:')
_LONGEST_PATH = 512
# Longer than the name of a file can be.
_LONG_WORD = re.compile(r"[\w+/=:;,-]{256,}")


def message_columns(names: Container[str]) -> tuple[str, ...]:
    """The columns of turns that are trained on: with `messages`, SFTTrainer passes `prompt` and `completion` over."""
    return ("messages",) if "messages" in names else ("prompt", "completion")


def turns(messages: Any) -> list[dict[str, Any]]:
    """The turns of a column `messages`, which may be JSON text: Arrow cannot hold contents of different types.

    Raises:
        `ValueError`: If it holds no turns.
    """
    value = messages
    if isinstance(messages, str):
        try:
            value = json.loads(messages)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) and "role" in turn for turn in value):
        raise ValueError(
            f"Column `messages` holds a {type(messages).__name__} that is no list of turns. Store a list of "
            "dictionaries with `role` and `content`, or the JSON text of one."
        )
    return value


def typed_parts(row: Mapping[str, Any], *kinds: str) -> Iterator[tuple[dict[str, Any], str]]:
    """All parts of these types in the turns that a row is trained on, and the roles of their turns."""
    for name in message_columns(row):
        value = row.get(name)
        if name == "messages" and value is not None:
            value = turns(value)
        for message in value if isinstance(value, list) else ():
            content = message.get("content")
            for part in content if isinstance(content, list) else ():
                if part.get("type") in kinds:
                    yield part, message["role"]


def part_value(part: Mapping[str, Any]) -> Any:
    """The image or video that a typed part brings, as it is stored; `None` for a mere placeholder.

    Raises:
        `ValueError`: If it names the file of a video.
    """
    for key in _PART_KEYS[part["type"]]:
        value = part.get(key)
        if key == "image_url" and isinstance(value, Mapping):
            value = value.get("url")
        if value is not None:
            if part["type"] == "video" and key != "video":
                raise ValueError(f"A row has a video under `{key}`. {VIDEO_FORM}")
            return value
    return None


IMAGE_COLUMNS = ("image", "images")  # of a row that has both, the first counts
ONE_COLUMN = "Bring the images of all rows into one column before data sets are put together."


def column_images(row: Mapping[str, Any]) -> list[Any]:
    """What stands in the row's column of images, which may hold one image or a list, without nulls.

    Raises:
        `ValueError`: If its image is in `images`, while `image`, which counts, is there and null.
    """
    if row.get("image") is None:
        images = [image for image in _listed(row.get("images")) if image is not None]
        if images and "image" in row:
            raise ValueError(f"A row has its images in `images`, and null in `image`, which counts. {ONE_COLUMN}")
        return images
    images = list(row["image"]) if isinstance(row["image"], (list, tuple)) else [row["image"]]
    return [image for image in images if image is not None]


def check_one_image_column(dataset: datasets.Dataset, name: str = "the data set") -> None:
    """Refuses rows whose images lie in the column that does not count, as where data sets of both forms are put
    together.

    Raises:
        `ValueError`: With the number of the first such row.
    """
    if not set(IMAGE_COLUMNS) <= set(dataset.column_names):
        return
    first, second = (dataset.data.column(column) for column in IMAGE_COLUMNS)
    if not first.null_count or not is_list(dataset.features["images"]):
        return
    is_there = []
    for chunk in second.chunks:  # one by one: together, their images would be copied
        part = np.zeros(len(chunk), dtype=bool)
        part[pc.list_parent_indices(chunk).to_numpy()[pc.list_flatten(chunk).is_valid().to_numpy(False)]] = True
        is_there.append(part)
    rows = (first.is_null().to_numpy() & np.concatenate(is_there))[stored_rows(dataset)]
    if rows.any():
        raise ValueError(
            f"Row {int(rows.argmax())} of {name} has its images in `images`, and null in `image`, which counts. "
            f"{ONE_COLUMN}"
        )


def column_videos(row: Mapping[str, Any]) -> list[Any]:
    """The videos of the row's column of videos, without empty ones."""
    videos = [row["video"]] if "video" in row else _listed(row.get("videos"))
    return [frames for video in videos if (frames := frames_of(video))]


def _listed(value: Any) -> list[Any]:
    if isinstance(value, (PIL.Image.Image, str, bytes, Mapping)):
        return [value]
    return [] if value is None else list(value)  # of tensors or arrays as well, where the data set has a format


def frames_of(video: Any) -> list[Any]:
    """The frames of a video, none where it is null.

    Raises:
        `ValueError`: If it is no list of frames.
    """
    if video is None or isinstance(video, (list, tuple)):
        return list(video or ())
    raise ValueError(
        f"A row has a {type(video).__name__} as a video. {VIDEO_FORM} Data with a format needs `with_format(None)`."
    )


def sampled_frames(count: int) -> np.ndarray:
    """Indices of the frames that the teacher sees of a video with `count` frames: all of them, or eight at equal
    distances, the first and the last included."""
    return np.linspace(0, count - 1, min(count, MAX_FRAMES)).round().astype(np.int64)


def images_beside(row: Mapping[str, Any]) -> list[Any]:
    """The images in a row's column and the sampled frames of the videos in its column, as they are stored."""
    return [*column_images(row), *(frame for video in column_videos(row) for frame in _sampled(video))]


def images_inside(row: Mapping[str, Any]) -> list[Any]:
    """The images inside of a row's messages and the sampled frames of the videos there, as they are stored."""
    found = [value for part, _ in typed_parts(row, "image", "image_url") if (value := part_value(part)) is not None]
    for part, _ in typed_parts(row, "video"):
        found += _sampled(frames_of(part_value(part)))
    return found


def _sampled(frames: list[Any]) -> list[Any]:
    return [frames[index] for index in sampled_frames(len(frames)) if frames[index] is not None]


# Images that are stored


def is_url(text: str | None) -> bool:
    """Whether a text says that an image is to be fetched from the network."""
    return text is not None and text.startswith(("http://", "https://"))


def url_refusal(url: str) -> str:
    """What is said of an image that would have to be fetched. The end of a long URL may be a signature."""
    shown = url if len(url) < 100 else f"{url[:80]}..."
    return f"{shown} is a URL; download it, and store its bytes or its path on disk"


def written_image(text: str) -> bytes | None:
    """The bytes of an image that is written down as a data URI or in base64, as transformers reads them: where the text
    names no file. `None` for a path or URL.

    Raises:
        `ValueError`: If the text is too long for a path, and no such image. An error from the file system would repeat
            all of it.
    """
    if "://" in text or os.path.isfile(text):
        return None
    is_uri = text.startswith("data:image/")
    try:
        content = base64.b64decode("".join((text.partition(",")[2] if is_uri else text).split()), validate=True)
    except ValueError:
        content = b""
    if _is_image(content):  # a path without dots may be base64 by chance
        return content
    if is_uri or len(text) > _LONGEST_PATH:
        raise ValueError(f"a text of {len(text):,} characters ({text[:24]}...) names no file and is no image in base64")
    return None


def _is_image(content: bytes) -> bool:
    try:
        with PIL.Image.open(io.BytesIO(content)):
            return True
    except PIL.UnidentifiedImageError:
        return False


def without_payload(text: object) -> str:
    """A message in which an image that is written in base64 is not repeated."""
    return _LONG_WORD.sub(lambda word: f"{word[0][:24]}... ({len(word[0]):,} characters)", str(text))


def decoded(image: Any) -> Any:
    """A stored image (bytes, a path, a data URI, base64, or a dictionary of `bytes` and `path`) decoded as
    `datasets.Image` does it; anything else, such as an image of PIL, as it is."""
    if isinstance(image, bytes):
        image = {"bytes": image}
    elif isinstance(image, str):
        image = {"path": image}
    if not isinstance(image, Mapping):
        return image
    content, path = image.get("bytes"), image.get("path")
    if content is None and path is not None:
        content = written_image(path)
    return datasets.Image().decode_example({"bytes": content, "path": path})


# Whole tables


@dataclass(frozen=True)
class ImageSource:
    """One place in the rows that holds images.

    Args:
        column: Name of the column.
        steps: How to walk from a row of the column to the images.
        mode: PIL mode that the column's feature asks for.
        feature: Feature of a column whose turns are texts of `datasets.Json`.
    """

    column: str
    steps: tuple[str, ...]
    mode: str | None
    feature: Any = None

    @property
    def is_inside(self) -> bool:
        """Whether the images lie inside of messages."""
        return self.column in ("messages", "prompt", "completion")

    @property
    def is_video_file(self) -> bool:
        """Whether these are files of videos, of which no frame can be shown."""
        return f"{_OF_TYPE}video" in self.steps and _FRAMES not in self.steps

    def images(self, table: pa.Table) -> Iterator[tuple[np.ndarray, np.ndarray, pa.StructArray]]:
        """Yields, chunk by chunk without copying, of all images that are stored: the row of the table, whether the
        image counts (it is not null, its part is of the right type, a frame is sampled), and the (bytes, path)
        structs."""
        first = 0
        for chunk in table[self.column].chunks:
            owners = np.arange(first, first + len(chunk))
            counts = np.ones(len(chunk), dtype=bool)
            first += len(chunk)
            for number, step in enumerate(self.steps):
                if pa.types.is_null(chunk.type):
                    break
                if step.startswith(_OF_TYPE):
                    counts &= _of_type(chunk, step.removeprefix(_OF_TYPE), self.steps[number + 1])
                    continue
                if step not in (_EACH, _FRAMES, _JSON):
                    chunk = pc.struct_field(chunk, step)
                    continue
                if step == _JSON:
                    found = (_images_in_json(turns, self.feature) for turns in chunk.to_pylist())
                    chunk = pa.array(found, pa.list_(datasets.Image.pa_type))
                lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
                counts = np.repeat(counts, lengths)
                if step == _FRAMES and len(counts):
                    counts &= np.concatenate([_is_sampled(length) for length in lengths])
                owners = np.repeat(owners, lengths)
                chunk = pc.list_flatten(chunk)
            if pa.types.is_null(chunk.type):
                chunk = pa.nulls(len(chunk), datasets.Image.pa_type)
            structs = datasets.Image().cast_storage(chunk)
            yield owners, counts & structs.is_valid().to_numpy(zero_copy_only=False), structs


def _is_sampled(count: int) -> np.ndarray:
    mask = np.zeros(count, dtype=bool)
    mask[sampled_frames(count)] = True
    return mask


def _of_type(parts: pa.StructArray, kind: str, key: str) -> np.ndarray:
    """Which parts bring what they show under this key: those of the type, with nothing under a key that comes first."""
    fits = pc.fill_null(pc.equal(pc.struct_field(parts, "type"), kind), False)
    for earlier in _PART_KEYS[kind][: _PART_KEYS[kind].index(key)]:
        if parts.type.get_field_index(earlier) >= 0:
            fits = pc.and_(fits, pc.is_null(pc.struct_field(parts, earlier)))
    return fits.to_numpy(zero_copy_only=False)


def _images_in_json(messages: Any, feature: Any = None) -> list[dict[str, Any]]:
    if feature is not None:
        messages = decoded_json(messages, feature)
        if not isinstance(messages, list):  # plain text
            return []
    elif messages is None or not _JSON_KEYS.search(messages):
        return []
    images = images_inside({"messages": messages})
    return [{"path": image["path"] if isinstance(image, Mapping) else image} for image in images]


def find_sources(features: datasets.Features) -> list[ImageSource]:
    """The places that hold images: `image` or else `images`, `video` or else `videos`, and parts of messages.

    Raises:
        ValueError: If such a column holds something else than images; the message says what to cast it to.
    """
    sources: list[ImageSource] = []
    name = next((name for name in IMAGE_COLUMNS if name in features), None)
    if name is not None:
        feature = features[name]
        steps = (_EACH,) if is_list(feature) else ()
        element = feature.feature if steps else feature
        if not _is_image_like(element):
            raise ValueError(
                f"Column `{name}` holds {feature}, not images. Make it one with `dataset.cast_column("
                f'"{name}", datasets.Image())`, or with `datasets.List(datasets.Image())` for lists of images.'
            )
        sources.append(ImageSource(name, steps, _mode(element)))
    name = next((name for name in ("video", "videos") if name in features), None)
    if name is not None:
        feature, steps = features[name], ()
        if name == "videos" and is_list(feature):
            feature, steps = feature.feature, (_EACH,)
        sources += _video_source(name, steps, feature, f"Column `{name}` holds {features[name]}.")
    for name in message_columns(features):
        if name in features:
            sources.extend(_inline_sources(name, features[name]))
    return sources


def _video_source(column: str, steps: tuple[str, ...], feature: Any, problem: str) -> list[ImageSource]:
    """The source of the videos that the steps lead to; none where all of them are null."""
    if _is_null(feature):
        return []
    if not is_list(feature) or not _is_image_like(feature.feature):
        raise ValueError(f"{problem} {VIDEO_FORM}")
    return [ImageSource(column, (*steps, _FRAMES), _mode(feature.feature))]


def _inline_sources(column: str, feature: Any) -> list[ImageSource]:
    """Images inside the typed parts of messages, one source for each key that brings them."""
    if column == "messages" and _is_text(feature):
        return [ImageSource(column, (_JSON,), None)]
    if has_parts_in_json(feature):
        return [ImageSource(column, (_JSON,), None, feature)]
    message = feature.feature if is_list(feature) else None
    content: Any = message.get("content") if isinstance(message, dict) else None
    part = content.feature if is_list(content) else None
    if not isinstance(part, dict) or "type" not in part:
        return []
    sources = []
    for kind, keys in _PART_KEYS.items():
        for key in keys:
            stored = part.get(key)
            steps: tuple[str, ...] = (_EACH, "content", _EACH, f"{_OF_TYPE}{kind}", key)
            if key == "image_url" and isinstance(stored, dict):
                stored, steps = stored.get("url"), (*steps, "url")
            if stored is None or _is_null(stored):
                continue
            problem = f"`{key}` in the messages of column `{column}` holds {stored}"
            if key == "video":
                sources += _video_source(column, steps, stored, f"{problem}.")
            elif _is_image_like(stored):
                sources.append(ImageSource(column, steps, _mode(stored)))
            elif kind != "video":
                raise ValueError(f"{problem}, not images. Make it of type `datasets.Image()`.")
    return sources


def _is_null(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype == "null"


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _mode(feature: Any) -> str | None:
    return feature.mode if isinstance(feature, datasets.Image) else None


def _is_image_like(feature: Any) -> bool:
    """Whether `datasets.Image` can read what the feature stores: images, paths, bytes, {bytes, path}, or only null."""
    if isinstance(feature, dict):
        return bool(feature) and set(feature) <= {"bytes", "path"}
    if isinstance(feature, datasets.Value):
        return _is_text(feature) or feature.dtype in ("binary", "large_binary", "null")
    return isinstance(feature, datasets.Image)
