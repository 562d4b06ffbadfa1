"""Writes the tables and figures of docs/results.md from the study's results.

    python examples/paper_study/report.py            # rewrites what stands between the page's markers
    python examples/paper_study/report.py --page other.md --results folder

Everything outside of the markers is written by hand and stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "results.md"
RESULTS = HERE / "results"
HEADS = 5
# 97.5 % quantiles of Student's t by degrees of freedom.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Record = dict[str, Any]


def read_results(folder: Path) -> dict[str, list[Record]]:
    """The records of each experiment."""
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }


# What is read off a record


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


def starts(records: Sequence[Record]) -> dict[tuple[str, int], Record]:
    """What was measured before training, by images and draw."""
    return {(r["config"]["images"], r["config"]["draw"]): r for r in records if r["arm"] == "start"}


def start_of(record: Record, records: Sequence[Record]) -> Record:
    return starts(records)[record["config"]["images"], record["config"]["draw"]]


# Numbers of several seeds


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean, by Student's t; None of a single value."""
    return QUANTILES[len(values) - 2] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def number(values: Sequence[float], digits: int = 3) -> str:
    """The mean, and its interval where there are several."""
    half = interval(values)
    return f"{mean(values):.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def seeds(values: Sequence[float], digits: int = 3) -> str:
    """Each seed's value."""
    return " / ".join(f"{value:.{digits}f}" for value in values)


def by_arm(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The trained runs of each arm, by seed."""
    arms: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        if record["arm"] != "start":
            arms.setdefault(record["arm"], []).append(record)
    return arms


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Tables


def references(records: Sequence[Record]) -> str:
    """What scores are held against."""
    found = records[0]["references"]
    null, p95 = found["null"]
    return (
        f"{found['n']} held-out images, k = {found['k']}. Unrelated spaces score {null:.3f} "
        f"(95th percentile {p95:.3f}), "
        f"DINOv2 ViT-S and EfficientNet-Lite2 score {found['ceiling']:.3f} with each other."
    )


def signature(records: Sequence[Record]) -> str:
    """Mutual k-NN on the way, every seed, as SFT, alignment and control leave it."""
    start = next(record for record in records if record["arm"] == "start")
    steps = sorted({int(step) for record in records for step in record["measured"]})
    header = ["arm", "seeds", *(f"aligned five, step {step}" for step in steps)]
    header += ["top five, last", "all, last", "held-out loss", "pull, last"]
    rows = []
    for arm, runs in by_arm(records).items():
        row = [arm, " / ".join(str(run["seed"]) for run in runs)]
        for step in steps:
            found = runs if step else [start]
            row.append(seeds([mknn(run, aligned(run), step=step) for run in found]))
        row.append(seeds([mknn(run, top(run, start)) for run in runs]))
        row.append(seeds([mean(last(run)["mknn"]["image"][run["config"]["teacher"]]) for run in runs]))
        row.append(seeds([last(run)["lm_loss"] for run in runs]))
        pulls = [run["log"]["alignment_pull"][-1] for run in runs if "alignment_pull" in run["log"]]
        row.append(seeds(pulls, 2) if pulls else "")
        rows.append(row)
    return f"{markdown(header, rows)}\n\n{references(records)}"


SECTIONS: dict[str, Callable[[Sequence[Record]], str]] = {"signature": signature}


def section_of(page: str, name: str) -> tuple[str, str, str]:
    """What stands before, between and behind the markers of an experiment."""
    begin, end = f"<!-- study: {name} -->", f"<!-- /study: {name} -->"
    before, rest = page.split(begin)
    between, behind = rest.split(end)
    return before + begin, between, end + behind


def write_page(page: str, results: dict[str, list[Record]]) -> str:
    """The page with what stands between its markers made anew."""
    for name, section in SECTIONS.items():
        before, _, behind = section_of(page, name)
        body = section(results[name]) if results.get(name) else "Not measured yet."
        page = f"{before}\n\n{body}\n\n{behind}"
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    args.page.write_text(write_page(args.page.read_text(), read_results(args.results)))


if __name__ == "__main__":
    main()
