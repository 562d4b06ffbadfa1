"""Writes the tables of docs/performance.md from the results of the benchmarks.

    python examples/benchmarks/report.py            # rewrites what stands between the page's markers
    python examples/benchmarks/report.py --page other.md --results folder

Everything outside of the markers is written by hand and stays as it is. A benchmark without a result is listed as not
measured yet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
# In the order of the page. Results with other names follow; those of `--small` are never shown.
BENCHMARKS = {
    "training_step": "Training step",
    "training_step_four_bit": "Training step, 4-bit",
    "training_step_cuda": "Training step on a GPU",
    "training_step_four_bit_cuda": "Training step, 4-bit, on a GPU",
    "vision_tower": "Training step, heavy vision tower",
    "vision_tower_cuda": "Training step, heavy vision tower, on a GPU",
    "ranking": "Head ranking",
    "neighbors": "Nearest neighbours",
    "teacher": "Teacher vectors",
    "loss": "Alignment loss",
    "import_time": "Import time",
    "scaling": "Growth",
}
OPTIONAL = {"training_step_four_bit", "training_step_four_bit_cuda"}


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in a folder, by the name of their benchmark, in the order of the page."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    found = {name: result for name, result in found.items() if "_small" not in name}
    order = [*BENCHMARKS, *(name for name in found if name not in BENCHMARKS)]
    return {name: found[name] for name in order if name in found}


def number(value: float) -> str:
    """Three significant digits, more before the decimal point if there are more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of one benchmark as a table."""
    lines = ["| what | against | bar | median | spread | pairs | |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        verdict = {True: "met", False: "**missed**", None: ""}[row["met"]]
        spread = f"{number(row['low'])} to {number(row['high'])}"
        cells = [row["what"], row["against"], row["bar"], number(row["ratio"]), spread, str(row["pairs"]), verdict]
        lines.append("| " + " | ".join(cell(each) for each in cells) + " |")
    return lines


def section(name: str, result: dict[str, Any], figure: bool) -> list[str]:
    """Heading, command, table and notes of one benchmark."""
    notes = [f"- {row['what']}: {row['note']}." for row in result["rows"] if row["note"]]
    lines = [f"### {BENCHMARKS.get(name, name)}", "", f"`{result['command']}`", "", *table(result["rows"]), ""]
    if figure:
        lines += ["![Measured growth, and the growth predicted](assets/scaling.svg)", ""]
    return [*lines, *notes, ""]


def summary(results: dict[str, dict[str, Any]]) -> list[str]:
    """How many bars are met, and which are not."""
    rows = [row for result in results.values() for row in result["rows"] if row["met"] is not None]
    missed = [row for row in rows if not row["met"]]
    lines = [f"{len(rows) - len(missed)} of {len(rows)} bars are met."]
    if missed:
        lines += ["Missed:", "", *(f"- {row['what']}: {number(row['ratio'])}, bar {row['bar']}" for row in missed)]
    return [*lines, ""]


def environments(results: dict[str, dict[str, Any]]) -> list[str]:
    """The machines and versions, each once, with the benchmarks that ran there."""
    places: dict[str, list[str]] = {}
    for name, result in results.items():
        machine = dict(result["environment"])
        gpu = machine.pop("gpu") or "no GPU"
        head = f"{machine.pop('cpu')}, {machine.pop('cores')} cores, {machine.pop('threads')} threads of PyTorch, {gpu}"
        versions = ", ".join(f"{library} {version}" for library, version in machine.items())
        places.setdefault(f"{head}; {versions}", []).append(name)
    lines = [f"- {', '.join(f'`{name}`' for name in names)}: {place}." for place, names in places.items()]
    return ["### Environment", "", *lines, ""]


def missing(results: dict[str, dict[str, Any]]) -> list[str]:
    """Benchmarks that have no result."""
    absent = [name for name in BENCHMARKS if name not in results and name not in OPTIONAL]
    gpu = any(result["environment"]["gpu"] for result in results.values())
    lines = [f"- {BENCHMARKS[name]}: not measured yet." for name in absent if not name.endswith("_cuda")]
    if not gpu:
        lines.append(
            "- On a GPU: not measured. `python examples/benchmarks/training_step.py --device cuda` measures it, with "
            "CUDA events and the peak of allocated memory."
        )
    return ["### Not measured", "", *lines, ""] if lines else []


def generated(results: dict[str, dict[str, Any]], figure: bool) -> str:
    """What stands between the markers.

    Args:
        results (`dict`): Results by name, see [`read_results`].
        figure (`bool`): Whether there is a figure of the growth.
    """
    lines = summary(results) if results else []
    for name, result in results.items():
        lines += section(name, result, figure and name == "scaling")
    lines += missing(results)
    lines += environments(results) if results else []
    return "\n".join(lines).strip()


def rewritten(page: str, content: str) -> str:
    """The page with other content between its markers.

    Raises:
        `ValueError`: If the page does not have both markers once, in their order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"The page must have the markers {BEGIN} and {END} once each, in this order.")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    chosen = parser.parse_args(arguments)
    figure = (chosen.page.parent / "assets" / "scaling.svg").exists()
    content = generated(read_results(chosen.results), figure)
    chosen.page.write_text(rewritten(chosen.page.read_text(encoding="utf-8"), content), encoding="utf-8")


if __name__ == "__main__":
    main()
