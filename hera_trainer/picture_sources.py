"""Where pictures lie in the rows of a data set: image columns, frames of videos, and parts of messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Frames of a video that the teacher sees.
MAX_FRAMES = 8

# What is said wherever a video is stored in another way.
VIDEO_FORM = (
    "A video must be stored as the list of its frames: decode video files first, and make a column `video` of type "
    "`datasets.List(datasets.Image())`, or `videos` of type `datasets.List(datasets.List(datasets.Image()))`."
)

_MESSAGE_COLUMNS = ("messages", "prompt", "completion")
# Steps from a column to its pictures; any other step is the name of a struct's field.
_EACH, _FRAMES = "*", "frames"


def sampled_frames(count: int) -> np.ndarray:
    """Indices of the frames that the teacher sees of a video with `count` frames: all of them, or eight at equal
    distances, the first and the last included."""
    return np.linspace(0, count - 1, min(count, MAX_FRAMES)).round().astype(np.int64)


@dataclass(frozen=True)
class PictureSource:
    """One place in the rows that holds pictures.

    Args:
        column: Name of the column.
        steps: How to walk from a row of the column to the pictures.
        mode: PIL mode that the column's feature asks for.
    """

    column: str
    steps: tuple[str, ...]
    mode: str | None

    def pictures(self, table: pa.Table) -> Iterator[tuple[np.ndarray, np.ndarray, pa.StructArray]]:
        """Yields, chunk by chunk without copying, of all pictures that are stored: the row of the table, whether the
        picture counts (it is not null, and a frame is sampled), and the (bytes, path) structs."""
        first = 0
        for chunk in table[self.column].chunks:
            owners = np.arange(first, first + len(chunk))
            counts = np.ones(len(chunk), dtype=bool)
            first += len(chunk)
            for step in self.steps:
                if pa.types.is_null(chunk.type):
                    break
                if step not in (_EACH, _FRAMES):
                    chunk = pc.struct_field(chunk, step)
                    continue
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


def find_sources(features: datasets.Features) -> list[PictureSource]:
    """The places that hold pictures: `image` or else `images`, `video` or else `videos`, and parts of messages.

    Raises:
        ValueError: If such a column holds something else than pictures; the message says what to cast it to.
    """
    sources: list[PictureSource] = []
    name = next((name for name in ("image", "images") if name in features), None)
    if name is not None:
        feature = features[name]
        steps = (_EACH,) if _is_list(feature) else ()
        element = feature.feature if steps else feature
        if not _is_image_like(element):
            raise ValueError(
                f"Column `{name}` holds {feature}, not images. Make it one with `dataset.cast_column("
                f'"{name}", datasets.Image())`, or with `datasets.List(datasets.Image())` for lists of images.'
            )
        sources.append(PictureSource(name, steps, _mode(element)))
    name = next((name for name in ("video", "videos") if name in features), None)
    if name is not None:
        feature, steps = features[name], ()
        if name == "videos" and _is_list(feature):
            feature, steps = feature.feature, (_EACH,)
        sources += _video_source(name, steps, feature, f"Column `{name}` holds {features[name]}.")
    for name in _MESSAGE_COLUMNS:
        if name in features:
            sources.extend(_inline_sources(name, features[name]))
    return sources


def _video_source(column: str, steps: tuple[str, ...], feature: Any, problem: str) -> list[PictureSource]:
    """The source of the videos that the steps lead to; none where all of them are null."""
    if _is_null(feature):
        return []
    if not _is_list(feature) or not _is_image_like(feature.feature):
        raise ValueError(f"{problem} {VIDEO_FORM}")
    return [PictureSource(column, (*steps, _FRAMES), _mode(feature.feature))]


def _inline_sources(column: str, feature: Any) -> list[PictureSource]:
    """Pictures inside the typed parts of messages, `{"type": "image", "image": ...}`."""
    message = feature.feature if _is_list(feature) else None
    content: Any = message.get("content") if isinstance(message, dict) else None
    part = content.feature if _is_list(content) else None
    if not isinstance(part, dict):
        return []
    for name in ("url", "path", "base64"):
        if name in part and not _is_null(part[name]):
            raise ValueError(
                f"Messages in column `{column}` have parts with `{name}`. Store a picture under `image` (bytes, a path "
                "on disk or a PIL image), and the frames of a video under `video`."
            )
    steps, sources = (_EACH, "content", _EACH), []
    if "image" in part and not _is_null(part["image"]):
        if not _is_image_like(part["image"]):
            raise ValueError(
                f"`image` in the messages of column `{column}` holds {part['image']}, not images. Make it of type "
                "`datasets.Image()`."
            )
        sources.append(PictureSource(column, (*steps, "image"), _mode(part["image"])))
    if "video" in part:
        problem = f"`video` in the messages of column `{column}` holds {part['video']}."
        sources += _video_source(column, (*steps, "video"), part["video"], problem)
    return sources


def _is_list(feature: Any) -> bool:
    return isinstance(feature, (datasets.List, datasets.LargeList))


def _is_null(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype == "null"


def _mode(feature: Any) -> str | None:
    return feature.mode if isinstance(feature, datasets.Image) else None


def _is_image_like(feature: Any) -> bool:
    """Whether `datasets.Image` can read what the feature stores: images, paths, bytes, {bytes, path}, or only null."""
    if isinstance(feature, dict):
        return bool(feature) and set(feature) <= {"bytes", "path"}
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("string", "large_string", "binary", "large_binary", "null")
    return isinstance(feature, datasets.Image)
