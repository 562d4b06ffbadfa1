"""`hera eval`: questions from files, models of each kind, scores and their report."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from peft import LoraConfig, get_peft_model
from tiny import build_vlm, image_dataset, save_vlm
from tiny_teachers import encoded

from hera_trainer.cli import main
from hera_trainer.evaluation.generation import answer
from hera_trainer.evaluation.other_images import BlankQuestions, PermutedQuestions
from hera_trainer.evaluation.questions import Questions

LENGTH = 6


# --- Questions -------------------------------------------------------------------------------------------------------


def test_forms_of_questions():
    """The same question and answer in each form of data."""
    rows = image_dataset(2)
    expected = Questions(rows).describe(0)
    messages = Questions(image_dataset(2, fmt="image")).describe(0)
    assert (messages["prompt"], messages["reference"]) == (expected["prompt"], expected["reference"])
    images = [row["images"][0] for row in rows]
    plain = Dataset.from_dict(
        {"question": [expected["prompt"]] * 2, "image": images, "label": [1, 0]},
        features=Features({"question": Value("string"), "image": Image(), "label": ClassLabel(names=["no", "yes"])}),
    )
    assert Questions(plain).describe(0)["reference"] == "yes"
    turns = Questions(plain, system="Be brief.", suffix=" One word.").messages(0)
    assert [turn["role"] for turn in turns] == ["system", "user"]
    assert [part["type"] for part in turns[1]["content"]] == ["image", "text"]
    assert turns[1]["content"][1]["text"] == expected["prompt"] + " One word."
    assert turns[1]["content"][0]["image"].tobytes() == images[0].tobytes()


def test_images_inside_messages_and_several_columns():
    one, two, three = (row["images"][0] for row in image_dataset(3))
    part = {"type": Value("string"), "text": Value("string"), "image": Image()}
    content = [
        {"type": "text", "text": "First", "image": None},
        {"type": "image", "text": None, "image": one},
        {"type": "image", "text": None, "image": None},
        {"type": "image", "text": None, "image": None},
    ]
    dataset = Dataset.from_dict(
        {"messages": [[{"role": "user", "content": content}]], "a": [two], "b": [three], "answer": ["x"]},
        features=Features(
            {
                "messages": List({"role": Value("string"), "content": List(part)}),
                "a": Image(),
                "b": Image(),
                "answer": Value("string"),
            }
        ),
    )
    questions = Questions(dataset, image_columns=["a", "b"])
    parts = questions.messages(0)[0]["content"]
    assert [part["image"].tobytes() for part in parts[1:]] == [image.tobytes() for image in (one, two, three)]
    assert parts[0] == {"type": "text", "text": "First"}
    with pytest.raises(ValueError, match="Row 0: Number of images"):
        Questions(dataset, image_columns=["a"]).messages(0)
    assert Questions(dataset, answer_column="answer, b").describe(0)["reference"]["answer"] == "x"


@pytest.mark.parametrize("as_json", [True, False])
def test_images_in_every_form(as_json):
    """As in training: written in the messages, which may be JSON text; one that the column repeats is shown once."""
    one, two = (row["images"][0] for row in image_dataset(2))
    uri = f"data:image/png;base64,{base64.b64encode(encoded(one)).decode()}"
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "image"}, {"type": "text", "text": "what"}]
    said = [{"type": "text", "text": "a cat"}]
    messages: Any = [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
    stored = [{"bytes": encoded(image), "path": None} for image in (one, two)]
    dataset = Dataset.from_dict({"messages": [json.dumps(messages) if as_json else messages], "images": [stored]})
    questions = Questions(dataset)
    [turn] = questions.messages(0)
    assert [part["type"] for part in turn["content"]] == ["image", "image", "text"]
    shown = [part["image"].tobytes() for part in turn["content"][:2]]
    assert shown == [image.tobytes() for image in (one, two)]
    assert (questions.describe(0)["prompt"], questions.describe(0)["reference"]) == ("what", "a cat")
    assert questions.references() == ["a cat"]


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, an adapter on it, and a file of questions with the images beside it."""
    root = tmp_path_factory.mktemp("eval")
    base = save_vlm("llava", root / "base")
    model, _ = build_vlm("llava")
    model.name_or_path = base
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(str(root / "adapter"))
    lines = []
    for index, row in enumerate(image_dataset(5)):
        row["images"][0].save(root / f"{index}.png")
        question = row["prompt"][0]["content"]
        lines.append({"id": f"q{index}", "image": f"{index}.png", "question": question, "answer": "yes"})
    (root / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def evaluate(folder, model, output, *arguments):
    options = ["--dataset", str(folder / "questions.jsonl"), "--max-new-tokens", str(LENGTH), "--output", str(output)]
    return main(["eval", str(folder / model), *options, *arguments])


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_model_and_adapter(folder, tmp_path, capsys, name):
    assert evaluate(folder, name, tmp_path, "--metric", "exact_match", "pope", "--batch-size", "2") == 0
    printed = capsys.readouterr().out
    model, processor = build_vlm("llava")
    if name == "adapter":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder / "adapter"))
    questions = Questions(image_dataset(5))
    expected = answer(model, processor, [questions.messages(index) for index in range(5)], LENGTH)
    entries = lines_of(tmp_path / "predictions.jsonl")
    assert [entry["prediction"] for entry in entries] == expected
    assert [entry["id"] for entry in entries] == [f"q{index}" for index in range(5)]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["rows"] == 5 and results["model"] == str(folder / name)
    assert set(results["metrics"]) == {"exact_match", "pope"}
    # Nothing that a random model says is a no, so POPE takes every answer for a yes.
    assert results["metrics"]["pope"]["yes_ratio"] == results["metrics"]["pope"]["accuracy"] == 1.0
    assert results["settings"]["max_new_tokens"] == LENGTH and "transformers" in results["versions"]
    assert "5 answers" in printed and "yes_ratio" in printed


def test_limit_resume_and_refusal(folder, tmp_path, capsys):
    assert evaluate(folder, "base", tmp_path, "--metric", "exact_match", "--limit", "2") == 0
    first = (tmp_path / "predictions.jsonl").read_text()
    assert evaluate(folder, "base", tmp_path, "--metric", "exact_match") == 0
    assert (tmp_path / "predictions.jsonl").read_text().startswith(first)
    assert len(lines_of(tmp_path / "predictions.jsonl")) == 5
    capsys.readouterr()
    assert evaluate(folder, "adapter", tmp_path, "--metric", "exact_match") == 1
    error = capsys.readouterr().err
    assert "model_digest" in error and "--restart" in error and error.count("\n") == 1
    assert evaluate(folder, "adapter", tmp_path, "--metric", "exact_match", "--restart") == 0
    assert len(lines_of(tmp_path / "predictions.1.jsonl")) == 5


def test_autocast(folder, tmp_path):
    """Under autocast the prompts are answered in that type, and the answers are kept apart from others."""
    import torch

    options = ("--metric", "exact_match", "--batch-size", "5")
    assert evaluate(folder, "base", tmp_path, *options, "--autocast", "bfloat16") == 0
    questions = Questions(image_dataset(5))
    conversations = [questions.messages(index) for index in range(5)]
    expected = answer(*build_vlm("llava"), conversations, LENGTH, torch.bfloat16)
    assert [entry["prediction"] for entry in lines_of(tmp_path / "predictions.jsonl")] == expected
    assert evaluate(folder, "base", tmp_path, *options) == 1


def test_other_images(folder, tmp_path, capsys):
    """Answers with the images of others and with grey ones, each kept beside the right ones, and what the right ones
    gain by every score."""
    right = answers_to(Questions(image_dataset(5)))
    others = {
        "permuted": answers_to(PermutedQuestions(Questions(image_dataset(5)))),
        "blank": answers_to(BlankQuestions(Questions(image_dataset(5)))),
    }
    assert right != others["permuted"] and right != others["blank"]
    # What the model says to its images is right, so that every answer that they change costs.
    lines = lines_of(folder / "questions.jsonl")
    path = folder / "right.jsonl"
    path.write_text(
        "".join(json.dumps({**line, "answer": said}) + "\n" for line, said in zip(lines, right, strict=True))
    )
    arguments = ("--dataset", str(path), "--metric", "exact_match", "vqa_accuracy")
    assert evaluate(folder, "base", tmp_path, *arguments) == 0
    assert "gain" not in capsys.readouterr().out
    first = (tmp_path / "predictions.jsonl").read_bytes()
    assert evaluate(folder, "base", tmp_path, *arguments, "--images", "right", "permuted", "blank") == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "predictions.jsonl").read_bytes() == first  # not asked again
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["metrics"] == {"exact_match": {"exact_match": 1.0}, "vqa_accuracy": {"vqa_accuracy": 1.0}}
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("exact_match")]
    (head,) = [line.split() for line in printed.splitlines() if line.startswith("metric")]
    assert head == ["metric", "score", "right", "permuted", "gain", "blank", "gain"]
    for place, (name, answers) in enumerate(others.items()):
        assert [line["prediction"] for line in lines_of(tmp_path / name / "predictions.jsonl")] == answers
        share = sum(map(str.__eq__, answers, right)) / 5
        scores = results["other_images"][name]
        assert scores["metrics"]["exact_match"]["exact_match"] == share < 1
        assert scores["image_gain"]["exact_match"]["exact_match"] == 1 - share
        assert set(scores["image_gain"]) == set(results["metrics"]) and scores["asked_as_they_are"] == 0
        assert row[3 + 2 * place : 5 + 2 * place] == [f"{share:.4f}", f"{1 - share:+.4f}"]
    # Other questions have other images to give, so the rows are not what they were.
    assert evaluate(folder, "base", tmp_path, *arguments, "--limit", "4", "--images", "permuted") == 1
    assert "permuted/predictions.jsonl" in capsys.readouterr().err


def answers_to(questions):
    model, processor = build_vlm("llava")
    return answer(model, processor, [questions.messages(index) for index in range(len(questions))], LENGTH)


def test_questions_without_images_are_asked_as_they_are(folder, tmp_path, capsys):
    lines = lines_of(folder / "questions.jsonl")
    path = folder / "some.jsonl"
    path.write_text(
        "".join(json.dumps({**line, "image": None} if i < 2 else line) + "\n" for i, line in enumerate(lines))
    )
    options = ("--dataset", str(path), "--metric", "pope", "--images", "permuted")
    assert evaluate(folder, "base", tmp_path, *options) == 0
    assert "2 questions have no permuted images and were asked as they are." in capsys.readouterr().out
    right, other = (lines_of(tmp_path / part / "predictions.jsonl") for part in ("", "permuted"))
    assert right[:2] == other[:2] and all(a["digest"] != b["digest"] for a, b in zip(right[2:], other[2:], strict=True))


def test_scores_a_file(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    lines = [{"prediction": "Yes", "reference": "yes"}, {"prediction": "No", "reference": "yes"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["eval", "--predictions", str(path), "--metric", "exact_match", "--output", str(tmp_path / "scores")]
    assert main(arguments) == 0
    assert "0.5000" in capsys.readouterr().out
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert results["metrics"] == {"exact_match": {"exact_match": 0.5}}


def test_metrics_of_others_may_return_arrays(tmp_path, monkeypatch):
    from hera_trainer.evaluation import answer_scores

    monkeypatch.setattr(answer_scores, "score", lambda *given: {"f1": {"f1": np.array([0.5, 0.25]), "n": np.int64(2)}})
    (tmp_path / "answers.jsonl").write_text(json.dumps({"prediction": "a", "reference": "a"}) + "\n")
    arguments = ["eval", "--predictions", str(tmp_path / "answers.jsonl"), "--metric", "exact_match"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == {"f1": {"f1": [0.5, 0.25], "n": 2}}


def test_annotations_reach_the_metric(tmp_path, capsys):
    """POPE with ids of questions and its question file."""
    questions = [{"question_id": 1, "label": "yes"}, {"question_id": 2, "label": "no"}]
    (tmp_path / "pope.json").write_text("".join(json.dumps(question) + "\n" for question in questions))
    lines = [{"prediction": "No.", "reference": 2}, {"prediction": "No.", "reference": 1}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["eval", "--predictions", str(tmp_path / "answers.jsonl"), "--metric", "pope", "--metric-arg"]
    assert main([*arguments, f"annotations={tmp_path}/pope.json"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[2] for line in printed.splitlines() if "accuracy" in line] == ["0.5000"]
    assert main([*arguments, f"annotations={tmp_path}/nothing.json"]) == 1
    assert "not there" in capsys.readouterr().err


def test_chat_template(folder, tmp_path, capsys):
    """A model without one is refused, and takes one from a file."""
    base = Path(save_vlm("llava", tmp_path / "base"))
    template = (base / "chat_template.jinja").rename(tmp_path / "template.jinja")
    arguments = (folder, base, tmp_path / "out", "--metric", "exact_match")
    assert evaluate(*arguments) == 1
    assert "--chat-template FILE" in capsys.readouterr().err
    assert evaluate(*arguments, "--chat-template", str(template)) == 0
    evaluate(folder, "base", tmp_path / "own", "--metric", "exact_match")
    assert lines_of(tmp_path / "out" / "predictions.jsonl") == lines_of(tmp_path / "own" / "predictions.jsonl")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "accuracy"], ["no metric 'accuracy'", "exact_match"]),
        (["--metric", "mutual_knn"], ["hera rank"]),
        (["--metric", "amber"], ["--metric-arg annotations=AMBER/data", "https://github.com"]),
        (["--metric", "exact_match", "--metric-arg", "a=1"], ["has no argument 'a'", "It takes none."]),
        (["--metric", "pope", "--metric-arg", "anotations=x"], ["no argument 'anotations'", "It takes `annotations`."]),
        (["--metric", "chair", "--metric-arg", "synonym=x"], ["'synonym'", "It takes `annotations`, `synonyms`."]),
        (["--metric", "pope", "--metric-arg", "predictions=x"], ["'predictions'", "It takes `annotations`."]),
        (["--metric", "pope", "--metric-arg", "annotations=5"], ["annotations of the metric 'pope'", "path, not 5"]),
        (["--metric", "pope", "--metric-arg", 'annotations=["a"]'], ["are a path, not ['a']"]),
        (["--metric", "chair", "--metric-arg", "annotations=[1]"], ["are a path, not 1"]),
        (["--metric", "chair", "--metric-arg", 'annotations=["a.json"]'], ["annotations 'a.json' are not there"]),
        (["--metric", "pope", "--metric-arg", ".annotations=x"], ["takes KEY=VALUE"]),
        (
            ["--metric", "exact_match", "--answer-column", "answer,id"],
            ["Row 0", "record of answer, id", "--answer-column"],
        ),
        (["--metric", "pope", "--answer-column", "question"], ["'pope'", "row 0 is 'what is in", "--answer-column"]),
        (["--metric", "chair"], ["'chair'", "row 0 is 'yes'", "--answer-column"]),
        (["--metric", "exact_match", "pope", "--metric-arg", "a=1"], ["exact_match.a=1"]),
        (["--metric", "exact_match", "--metric-arg", "pope.a=1"], ["arguments for pope"]),
        (["--metric", "exact_match", "--answer-column", "right"], ["no column `right`", "--answer-column"]),
        (["--metric", "exact_match", "--prompt-column", "text"], ["no column `text`", "--prompt-column"]),
        (["--metric", "exact_match", "--dataset", "someone/data"], ["--split test"]),
        (["--metric", "exact_match", "--dataset", "nothing.jsonl"], ["no file"]),
        (["--metric", "hallusionbench", "exact_match"], ["hallusionbench, exact_match compare", "--answer-column"]),
    ],
)
def test_errors_name_the_cure(folder, tmp_path, capsys, arguments, words):
    assert evaluate(folder, "base", tmp_path / "out", *arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model"],
        ["model", "--metric", "pope"],
        ["--export", "lmms-eval"],
        ["--predictions", "answers.jsonl", "--metric", "pope", "--images", "permuted"],
        ["--predictions", "answers.jsonl", "--metric", "exact_match", "--answer-column", "label"],
    ],
)
def test_what_is_needed(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *arguments])
    assert stopped.value.code == 2


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("hera eval", "--metric-arg", "--predictions", "--export", "examples:"))


# As they come from the Hub (lmms-lab/VQAv2, HuggingFaceM4/OK-VQA, lmms-lab/textvqa, HuggingFaceM4/VizWiz), and the
# accuracy of the answer net: two, five and ten of the ten agree with it.
HUMANS = ["net"] * 2 + ["tennis net"] * 8
FORMS = {
    "VQA v2": {
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(HUMANS)]
    },
    "OK-VQA": {
        "answers": [{"answer": a, "raw_answer": a + "s", "answer_confidence": "yes", "answer_id": 1} for a in HUMANS]
    },
    "VizWiz": {"answers": [{"answer_confidence": "maybe", "answer": answer} for answer in HUMANS]},
    "TextVQA": {"answers": HUMANS},
    "records of lists": {"answers": {"answer": HUMANS, "answer_id": list(range(10))}},
}


@pytest.mark.parametrize("form", FORMS)
def test_references_as_they_come_from_the_hub(folder, tmp_path, capsys, monkeypatch, form):
    """From Parquet, through Arrow, predictions on disk and back."""
    from hera_trainer.evaluation import generation

    monkeypatch.setattr(generation, "answer", lambda model, processor, asked, *_: ["A net."] * len(asked))
    rows = Dataset.from_list([{"question_id": 7, "question": "What is it?", **FORMS[form]}] * 2)
    rows = rows.add_column("multiple_choice_answer", ["tennis net", "net"])
    rows.to_parquet(tmp_path / "rows.parquet")
    data = ("--dataset", str(tmp_path / "rows.parquet"))
    assert evaluate(folder, "base", tmp_path / "out", *data, "--metric", "vqa_accuracy", "exact_match") == 0
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    # Of the ten ways to leave one human out, two leave one who agrees, eight leave two.
    assert metrics["vqa_accuracy"]["vqa_accuracy"] == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert metrics["exact_match"]["exact_match"] == 1.0
    arguments = ("--metric", "exact_match", "--answer-column", "multiple_choice_answer")
    assert evaluate(folder, "base", tmp_path / "one", *data, *arguments) == 0
    assert json.loads((tmp_path / "one" / "results.json").read_text())["metrics"] == {
        "exact_match": {"exact_match": 0.5}
    }
    capsys.readouterr()
    again = ["eval", "--predictions", str(tmp_path / "out" / "predictions.jsonl"), "--metric", "vqa_accuracy"]
    assert main(again) == 0 and "0.6000" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["paths", "lists of paths", "images"])
def test_images_in_a_column_of_another_name_are_not_passed_over(tmp_path, capsys, form):
    """The model that is named is not there."""
    rows = image_dataset(2)
    for i in range(2):
        rows[i]["images"][0].save(tmp_path / f"{i}.PNG")
    shown = [rows[i]["images"][0] if form == "images" else str(tmp_path / f"{i}.PNG") for i in range(2)]
    table = Dataset.from_dict({"pic": [[one] for one in shown] if form == "lists of paths" else shown})
    table = table.add_column("question", ["What?"] * 2).add_column("answer", ["red"] * 2)
    table.save_to_disk(tmp_path / "rows")
    arguments = ["eval", "no/such-model", "--dataset", str(tmp_path / "rows"), "--metric", "exact_match"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "No question comes with an image. If pic holds them, name the column with `--image-column`" in error
    without = table.remove_columns("pic")
    nulls = without.add_column("image", [None] * 2).cast_column("image", Image())
    named = without.remove_columns("answer").add_column("answer", ["red.png"] * 2)
    for number, rows in enumerate((without, nulls, named)):
        rows.save_to_disk(tmp_path / f"rows {number}")
    more = [[*arguments[:3], str(tmp_path / f"rows {number}"), *arguments[4:]] for number in range(3)]
    for asked in ([*arguments, "--image-column", "pic"], *more):  # now it is the model that is missed
        assert main(asked) == 1
        assert "no/such-model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "metric", "words"),
    [
        ([True, False], "exact_match", ["Row 0", "True", 'such as "yes" and "no"']),
        ([1.0, 2.5], "vqa_accuracy", ["Row 0", "1.0", "Store the text"]),
        ([["red"], []], "vqa_accuracy", ["Row 1", "missing", "--answer-column"]),
        (["red", None], "exact_match", ["Row 1", "missing", "--answer-column"]),
        (["red", " "], "exact_match", ["Row 1", "missing"]),
        (["red", "['red', 'blue']"], "vqa_accuracy", ["Row 1", "list that is stored as a text", "JSON or Parquet"]),
        ([{"ids": [1], "weights": [0.3]}] * 2, "vqa_accuracy", ["Row 0", "record of ids, weights", "--answer-column"]),
        ([True, False], "pope", ["'pope'", "row 0 is True"]),
        (["cat", "dog"], "chair", ["'chair'", "row 0 is 'cat'"]),
        ([1.0, 2.0], "amber", ["'amber'", "row 0 is 1.0"]),
        (["yes", "no"], "hallusionbench", ["'hallusionbench'", "row 0 is 'yes'"]),
        ([1, 2], "hallusionbench", ["HallusionBench.json", "annotations"]),
    ],
)
def test_references_are_checked_before_the_model_is_loaded(tmp_path, capsys, values, metric, words):
    """All rows, whatever the first one is: the model that is named is not there."""
    lines = [{"question": "What?", "answer": value} for value in values]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--answer-column", "answer", "--metric", metric]
    if metric == "amber":
        (tmp_path / "annotations.json").write_text("[]")
        options += ["--metric-arg", f"annotations={tmp_path}"]
    assert main(["eval", "no/such-model", "--dataset", str(tmp_path / "rows.jsonl"), *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error


def test_labels_in_lists_have_their_names():
    names = ClassLabel(names=["cat", "dog"])
    rows = Dataset.from_dict(
        {"question": ["?"] * 3, "answers": [[1, 0], [1], [0]], "label": [0, 1, -1]},
        features=Features({"question": Value("string"), "answers": List(names), "label": names}),
    )
    assert Questions(rows).references() == [["dog", "cat"], ["dog"], ["cat"]]
    assert Questions(rows, answer_column="label").references() == ["cat", "dog", None]  # -1: not labelled


def test_easy_vqa_example(folder, tmp_path, capsys):
    """The example's file has the demo's questions and images."""
    pytest.importorskip("easy_vqa")
    from hera_trainer.cli.rows import load_rows
    from hera_trainer.demo.data import TEST_SEED, easy_vqa
    from hera_trainer.demo.job import SEED

    path = Path(__file__).parents[2] / "examples" / "write_easy_vqa.py"
    spec = importlib.util.spec_from_file_location("write_easy_vqa", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main([str(tmp_path), "--questions", "6"])
    written, original = load_rows(tmp_path / "test.jsonl"), easy_vqa("test", 6, TEST_SEED + SEED)
    assert written["answer"][:] == original["answer"][:]
    first, second = (Questions(rows).messages(4)[0]["content"] for rows in (written, original))
    assert first[1] == second[1] and first[0]["image"].tobytes() == second[0]["image"].tobytes()
    # Its folder, which `datasets` takes for one of images alone.
    assert load_rows(tmp_path, split="test")["answer"][:] == load_rows(tmp_path, split="test[:6]")["answer"][:]
    assert Questions(load_rows(tmp_path, split="test")).messages(4)[0]["content"][1] == first[1]
    output = ["--metric", "exact_match", "--max-new-tokens", "2", "--output", str(tmp_path / "out")]
    assert main(["eval", str(folder / "base"), "--dataset", str(tmp_path), *output]) == 0
    entries = lines_of(tmp_path / "out" / "predictions.jsonl")
    assert [entry["reference"] for entry in entries] == original["answer"][:]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["dataset"] == str(tmp_path / "test.jsonl")
    # Of two files, one is named.
    example.main([str(tmp_path), "--questions", "6", "--split", "train"])
    capsys.readouterr()
    assert main(["eval", "model", "--dataset", str(tmp_path), "--metric", "exact_match"]) == 1
    error = capsys.readouterr().err
    assert "--split test" in error and f"--dataset {tmp_path / 'test.jsonl'}" in error
