"""What is pooled, what text is ranked, and the way of a teacher vector through the collator."""

from __future__ import annotations

import copy
import json
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import FAMILIES, QWEN_TOKENS, build_tokenizer, build_vlm, image_dataset, llava_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BatchEncoding, PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer.data.batch import pop_teacher
from hera_trainer.data.collator import TEACHER_COLUMN, TeacherCollator, check_collator
from hera_trainer.heads.pooling import placeholder_token_ids, pooling_mask
from hera_trainer.heads.text import TextTokens, answer_text

# --- Positions that are pooled ---------------------------------------------------------------------------------------


def placeholder_token(family: str) -> str:
    return "<|image_pad|>" if family.startswith("qwen") else "<image>"


@pytest.mark.parametrize("family", FAMILIES)
def test_image_placeholders_are_not_pooled(family: str) -> None:
    model, processor = build_vlm(family, num_hidden_layers=1)
    placeholder = processor.tokenizer.convert_tokens_to_ids(placeholder_token(family))
    batch = DataCollatorForVisionLanguageModeling(processor)(list(image_dataset(4, "messages")))
    labels, ids = batch["labels"].tolist(), batch["input_ids"].tolist()
    labelled = [[label != -100 for label in row] for row in labels]
    expected = [
        [has_label and token != placeholder for has_label, token in zip(row_labels, row, strict=True)]
        for row_labels, row in zip(labelled, ids, strict=True)
    ]
    assert labelled != expected  # in plain `messages` data the placeholders do carry labels

    mask = pooling_mask(batch["labels"], batch["input_ids"], placeholder_token_ids(model.config, processor))
    assert mask.dtype == torch.bool
    assert mask.tolist() == expected
    assert placeholder not in batch["input_ids"][mask].tolist()
    assert mask.any(1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholder_ids_are_found_in_config_or_processor(family: str) -> None:
    model, processor = build_vlm(family, num_hidden_layers=1)
    names = [token for token in ("<image>", "<video>", "<|image_pad|>", "<|video_pad|>")]
    known = {processor.tokenizer.get_vocab()[name] for name in names if name in processor.tokenizer.get_vocab()}
    image = processor.tokenizer.convert_tokens_to_ids(placeholder_token(family))
    for ids in (placeholder_token_ids(model.config), placeholder_token_ids(model.config, processor)):
        assert image in ids
        assert set(ids) <= known
        assert ids == sorted(set(ids))


def test_placeholder_ids_of_a_text_model() -> None:
    assert placeholder_token_ids(SimpleNamespace(image_token_id=None), llava_tokenizer()) == []
    assert placeholder_token_ids(SimpleNamespace(image_token_index=0, video_token_id=7)) == [0, 7]


def test_pooling_by_hand() -> None:
    ids = torch.tensor([[9, 9, 5, 6, 7], [9, 5, 8, 9, 0]])
    labels = torch.tensor([[-100, 9, 5, 6, -100], [-100, -100, 8, 9, -100]])
    expected = [[False, False, True, True, False], [False, False, False, False, False]]
    assert pooling_mask(labels, ids, [8, 9]).tolist() == expected
    assert pooling_mask(labels, ids, []).tolist() == (labels != -100).tolist()
    assert not pooling_mask(torch.full_like(labels, -100), ids, [9]).any()


# --- Text that is ranked ---------------------------------------------------------------------------------------------


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


IMAGE, QUESTION = {"type": "image"}, {"type": "text", "text": "what is it?"}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "what is it?", "completion": "a cat"}, "a cat"),
        ({"prompt": [turn("user", "what?")], "completion": [turn("assistant", "a cat")]}, "a cat"),
        (
            {
                "prompt": [turn("user", [IMAGE, QUESTION])],
                "completion": [turn("assistant", [{"type": "text", "text": "a cat"}])],
            },
            "a cat",
        ),
        ({"messages": [turn("system", "be kind"), turn("user", "what?"), turn("assistant", "a cat")]}, "a cat"),
        (
            {
                "messages": [
                    turn("user", "what?"),
                    turn("assistant", "a cat"),
                    turn("user", "which color?"),
                    turn("assistant", [{"type": "text", "text": "it is "}, {"type": "text", "text": "red"}]),
                ]
            },
            "a cat\nit is red",
        ),
        # Arrow fills the parts up: an image part has a text of None, a text part an image of None.
        (
            {
                "messages": [
                    turn("user", [{"type": "image", "text": None}, QUESTION]),
                    turn("assistant", [{"type": "image", "text": None}, {"type": "text", "text": "a cat"}]),
                ]
            },
            "a cat",
        ),
        ({"messages": [turn("user", "what?"), turn("assistant", None)]}, ""),
        ({"messages": [turn("user", "what?")]}, ""),
        ({"text": "a cat on a mat"}, "a cat on a mat"),
        ({"completion": None, "messages": None, "text": "a cat"}, "a cat"),
        # What SFTTrainer trains on: `messages` before all others, plain text only where there is nothing else.
        (
            {"prompt": "what?", "completion": "a cat", "messages": [turn("assistant", "a dog")], "text": "a bird"},
            "a dog",
        ),
        ({"prompt": "what?", "completion": "a cat", "text": "a bird"}, "a cat"),
        ({"completion": "a cat", "text": "a bird"}, "a bird"),  # it trains on no `completion` without a `prompt`
        ({"completion": "a cat"}, "a cat"),
        ({"messages": json.dumps([turn("user", "what?"), turn("assistant", "a cat")])}, "a cat"),
        ({"prompt": "what is it?"}, ""),
        ({}, ""),
    ],
)
def test_answer_text(row: dict[str, Any], text: str) -> None:
    assert answer_text(row) == text


@pytest.mark.parametrize("fmt", ["prompt_completion", "messages", "image", "text"])
def test_answer_text_of_data_set_rows(fmt: str) -> None:
    answers = {"text": lambda row: row["text"], "prompt_completion": lambda row: row["completion"][0]["content"]}
    pick = answers.get(fmt, lambda row: row["messages"][1]["content"])
    for row in image_dataset(4, fmt):
        assert answer_text(row) == pick(row)


def test_answer_text_survives_arrow() -> None:
    rows = [
        {"messages": [turn("user", [IMAGE, QUESTION]), turn("assistant", [{"type": "text", "text": answer}])]}
        for answer in ("a cat", "a dog")
    ]
    assert [answer_text(row) for row in Dataset.from_list(rows)] == ["a cat", "a dog"]


def test_special_tokens_are_fed_but_not_the_texts_own() -> None:
    tokenizer = llava_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    text = "a red block"
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids, own = TextTokens(tokenizer)(text)
    assert (ids.dtype, own.dtype) == (torch.long, torch.bool)
    assert ids.tolist() == [bos, *plain, eos]
    assert own.tolist() == [False, *[True] * len(plain), False]
    ids, own = TextTokens(tokenizer)("")
    assert (ids.tolist(), own.tolist()) == ([bos, eos], [False, False])


@pytest.mark.parametrize("make", [llava_tokenizer, lambda: build_tokenizer(QWEN_TOKENS, pad_token="<|endoftext|>")])
def test_tokens_of_a_tokenizer_without_special_ones(make: Any) -> None:
    tokenizer: PreTrainedTokenizerFast = make()
    ids, own = TextTokens(tokenizer)("a red block")
    assert tokenizer.decode(ids) == "a red block"
    assert own.all() and len(own) == len(ids)
    assert [part.shape for part in TextTokens(tokenizer)("")] == [(0,), (0,)]


# --- Teacher vectors beside the batch --------------------------------------------------------------------------------


class Inner:
    """A collator that notes what it is given."""

    def __init__(self) -> None:
        self.pad_token_id = 7
        self.seen: list[dict[str, Any]] = []

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        self.seen = examples
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": ids, "labels": ids.clone()}


def examples(*vectors: Any) -> list[dict[str, Any]]:
    return [{"input_ids": [i, i + 1], TEACHER_COLUMN: vector} for i, vector in enumerate(vectors)]


def test_vectors_ride_beside_the_batch() -> None:
    inner = Inner()
    rows = examples([1.0, 2.0, 3.0], None, torch.tensor([4, 5, 6], dtype=torch.float16))
    del rows[1][TEACHER_COLUMN]  # the same as null
    rows.append({"input_ids": [3, 4], TEACHER_COLUMN: None})
    before = [dict(row) for row in rows]
    batch = TeacherCollator(inner, 3)(rows)

    assert batch["input_ids"].tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert set(batch) == {"input_ids", "labels", TEACHER_COLUMN}
    nan = torch.full((3,), torch.nan)
    expected = torch.stack([torch.tensor([1.0, 2.0, 3.0]), nan, torch.tensor([4.0, 5.0, 6.0]), nan])
    torch.testing.assert_close(batch[TEACHER_COLUMN], expected, rtol=0, atol=0, equal_nan=True)
    assert batch[TEACHER_COLUMN].dtype == torch.float32
    # The inner collator never sees the column, and the data set's own rows still have it.
    assert all(set(row) == {"input_ids"} for row in inner.seen)
    assert [set(row) for row in rows] == [set(row) for row in before]
    assert all(row[key] is value for row, old in zip(rows, before, strict=True) for key, value in old.items())

    teacher = pop_teacher(batch)
    assert TEACHER_COLUMN not in batch
    assert teacher.present.tolist() == [True, False, True, False]
    assert teacher.vectors.tolist() == [[1.0, 2.0, 3.0], [0.0] * 3, [4.0, 5.0, 6.0], [0.0] * 3]
    assert pop_teacher(batch) is None


def test_a_batch_of_a_real_collator() -> None:
    _, processor = build_vlm("llava", num_hidden_layers=1)
    collator = DataCollatorForVisionLanguageModeling(processor)
    dataset = image_dataset(3, with_features=4)
    rows = [dataset[i] for i in range(3)]
    plain = collator([dataset.remove_columns(TEACHER_COLUMN)[i] for i in range(3)])
    batch = TeacherCollator(collator, 4)(rows)
    teacher = pop_teacher(batch)
    assert plain.keys() == batch.keys()
    assert all(torch.equal(plain[name], batch[name]) for name in plain)
    assert teacher.vectors.tolist() == [row[TEACHER_COLUMN] for row in rows]
    assert teacher.present.all()


def test_a_batch_encoding_is_a_batch_too() -> None:
    batch = TeacherCollator(lambda rows: BatchEncoding({"labels": torch.zeros(len(rows), 1)}), 2)(examples([1.0, 2.0]))
    assert pop_teacher(batch).vectors.tolist() == [[1.0, 2.0]]
    assert list(batch) == ["labels"]


def test_a_collator_that_drops_a_sample_later_is_refused() -> None:
    """The first rows, on which a collator is checked, may lose none."""
    collator = TeacherCollator(lambda rows: Inner()([row for row in rows if row["input_ids"] != [2, 3]]), 2)
    check_collator(collator, examples([1.0, 2.0], None))
    with pytest.raises(ValueError, match=r"made 2 samples from 3 rows.*`filter`"):
        collator(examples([1.0, 2.0], None, [3.0, 4.0]))


def test_a_vector_of_another_width_is_never_stretched() -> None:
    for vector in ([1.0], [1.0, 2.0]):
        with pytest.raises((ValueError, RuntimeError)):
            TeacherCollator(Inner(), 3)(examples([1.0, 2.0, 3.0], vector))


def test_attributes_are_those_of_the_inner_collator() -> None:
    inner = Inner()
    collator = TeacherCollator(inner, 3)
    assert collator.pad_token_id == 7
    inner.pad_token_id = 8
    assert collator.pad_token_id == 8
    assert (collator.width, collator.inner) == (3, inner)
    collator.pad_token_id = 9  # as `trainer.data_collator.max_length = ...` sets one
    assert inner.pad_token_id == collator.pad_token_id == 9 and "pad_token_id" not in vars(collator)
    collator.width = 4
    assert collator.width == 4 and not hasattr(inner, "width")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = collator.no_such_thing
    assert not hasattr(collator, "_private")


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_and_pickles(duplicate: Any) -> None:
    twin = duplicate(TeacherCollator(Inner(), 2))
    assert isinstance(twin, TeacherCollator)
    assert isinstance(twin.inner, Inner)
    assert twin.pad_token_id == 7
    assert pop_teacher(twin(examples([1.0, 2.0], None))).present.tolist() == [True, False]


# --- Collators that a vector cannot ride through ---------------------------------------------------------------------


def refusal(inner: Any) -> str:
    with pytest.raises(ValueError, match="cannot ride through this `data_collator`") as caught:
        check_collator(TeacherCollator(inner, 2), examples([1.0, 2.0], None))
    assert "alignment_weight=0" in str(caught.value)
    return str(caught.value)


def test_collators_that_pass() -> None:
    inner = Inner()
    rows = examples([1.0, 2.0], None)
    check_collator(TeacherCollator(inner, 2), rows)
    assert all(set(row) == {"input_ids"} for row in inner.seen)
    assert all(TEACHER_COLUMN in row for row in rows)
    check_collator(TeacherCollator(lambda rows: BatchEncoding(Inner()(rows)), 2), rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_collators_of_trl_pass(family: str) -> None:
    _, processor = build_vlm(family, num_hidden_layers=1)
    rows = [image_dataset(2, with_features=4)[i] for i in range(2)]
    check_collator(TeacherCollator(DataCollatorForVisionLanguageModeling(processor), 4), rows)


def test_collators_that_are_refused() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    assert "returns a tuple" in refusal(lambda rows: (ids, ids))
    assert "no `labels`" in refusal(lambda rows: {"input_ids": ids})
    assert "no `input_ids`" in refusal(lambda rows: {"labels": ids, "inputs_embeds": ids})
    assert "from 2 rows" in refusal(lambda rows: {"input_ids": ids[:1], "labels": ids[:1]})  # packed
    assert "[1, 6]" in refusal(lambda rows: {"input_ids": ids.reshape(1, 6), "labels": ids.reshape(1, 6)})  # flattened
    assert "[2, 2]" in refusal(lambda rows: {"input_ids": ids, "labels": ids[:, :2]})


def test_a_collator_that_returns_lists_is_refused_with_the_cure() -> None:
    refusal(lambda rows: {"input_ids": [[1, 2]] * 2, "labels": [[1, 2]] * 2})
