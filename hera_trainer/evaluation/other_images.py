"""Questions with other images than their own: those of other questions, or blank ones."""

from __future__ import annotations

import io
from typing import Any

import PIL.Image

from ..teacher.image_sources import decoded
from .image_gain import other_rows
from .questions import Questions, image_content

_GREY = (128, 128, 128)


class PermutedQuestions(Questions):
    """Questions each with the images of another one that has equally many.

    Questions without images, or whose images no others can replace, stay as they are. Of several images of a question,
    one that the other question has in common may stay.

    Args:
        questions ([`Questions`]): The questions; all their images are read.
        seed (`int`, *optional*, defaults to `0`): Seed of the draw.
    """

    def __init__(self, questions: Questions, seed: int = 0) -> None:
        vars(self).update(vars(questions))
        shown = [tuple(image_content(image) for image in questions.images(index)) for index in range(len(questions))]
        self._others = other_rows([len(images) or None for images in shown], shown, seed)

    def images(self, index: int) -> list[Any]:
        other = self._others[index]
        return super().images(index if other is None else other)


class BlankQuestions(Questions):
    """Questions with an evenly grey image of the same size in the place of each of theirs.

    Args:
        questions ([`Questions`]): The questions.
    """

    def __init__(self, questions: Questions) -> None:
        vars(self).update(vars(questions))

    def images(self, index: int) -> list[Any]:
        return [{"bytes": _blank(decoded(image).size), "path": None} for image in super().images(index)]


def _blank(size: tuple[int, int]) -> bytes:
    content = io.BytesIO()
    PIL.Image.new("RGB", size, _GREY).save(content, "PPM")  # the same bytes with every version of a compressor
    return content.getvalue()
