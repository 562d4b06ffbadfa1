"""Scores of answers: two metrics of visual question answering, and those of the `evaluate` library."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
# A point or comma between digits belongs to the number; any other sign separates words.
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_SIGNS = re.compile(r"(?!(?<=\d)\.(?=\d))[^\w\s]|_")


def normalize_answer(text: str) -> str:
    """An answer as answers are compared, after the rules of VQA: in lower case, without punctuation and articles, and
    with the words for 0 to 10 (and "none") as digits.

    ```python
    normalize_answer("The two dogs.")  # "2 dogs"
    ```

    Args:
        text (`str`): An answer.
    """
    # Apostrophes go without a gap ("dont"), as in VQA.
    text = _COMMA_IN_NUMBER.sub("", text.lower().replace("'", "").replace("\u2019", ""))
    words = [_DIGITS.get(word, word) for word in _SIGNS.sub(" ", text).split()]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def exact_match(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
    """Share of answers that equal the right one, or one of several, both normalized (see [`normalize_answer`]).

    Nothing else is forgiven: "Yes, it is" is not "yes".

    Args:
        predictions (sequence of `str`): What the model said.
        references (sequence of `str` or lists of `str`): What is right, or all that count as right.

    Returns:
        `dict`: `exact_match`.
    """
    pairs = zip(predictions, references, strict=True)
    right = [
        normalize_answer(said) in {normalize_answer(text) for text in _accepted(answers)} for said, answers in pairs
    ]
    return {"exact_match": sum(right) / len(right)}


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
    """The accuracy of VQA v2 and TextVQA: for each question with several human answers, an answer counts
    min(1, number of humans who gave it / 3), averaged over leaving out one human at a time.

    Args:
        predictions (sequence of `str`): What the model said.
        references (sequence of lists of `str`): The human answers, ten in VQA.

    Returns:
        `dict`: `vqa_accuracy`.
    """
    scores = []
    for said, answers in zip(predictions, references, strict=True):
        human = [normalize_answer(text) for text in _accepted(answers)]
        agreed = sum(text == normalize_answer(said) for text in human)
        others = [agreed - (text == normalize_answer(said)) for text in human] if len(human) > 1 else [3 * agreed]
        scores.append(sum(min(1.0, count / 3) for count in others) / len(others))
    return {"vqa_accuracy": sum(scores) / len(scores)}


def _accepted(answers: Any) -> list[str]:
    if answers is None or (isinstance(answers, (list, tuple)) and not answers):
        raise ValueError("A row has no right answer to compare with. Leave such rows out of the data.")
    return [str(answer) for answer in (answers if isinstance(answers, (list, tuple)) else [answers])]


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
    from .evaluation import METRICS

    return (*BUILT_IN, *(name for name in METRICS if name != "mutual_knn"))


def check_metrics(names: Sequence[str], arguments: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks the names of metrics and of files among their arguments, before a model answers for hours.

    Args:
        names (sequence of `str`): Metrics, as for [`score`].
        arguments (`Mapping[str, Mapping[str, Any]]`): Their arguments, as for [`score`].

    Raises:
        `ValueError`: If there is no such metric, or it does not take answers or arguments.
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
        if name in BUILT_IN and arguments.get(name):
            raise ValueError(f"The metric {name!r} takes no arguments, got {', '.join(arguments[name])}.")
    unused = sorted(set(arguments) - set(names))
    if unused:
        raise ValueError(f"There are arguments for {', '.join(unused)}, which is not among the metrics.")
    for given in arguments.values():
        for key in ("annotations", "synonyms", "relation", "safe_words"):
            for path in given[key] if isinstance(given.get(key), list) else [given.get(key)]:
                if path is not None and not Path(path).exists():
                    raise FileNotFoundError(f"The {key} {str(path)!r} are not there.")


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
    if any(reference is None for reference in references):
        raise ValueError(
            "Some rows have no right answer to compare with. Name the column of the answers with `--answer-column`."
        )
    scores = {}
    for name in names:
        if name in BUILT_IN:
            scores[name] = BUILT_IN[name](predictions, references)
        else:
            scores[name] = _evaluate_metric(name, predictions, references, dict((arguments or {}).get(name, {})))
    return scores


def _evaluate_metric(name: str, predictions: Sequence[str], references: Sequence[Any], arguments: dict) -> dict:
    import evaluate

    from .evaluation import METRICS, load_metric

    metric = load_metric(name) if name in METRICS else evaluate.load(name)
    try:
        return dict(metric.compute(predictions=list(predictions), references=list(references), **arguments))
    except TypeError as error:  # arguments that its `compute` does not have
        raise ValueError(f"The metric {name!r} can't be computed: {error}") from error
