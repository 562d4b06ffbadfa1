"""What is read off the study's records, and numbers of several seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import correlation, mean, stdev
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
HEADS = 5
NAMES = {"efficientnet": "EfficientNet-Lite2", "dinov2": "DINOv2 ViT-S"}
# 97.5 % quantiles of Student's t by degrees of freedom.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Record = dict[str, Any]


def read_results(folder: Path) -> dict[str, list[Record]]:
    """The records of each experiment."""
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }


# Experiments in which trained models are set beside the one before training.
BESIDE_THE_START = (
    *("signature", "stages", "stages_confirmed", "concepts", "longer"),
    *("finished", "confirmation", "use"),
)


def can_be_shown(name: str, results: dict[str, list[Record]]) -> bool:
    """Whether enough runs of an experiment are done for its table."""
    records = results.get(name, [])
    if name in BESIDE_THE_START:
        return any(record["arm"] == "start" for record in records)
    return bool(records)


def before_training(records: Sequence[Record]) -> Record:
    """The record of the model that an experiment's runs begin with."""
    return next(record for record in records if record["arm"] == "start")


def last(record: Record) -> Record:
    """The last measurement of a run."""
    return record["measured"][max(record["measured"], key=int)]


def mknn(
    record: Record, group: Sequence[int], context: str = "image", encoder: str | None = None, step: int | None = None
) -> float:
    """Mean mutual k-NN of some heads, given by their places, with an encoder, by default the one that taught."""
    measured = last(record) if step is None else record["measured"][str(step)]
    scores = measured["mknn"][context][encoder or record["config"]["teacher"]]
    return mean(scores[place] for place in group)


def aligned(record: Record) -> list[int]:
    """Places of the aligned heads."""
    per_layer = len(last(record)["mknn"]["image"]["dinov2"]) // record.get("layers", 30)
    names = record["aligned_heads"][record["config"]["teacher"]]
    places = (re.fullmatch(r"L(\d+)H(\d+)", name) for name in names)
    return [int(found[1]) * per_layer + int(found[2]) for found in places if found]


def top(record: Record, start: Record, context: str = "image") -> list[int]:
    """Places of the heads that agreed most with the encoder before training."""
    scores = last(start)["mknn"][context][record["config"]["teacher"]]
    return sorted(range(len(scores)), key=lambda place: -scores[place])[:HEADS]


def aligned_heads(record: Record, context: str = "image", encoder: str | None = None) -> float:
    return mknn(record, aligned(record), context, encoder)


def other(record: Record) -> str:
    """The encoder that did not teach."""
    return next(name for name in record["aligned_heads"] if name != record["config"]["teacher"])


def pairs(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Each aligned run with its control: everything but the teacher's vectors is equal."""

    def key(record: Record) -> tuple:
        return record["arm"].removesuffix(" control"), record["config"]["teacher"], record["seed"]

    controls = {key(r): r for r in records if r["arm"].endswith(" control")}
    return [(r, controls[key(r)]) for r in records if not r["arm"].endswith(" control") and key(r) in controls]


# Numbers of several seeds


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean, by Student's t; None of a single value."""
    return QUANTILES[len(values) - 2] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def number(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """The mean, and its interval where there are several."""
    half = interval(values)
    return f"{mean(values):{sign}.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def seeds(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Each seed's value."""
    return " / ".join(f"{value:{sign}.{digits}f}" for value in values)


STAGES = (
    "neither",
    "stage 1",
    "stage 1 control",
    "stage 1 uniformity",
    "stage 2",
    "stage 2 control",
    "both",
    "both control",
)
LONGER = ("longer neither", "longer stage 1", "longer stage 1 control")
ARMS = ("SFT", "aligned", "aligned control", "uniformity", *STAGES, *LONGER)


def by_arm(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The trained runs of each arm, by seed."""
    found = {record["arm"] for record in records if record["arm"] != "start"}
    names = [*(arm for arm in ARMS if arm in found), *sorted(found.difference(ARMS))]
    ordered = sorted(records, key=lambda record: record["seed"])
    return {name: [record for record in ordered if record["arm"] == name] for name in names}


ACCURACY = "easy-VQA accuracy"
# What the confirmation compares: a name, digits, and how it is read off a record and the one before training.
Measure = tuple[str, int, Callable[[Record, Record], float]]
MEASURES: tuple[Measure, ...] = (
    ("aligned five", 3, lambda run, start: aligned_heads(run)),
    ("aligned five, by the other encoder", 3, lambda run, start: aligned_heads(run, encoder=other(run))),
    ("aligned five, text only", 3, lambda run, start: aligned_heads(run, "text")),
    ("top five", 3, lambda run, start: mknn(run, top(run, start))),
    ("all heads", 3, lambda run, start: mean(last(run)["mknn"]["image"][run["config"]["teacher"]])),
    ("held-out loss", 3, lambda run, start: last(run)["lm_loss"]),
    ("image gain", 3, lambda run, start: last(run)["image_gain"]),
    (ACCURACY, 3, lambda run, start: last(run)["vqa_accuracy"]),
)


def by_seed(runs: Sequence[Record], others: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Each run with the other of its seed."""
    found = {record["seed"]: record for record in others}
    return [(run, found[run["seed"]]) for run in runs if run["seed"] in found]


def on_common_heads(run: Record, another: Record) -> tuple[Record, Record]:
    """Both as if they had aligned only what both have: CPUs that round otherwise rank otherwise, and what is
    subtracted must be measured on the same heads."""
    heads = {
        teacher: [head for head in chosen if head in another["aligned_heads"][teacher]]
        for teacher, chosen in run["aligned_heads"].items()
    }
    return {**run, "aligned_heads": heads}, {**another, "aligned_heads": heads}


def measures_of(records: Sequence[Record]) -> list[Measure]:
    """All, but for the accuracy of models that have never been asked anything."""
    asked = any("wording" in record["references"] for record in records)
    return [measure for measure in MEASURES if asked or measure[0] != ACCURACY]


def differences(runs: Sequence[Record], others: Sequence[Record], start: Record, measure: Measure) -> list[float]:
    """Of a measure, seed by seed."""
    pairs = (on_common_heads(*pair) for pair in by_seed(runs, others))
    return [measure[2](run, start) - measure[2](another, start) for run, another in pairs]


# Maps of heads


def worst(record: Record) -> set[tuple[int, int]]:
    """The heads that agree least, by layer and place."""
    scores = record["scores"]
    heads = [(layer, head) for layer, row in enumerate(scores) for head in range(len(row))]
    return set(sorted(heads, key=lambda place: scores[place[0]][place[1]])[:HEADS])


def rank_correlation(first: Record, second: Record) -> float:
    """Spearman's, over all heads."""

    def ranks(record: Record) -> list[int]:
        flat = [score for row in record["scores"] for score in row]
        order = sorted(range(len(flat)), key=flat.__getitem__)
        places = [0] * len(flat)
        for place, index in enumerate(order):
            places[index] = place
        return places

    return correlation(ranks(first), ranks(second))
