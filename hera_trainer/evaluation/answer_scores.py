"""Scores of answers: two metrics of visual question answering, and those of the `evaluate` library."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# --- Normalization ---------------------------------------------------------------------------------------------------

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
# Signs that go. Others, such as those of money, per cent, minutes and contractions ($ % : '), belong to a word.
_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# At the beginning, as a hyphen or as the sign itself. A blank may follow before a number alone: lists have such, too.
_MINUS = re.compile(r"\s*[-\u2212](?:(?=\.?\d)|\s+(?=[\d.,]+\s*$))")
_POINT = re.compile(r"\.(?!\d)")
# The spellings that VQA knows of contractions in which one apostrophe is missing.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_SPELLINGS = {
    word[:index] + word[index + 1 :]: word for word in _CONTRACTIONS for index, sign in enumerate(word) if sign == "'"
}
_SPELLINGS["somebody'd"] = "somebodyd"  # the wrong way round in VQA's table


def normalize_answer(text: str) -> str:
    """An answer as answers are compared: in lower case, without punctuation and articles, with the words for 0 to 10
    (and "none") as digits and the apostrophes of contractions in their places.

    These are the rules of VQA's own evaluation (`vqaEval.py` of https://github.com/GT-Vision-Lab/VQA), step by step,
    with one exception: an answer of nothing but articles or signs, such as the option "A" or a "+", keeps them.

    ```python
    normalize_answer("The two dogs.")  # "2 dogs"
    ```

    Args:
        text (`str`): An answer.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for sign in _SIGNS:
        # Beside a blank a sign leaves no gap, and none does where one parts the thousands of a number.
        plain = plain.replace(sign, "" if has_number or f"{sign} " in text or f" {sign}" in text else " ")
    words = [_DIGITS.get(word, word) for word in _POINT.sub("", plain).lower().split()] or text.lower().split()
    return " ".join(_SPELLINGS.get(word, word) for word in [word for word in words if word not in _ARTICLES] or words)


# --- What is right ---------------------------------------------------------------------------------------------------

# The fields of one human's answer in VQA v2, OK-VQA and VizWiz.
_HUMAN_ANSWER = frozenset({"answer", "answer_confidence", "answer_id", "raw_answer"})
_LIST_AS_TEXT = re.compile(r"""\s*\[\s*\{?\s*['"]""")  # ["a", ...] or [{"answer": ..., as CSV files have it
_NAME_COLUMN = "Name the column of the answers with `--answer-column`"
_MISSING = f"missing. {_NAME_COLUMN}, or leave such rows out of the data."


def right_answers(reference: Any, row: int) -> list[str]:
    """The texts that count as right, from any form in which data sets store them.

    Args:
        reference (`str`, `int`, record, or list of them):
            What is right: a text, a whole number, a human's answer as VQA v2, OK-VQA and VizWiz store it (a record with
            `answer`, and perhaps `answer_confidence`, `answer_id` and `raw_answer`), or a list of such.
        row (`int`): Number of the row, for messages.

    Returns:
        `list[str]`: The texts, at least one.

    Raises:
        `ValueError`: If it is none of these, such as a boolean or a record of several columns.
    """
    if _is_human_answer(reference):  # also a record of lists, as `datasets` stores a sequence of records
        reference = reference["answer"]
    answers = list(reference) if isinstance(reference, (list, tuple)) else [reference]
    answers = [answer["answer"] if _is_human_answer(answer) else answer for answer in answers]
    for answer in answers:
        problem = _not_comparable(answer)
        if problem is not None:
            raise ValueError(f"Row {row}: what is right is {problem}")
    if not any(str(answer).strip() for answer in answers):
        raise ValueError(f"Row {row}: what is right is {_MISSING}")
    return [str(answer) for answer in answers]


def _is_human_answer(value: Any) -> bool:
    return isinstance(value, Mapping) and "answer" in value and _HUMAN_ANSWER.issuperset(value)


def _not_comparable(answer: Any) -> str | None:
    """What an answer is that can't be compared with a text, and the cure; `None` if it can."""
    if isinstance(answer, str):
        if _LIST_AS_TEXT.match(answer):
            return f"a list that is stored as a text, {answer[:60]!r}. Store it as a list, as JSON or Parquet can."
        return None
    if isinstance(answer, Integral) and not isinstance(answer, bool):
        return None
    if answer is None:
        return _MISSING
    if isinstance(answer, bool):
        return f'{answer}, but a model answers in words. Store what it is to say, such as "yes" and "no".'
    if isinstance(answer, Real):
        return (
            f'the number {answer!r}, which can be written in many ways. Store the text to compare with, such as "0.5".'
        )
    if isinstance(answer, Mapping):
        fields = ", ".join(map(str, answer))
        return f"a record of {fields}. {_NAME_COLUMN}, one that holds a text or a list of texts."
    return f"of type {type(answer).__name__}. {_NAME_COLUMN}, one that holds a text or a list of texts."


# --- Metrics ---------------------------------------------------------------------------------------------------------


def exact_match(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
    """Share of answers that equal the right one, or one of several, both normalized (see [`normalize_answer`]).

    Nothing else is forgiven: "Yes, it is" is not "yes", -5 is not 5, and no answer is right that says nothing.

    Args:
        predictions (sequence of `str`): What the model said.
        references (sequence): What is right, or all that counts as right, as [`right_answers`] takes it.

    Returns:
        `dict`: `exact_match`.

    Raises:
        `ValueError`: If what is right can't be compared with a text.
    """
    right = [
        _signed(said) in [_signed(answer) for answer in right_answers(reference, row) if answer.strip()]
        for row, (said, reference) in enumerate(zip(predictions, references, strict=True))
    ]
    return {"exact_match": sum(right) / len(right)}


def _signed(text: str) -> str:
    """An answer as [`normalize_answer`] has it, but for the minus of a number."""
    minus = _MINUS.match(text)
    return normalize_answer(text) if minus is None else f"-{normalize_answer(text[minus.end() :])}"


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
    """The accuracy of VQA v2 and TextVQA: for each question with several human answers, an answer counts
    min(1, number of humans who gave it / 3), averaged over leaving out one human at a time.

    Model and humans are always normalized (see [`normalize_answer`]). VQA's own script does so unless all humans agree,
    and would then not count "Yes." as their "yes".

    Args:
        predictions (sequence of `str`): What the model said.
        references (sequence): The human answers, ten in VQA, as [`right_answers`] takes them.

    Returns:
        `dict`: `vqa_accuracy`.

    Raises:
        `ValueError`: If what is right can't be compared with a text.
    """
    scores = []
    normalized = [[normalize_answer(text) for text in right_answers(ref, row)] for row, ref in enumerate(references)]
    few = sum(len(human) in (2, 3) for human in normalized)
    if few:
        logger.warning(
            f"{few} of {len(normalized)} rows have two or three answers, of which `vqa_accuracy`, made for ten, gives "
            "at most 1/3 or 2/3: one is left out at a time, and three must agree. `exact_match` takes any of them."
        )
    for said, human in zip(predictions, normalized, strict=True):
        agrees = [text == normalize_answer(said) for text in human]
        others = [sum(agrees) - own for own in agrees] if len(human) > 1 else [3 * sum(agrees)]
        scores.append(sum(min(1.0, count / 3) for count in others) / len(others))
    return {"vqa_accuracy": sum(scores) / len(scores)}


BUILT_IN: dict[str, Callable[[Sequence[str], Sequence[Any]], dict[str, float]]] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
}

# Columns that a metric's references are made of, where none is named.
REFERENCE_COLUMNS = {
    "amber": "id",
    "hallusionbench": "category,subcategory,visual_input,set_id,figure_id,question_id,gt_answer",
}


def metric_names() -> tuple[str, ...]:
    """Names of the metrics that come with this package and take a model's answers."""
    from . import METRICS

    return (*BUILT_IN, *(name for name in METRICS if name != "mutual_knn"))


def check_metrics(names: Sequence[str], arguments: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks metrics and their arguments, before a model answers for hours.

    Args:
        names (sequence of `str`): Metrics, as for [`score`].
        arguments (`Mapping[str, Mapping[str, Any]]`): Their arguments, as for [`score`].

    Raises:
        `ValueError`: If there is no such metric, or it does not take answers or these arguments.
        `FileNotFoundError`: If a file of annotations is not there.
    """
    for name in names:
        if name == "mutual_knn":
            raise ValueError("`mutual_knn` compares vectors, not answers. `hera rank` measures it.")
        if name not in metric_names() and not Path(name).exists() and "/" not in name:
            raise ValueError(
                f"There is no metric {name!r}. There are {', '.join(metric_names())}, and those of the `evaluate` "
                "library by a path or a name on the Hub with a slash."
            )
        if name == "amber" and not arguments.get(name, {}).get("annotations"):
            raise ValueError(
                "The metric 'amber' needs AMBER's folder `data` (https://github.com/junyangwang0410/AMBER): "
                "`--metric-arg annotations=AMBER/data`, with several metrics `amber.annotations=AMBER/data`."
            )
    unused = sorted(set(arguments) - set(names))
    if unused:
        raise ValueError(f"There are arguments for {', '.join(unused)}, which is not among the metrics.")
    for name in names:
        _check_names(name, arguments.get(name, {}))
        if name in metric_names():
            _check_paths(name, arguments.get(name, {}))


def _check_names(name: str, arguments: Mapping[str, Any]) -> None:
    compute = BUILT_IN[name] if name in BUILT_IN else _loaded(name)._compute
    parameters = inspect.signature(compute).parameters
    own = {key: parameter for key, parameter in parameters.items() if key not in ("predictions", "references")}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values())
    named = [key for key, parameter in own.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    unknown = [key for key in arguments if key not in named and not (takes_any and key not in parameters)]
    if unknown:
        takes = ", ".join(f"`{key}`" for key in named) or "none"
        raise ValueError(f"The metric {name!r} has no argument {unknown[0]!r} (`--metric-arg`). It takes {takes}.")
    missing = [key for key in named if own[key].default is inspect.Parameter.empty and key not in arguments]
    if missing:
        raise ValueError(f"The metric {name!r} needs a value for `{missing[0]}`: `--metric-arg {missing[0]}=VALUE`.")


def _check_paths(name: str, arguments: Mapping[str, Any]) -> None:
    for key in ("annotations", "synonyms", "relation", "safe_words"):
        given = arguments.get(key)
        several = name == "chair" and key == "annotations"  # a list of them, or one
        paths = given if several and isinstance(given, list) else [] if given is None else [given]
        for path in paths:
            if not isinstance(path, (str, os.PathLike)):
                raise ValueError(f"The {key} of the metric {name!r} (`--metric-arg`) are a path, not {path!r}.")
            if not Path(path).exists():
                raise FileNotFoundError(f"The {key} {str(path)!r} are not there.")


def check_references(
    names: Sequence[str], references: Sequence[Any], arguments: Mapping[str, Mapping[str, Any]]
) -> None:
    """Checks what is right, before a model answers for hours: the metrics of this package are computed as if it had
    answered no to every question.

    Args:
        names (sequence of `str`): Metrics, as for [`score`].
        references (sequence): What is right.
        arguments (`Mapping[str, Mapping[str, Any]]`): The metrics' arguments, as for [`score`].

    Raises:
        `ValueError`: If a reference is missing or not what a metric takes.
        `OSError`, `ImportError`: If a metric lacks a file or a library.
    """
    _check_there(references)
    for name in names:
        if name not in metric_names():  # those of others may be costly, or take no such answer
            continue
        try:
            score([name], ["no"] * len(references), references, arguments)
        except ValueError as error:
            cure = "" if "--answer-column" in str(error) else f" {_NAME_COLUMN}."
            raise ValueError(f"The metric {name!r} can't be computed on these columns: {error}{cure}") from error


def score(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Any],
    arguments: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores answers.

    Args:
        names (sequence of `str`):
            Metrics: `"exact_match"`, `"vqa_accuracy"`, one of [`evaluation`][hera_trainer.evaluation], or what
            `evaluate.load` takes.
        predictions (sequence of `str`): What the model said.
        references (sequence): What is right, in the form that the metric takes.
        arguments (`Mapping[str, Mapping[str, Any]]`, *optional*):
            For each metric the further arguments of its `compute`, such as the path of annotations.

    Returns:
        `dict`: For each metric its values.

    Raises:
        `ValueError`: If there is nothing to score, or references are missing or not what the metric takes.
    """
    if not predictions:
        raise ValueError("There are no predictions to score.")
    _check_there(references)
    scores = {}
    for name in names:
        if name in BUILT_IN:
            scores[name] = BUILT_IN[name](predictions, references)
        else:
            scores[name] = _evaluate_metric(name, predictions, references, dict((arguments or {}).get(name, {})))
    return scores


def _check_there(references: Sequence[Any]) -> None:
    for row, reference in enumerate(references):
        if reference is None:
            raise ValueError(f"Row {row}: what is right is {_MISSING}")


def _evaluate_metric(name: str, predictions: Sequence[str], references: Sequence[Any], arguments: dict) -> dict:
    try:
        return dict(_loaded(name).compute(predictions=list(predictions), references=list(references), **arguments))
    except TypeError as error:  # of modules that do not look at what they are given
        raise ValueError(f"The metric {name!r} can't be computed: {error}") from error


def _loaded(name: str) -> Any:
    import evaluate

    from . import METRICS, load_metric

    load = load_metric if name in METRICS else evaluate.load
    return load(name, keep_in_memory=True)  # a metric that fails leaves a lock on its file
