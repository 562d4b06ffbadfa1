"""Measuring a finished model: questions and answers, their scores, and metrics for the
[`evaluate`](https://huggingface.co/docs/evaluate) library, one folder a metric, loadable by its path and pushable to
the Hub as a Space. Uses `heads` and what lies below it.

```python
from hera_trainer.evaluation import load_metric, metric_path

metric = load_metric("pope")  # the same as evaluate.load(metric_path("pope"))
metric.add_batch(predictions=["Yes, there is."], references=["yes"])  # any number of times
metric.compute()
```

All of them take `predictions` and `references` of equal length, by `compute` at once or by `add_batch` in parts;
`compute` takes the rest. Shares are fractions in [0, 1], not per cent. Every value is a `float` or `int`, except for
the `str` `vocabulary` of `chair`. A share of nothing (such as the precision where no answer is yes) is 0.0, never
NaN; `amber` and `hallusionbench` leave out the scores of a part of the benchmark that no reference belongs to.

`mutual_knn`
    `compute(predictions=[[float]], references=[[float]], k=10, normalize=True)`
    -> `mutual_knn`. Row i of both are vectors of the same sample; the widths of the two may differ.

`chair`
    `compute(predictions=[caption], references=..., annotations=None, synonyms=None)`
    -> `chair_i`, `chair_s`, `recall`, `length` (words a caption), `captions`, `mentions`, `hallucinated_mentions`,
    `vocabulary`.
    `references`: for each caption the list of texts that say what is in the image, object names or reference captions
    (`[[str]]`); or COCO image ids (`[int]`), with `annotations` the path, or list of paths, of COCO's
    `instances_*.json` and `captions_*.json`. `synonyms`: path of another list of objects and synonyms, such as the
    official `synonyms.txt`.

`pope`
    `compute(predictions=[answer], references=..., annotations=None)`
    -> `accuracy`, `precision`, `recall`, `f1`, `yes_ratio`.
    `references`: `"yes"` or `"no"` for each answer (`[str]`); or question ids (`[int]`), with `annotations` the path
    of one of POPE's question files (`coco_pope_random.json`).

`amber`
    `compute(predictions=[response], references=[id], annotations=path, relation=None, safe_words=None, nouns="nltk",
    similarity=None, threshold=0.8)`
    -> for the generative ids `chair`, `cover`, `hal_rate`, `cog`; for the discriminative ones `accuracy`, `precision`,
    `recall`, `f1`, and each of them with a prefix for each dimension asked about (`existence_f1`; also `attribute_`,
    `state_`, `number_`, `action_`, `relation_`); with both, `amber_score`.
    `references`: AMBER's ids (`[int]`). `annotations`: AMBER's folder `data`, or its `annotations.json`, beside which
    `relation.json` and `safe_words.txt` are found unless they are given. `nouns="tokens"` needs no NLTK.

`hallusionbench`
    `compute(predictions=[answer], references=..., annotations=None)`
    -> `qAcc`, `fAcc`, `aAcc`, `easy_aAcc`, `hard_aAcc`.
    `references`: rows of the benchmark (`[dict]`), of which the keys `category`, `subcategory`, `visual_input`,
    `set_id`, `figure_id`, `question_id` and `gt_answer` are read; or numbers of rows, from 0 (`[int]`), with
    `annotations` the path of `HallusionBench.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluate import EvaluationModule

METRICS = ("mutual_knn", "chair", "pope", "amber", "hallusionbench")


def metric_path(name: str) -> str:
    """Folder of one of the metrics, for `evaluate.load`.

    Args:
        name (`str`): `"mutual_knn"`, `"chair"`, `"pope"`, `"amber"` or `"hallusionbench"`.

    Returns:
        `str`: The folder, which is also what to push to the Hub as a Space.

    Raises:
        `ValueError`: If there is no metric of that name.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r} here. There are {', '.join(METRICS)}.")
    return str(Path(__file__).parent / name)


def load_metric(name: str, **kwargs: Any) -> EvaluationModule:
    """Loads one of the metrics: `evaluate.load` with the path of the installed folder. Nothing is downloaded.

    Args:
        name (`str`): As for [`metric_path`].
        **kwargs: For `evaluate.load`, such as `keep_in_memory=True`.

    Returns:
        `evaluate.EvaluationModule`.

    Raises:
        `ValueError`: If there is no metric of that name.
    """
    import evaluate

    return evaluate.load(metric_path(name), **kwargs)
