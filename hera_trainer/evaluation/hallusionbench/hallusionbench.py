"""HallusionBench, language hallucination and visual illusion, as a module for the `evaluate` library."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
HallusionBench asks the same yes/no question about an image, an edited image, or none, and several questions about one
image. Single answers (aAcc), all answers to one question (qAcc) and all answers about one figure (fAcc) are scored, and
the answers to easy (original image or none) and hard (edited image) questions apart.
"""

_CITATION = """
@inproceedings{guan2024hallusionbench,
    title = {HallusionBench: An Advanced Diagnostic Suite for Entangled Language Hallucination and Visual Illusion in
        Large Vision-Language Models},
    author = {Guan, Tianrui and Liu, Fuxiao and Wu, Xiyang and Xian, Ruiqi and Li, Zongxia and Liu, Xiaoyu and Wang,
        Xijun and Chen, Lichang and Huang, Furong and Yacoob, Yaser and Manocha, Dinesh and Zhou, Tianyi},
    booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
    year = {2024}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `str`): The model's answers. One with the word yes and not the word no is yes, one with no
        and not yes is no, any other is uncertain.
    references (`list` of `dict` or of `int`): Rows of the benchmark, of which the keys `category`, `subcategory`,
        `visual_input`, `set_id`, `figure_id`, `question_id` and `gt_answer` are read; or numbers of rows, from 0, with
        `annotations`.
    annotations (`str`, *optional*): Path of `HallusionBench.json` of https://github.com/tianyi-lab/HallusionBench.
Returns:
    aAcc (`float`): Share of right answers.
    qAcc (`float`): Share of questions that are answered right with every figure.
    fAcc (`float`): Share of figures about which every question is answered right.
    easy_aAcc (`float`): As qAcc, of the questions about original images or none.
    hard_aAcc (`float`): As qAcc, of the questions about edited images.
Examples:
    >>> metric = evaluate.load("hallusionbench")
    >>> row = {"category": "VD", "subcategory": "illusion", "set_id": "0", "question_id": "0"}
    >>> original = {**row, "visual_input": "1", "figure_id": "0", "gt_answer": "1"}
    >>> edited = {**row, "visual_input": "2", "figure_id": "1", "gt_answer": "0"}
    >>> metric.compute(predictions=["Yes.", "Yes."], references=[original, edited])
    {'aAcc': 0.5, 'qAcc': 0.0, 'fAcc': 0.5, 'easy_aAcc': 1.0, 'hard_aAcc': 0.0}
"""

_SOURCE = "https://github.com/tianyi-lab/HallusionBench"
_KEYS = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "gt_answer")


def _answer(text: str) -> str | None:
    """`"1"` for yes, `"0"` for no, as `gt_answer` has them; `None` where it is uncertain."""
    words = set(re.findall(r"\w+", text.lower()))
    if ("yes" in words) == ("no" in words):
        return None
    return "1" if "yes" in words else "0"


def _is_right(text: str, row: dict[str, str]) -> bool:
    answer = _answer(text)
    # Without its figure, a question of the visual supplement may be answered with "I cannot tell".
    if answer is None:
        return row["category"] == "VS" and row["figure_id"] == "0"
    return answer == row["gt_answer"]


def _rows(numbers: Sequence[int], path: str | os.PathLike | None) -> list[dict[str, Any]]:
    if path is None or not os.path.isfile(path):
        raise FileNotFoundError(
            f"Numbers in `references` need the path of HallusionBench.json in `annotations`, which is {path!r}. Get it "
            f"from {_SOURCE}, or give its rows in `references`."
        )
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)
    outside = [i for i in numbers if not 0 <= i < len(rows)]
    if outside:
        raise ValueError(f"{path} has {len(rows)} rows, and no row {outside[0]}, which is in `references`.")
    return [rows[i] for i in numbers]


def _checked(row: Any, index: int) -> Any:
    """The row with what is read of it, as strings. Numbers of rows stay numbers."""
    if isinstance(row, Integral) and not isinstance(row, bool):  # `datasets` would take True and 1.5 for row 1
        return row
    if not isinstance(row, dict):
        raise ValueError(f"`references` must be rows of {_SOURCE}, or numbers of rows from 0; row {index} is {row!r}.")
    missing = [key for key in _KEYS if row.get(key) is None]
    if missing:
        raise ValueError(
            f"Row {index} of `references` has no `{missing[0]}`. Of {_SOURCE}, these are needed: {list(_KEYS)}."
        )
    if str(row["gt_answer"]) not in ("0", "1"):
        raise ValueError(f"`gt_answer` must be 0 (no) or 1 (yes); in row {index} it is {row['gt_answer']!r}.")
    return {key: str(row[key]) for key in _KEYS}


def _all_right(answers: Iterable[tuple[tuple[str, ...], bool]]) -> float | None:
    """Share of keys all answers of which are right, `None` where there are none."""
    groups: dict[tuple[str, ...], bool] = defaultdict(lambda: True)
    for key, right in answers:
        groups[key] &= right
    return sum(groups.values()) / len(groups) if groups else None


class HallusionBench(evaluate.Metric):
    """Accuracy of answers, of questions over their figures, of figures over their questions, easy and hard."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        forms = ({key: text for key in _KEYS}, datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[datasets.Features({"predictions": text, "references": form}) for form in forms],
            codebase_urls=[_SOURCE],
            reference_urls=["https://arxiv.org/abs/2310.14566"],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds a batch of predictions and references. Of rows, only what is scored is kept, not their images."""
        rows = [_checked(row, index) for index, row in enumerate(references)] if references is not None else None
        super().add_batch(predictions=predictions, references=rows, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Adds one prediction and reference. Of a row, only what is scored is kept, not its image."""
        super().add(prediction=prediction, reference=_checked(reference, 0), **kwargs)

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Any],
        annotations: str | os.PathLike | None = None,
    ) -> dict[str, float]:
        if not isinstance(references[0], dict):
            references = [_checked(row, i) for i, row in enumerate(_rows(references, annotations))]
        asked = [tuple(row[key] for key in _KEYS[:-1]) for row in references]
        if len(set(asked)) < len(asked):
            twice = next(key for key in asked if asked.count(key) > 1)
            raise ValueError(f"A question is answered twice: {dict(zip(_KEYS, twice, strict=False))}.")
        right = [_is_right(text, row) for text, row in zip(predictions, references, strict=True)]

        def group(*keys: str, of: list[bool]) -> float | None:
            chosen = zip(references, right, of, strict=True)
            return _all_right((tuple(row[key] for key in keys), answer) for row, answer, use in chosen if use)

        question = ("category", "subcategory", "set_id", "question_id")
        figure = ("category", "subcategory", "set_id", "figure_id")
        has_figure = [row["category"] != "VS" or row["figure_id"] != "0" for row in references]
        is_hard = [row["visual_input"] == "2" for row in references]
        scores = {
            "aAcc": sum(right) / len(right),
            "qAcc": group(*question, of=[True] * len(right)),
            "fAcc": group(*figure, of=has_figure),
            "easy_aAcc": group(*question, of=[not hard for hard in is_hard]),
            "hard_aAcc": group(*question, of=is_hard),
        }
        return {name: score for name, score in scores.items() if score is not None}
