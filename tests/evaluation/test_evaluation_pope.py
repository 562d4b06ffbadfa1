"""The module `pope`: hand-worked answers, and random ones against a second way of counting."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from hera_trainer.evaluation import load_metric


def test_hand_worked() -> None:
    #     answer                              read as   label   counts as
    answers = [
        "Yes, there is a dog.",  #            yes       yes     TP
        "yes",  #                             yes       no      FP
        "No, there is no dog.",  #            no        no      TN
        "There is not a dog in it.",  #       no        yes     FN
        "The image shows a dog.",  #          yes       yes     TP
        "Yes. There is no cat, though.",  #   yes       no      FP   only the first sentence counts
        "no,",  #                             no        no      TN   without the comma
        "Nobody knows.",  #                   yes       yes     TP   whole words: no "No" in Nobody
    ]
    labels = ["yes", "no", "no", "yes", "yes", "no", "no", "yes"]
    # TP 3, FP 2, TN 2, FN 1: accuracy 5/8, precision 3/5, recall 3/4, F1 = 2 * 0.6 * 0.75 / 1.35 = 2/3, yes 5/8
    scores = load_metric("pope").compute(predictions=answers, references=labels)
    assert scores == pytest.approx(
        {"accuracy": 5 / 8, "precision": 3 / 5, "recall": 3 / 4, "f1": 2 / 3, "yes_ratio": 5 / 8}
    )


@pytest.mark.parametrize(
    ("answer", "is_yes"),
    [
        ("No", False),
        ("no", False),
        ("not really", False),
        ("NO", True),  # so in the official program, which knows No and no
        ("No!", True),
        ("\nNo", True),  # words are what stands between blanks
        ("It is not, I think", False),
        ("Yes. No.", True),
        ("No. Yes.", False),
        (".No", True),
        ("", True),
    ],
)
def test_reading_is_that_of_the_official_program(answer: str, is_yes: bool) -> None:
    assert load_metric("pope").compute(predictions=[answer], references=["yes"])["yes_ratio"] == is_yes


def test_empty_answers_are_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    monkeypatch.setattr(evaluate.logging.get_logger("evaluate"), "propagate", True)
    load_metric("pope").compute(predictions=["", " ", "No"], references=["no", "no", "no"])
    assert "2 of 3 answers are empty" in caplog.text


def test_shares_of_nothing_are_zero() -> None:
    metric = load_metric("pope")
    nothing_said = metric.compute(predictions=["No", "No"], references=["no", "yes"])
    assert nothing_said == {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}
    nothing_there = metric.compute(predictions=["Yes", "No"], references=["no", "no"])
    assert nothing_there == {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.5}


def counted(answers: list[str], labels: list[str]) -> dict[str, float]:
    """By index sets, and F1 by its other formula."""
    said = {i for i, answer in enumerate(answers) if answer.startswith("Yes")}
    true = {i for i, label in enumerate(labels) if label == "yes"}
    everything = set(range(len(labels)))
    wrong = said ^ true
    return {
        "accuracy": len(everything - wrong) / len(everything),
        "precision": len(said & true) / len(said),
        "recall": len(said & true) / len(true),
        "f1": 2 * len(said & true) / (len(said) + len(true)),
        "yes_ratio": len(said) / len(everything),
    }


@pytest.mark.parametrize("seed", range(3))
def test_random_answers_in_any_batches_and_order(seed: int) -> None:
    rng = random.Random(seed)
    labels = [rng.choice(["yes", "no"]) for _ in range(97)]
    answers = [rng.choice(["Yes", "Yes, it is.", "No", "No, there is not."]) for _ in labels]
    metric = load_metric("pope")
    scores = metric.compute(predictions=answers, references=labels)
    assert scores == pytest.approx(counted(answers, labels))
    for start in range(0, 97, 10):
        metric.add_batch(predictions=answers[start : start + 10], references=labels[start : start + 10])
    assert metric.compute() == scores
    order = rng.sample(range(97), 97)
    assert metric.compute(predictions=[answers[i] for i in order], references=[labels[i] for i in order]) == scores


@pytest.fixture
def question_file(tmp_path: Path) -> Path:
    path = tmp_path / "coco_pope_random.json"
    rows = [
        {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
        {"question_id": 2, "image": "a.jpg", "text": "Is there a car in the image?", "label": "no"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_come_from_the_question_file(question_file: Path) -> None:
    scores = load_metric("pope").compute(
        predictions=["Yes", "Yes", "No"], references=[2, 1, 2], annotations=str(question_file)
    )
    assert scores == pytest.approx(
        {"accuracy": 2 / 3, "precision": 1 / 2, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 2 / 3}
    )


def test_wrong_input_is_refused(question_file: Path, tmp_path: Path) -> None:
    def compute(references: list, **kwargs: object) -> None:
        metric = load_metric("pope", keep_in_memory=True)  # leaves no lock behind to wait for
        metric.compute(predictions=["Yes"] * len(references), references=references, **kwargs)

    with pytest.raises(FileNotFoundError, match=r"RUCAIBox/POPE"):
        compute([1])
    with pytest.raises(FileNotFoundError, match=r"missing\.json.*RUCAIBox/POPE"):
        compute([1], annotations=str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match="no question 3"):
        compute([1, 3], annotations=question_file)
    with pytest.raises(ValueError, match='must be "yes" or "no"; row 1 is \'maybe\''):
        compute(["yes", "maybe"])


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (["no", True], "row 1 is True"),
        ([True], "row 0 is True"),
        ([1.0], r"row 0 is 1\.0"),
        ([None], "row 0 is None"),
        ([["yes"]], r"row 0 is \['yes'\]"),
        (["no", 1], "labels or ids, not both: 'no' and 1"),
        ([1, "no"], "labels or ids, not both: 1 and 'no'"),
    ],
)
def test_what_is_no_label_and_no_id_is_refused(references: list, message: str, question_file: str) -> None:
    """Also at once and one by one: `datasets` would take True and 1.5 for the id 1."""
    predictions = ["no"] * len(references)
    with pytest.raises(ValueError, match=message):
        load_metric("pope").compute(predictions=predictions, references=references, annotations=question_file)
    if len(references) == 1:
        with pytest.raises(ValueError, match=message):
            load_metric("pope").add(prediction="no", reference=references[0])
