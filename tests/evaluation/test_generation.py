"""Answers in batches, and predictions that survive whatever happens to the run."""

from __future__ import annotations

import json
from copy import copy

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, build_vlm, image_dataset
from tokenizers.normalizers import Lowercase
from transformers import T5Config, T5ForConditionalGeneration

from hera_trainer.evaluation import generation
from hera_trainer.evaluation.generation import answer, predict, read_predictions
from hera_trainer.evaluation.questions import Questions

LENGTH = 6


@pytest.fixture(scope="module")
def llava():
    return build_vlm("llava")


@pytest.fixture
def questions():
    return Questions(image_dataset(7))


def asked(questions):
    return [questions.messages(index) for index in range(len(questions))]


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_answer_as_single_questions(family):
    """Padding on the left, and images of several sizes in a batch, change nothing in float32."""
    model, processor = build_vlm(family)
    conversations = asked(Questions(image_dataset(5)))
    together = answer(model, processor, conversations, LENGTH)
    alone = [answer(model, processor, [conversation], LENGTH)[0] for conversation in conversations]
    assert together == alone
    assert len(set(together)) > 1 and sum(map(bool, together)) > 1


def test_answers_are_greedy(llava):
    """The same as picking the likeliest token by hand, one at a time, without a cache."""
    model, processor = llava
    conversation = asked(Questions(image_dataset(1)))[0]
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens, ends = inputs["input_ids"], model.generation_config.eos_token_id
    new: list[int] = []
    with torch.no_grad():
        while len(new) < LENGTH and (not new or new[-1] != ends):
            logits = model(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits
            new.append(int(logits[0, -1].argmax()))
            tokens = torch.cat([tokens, torch.tensor([[new[-1]]])], 1)
    expected = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert answer(model, processor, [conversation], LENGTH) == [expected]


def test_what_a_decoder_says_of_an_encoders_prompt(llava):
    """Its tokens do not begin with the prompt's."""
    tokenizer = copy(llava[1].tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    start = {"decoder_start_token_id": tokenizer.pad_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = T5ForConditionalGeneration(T5Config(initializer_factor=8.0, **sizes, **start)).eval()
    question = "What is the colour of the shape in this picture?"
    text = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    tokens = tokenizer(question, return_tensors="pt")
    said, stop = [tokenizer.pad_token_id], model.generation_config.eos_token_id
    with torch.no_grad():
        while len(said) <= LENGTH and said[-1] != stop:
            said.append(int(model(**tokens, decoder_input_ids=torch.tensor([said])).logits[0, -1].argmax()))
    expected = tokenizer.decode(said[1:], skip_special_tokens=True).strip()
    assert expected and tokens["input_ids"].shape[1] > LENGTH
    assert answer(model, tokenizer, [text], LENGTH) == [expected]


def test_sampling_settings_of_the_model_are_ignored(llava, questions):
    model, processor = llava
    expected = answer(model, processor, asked(questions), LENGTH)
    before = model.generation_config.to_dict()
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=50, top_p=0.9, num_beams=3)
    try:
        assert answer(model, processor, asked(questions), LENGTH) == expected
    finally:
        model.generation_config.update(**before)


def test_other_settings_of_the_model_hold(llava, questions):
    """A string to stop at, which ends the first answer, and outputs by name."""
    model, processor = llava
    free = answer(model, processor, asked(questions), LENGTH)
    stop = next(sign for sign in free[0] if sign.isascii())
    before = model.generation_config.to_dict()
    model.generation_config.update(stop_strings=[stop], return_dict_in_generate=True)
    try:
        stopped = answer(model, processor, asked(questions), LENGTH)
    finally:
        model.generation_config.update(**before)
    assert stopped[0] == free[0][: free[0].index(stop) + 1] != free[0]


def test_tokenizer_without_a_padding_token(llava, questions):
    model, processor = llava
    expected = answer(model, processor, asked(questions), LENGTH)
    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token
    tokenizer.pad_token = None
    try:
        assert answer(model, processor, asked(questions), LENGTH) == expected
        assert tokenizer.pad_token is None and tokenizer.padding_side == "right"
    finally:
        tokenizer.pad_token = pad


def test_no_chat_template(llava, questions):
    model, processor = llava
    template, processor.chat_template = processor.chat_template, None
    try:
        with pytest.raises(ValueError, match="--chat-template FILE"):
            answer(model, processor, asked(questions), LENGTH)
    finally:
        processor.chat_template = template


# --- Predictions on disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Numbers of questions of the batches that were answered."""
    sizes = []

    def counting(model, processor, conversations, *args):
        sizes.append(len(conversations))
        return answer(model, processor, conversations, *args)

    monkeypatch.setattr(generation, "answer", counting)
    return sizes


def run(llava, questions, folder, **kwargs):
    return predict(*llava, questions, folder, max_new_tokens=LENGTH, batch_size=3, progress=False, **kwargs)


def test_predictions(llava, questions, tmp_path, counted):
    entries = run(llava, questions, tmp_path)
    assert counted == [3, 3, 1]
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert lines == entries
    assert [entry["prediction"] for entry in entries] == answer(*llava, asked(questions), LENGTH)
    for index, row in enumerate(image_dataset(7)):
        entry = entries[index]
        assert entry["row"] == index
        assert entry["prompt"] == row["prompt"][0]["content"]
        assert entry["reference"] == row["completion"][0]["content"]


def test_goes_on_where_it_stopped(llava, questions, tmp_path, counted, monkeypatch):
    """A process that dies in the second batch, and half a line of it that reached the disk."""
    complete = run(llava, questions, tmp_path / "whole")
    counted.clear()
    original = generation.PredictionFile.append

    def dying(self, entries):
        if self.path.exists():
            with self.path.open("ab") as file:
                file.write(json.dumps(entries[0]).encode()[:40])
            raise KeyboardInterrupt
        original(self, entries)

    with monkeypatch.context() as patch:
        patch.setattr(generation.PredictionFile, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            run(llava, questions, tmp_path / "cut")
    assert len(read_predictions(tmp_path / "cut" / "predictions.jsonl")) == 3
    counted.clear()
    assert run(llava, questions, tmp_path / "cut") == complete
    assert counted == [3, 1]
    counted.clear()
    assert run(llava, questions, tmp_path / "cut") == complete
    assert counted == []


def test_more_rows_later(llava, tmp_path, counted):
    """A run with a limit is the beginning of one without; a smaller one reads a part."""
    run(llava, Questions(image_dataset(7).select(range(4))), tmp_path)
    counted.clear()
    whole = run(llava, Questions(image_dataset(7)), tmp_path)
    assert counted == [3] and len(whole) == 7
    assert run(llava, Questions(image_dataset(7).select(range(2))), tmp_path) == whole[:2]


def test_other_settings_are_refused(llava, questions, tmp_path):
    run(llava, questions, tmp_path)
    before = (tmp_path / "predictions.jsonl").read_bytes()
    other = build_vlm("llava", seed=1)
    for change in (
        lambda: run(other, questions, tmp_path),
        lambda: run(llava, questions, tmp_path, settings={"dtype": "float16"}),
        lambda: predict(*llava, questions, tmp_path, max_new_tokens=LENGTH + 1, progress=False),
    ):
        with pytest.raises(ValueError, match=r"made differently.*--restart"):
            change()
    assert (tmp_path / "predictions.jsonl").read_bytes() == before


def test_answers_of_other_configurations_are_refused(questions, tmp_path):
    """The weights are the same each time."""
    model, processor = build_vlm("llava")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_alpha=8))
    run((adapted, processor), questions, tmp_path)
    assert len(run((adapted, processor), questions, tmp_path)) == len(questions)

    def refused():
        with pytest.raises(ValueError, match=r"made differently \(config_digest"):
            run((adapted, processor), questions, tmp_path)

    model.generation_config.repetition_penalty = 5.0
    refused()
    model.generation_config.repetition_penalty = None
    adapted.peft_config["default"].lora_alpha = 512
    refused()
    adapted.peft_config["default"].lora_alpha = 8
    processor.tokenizer.backend_tokenizer.normalizer = Lowercase()
    refused()


@pytest.mark.parametrize("change", ["image", "question", "answer", "suffix"])
def test_other_data_is_refused(llava, tmp_path, change):
    rows = image_dataset(3)
    run(llava, Questions(rows), tmp_path)
    other = image_dataset(3, seed=1)
    columns = {"image": "images", "question": "prompt", "answer": "completion"}
    if change == "question":
        other = other.select([1, 2, 0])
    if change != "suffix":
        taken = other.select_columns([columns[change]])
        rows = datasets.concatenate_datasets([rows.remove_columns(taken.column_names), taken], axis=1)
    with pytest.raises(ValueError, match=r"Row \d of the data set.*--restart"):
        run(llava, Questions(rows, suffix="!" if change == "suffix" else ""), tmp_path)


def test_restart_keeps_the_old_predictions(llava, questions, tmp_path):
    old = run(llava, questions, tmp_path)
    other = build_vlm("llava", seed=1)
    new = run(other, questions, tmp_path, restart=True)
    assert read_predictions(tmp_path / "predictions.jsonl") == new != old
    assert read_predictions(tmp_path / "predictions.1.jsonl") == old


def test_one_process_writes(llava, questions, tmp_path):
    first = generation.PredictionFile(tmp_path, {})
    with pytest.raises(ValueError, match="Another process"):
        run(llava, questions, tmp_path)
    first.close()


def test_broken_line(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"row": 1, "prediction": "b"}\nnothing\n{"row": 0, "prediction": "a"}\n')
    with pytest.raises(ValueError, match="Line 2 of"):
        read_predictions(path)
    path.write_text('{"row": 1, "prediction": "b"}\n{"row": 0, "prediction": "a"}\n{"row": 2, "predic')
    assert [entry["prediction"] for entry in read_predictions(path)] == ["a", "b"]
    path.write_text('{"prediction": "b"}\n{"prediction": "a"}')
    assert [entry["prediction"] for entry in read_predictions(path)] == ["b", "a"]
