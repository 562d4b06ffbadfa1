"""Scores of answers: VQA's own rules, restated, and what counts as right."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hera_trainer.evaluation.answer_scores import exact_match, normalize_answer, right_answers, score, vqa_accuracy

# --- Normalization ---------------------------------------------------------------------------------------------------

SIGNS = set(';/[]"{}()=+\\_-><@`,?!')
NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(), [0, *range(11)], strict=True))
# Of the contractions that VQA knows: each kind of apostrophe, and those of which one might think otherwise.
CONTRACTIONS = {
    "dont": "don't", "cant": "can't", "wont": "won't", "isnt": "isn't", "hes": "he's", "thats": "that's",
    "youre": "you're", "oclock": "o'clock", "maam": "ma'am", "twas": "'twas", "yall": "y'all", "weve": "we've",
    "shed've": "she'd've", "she'dve": "she'd've", "couldnt've": "couldn't've", "couldn'tve": "couldn't've",
    "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "y'alld've": "y'all'd've",
    "somebody'd": "somebodyd", "somebodyll": "somebody'll", "theyre": "they're", "wheres": "where's",
    "thered": "there'd",
}  # fmt: skip
NO_CONTRACTIONS = [
    "its",
    "im",
    "ive",
    "lets",
    "shed",
    "shes",
    "wed",
    "well",
    "were",
    "ill",
    "id've",
    "couldntve",
    "somebodyd",
]


def official(text: str) -> str:
    """An answer as `vqaEval.py` (commit a013f00 of GT-Vision-Lab/VQA) normalizes it, told letter by letter."""
    text = "".join(" " if letter in "\n\t" else letter for letter in text).strip()
    thousands = any(
        a.isdecimal() and b == "," and c.isdecimal() for a, b, c in zip(text, text[1:], text[2:], strict=False)
    )
    pairs = {text[at : at + 2] for at in range(len(text))}
    plain = ""
    for letter in text:
        if letter not in SIGNS:
            plain += letter
        elif not (thousands or letter + " " in pairs or " " + letter in pairs):
            plain += " "
    plain = "".join(a for a, b in zip(plain, plain[1:] + " ", strict=False) if a != "." or b.isdecimal())
    words = [str(NUMBERS.get(word, word)) for word in plain.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The two dogs.", "2 dogs"),
        ("  A  Red-Circle! ", "red circle"),
        ("t-shirt, blue", "t shirt blue"),
        ("red -blue/green", "red blue green"),
        ("1,200.5 km", "1200.5 km"),
        ("1,200 black/white", "1200 blackwhite"),
        ("3.5.", "3.5"),
        ("U.S.A.", "usa"),
        ("$5", "$5"),
        ("50%", "50%"),
        ("10:30", "10:30"),
        ("don't", "don't"),
        ("Dont", "don't"),
        ("dog's", "dog's"),
        ("none", "0"),
        ("twenty one", "twenty 1"),
        ("x_y", "x y"),
        ("No.", "no"),
    ],
)
def test_normalized_answers(text, normal):
    assert normalize_answer(text) == official(text) == normal


def test_articles_and_signs_alone_stay():
    """VQA makes nothing of them, so that the options A and An, or + and -, would be the same answer."""
    for text in ("A", "a.", "the", "An"):
        assert official(text) == ""
        assert normalize_answer(text) == text.lower().strip(".")
    for text in ("?", "+", "- -"):
        assert official(text) == "" and normalize_answer(text) == text
    assert exact_match(["A", "the", ""], ["A", "A", "A"]) == {"exact_match": pytest.approx(1 / 3)}


def test_rules_of_vqa():
    """Of 20,000 texts of words, signs and blanks in any order."""
    draw = random.Random(0)
    words = [
        *CONTRACTIONS,
        *CONTRACTIONS.values(),
        *NO_CONTRACTIONS,
        *NUMBERS,
        *"a an the A The red 3 2.5 .5 5. 1,000".split(),
    ]
    marks = [*sorted(SIGNS), *".:'&*%$#\u2019", " ", " ", " ", "  ", "\n", "\t"]
    compared = 0
    for _ in range(20_000):
        text = "".join(draw.choice(words if draw.random() < 0.5 else marks) for _ in range(draw.randint(1, 9)))
        if official(text):
            compared += 1
            assert normalize_answer(text) == official(text), text
    assert compared > 15_000


# --- Metrics ---------------------------------------------------------------------------------------------------------


def test_exact_match():
    scores = exact_match(["Yes.", "Yes, it is", "two", "a cat"], ["yes", "yes", ["2", "3"], "dog"])
    assert scores == {"exact_match": 0.5}


@pytest.mark.parametrize(
    ("said", "right", "share"),
    [
        ("-5", "5", 0),
        ("5", "-5", 0),
        ("- 5.0", "-5.0", 1),
        ("\u22125", "-5", 1),
        ("a - 5", "a 5", 1),
        ("- 3 dogs", "3 dogs", 1),
        ("-", "+", 0),
        ("!", "+", 0),
        ("", "?", 0),
        ("", ["", "red"], 0),
        ("red", ["", "red"], 1),
    ],
)
def test_signs_and_empty_answers(said, right, share):
    assert exact_match([said], [right]) == {"exact_match": share}


def test_vqa_accuracy_of_few_answers(caplog):
    """As the formula has it, which is made for ten; and it is said."""
    assert vqa_accuracy(["red"] * 4, ["red", ["red"] * 2, ["red"] * 3, ["red"] * 4]) == {
        "vqa_accuracy": pytest.approx((1 + 1 / 3 + 2 / 3 + 1) / 4)
    }
    assert "2 of 4 rows have two or three answers" in caplog.text


def test_vqa_accuracy():
    """With two of ten humans agreed: leaving out one of these two leaves 1/3, leaving out another leaves 2/3."""
    humans = ["red"] * 2 + ["blue"] * 8
    scores = vqa_accuracy(["red", "Blue!", "green"], [humans, humans, humans])
    assert scores["vqa_accuracy"] == pytest.approx(((2 * 1 / 3 + 8 * 2 / 3) / 10 + 1 + 0) / 3)
    assert vqa_accuracy(["red"], ["red"]) == {"vqa_accuracy": 1.0}


def test_accuracy_of_vqa():
    """`vqaEval.py` on its own form of annotations: each human is left out, and three of the others are enough."""
    draw, said, references, expected = random.Random(1), [], [], []
    for _ in range(300):
        pool = draw.sample(["two", "2", "Two.", "a t-shirt", "t shirt", "dont", "don't", "50%", "50", "net"], 3)
        answers = [{"answer": draw.choice(pool), "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]
        answers[0]["answer"], answers[1]["answer"] = pool[:2]  # where all agree, VQA normalizes nothing
        said.append(draw.choice(pool))
        references.append(answers)
        shares = []
        for left_out in answers:
            others = [human for human in answers if human["answer_id"] != left_out["answer_id"]]
            shares.append(min(1, sum(official(human["answer"]) == official(said[-1]) for human in others) / 3))
        expected.append(sum(shares) / 10)
    assert 0.2 < sum(expected) / 300 < 0.9
    assert vqa_accuracy(said, references)["vqa_accuracy"] == pytest.approx(sum(expected) / 300)


def test_humans_who_all_agree():
    """VQA compares these letter by letter: its accuracy of "Yes." would be 0."""
    assert vqa_accuracy(["Yes.", "T-shirt"], [["yes"] * 10, ["t-shirt"] * 10]) == {"vqa_accuracy": 1.0}


# --- What is right ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "texts"),
    [
        ("red", ["red"]),
        (3, ["3"]),
        (np.int64(3), ["3"]),
        ([3, "four"], ["3", "four"]),
        (("red", ""), ["red", ""]),
        ({"answer": "red", "answer_confidence": "yes"}, ["red"]),
        ({"answer": ["red", "blue"], "answer_id": [1, 2]}, ["red", "blue"]),
        ([{"answer": "red", "answer_id": 1}, {"answer": "blue", "answer_id": 2}], ["red", "blue"]),
        ("[1, 2]", ["[1, 2]"]),
    ],
)
def test_right_answers(reference, texts):
    assert right_answers(reference, 0) == texts


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (None, "missing"),
        ([], "missing"),
        ("", "missing"),
        (["red", None], "missing"),
        ([{"answer": None, "answer_id": 1}], "missing"),
        (True, "True, but a model answers in words"),
        ([np.bool_(True)], "of type bool"),
        (0.5, "the number 0.5"),
        (np.float32(2), "the number"),
        ({"answer": "red", "question_type": "what"}, "a record of answer, question_type"),
        ([{"text": "red"}], "a record of text"),
        ([["red"]], "of type list"),
        ('["red", "blue"]', "a list that is stored as a text"),
        ("[{'answer': 'red', 'answer_id': 1}]", "a list that is stored as a text"),
        (b"red", "of type bytes"),
    ],
)
def test_what_can_not_be_compared_is_refused(reference, words):
    """With the row and the cure, by both metrics, and never scored 0."""
    for metric in ("exact_match", "vqa_accuracy"):
        with pytest.raises(ValueError, match=f"Row 1: what is right is {words}.*(Name the column|Store)"):
            score([metric], ["red", "red"], ["red", reference])
