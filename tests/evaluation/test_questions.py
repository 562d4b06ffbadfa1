"""What of a row is asked, and what is right."""

from __future__ import annotations

import json

import datasets
import pytest
from PIL import Image

from hera_trainer.cli.rank import with_image_column
from hera_trainer.evaluation.questions import Questions
from hera_trainer.teacher.image_sources import column_images
from hera_trainer.teacher.images import ImageColumn


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


def test_images_in_the_column_that_does_not_count_are_refused():
    """As in training: they would not be shown."""
    features = datasets.Features(
        {"image": datasets.Image(), "images": datasets.List(datasets.Image()), "question": datasets.Value("string")}
    )
    picture = Image.new("RGB", (8, 8))
    given = [{"image": picture, "images": []}, {"image": None, "images": [picture]}]
    rows = datasets.Dataset.from_list([{**row, "question": "?"} for row in given], features=features)
    with pytest.raises(ValueError, match="Row 1 of the data set has its images in `images`"):
        Questions(rows)
    with pytest.raises(ValueError, match="Row 1 of the data set has its images in `images`"):
        ImageColumn(rows)
    assert Questions(rows.select([0])).has_images(0)
    assert [Questions(rows, image_columns=["images"]).has_images(i) for i in range(2)] == [False, True]


def test_calls_of_tools_are_shown_and_tell_questions_apart():
    def asked(city):
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        messages = [
            turn("user", "How is it there?"),
            {**turn("assistant", ""), "tool_calls": [call]},
            {**turn("tool", "rain"), "tool_call_id": "1"},
            turn("assistant", "Wet."),
        ]
        return Questions(datasets.Dataset.from_list([{"messages": messages}])), call

    rome, call = asked("Rome")
    turns = rome.messages(0)
    assert turns[1]["tool_calls"] == [call] and turns[2]["tool_call_id"] == "1"
    assert set(turns[0]) == {"role", "content"}  # without the nulls that fill up Arrow's one set of keys
    assert rome.describe(0)["digest"] != asked("Paris")[0].describe(0)["digest"]


def test_turns_of_different_forms(tmp_path):
    """Of a file, `datasets` keeps them as texts of JSON."""
    picture = str(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "red").save(picture)
    image, words = {"type": "image", "image": picture}, {"type": "text", "text": "What?"}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    chats = [
        [turn("user", "What?"), turn("assistant", "Red")],
        [turn("user", [{"type": "image"}, words]), turn("assistant", "Red")],
        [turn("user", [image, words]), {**turn("assistant", ""), "tool_calls": [call]}, turn("user", [words])],
    ]
    for number, chosen in enumerate((chats[:2], chats[1:])):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chosen))
        rows = datasets.Dataset.from_json(str(path))
        assert "Json" in str(rows.features)
        questions = Questions(rows)
        assert [questions.row(i)["messages"] for i in range(2)] == chosen
        if not number:
            assert questions.describe(0)["prompt"] == questions.describe(1)["prompt"] == "What?"
            assert questions.references() == ["Red", "Red"]
    assert questions.messages(1)[1]["tool_calls"] == [call]
    assert [questions.has_images(i) for i in range(2)] == [False, True]
    assert ImageColumn(rows).rows_with_images().tolist() == [False, True]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": ["What?", "Who?"]}, "Column `question` holds .* and no questions"),
        ({"query": {"en": "What?", "de": "Was?"}}, "Column `query` holds .* and no questions"),
        ({"question": None}, "Row 1 has no question"),
        ({"question": "What?", "tools": "[{'name': 'zoom'}]"}, "column `tools`"),
    ],
)
def test_what_is_no_question_is_refused_at_once(row, words):
    first = {"question": "What?"} if row.get("question", "") is None else row
    with pytest.raises(ValueError, match=words):
        Questions(datasets.Dataset.from_list([first, row]))
