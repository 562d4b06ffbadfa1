"""What of a row is asked, and what is right."""

from __future__ import annotations

import datasets
import pytest
from PIL import Image

from hera_trainer.cli.rank import with_image_column
from hera_trainer.evaluation.questions import Questions
from hera_trainer.teacher.image_sources import column_images


def turn(role, content):
    return {"role": role, "content": content}


EXAMPLE = [turn("user", "Like this?"), turn("assistant", "So."), turn("user", "What colour?")]


@pytest.mark.parametrize("column", ["messages", "prompt", "conversations"])
def test_the_answer_is_not_shown(column):
    rows = datasets.Dataset.from_list([{column: [*EXAMPLE, turn("assistant", "Red")], "answer": "crimson"}])
    asked = "Like this?\n[assistant] So.\nWhat colour?"
    told = Questions(rows, column, column).describe(0)
    assert (told["prompt"], told["reference"]) == (asked, "Red")
    told = Questions(rows, column).describe(0)
    assert (told["prompt"], told["reference"]) == (asked, "crimson")


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_a_conversation_that_ends_with_a_question_is_asked_whole(column):
    rows = datasets.Dataset.from_list([{column: EXAMPLE, "answer": "Red"}])
    told = Questions(rows).describe(0)
    assert (told["prompt"], told["reference"]) == ("Like this?\n[assistant] So.\nWhat colour?", "Red")
    assert Questions(rows, answer_column=column).describe(0)["reference"] is None  # it has no answer


def test_of_two_columns_of_images_that_of_training_is_shown():
    """As the teacher and the collator see the row."""
    small, large = Image.new("RGB", (8, 8)), Image.new("RGB", (12, 12))
    features = datasets.Features(
        {"image": datasets.Image(), "images": datasets.List(datasets.Image()), "question": datasets.Value("string")}
    )
    rows = datasets.Dataset.from_list([{"image": small, "images": [large], "question": "?"}], features=features)
    (part,) = [part for part in Questions(rows).messages(0)[0]["content"] if part["type"] == "image"]
    assert part["image"].size == column_images(rows[0])[0].size == (8, 8)
    for named, size in (("image", (8, 8)), ("images", (12, 12))):
        chosen = with_image_column(rows, named, "question")
        assert column_images(chosen[0])[0].size == size
