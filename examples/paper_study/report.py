"""Writes the tables and figures of docs/results.md from the study's results.

    python examples/paper_study/report.py            # rewrites what stands between the page's markers, and the figures
    python examples/paper_study/report.py --page other.md --results folder

Everything outside of the markers is written by hand and stays as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from figures import draw
from records import RESULTS, Record, can_be_shown, read_results
from tables import SECTIONS, both_draws, hours

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results.md"


def section_of(page: str, name: str) -> tuple[str, str, str]:
    """What stands before, between and behind the markers of an experiment."""
    begin, end = f"<!-- study: {name} -->", f"<!-- /study: {name} -->"
    before, rest = page.split(begin)
    between, behind = rest.split(end)
    return before + begin, between, end + behind


def write_page(page: str, results: dict[str, list[Record]]) -> str:
    """The page with what stands between its markers made anew."""
    bodies = {
        name: section(results[name]) if can_be_shown(name, results) else "Not measured yet."
        for name, section in SECTIONS.items()
    }
    for name, body in {**bodies, "both_draws": both_draws(results), "hours": hours(results)}.items():
        before, _, behind = section_of(page, name)
        page = f"{before}\n\n{body}\n\n{behind}"
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    results = read_results(args.results)
    args.page.write_text(write_page(args.page.read_text(), results))
    draw(results, args.page.parent / "assets")


if __name__ == "__main__":
    main()
