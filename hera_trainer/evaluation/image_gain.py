"""How much a model's loss owes to its images: the same rows with their own images and with those of other rows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..common.files import write_atomically
from ..common.processes import Team
from ..heads.modes import evaluating
from ..heads.pooling import pooling_mask
from ..teacher.image_sources import IMAGE_COLUMNS, column_images, column_videos, part_value, turns, typed_parts

_COLUMNS = (*IMAGE_COLUMNS, "video", "videos")
_PARTS = ("image", "image_url", "video")


@dataclass
class ImageGain:
    """What the right images are worth to a model.

    Args:
        loss (`float`): Language-model loss of held-out rows with their images, in nats a labelled token.
        permuted_loss (`float`): The same with the images of other rows.
        tokens (`int`): Labelled tokens.
        rows (`int`): Rows.
        left_out (`int`): Further rows, without an image or without another row whose images fit in their places.
    """

    loss: float
    permuted_loss: float
    tokens: int
    rows: int
    left_out: int

    @property
    def gain(self) -> float:
        """By how much the loss rises when the images are permuted; 0 for a model that does not look at them."""
        return self.permuted_loss - self.loss

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as JSON, atomically."""
        path, content = Path(path), json.dumps({"image_gain": self.gain, **asdict(self)}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_text(content))

    @classmethod
    def load(cls, path: str | os.PathLike) -> ImageGain:
        """Reads what [`~ImageGain.save`] wrote.

        Raises:
            `ValueError`: If the file is none.
        """
        try:
            content = json.loads(Path(path).read_text())
            del content["image_gain"]
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} holds no image gain that can be read ({error}). Remove it.") from error


def measure_image_gain(
    model: nn.Module,
    read_row: Callable[[int], dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    others: Mapping[int, int | None],
    batch_size: int,
    distributed: bool = False,
    placeholder_ids: Sequence[int] = (),
    **options: Any,
) -> ImageGain:
    """Measures the loss of rows with their images and with those of others, in eval mode.

    Args:
        model (`nn.Module`): A model that returns the mean loss of the labelled tokens of a batch.
        read_row (`Callable`): Reads the row of a number, as the collator takes it.
        collate (`Callable`):
            Makes a batch of such rows. It must not cut them: where images have tokens by their size, other ones would
            leave other words to predict.
        others (`Mapping[int, int | None]`):
            For each row the one whose images it gets (see [`other_rows`]); those without one are left out.
        batch_size (`int`): Rows in a batch.
        distributed (`bool`, *optional*, defaults to `False`):
            Divide the batches among all processes of the run, each of which must then call this function alike. All
            get the same.
        placeholder_ids (sequence of `int`, *optional*):
            Tokens that stand for images, which carry labels in plain `messages` data. They are not counted: no model is
            better at them for looking.
        options (`Any`): Further arguments of the model's forward.

    Returns:
        [`ImageGain`].
    """
    team, device = Team(distributed), next(model.parameters()).device
    pairs = [(row, other) for row, other in others.items() if other is not None]
    sums = torch.zeros(1, 4, dtype=torch.float64)  # loss and tokens with the right images, and with others
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    with team.together(), evaluating(model):
        for number in range(team.index, -(-len(batches) // team.count) * team.count, team.count):
            # A sharded model runs in all processes or not at all: one that is left without a batch repeats the last.
            batch = batches[min(number, len(batches) - 1)]
            right = collate([read_row(row) for row, _ in batch])
            permuted = collate([with_images_of(read_row(row), read_row(other)) for row, other in batch])
            labelled = [_of_text(inputs, placeholder_ids) for inputs in (right, permuted)]
            summed = [_summed_loss(model, inputs, device, options) for inputs in labelled]
            if number < len(batches):
                sums += torch.tensor(summed, dtype=torch.float64).view(1, 4)
    loss, tokens, permuted_loss, permuted_tokens = team.gather_rows(sums).sum(0).tolist()
    return ImageGain(
        loss=loss / max(1, tokens),
        permuted_loss=permuted_loss / max(1, permuted_tokens),
        tokens=int(tokens),
        rows=len(pairs),
        left_out=len(others) - len(pairs),
    )


def _of_text(inputs: Mapping[str, Any], placeholder_ids: Sequence[int]) -> dict[str, Any]:
    """A batch with labels at those positions alone that head representations are pooled over."""
    labels, ids = inputs["labels"], inputs["input_ids"]
    return {**inputs, "labels": labels.masked_fill(~pooling_mask(labels, ids, placeholder_ids), -100)}


def _summed_loss(
    model: nn.Module, inputs: Mapping[str, Any], device: torch.device, options: Mapping[str, Any]
) -> list[float]:
    """Loss summed over the labelled tokens of a batch, and their number."""
    tokens = int((inputs["labels"][:, 1:] != -100).sum())
    inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
    loss = model(**inputs, use_cache=False, **options).loss.item()
    return [loss * tokens, tokens] if tokens else [0.0, 0.0]  # the mean of none is NaN


# Whose images a row gets


def other_rows(shapes: Sequence[Hashable], images: Sequence[Hashable], seed: int) -> list[int | None]:
    """For each row another one that can lend it its images: of the same shape, with other images.

    The distinct images of rows (all those of a row together) change places in a circle whose order is drawn, so each is
    used as often as there are rows with the one that it takes the place of, and none stays where it is. Where rows have
    some of several images in common, such a one may stay.

    Args:
        shapes (sequence): What two rows must have in common; `None` for a row without images.
        images (sequence): Tells the images of rows apart.
        seed (`int`): Seed of the draw.

    Returns:
        `list[int | None]`: Numbers of rows; `None` for a row without images, or whose images no others can replace.
    """
    owners: dict[Hashable, dict[Hashable, int]] = {}
    for row, (shape, shown) in enumerate(zip(shapes, images, strict=True)):
        if shape is not None:
            owners.setdefault(shape, {}).setdefault(shown, row)
    rng = np.random.default_rng(seed)
    lent: dict[Hashable, int] = {}
    for shape, rows in owners.items():
        circle = rng.permutation(list(rows.values())).tolist()
        if len(circle) > 1:
            lent |= {(shape, images[row]): circle[place - 1] for place, row in enumerate(circle)}
    return [lent.get(key) for key in zip(shapes, images, strict=True)]


def image_shape(row: Mapping[str, Any]) -> Hashable:
    """Where a row has images and videos, and how many; `None` if it has none. Rows of which it is the same can have
    each other's."""
    counts = len(column_images(row)), len(column_videos(row))
    parts = tuple((part["type"], part_value(part) is not None) for part, _ in typed_parts(row, *_PARTS))
    return (*counts, parts) if any(counts) or any(own for _, own in parts) else None


def with_images_of(row: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the images and videos of another one in the places of its own.

    Args:
        row (`dict`): The row; its messages are changed.
        other (`Mapping`): A row of the same [`image_shape`].
    """
    row = {name: other[name] if name in _COLUMNS else value for name, value in row.items()}
    is_text = isinstance(row.get("messages"), str)
    if is_text:
        row["messages"] = turns(row["messages"])
    for (part, _), (lent, _) in zip(typed_parts(row, *_PARTS), typed_parts(other, *_PARTS), strict=True):
        part.clear()
        part.update(lent)
    return {**row, "messages": json.dumps(row["messages"])} if is_text else row
