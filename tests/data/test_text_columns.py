"""Which columns make a row: those that SFTTrainer trains on, in training, in streams, and in the ranking of heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from forms import vision_collator
from rankings import fed_texts
from runs import NoStep
from streams import HEADS, build, count_images
from tiny import build_vlm, image_dataset, save_tiny_dinov2, sft_args
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import AlignmentMonitorCallback, HeRATrainer, rank_heads
from hera_trainer.data.collator import TEACHER_COLUMN
from hera_trainer.data.rows import collatable
from hera_trainer.heads.text import TextColumns

N = 12
ANSWERS = [row["completion"][0]["content"] for row in image_dataset(N)]
WORDS = [f"{answer} {number} times" for number, answer in enumerate(ANSWERS)]


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("teacher.vectors", "heads.ranking_cache"):
        monkeypatch.setattr(f"hera_trainer.{module}.cache_root", lambda: tmp_path / "cache")


def memory(dataset: Dataset) -> Dataset:
    return dataset


STREAMED = pytest.mark.parametrize("form", [memory, Dataset.to_iterable_dataset], ids=["memory", "stream"])


def data(form: str, **columns: list[Any]) -> Dataset:
    dataset = image_dataset(N, form, with_features=6)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def placeholders(words: list[str]) -> list[str]:
    return [f"<image>{text}" for text in words]


def ranked_texts(trainer: HeRATrainer) -> list[str]:
    with fed_texts(trainer.model, trainer.processing_class.tokenizer) as texts:
        trainer.prepare_alignment()
    return sorted(texts[: trainer.head_ranking.num_samples])


def first_batch(trainer: Any) -> Any:
    return next(iter(trainer.get_train_dataloader()))


def sft_batch(folder: Any, dataset: Any, **settings: Any) -> Any:
    """What SFTTrainer itself trains on."""
    model, processor = build_vlm("llava")
    args = {"per_device_train_batch_size": 4, "max_steps": 3, "train_sampling_strategy": "sequential", **settings}
    args = SFTConfig(**sft_args(folder, **args))
    return first_batch(SFTTrainer(model, args, train_dataset=dataset, processing_class=processor))


def assert_same_batch(batch: Any, other: Any) -> None:
    for name in ("input_ids", "labels", "pixel_values"):
        assert torch.equal(batch[name], other[name]), name


# A further column


@STREAMED
@pytest.mark.parametrize("extra", ["text", "caption"])
@pytest.mark.parametrize("columns", ["prompt_completion", "messages"])
def test_a_further_column_decides_nothing(tmp_path, columns, extra, form):
    dataset = form(data(columns, **{extra: placeholders(WORDS)}))
    settings = {"dataset_text_field": extra}
    trainer = build(tmp_path, dataset, **settings)
    assert ranked_texts(trainer) == sorted(ANSWERS)
    assert_same_batch(first_batch(trainer), sft_batch(tmp_path, dataset, **settings))


@STREAMED
def test_nor_does_it_where_the_prompt_is_trained_on(tmp_path, form):
    dataset = form(data("prompt_completion", text=placeholders(WORDS)))
    trainer = build(tmp_path, dataset, completion_only_loss=False)
    assert ranked_texts(trainer) == sorted(ANSWERS)
    batch = first_batch(trainer)
    assert_same_batch(batch, sft_batch(tmp_path, dataset, completion_only_loss=False))
    assert (batch["labels"] != -100).sum() == batch["attention_mask"].sum()


def test_messages_before_prompt_and_completion(tmp_path):
    dataset = data("messages")
    pair = image_dataset(N, seed=1).select_columns(["prompt", "completion"])
    for name in pair.column_names:
        dataset = dataset.add_column(name, pair[:][name], feature=pair.features[name])
    trainer = build(tmp_path, dataset, completion_only_loss=False)
    assert ranked_texts(trainer) == sorted(ANSWERS)
    assert_same_batch(first_batch(trainer), sft_batch(tmp_path, dataset, completion_only_loss=False))


def test_columns_that_are_not_taken_out(tmp_path):
    """With `remove_unused_columns=False`, SFTTrainer's collator sees the plain text, and prefers it."""
    settings = {"remove_unused_columns": False, "completion_only_loss": False}
    dataset = data("prompt_completion", text=placeholders(WORDS))
    trainer = build(tmp_path, dataset, **settings)
    assert ranked_texts(trainer) == sorted(WORDS)
    batch = first_batch(trainer)
    assert_same_batch(batch, sft_batch(tmp_path, dataset, **settings))
    assert "times" in trainer.processing_class.tokenizer.decode(batch["input_ids"][1])
    both = data("messages", text=placeholders(WORDS))
    trainer = build(tmp_path, both, **settings)
    assert ranked_texts(trainer) == sorted(ANSWERS)
    assert_same_batch(first_batch(trainer), sft_batch(tmp_path, both, **settings))


def test_the_text_of_a_collator_with_its_own_field(tmp_path):
    _, processor = build_vlm("llava")
    collator = DataCollatorForVisionLanguageModeling(processor, dataset_text_field="caption")
    dataset = data("prompt_completion", caption=placeholders(WORDS)).remove_columns(["prompt", "completion"])
    trainer = build(tmp_path, dataset.add_column("text", ["no"] * N), data_collator=collator)
    assert ranked_texts(trainer) == sorted(WORDS)
    assert "times" in processor.tokenizer.decode(first_batch(trainer)["input_ids"][1])


@pytest.mark.parametrize("unused", [True, False])
def test_a_collator_of_ones_own_gets_what_sft_trainer_gives_it(tmp_path, unused):
    seen: list[set[str]] = []
    _, processor = build_vlm("llava")
    inner = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)

    def collator(rows: list[dict[str, Any]]) -> Any:
        seen.append(set(rows[0]))
        return inner([{name: value for name, value in row.items() if name in ("images", *PAIR)} for row in rows])

    trainer = build(
        tmp_path, data("prompt_completion", text=WORDS), data_collator=collator, aligned_heads=HEADS,
        remove_unused_columns=unused, max_steps=1,
    )  # fmt: skip
    trainer.train()
    wanted = {"images", *PAIR} if unused else {"images", "text", *PAIR}
    assert len(seen) > 2 and all(names == wanted for names in seen)


PAIR = ("prompt", "completion")


def test_the_monitor_measures_on_the_same_text(tmp_path):
    rows = data("prompt_completion", text=placeholders(WORDS))
    monitor = AlignmentMonitorCallback(rows, num_samples=N, k=2)
    trainer = build(tmp_path, data("prompt_completion"), callbacks=[monitor], aligned_heads=HEADS)
    trainer.prepare_alignment()
    monitor.prepare(trainer)
    with fed_texts(trainer.model, trainer.processing_class.tokenizer) as texts:
        monitor._rank("text")
    assert sorted(texts) == sorted(ANSWERS)
    assert monitor._rank("image").num_samples == N  # batches as in training


def test_rows_of_a_collator_keep_one_text():
    collator = vision_collator()
    row = {"images": [], "prompt": "what", "completion": "red", "text": "no"}
    assert collatable(row, collator) == {"images": [], "prompt": "what", "completion": "red"}
    assert collatable(row, collator, TextColumns(keeps_unused=True)) == {"images": [], "text": "no"}
    with pytest.raises(ValueError, match=r"without any text.*`prompt` with `completion`"):
        collatable({"images": [], "prompt": "what"}, collator)


# What the labels of a collator of one's own cover


class Own:
    """Trains on whatever `make` says of a row: the text before, which has no labels, and the one with labels."""

    def __init__(self, make: Callable[[dict[str, Any]], tuple[str, str]], length: int = 1000) -> None:
        self.make, self.length = make, length
        _, self.processor = build_vlm("llava")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        ids, labels = [], []
        for row in rows:
            before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.make(row))
            after = after[: self.length]
            ids.append(torch.tensor([*before, *after]))
            labels.append(torch.tensor([-100] * len(before) + after))
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(ids, batch_first=True)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": pad(labels, batch_first=True, padding_value=-100),
        }


def own_run(tmp_path: Any, dataset: Any, collator: Any, **settings: Any) -> HeRATrainer:
    return build(
        tmp_path, dataset, data_collator=collator, remove_unused_columns=False, callbacks=[NoStep()], **settings
    )


def conversation(number: int) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"what is number {number}"}]},
        {"role": "assistant", "content": ANSWERS[number]},
    ]


@STREAMED
def test_messages_in_json(tmp_path, form):
    """Arrow cannot hold contents of different types, so they are stored as text: only the answers are ranked."""
    texts = [json.dumps(conversation(number)) for number in range(N)]
    dataset = data("messages").remove_columns("messages").add_column("messages", texts)
    collator = Own(lambda row: tuple(json.loads(row["messages"])[i]["content"] for i in (1, 1)))
    assert ranked_texts(own_run(tmp_path, form(dataset), collator)) == sorted(ANSWERS)
    # SFTTrainer's collator stops at them
    trainer = build(tmp_path, form(dataset), "qwen2_5_vl", max_steps=1, aligned_heads=HEADS)
    plain = dataset.remove_columns("messages").add_column("messages", texts)
    plain = plain.map(lambda row: {"messages": typed(json.loads(row["messages"]))})
    expected = build(tmp_path, plain, "qwen2_5_vl", max_steps=1, aligned_heads=HEADS)
    for run in (trainer, expected):
        run.prepare_alignment()
    assert_same_batch(first_batch(trainer), first_batch(expected))


def typed(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answer = [{"type": "text", "text": messages[1]["content"]}]
    return [messages[0], {**messages[1], "content": answer}]


@pytest.mark.parametrize("text", ["no JSON", '{"a": 1}', '["a"]', "[1]"])
def test_messages_that_are_no_turns(text):
    with pytest.raises(ValueError, match="Column `messages` holds a str that is no list of turns"):
        collatable({"images": [], "messages": text}, vision_collator())


@STREAMED
def test_questions_and_answers(tmp_path, form, monkeypatch):
    teacher = save_tiny_dinov2(tmp_path / "teacher")
    passes = count_images(monkeypatch)
    dataset = data("messages", question=["what"] * N, answer=ANSWERS).remove_columns(["messages", TEACHER_COLUMN])
    collator = Own(lambda row: (row["question"], row["answer"]))
    run = own_run(tmp_path, form(dataset), collator, teacher=teacher)
    message = r"no text to rank.*`answer`, `images`, `question`.*`dataset_text_field`.*`aligned_heads`"
    with pytest.raises(ValueError, match=message):
        run.prepare_alignment()
    assert not passes  # before the teacher has worked
    run = own_run(tmp_path, form(dataset), collator, teacher=teacher, dataset_text_field="answer")
    assert ranked_texts(run) == sorted(ANSWERS)
    own_run(tmp_path, form(dataset), collator, teacher=teacher, aligned_heads=HEADS).prepare_alignment()


@STREAMED
def test_labels_that_cover_another_text(tmp_path, form):
    """A further column that the collator trains on: what is ranked by the names of columns is not it."""
    dataset = form(data("messages", reply=WORDS))
    collator = Own(lambda row: (row["messages"][0]["content"], f"no {row['reply'][::-1]}"))
    message = r"ranked on column `messages`.*`data_collator` do not cover.*`dataset_text_field`.*`head_ranking`"
    with pytest.raises(ValueError, match=message):
        own_run(tmp_path, dataset, collator).prepare_alignment()
    collator = Own(lambda row: (row["messages"][0]["content"], row["reply"]))
    assert ranked_texts(own_run(tmp_path, dataset, collator, dataset_text_field="reply")) == sorted(WORDS)


def test_labels_of_a_part(tmp_path):
    whole = [f"asked and said {answer}" for answer in ANSWERS]
    dataset = data("messages", text=whole).remove_columns("messages")
    # The text is ranked with a question that has no labels.
    collator = Own(lambda row: ("asked and said", row["text"].removeprefix("asked and said")))
    with pytest.raises(ValueError, match="ranked on column `text`"):
        own_run(tmp_path, dataset, collator).prepare_alignment()
    # Cut at a length, it is still the text.
    assert ranked_texts(own_run(tmp_path, dataset, Own(lambda row: ("", row["text"]), length=12))) == sorted(whole)
    # More than the text has labels, as those of plain `messages` have.
    collator = Own(lambda row: ("", f"{row['text']} and so on"))
    own_run(tmp_path, dataset, collator).prepare_alignment()


def test_the_text_of_a_ranking_by_hand():
    model, processor = build_vlm("llava")
    dataset = data("messages", answer=WORDS).remove_columns("messages")
    with pytest.raises(ValueError, match=r"no text to rank.*`answer`.*`text_column`"):
        rank_heads(model, processor, dataset, k=2)
    with pytest.raises(ValueError, match="but no column `reply`"):
        rank_heads(model, processor, dataset, k=2, text_column="reply")
    with fed_texts(model, processor.tokenizer) as texts:
        rank_heads(model, processor, dataset, k=2, text_column="answer")
    assert sorted(texts) == sorted(WORDS)
    numbers = dataset.add_column("text", list(range(N)))
    with pytest.raises(ValueError, match="Column `text` holds a int, neither a text nor turns"):
        rank_heads(model, processor, numbers, k=2)
