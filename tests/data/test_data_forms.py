"""Every form of data through the whole trainer: which positions are pooled, and which vector comes with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, List, Value
from forms import ROWS, TEXT, VISION, chat, check, hand_vector, of_rows, photos, run, settle, turn, vision_collator
from tiny import build_vlm, save_tiny_dinov2, sft_args
from tiny_teachers import encoded
from trl import maybe_convert_to_chatml
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import HeRAConfig, HeRATrainer
from hera_trainer.cli.rows import load_rows
from hera_trainer.data.rows import check_tools, collatable
from hera_trainer.heads.text import TextColumns, answer_text


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return save_tiny_dinov2(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def vector(teacher):
    return hand_vector(teacher)


# Images a row, and where they are


COUNTS = (1, 0, 3, 1, 2, 1)


@pytest.mark.parametrize("missing", ["empty", "null", "null inside"])
@pytest.mark.parametrize("split", [False, True])
def test_none_one_and_many_images(tmp_path, teacher, vector, missing, split):
    rows, expected = [], {}
    for i, count in enumerate(COUNTS):
        own = photos(i, count)
        images: Any = {"empty": own, "null": own or None, "null inside": [*own, None]}[missing]
        text = {"prompt": chat(i)[:1], "completion": chat(i)[1:]} if split else {"messages": chat(i)}
        rows.append({"images": images, **text})
        answer = turn("assistant", f"red {i}")
        pooled = answer.removeprefix("<|im_start|>assistant\n") if split else None
        pooled = pooled or turn("user", VISION * count + f"what {i}") + answer
        expected[pooled] = vector(*own) if own else None
    check(run(tmp_path, teacher, of_rows(rows)), expected)


def test_one_image_or_null(tmp_path, teacher, vector):
    own = [photos(i)[0] if i else None for i in range(ROWS)]
    trainer = run(tmp_path, teacher, of_rows([{"image": own[i], "messages": chat(i)} for i in range(ROWS)]))
    check(
        trainer,
        {
            turn("user", VISION * bool(i) + f"what {i}") + turn("assistant", f"red {i}"): vector(own[i]) if i else None
            for i in range(ROWS)
        },
    )


@pytest.mark.parametrize("form", [list, Dataset.to_iterable_dataset], ids=["memory", "stream"])
@pytest.mark.parametrize("name", ["image", "images"])
def test_lists_in_image_and_one_in_images(tmp_path, teacher, vector, name, form):
    """What the two names promise is not always what is stored; SFTTrainer stops at both."""
    count = 2 if name == "image" else 1
    own = [photos(i, count) for i in range(ROWS)]
    rows = [{name: images if count > 1 else images[0], "messages": chat(i)} for i, images in enumerate(own)]
    dataset = of_rows(rows, image=List(Image()), images=Image())
    trainer = run(tmp_path, teacher, dataset if form is list else form(dataset), max_steps=2)
    check(
        trainer,
        {
            turn("user", VISION * count + f"what {i}") + turn("assistant", f"red {i}"): vector(*own[i])
            for i in range(ROWS)
        },
    )


def test_images_of_rows_with_a_format():
    """One tensor for all of a row's images, where they are equally large."""
    row = of_rows([{"images": [*photos(0), *photos(2)], "messages": chat(0)}]).with_format("torch")[0]
    assert row["images"].shape == (2, 3, 36, 32)
    images = collatable(row, vision_collator())["images"]
    assert [image.shape for image in images] == [(3, 36, 32)] * 2


@pytest.mark.parametrize("stored", ["bytes", "paths", "binary"])
def test_images_that_are_not_decoded(tmp_path, teacher, vector, stored):
    rows, expected = [], {}
    for i in range(ROWS):
        path = tmp_path / f"{i}.png"
        path.write_bytes(encoded(photos(i)[0]))
        value: Any = {"bytes": path.read_bytes(), "path": None}
        value = {"bytes": value, "paths": {"bytes": None, "path": str(path)}, "binary": value["bytes"]}[stored]
        rows.append({"images": [value], "messages": chat(i)})
        expected[turn("user", VISION + f"what {i}") + turn("assistant", f"red {i}")] = vector(*photos(i))
    feature = Value("binary") if stored == "binary" else Image(decode=False)
    trainer = run(tmp_path, teacher, of_rows(rows, images=List(feature)))
    check(trainer, expected)
    decoded = run(tmp_path, teacher, of_rows(rows))
    assert torch.equal(trainer.pixels["pixel_values"], decoded.pixels["pixel_values"])


@pytest.mark.parametrize("split", [False, True])
def test_images_inside_of_messages(tmp_path, teacher, vector, split):
    """Two of them, the placeholder of one from `images` in between; Arrow gives every part every key."""
    part = {"type": Value("string"), "text": Value("string"), "image": Image()}
    rows, expected = [], {}
    for i in range(ROWS):
        first, second, third = photos(i, 3)
        user = [
            {"type": "image", "image": first},
            {"type": "text", "text": f"what {i}"},
            {"type": "image"},
            {"type": "image", "image": third},
        ]
        turns = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": f"red {i}"}]},
        ]
        text = {"prompt": turns[:1], "completion": turns[1:]} if split else {"messages": turns}
        rows.append({"images": [second], **text})
        answer = turn("assistant", f"red {i}")
        whole = turn("user", VISION + f"what {i}" + VISION * 2) + answer
        pooled = answer.removeprefix("<|im_start|>assistant\n") if split else whole
        expected[pooled] = vector(first, second, third)
    message = List({"role": Value("string"), "content": List(part)})
    dataset = of_rows(rows, messages=message, prompt=message, completion=message)
    check(run(tmp_path, teacher, dataset), expected)
    # the model gets them in the order of their placeholders: of a prompt by the list, of `messages` where they stand
    row = collatable(dataset[0], vision_collator())
    pixels = [np.asarray(p).tolist() for p in photos(0, 3)]
    assert "image" in dataset[0]["prompt" if split else "messages"][0]["content"][1]
    parts = row["prompt" if split else "messages"][0]["content"]
    own = [np.asarray(part["image"]).tolist() for part in parts if "image" in part]
    listed = [np.asarray(image).tolist() for image in row["images"]]
    assert (own, listed) == (([], pixels) if split else ([pixels[0], pixels[2]], [pixels[1]]))
    assert [part["type"] for part in parts] == ["image", "text", "image", "image"]


# Turns


def test_images_inside_of_turns_of_a_file(tmp_path, teacher, vector):
    """Whose contents are of different types, which `datasets` keeps as texts."""
    lines = []
    for i in range(ROWS):
        path = tmp_path / f"{i}.png"
        photos(i)[0].save(path)
        image = {"type": "image", "image": str(path)}
        content = [image, {"type": "text", "text": f"what {i}"}] if i else f"what {i}"
        asked, answer = {"role": "user", "content": content}, {"role": "assistant", "content": f"red {i}"}
        lines.append(json.dumps({"images": [], "messages": [asked, answer]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows = load_rows(tmp_path / "rows.jsonl")
    assert "Json" in str(rows.features["messages"])
    check(
        run(tmp_path, teacher, rows, num_neighbors=2),
        {
            turn("user", VISION * bool(i) + f"what {i}") + turn("assistant", f"red {i}"): vector(*photos(i))
            if i
            else None
            for i in range(ROWS)
        },
    )


def conversation(number: int) -> list[dict[str, Any]]:
    """System, two questions, and an answer for which a tool was called first."""
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"x": number}}}
    return [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": f"what {number}"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": f"red {number}"},
        {"role": "user", "content": "and where"},
        {"role": "assistant", "content": f"left {number}"},
    ]


CALLING = List(
    {
        **TEXT,
        "tool_calls": List(
            {"type": Value("string"), "function": {"name": Value("string"), "arguments": {"x": Value("int64")}}}
        ),
    }
)


@pytest.mark.parametrize("form", ["messages", "assistant only", "prompt and completion"])
def test_system_turns_tools_and_several_turns(tmp_path, teacher, vector, form):
    rows, expected = [], {}
    for i in range(ROWS):
        turns, own = conversation(i), photos(i, 2)
        cut = 4 if i % 2 else 2  # the prompt ends with what the tool, or the user, said
        split = {"prompt": turns[:cut], "completion": turns[cut:]}
        rows.append({"images": own, **(split if form == "prompt and completion" else {"messages": turns})})
        call = f'[{{"type": "function", "function": {{"name": "zoom", "arguments": {{"x": {i}}}}}}}]'
        spoken = [f"{call}<|im_end|>", f"red {i}<|im_end|>", f"left {i}<|im_end|>"]
        asked = turn("user", VISION * 2 + f"what {i}")
        tail = turn("user", "and where") + f"<|im_start|>assistant\n{spoken[2]}\n"
        whole = turn("system", "be brief") + asked + f"<|im_start|>assistant\n{spoken[0]}\n" + turn("tool", "done")
        whole += f"<|im_start|>assistant\n{spoken[1]}\n" + tail
        pooled = {
            "messages": whole,
            "assistant only": "".join(spoken),
            "prompt and completion": f"{spoken[1]}\n" + tail
            if i % 2
            else whole.split(asked + "<|im_start|>assistant\n")[1],
        }[form]
        expected[pooled] = vector(*own)
    dataset = of_rows(rows, messages=CALLING, prompt=CALLING, completion=CALLING)
    trainer = run(tmp_path, teacher, dataset, assistant_only_loss=form == "assistant only")
    if form == "assistant only":  # by pieces: the tokens of one turn never depend on those of another
        tokenizer = trainer.processing_class.tokenizer
        assert {tokenizer.decode(ids) for ids in trainer.samples} == set(expected)
        by_text = {tokenizer.decode(ids): v for ids, v in trainer.samples.items()}
        for text, found in by_text.items():
            torch.testing.assert_close(found, expected[text], rtol=1e-5, atol=1e-5)
    else:
        check(trainer, expected)


def test_text_that_is_ranked():
    words = {"role": "assistant", "content": [{"type": "image", "text": None}, {"type": "text", "text": "a dog"}]}
    assert answer_text({"messages": conversation(3)}) == "red 3\nleft 3"
    assert answer_text({"prompt": conversation(3)[:5], "completion": conversation(3)[5:]}) == "left 3"
    assert answer_text({"messages": [{"role": "assistant", "tool_calls": []}, words]}) == "a dog"  # no `content` at all
    assert answer_text({"prompt": "what", "completion": "a cat"}) == "a cat"
    assert answer_text({"messages": conversation(3)[:4]}) == ""
    assert answer_text({"text": "a cat", "caption": "a dog"}, TextColumns("caption")) == "a dog"


@pytest.mark.parametrize("tools", [[{"type": "function", "function": {"name": "zoom"}}], '[{"name": "zoom"}]'])
def test_definitions_of_tools_are_refused(tools):
    """SFTTrainer takes the column out of vision data, and the model would never see the tools that it calls."""
    row = {"images": [], "messages": chat(0)}
    collator = vision_collator()
    for nothing in (None, [], "", "[]"):
        assert "tools" not in collatable({**row, "tools": nothing}, collator)
    with pytest.raises(ValueError, match=r"does not show.*system turn.*remove_columns"):
        collatable({**row, "tools": tools}, collator)
    dataset = Dataset.from_list([{**row, "tools": value} for value in (None, tools)])
    with pytest.raises(ValueError, match="column `tools`"):
        check_tools(dataset, collator)
    check_tools(dataset.select([0]), collator)
    check_tools(dataset, lambda rows: rows)  # a collator of the user's own may show them
    assert collatable(dataset[1], len) is not None


def test_tools_in_any_row_are_refused_before_training(tmp_path, teacher):
    rows = [{"images": photos(i), "messages": chat(i), "tools": None} for i in range(ROWS)]
    rows[-1]["tools"] = '[{"name": "zoom"}]'
    with pytest.raises(ValueError, match="column `tools`"):
        run(tmp_path, teacher, of_rows(rows, tools=Value("string")))


def test_plain_text(tmp_path, teacher, vector):
    """SFTTrainer alone takes the column out of vision data, and stops at rows without any."""
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    rows = [{"images": photos(i), "text": f"{image}what {i} red {i}"} for i in range(ROWS)]
    expected = {f"{VISION}what {i} red {i}": vector(*photos(i)) for i in range(ROWS)}
    check(run(tmp_path, teacher, of_rows(rows, text=Value("string"))), expected)


@pytest.mark.parametrize("streamed", [False, True])
def test_plain_text_of_another_name_is_ranked(tmp_path, teacher, streamed):
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    rows = [{"images": photos(i), "text": "the same", "caption": f"{image}what {i} red {i}"} for i in range(ROWS)]
    rankings = []
    for name in ("caption", "text"):
        dataset = of_rows([{"images": row["images"], name: row["caption"]} for row in rows], **{name: Value("string")})
        if name == "caption":
            dataset = of_rows(rows, caption=Value("string"), text=Value("string"))
        dataset = dataset.to_iterable_dataset() if streamed else dataset
        settings = {"dataset_text_field": name, "max_steps": 2, "num_neighbors": 2, "gradient_accumulation_steps": 1}
        model, processor = build_vlm("qwen2_5_vl")
        args = HeRAConfig(**sft_args(tmp_path, per_device_train_batch_size=ROWS, **settings), num_aligned_heads=2)
        trainer = HeRATrainer(model, args, train_dataset=dataset, processing_class=processor, teacher=teacher)
        trainer.prepare_alignment()
        rankings.append(trainer.head_ranking)
    assert rankings[0].num_samples == ROWS
    torch.testing.assert_close(rankings[0].scores, rankings[1].scores, rtol=0, atol=0, equal_nan=True)


def test_rows_without_any_text():
    with pytest.raises(ValueError, match=r"without any text.*`messages`, `prompt` with.*`text`.*`dataset_text_field`"):
        collatable({"images": []}, vision_collator())
    assert collatable({"images": None, "text": "a"}, vision_collator()) == {"images": [], "text": "a"}
    custom = {"images": None}
    assert collatable(custom, len) is custom  # not ours to change


# Plain captions


@pytest.mark.parametrize("columns", [["text"], ["prompt", "completion"]])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_plain_texts_without_a_placeholder(tmp_path, teacher, family, columns):
    model, processor = build_vlm(family)
    rows = [{"images": photos(i), **{name: f"red {i}" for name in columns}} for i in range(ROWS)]
    args = HeRAConfig(**sft_args(tmp_path, teacher_model_name_or_path=teacher, num_neighbors=2))
    run = HeRATrainer(
        model, args, train_dataset=of_rows(rows, **dict.fromkeys(columns, Value("string"))), processing_class=processor
    )
    with pytest.raises(ValueError, match=f"`{columns[-1]}` holds plain texts without the placeholder of an image"):
        run.prepare_alignment()


def test_a_folder_of_captioned_images_as_the_docs_show(tmp_path, teacher, vector):
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    (code,) = re.findall(r"## A folder of images with captions.*?```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "photos").mkdir()
    lines = ["file_name,text"]
    for i in range(ROWS):
        photos(i, 1)[0].save(tmp_path / "photos" / f"{i}.png")
        lines.append(f"{i}.png,red {i}")
    (tmp_path / "photos" / "metadata.csv").write_text("\n".join(lines))
    exec(code.replace('"photos"', repr(str(tmp_path / "photos"))).replace('"data"', repr(str(tmp_path / "data"))), {})
    expected = {f"red {i}<|im_end|>\n": vector(*photos(i, 1)) for i in range(ROWS)}
    check(run(tmp_path, teacher, load_rows(tmp_path / "data")), expected)


# LLaVA's data


def llava_rows(with_placeholder: bool = True) -> Dataset:
    rows = []
    for i in range(ROWS):
        asked = ("<image>\n" if with_placeholder else "") + f"what {i}"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"red {i}"}]
        rows.append({"images": photos(i, 1), "conversations": turns})
    return of_rows(rows, conversations=List({"from": Value("string"), "value": Value("string")}))


def shown_in_the_docs(with_placeholder: bool) -> Dataset:
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    (code,) = re.findall(r"## LLaVA's data.*?```python\n(.*?)```", page, re.DOTALL)
    names = {"dataset": llava_rows(with_placeholder)}
    exec(code, names)
    return names["dataset"]


def test_llavas_data_as_the_docs_show(tmp_path, teacher, vector, caplog):
    expected = {
        turn("user", VISION + f"what {i}") + turn("assistant", f"red {i}"): vector(*photos(i, 1)) for i in range(ROWS)
    }
    check(run(tmp_path, teacher, shown_in_the_docs(with_placeholder=True)), expected)
    assert "which this model reads as words" not in caplog.text


@pytest.mark.parametrize("heads", [None, ["L0H0"]])
def test_llavas_data_as_it_is(tmp_path, teacher, heads):
    with pytest.raises(ValueError, match=r"`conversations` is the form of LLaVA's data.*maybe_convert_to_chatml"):
        run(tmp_path, teacher, llava_rows(), aligned_heads=heads)


def test_placeholders_of_another_model_in_the_texts(tmp_path, teacher, caplog):
    rows = llava_rows().map(lambda row: maybe_convert_to_chatml(dict(row)), remove_columns="conversations")
    named = {"human": "user", "gpt": "assistant"}
    rows = rows.map(lambda row: {"messages": [{**m, "role": named[m["role"]]} for m in row["messages"]]})
    run(tmp_path, teacher, rows)
    assert caplog.text.count("`<image>`, which this model reads as words") == 1


class Afterwards(DataCollatorForVisionLanguageModeling):
    """A subclass that does something to the batch."""

    def torch_call(self, examples):
        return super().torch_call(examples)


def test_a_collator_that_changes_its_batch(tmp_path, teacher, vector):
    """It keeps its own column of text, and gets rows as SFTTrainer's."""
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    rows = [{"images": photos(i), "caption": f"{image}red {i}"} for i in range(ROWS)]
    _, processor = build_vlm("qwen2_5_vl")
    settle(processor)
    collator = Afterwards(processor, dataset_text_field="caption")
    settings = {"data_collator": collator, "has_baseline": False}  # SFTTrainer drops the column before it
    check(
        run(tmp_path, teacher, of_rows(rows, caption=Value("string")), **settings),
        {f"{VISION}red {i}": vector(*photos(i)) for i in range(ROWS)},
    )


class OfColumns(DataCollatorForVisionLanguageModeling):
    """A subclass of SFTTrainer's collator that makes messages of columns of its own."""

    def torch_call(self, examples):
        made = []
        for row in examples:
            asked, answer = {"role": "user", "content": row["asked"]}, {"role": "assistant", "content": row["answer"]}
            made.append({"images": row["images"], "messages": [asked, answer]})
        return super().torch_call(made)


def test_a_collator_of_ones_own_gets_the_rows_as_they_are_without_alignment(tmp_path):
    seen = []

    class Watching(DataCollatorForVisionLanguageModeling):
        def torch_call(self, examples):
            seen.extend(dict(example) for example in examples)
            return super().torch_call([{name: row[name] for name in ("image", "messages")} for row in examples])

    model, processor = build_vlm("qwen2_5_vl")
    settle(processor)
    rows = of_rows(
        [{"image": photos(i)[0], "messages": chat(i), "hint": "a"} for i in range(ROWS)], hint=Value("string")
    )
    settings = {"alignment_weight": 0.0, "max_steps": 1, "remove_unused_columns": False}
    args = HeRAConfig(**sft_args(tmp_path, **settings))
    collator = Watching(processor)
    trainer = HeRATrainer(model, args, data_collator=collator, train_dataset=rows, processing_class=processor)
    assert trainer.data_collator is collator
    trainer.train()
    assert set(seen[0]) == {"image", "messages", "hint"}


def test_a_collator_that_makes_its_messages(tmp_path, teacher, vector):
    rows = of_rows(
        [{"images": photos(i, 1), "asked": f"what {i}", "answer": f"red {i}"} for i in range(ROWS)],
        asked=Value("string"),
        answer=Value("string"),
    )
    expected = {
        turn("user", VISION + f"what {i}") + turn("assistant", f"red {i}"): vector(*photos(i, 1)) for i in range(ROWS)
    }
    _, processor = build_vlm("qwen2_5_vl")
    settle(processor)
    for settings in ({}, {"aligned_heads": None, "dataset_text_field": "answer", "num_aligned_heads": 2}):
        check(
            run(tmp_path, teacher, rows, data_collator=OfColumns(processor), remove_unused_columns=False, **settings),
            expected,
        )
