"""The module `hallusionbench`: ten questions worked by hand, and random ones against a second way of counting."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from hera_trainer.evaluation import load_metric

KEYS = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "gt_answer")


def rows(*lines: str) -> list[dict[str, str]]:
    return [dict(zip(KEYS, line.split(), strict=True)) for line in lines]


# category, subcategory, visual input, set, figure, question, right answer (1 is yes)
BENCHMARK = rows(
    "VD illusion 1 0 0 0 1",
    "VD illusion 1 0 0 1 0",
    "VD illusion 2 0 1 0 0",
    "VD illusion 2 0 1 1 1",
    "VD math 1 0 0 0 1",
    "VS chart 0 0 0 0 1",
    "VS chart 1 0 1 0 1",
    "VS chart 2 0 2 0 0",
    "VS map 0 0 0 0 0",
    "VS map 1 0 1 0 0",
)


def test_hand_worked() -> None:
    answers = [
        "Yes, it is.",  # right
        "No.",  # right
        "No, it is not.",  # right
        "No",  # wrong
        "I can't say.",  # wrong: uncertain with a figure
        "There is nothing to tell from.",  # right: uncertain without a figure
        "yes",  # right
        "Yes or no, who knows?",  # wrong: both words
        "Yes",  # wrong, also without a figure
        "no",  # right
    ]
    # questions: illusion/0 right with both figures, illusion/1 not, math/0 not, chart/0 not (figure 2), map/0 not
    # figures: illusion/0 right, illusion/1 not, math/0 not, chart/1 right, chart/2 not, map/1 right
    # easy: illusion/0 right, illusion/1 right, math/0 not, chart/0 right (figures 0 and 1), map/0 not
    # hard: illusion/0 right, illusion/1 not, chart/0 not
    scores = load_metric("hallusionbench").compute(predictions=answers, references=BENCHMARK)
    assert scores == pytest.approx(
        {"aAcc": 6 / 10, "qAcc": 1 / 5, "fAcc": 3 / 6, "easy_aAcc": 3 / 5, "hard_aAcc": 1 / 3}
    )


@pytest.mark.parametrize(
    ("answer", "reading"),
    [
        ("Yes.", "yes"),
        ("YES!", "yes"),
        ("The answer is: yes", "yes"),
        ("No, it isn't", "no"),
        ("**No**", "no"),
        ("nothing known", "uncertain"),  # whole words
        ("yesterday", "uncertain"),
        ("Not really", "uncertain"),
        ("yes and no", "uncertain"),
        ("", "uncertain"),
    ],
)
def test_reading_of_answers(answer: str, reading: str) -> None:
    metric = load_metric("hallusionbench")
    yes, no = rows("VD illusion 1 0 0 0 1"), rows("VD illusion 1 0 0 0 0")
    assert metric.compute(predictions=[answer], references=yes)["aAcc"] == (reading == "yes")
    assert metric.compute(predictions=[answer], references=no)["aAcc"] == (reading == "no")


def test_scores_of_what_was_not_asked_are_left_out() -> None:
    metric = load_metric("hallusionbench")
    assert metric.compute(predictions=["yes"], references=BENCHMARK[:1]).keys() == {"aAcc", "qAcc", "fAcc", "easy_aAcc"}
    assert metric.compute(predictions=["yes"], references=BENCHMARK[2:3]).keys() == {
        "aAcc",
        "qAcc",
        "fAcc",
        "hard_aAcc",
    }
    assert metric.compute(predictions=["yes"], references=BENCHMARK[5:6]) == {"aAcc": 1, "qAcc": 1, "easy_aAcc": 1}


def counted(right: list[bool], benchmark: list[dict[str, str]]) -> dict[str, float]:
    """By sorting and grouping, one share after the other."""

    def share(keys: tuple[str, ...], keep: list[bool]) -> float:
        chosen = [(*(row[key] for key in keys), ok) for row, ok, use in zip(benchmark, right, keep, strict=True) if use]
        groups = [[row[-1] for row in rows] for _, rows in itertools.groupby(sorted(chosen), key=lambda row: row[:-1])]
        return sum(all(group) for group in groups) / len(groups)

    question = ("category", "subcategory", "set_id", "question_id")
    edited = [row["visual_input"] == "2" for row in benchmark]
    return {
        "aAcc": sum(right) / len(right),
        "qAcc": share(question, [True] * len(right)),
        "fAcc": share(
            ("category", "subcategory", "set_id", "figure_id"),
            [(row["category"], row["figure_id"]) != ("VS", "0") for row in benchmark],
        ),
        "easy_aAcc": share(question, [not hard for hard in edited]),
        "hard_aAcc": share(question, edited),
    }


@pytest.mark.parametrize("seed", range(3))
def test_random_benchmarks_in_any_batches_and_order(seed: int) -> None:
    rng = random.Random(seed)
    benchmark = []
    for category, subcategory, set_, figure in itertools.product(("VD", "VS"), ("chart", "map"), "012", "012"):
        visual = "0" if (category, figure) == ("VS", "0") else "1" if figure == "0" else rng.choice("12")
        for question in "01":
            values = (category, subcategory, visual, set_, figure, question, rng.choice("01"))
            benchmark.append(dict(zip(KEYS, values, strict=True)))
    said = [row["gt_answer"] if rng.random() < 0.7 else rng.choice("01?") for row in benchmark]
    answers = [{"0": "No.", "1": "Yes.", "?": "Unclear."}[answer] for answer in said]
    right = [
        answer == row["gt_answer"] or (answer == "?" and (row["category"], row["figure_id"]) == ("VS", "0"))
        for answer, row in zip(said, benchmark, strict=True)
    ]
    metric = load_metric("hallusionbench")
    scores = metric.compute(predictions=answers, references=benchmark)
    assert scores == pytest.approx(counted(right, benchmark))
    for start in range(0, len(answers), 11):
        metric.add_batch(predictions=answers[start : start + 11], references=benchmark[start : start + 11])
    assert metric.compute() == scores
    order = rng.sample(range(len(answers)), len(answers))
    in_order = {"predictions": [answers[i] for i in order], "references": [benchmark[i] for i in order]}
    assert metric.compute(**in_order) == scores


def test_whole_rows_and_single_ones_are_taken_and_numbers_are_strings() -> None:
    metric = load_metric("hallusionbench")
    row = {**BENCHMARK[0], "set_id": 0, "gt_answer": 1, "question": "Is it?", "image": object(), "sample_note": None}
    metric.add(prediction="Yes", reference=row)
    metric.add(prediction="No", reference=BENCHMARK[2])
    assert metric.compute() == {"aAcc": 1.0, "qAcc": 1.0, "fAcc": 1.0, "easy_aAcc": 1.0, "hard_aAcc": 1.0}


def test_rows_of_the_official_file_by_number(tmp_path: Path) -> None:
    path = tmp_path / "HallusionBench.json"
    path.write_text(json.dumps([{**row, "question": "Is it?", "filename": None} for row in BENCHMARK]))
    answers = ["Yes" if row["gt_answer"] == "1" else "No" for row in BENCHMARK]
    metric = load_metric("hallusionbench")
    scores = metric.compute(predictions=answers, references=range(10), annotations=path)
    assert set(scores.values()) == {1.0}
    scores = metric.compute(predictions=["Yes", "Yes"], references=[2, 0], annotations=str(path))
    assert scores == {"aAcc": 0.5, "qAcc": 0.0, "fAcc": 0.5, "easy_aAcc": 1.0, "hard_aAcc": 0.0}
    with pytest.raises(ValueError, match="10 rows, and no row 10"):
        metric.compute(predictions=["Yes"], references=[10], annotations=path)


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    def compute(*references: object, **kwargs: object) -> None:
        metric = load_metric("hallusionbench", keep_in_memory=True)  # leaves no lock behind to wait for
        metric.compute(predictions=["Yes"] * len(references), references=list(references), **kwargs)

    with pytest.raises(FileNotFoundError, match=r"HallusionBench\.json.*tianyi-lab/HallusionBench"):
        compute(0)
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        compute(0, annotations=str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match="has no `gt_answer`"):
        compute({**BENCHMARK[0], "gt_answer": None})
    with pytest.raises(ValueError, match=r"answered twice.*'subcategory': 'illusion'"):
        compute(BENCHMARK[0], BENCHMARK[1], BENCHMARK[0])


@pytest.mark.parametrize("answer", ["yes", True, 1.0, "2"])
def test_what_is_no_answer_of_the_benchmark_is_refused(answer: object) -> None:
    keys = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")
    rows = [{**dict.fromkeys(keys, str(index)), "gt_answer": gt} for index, gt in enumerate(("1", answer))]
    with pytest.raises(ValueError, match=r"`gt_answer` must be 0 \(no\) or 1 \(yes\); in row 1 it is"):
        load_metric("hallusionbench").compute(predictions=["Yes.", "Yes."], references=rows)


@pytest.mark.parametrize("reference", [True, 1.5, "x", None])
def test_what_is_no_row_and_no_number_is_refused(reference: object) -> None:
    """`datasets` would take True and 1.5 for row 1."""
    with pytest.raises(ValueError, match="row 1 is"):
        load_metric("hallusionbench").compute(predictions=["Yes.", "Yes."], references=[0, reference])
