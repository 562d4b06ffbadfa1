"""POPE, polling-based evaluation of object hallucination, as a module for the `evaluate` library."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
POPE asks a vision-language model whether objects are in an image ("Is there a dog in the image?"), half of the time
about objects that are not. Accuracy, and precision, recall and F1 of the answer yes, are as of any binary
classification; the yes ratio shows a model that says yes to everything.
"""

_CITATION = """
@inproceedings{li2023evaluating,
    title = {Evaluating Object Hallucination in Large Vision-Language Models},
    author = {Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and Wen, Ji-Rong},
    booktitle = {Empirical Methods in Natural Language Processing (EMNLP)},
    year = {2023}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `str`): The model's answers. The first sentence counts: an answer is no where it has the
        word No, no or not, and yes otherwise.
    references (`list` of `str` or of `int`): `"yes"` or `"no"` for each answer; or ids of questions, with
        `annotations`.
    annotations (`str`, *optional*): Path of the question file that the ids in `references` are of, such as
        `coco_pope_random.json` of https://github.com/RUCAIBox/POPE (JSON lines with `question_id` and `label`).
Returns:
    accuracy (`float`): Share of right answers.
    precision (`float`): Share of right ones among the answers yes.
    recall (`float`): Share of the answer yes where yes is right.
    f1 (`float`): Harmonic mean of precision and recall.
    yes_ratio (`float`): Share of the answer yes.
Examples:
    >>> metric = evaluate.load("pope")
    >>> metric.compute(predictions=["Yes, there is.", "No.", "Yes.", "No."], references=["yes", "no", "no", "yes"])
    {'accuracy': 0.5, 'precision': 0.5, 'recall': 0.5, 'f1': 0.5, 'yes_ratio': 0.5}
"""

_SOURCE = "https://github.com/RUCAIBox/POPE/tree/main/output"
_NEGATIVE = {"No", "no", "not"}

logger = evaluate.logging.get_logger(__name__)


def _says_yes(answer: str) -> bool:
    """The rule of the official evaluation, with its case-sensitive words between blanks."""
    first_sentence = answer.partition(".")[0].replace(",", "")
    return _NEGATIVE.isdisjoint(first_sentence.split(" "))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _check(references: Sequence[Any]) -> None:
    """`datasets` would take True and 1.5 for the id 1, and a number among labels for a label."""
    for index, reference in enumerate(references):
        is_id = isinstance(reference, Integral) and not isinstance(reference, bool)
        if not is_id and not isinstance(reference, str):
            raise ValueError(
                f'`references` must be "yes" or "no", or ids of questions, which are whole numbers; row {index} is '
                f"{reference!r}."
            )
        if isinstance(reference, str) != isinstance(references[0], str):
            raise ValueError(f"`references` must be labels or ids, not both: {references[0]!r} and {reference!r}.")


def _labels(ids: Sequence[int], path: str | os.PathLike | None) -> list[str]:
    if path is None or not os.path.isfile(path):
        raise FileNotFoundError(
            f"Question ids in `references` need POPE's question file in `annotations`, which is {path!r}. Get it from "
            f'{_SOURCE}, or give "yes" and "no" in `references`.'
        )
    with open(path, encoding="utf-8") as file:
        questions = [json.loads(line) for line in file if line.strip()]
    if not all(isinstance(question, dict) and {"question_id", "label"} <= question.keys() for question in questions):
        raise ValueError(f"{path} is no question file of POPE: its lines need `question_id` and `label`.")
    labels = {question["question_id"]: question["label"] for question in questions}
    unknown = [i for i in ids if i not in labels]
    if unknown:
        raise ValueError(f"{path} has no question {unknown[0]}, which is in `references`. Is it the right file?")
    return [labels[i] for i in ids]


class POPE(evaluate.Metric):
    """Accuracy, precision, recall, F1 and share of the answer yes."""

    def _info(self) -> evaluate.MetricInfo:
        text, number = datasets.Value("string"), datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[datasets.Features({"predictions": text, "references": form}) for form in (text, number)],
            codebase_urls=["https://github.com/RUCAIBox/POPE"],
            reference_urls=["https://arxiv.org/abs/2305.10355"],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds a batch of predictions and references."""
        _check(references if references is not None else ())
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Adds one prediction and reference."""
        _check([reference])
        super().add(prediction=prediction, reference=reference, **kwargs)

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Any],
        annotations: str | os.PathLike | None = None,
    ) -> dict[str, float]:
        labels = references if isinstance(references[0], str) else _labels(references, annotations)
        labels = [label.strip().lower() for label in labels]
        wrong = next((index for index, label in enumerate(labels) if label not in ("yes", "no")), None)
        if wrong is not None:
            raise ValueError(f'`references` must be "yes" or "no"; row {wrong} is {labels[wrong]!r}.')
        empty = sum(not answer.strip() for answer in predictions)
        if empty:
            logger.warning(
                f"{empty} of {len(predictions)} answers are empty. They count as yes, as in POPE's own code."
            )
        said = [_says_yes(answer) for answer in predictions]
        right = [label == "yes" for label in labels]
        both = sum(s and r for s, r in zip(said, right, strict=True))
        precision, recall = _share(both, sum(said)), _share(both, sum(right))
        return {
            "accuracy": sum(s == r for s, r in zip(said, right, strict=True)) / len(said),
            "precision": precision,
            "recall": recall,
            "f1": _share(2 * precision * recall, precision + recall),
            "yes_ratio": sum(said) / len(said),
        }
