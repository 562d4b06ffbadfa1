"""`hera report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .parser import Parser


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hera report",
        description="Makes one HTML page of a training run: maps of the attention heads before and after, curves, the "
        "aligned heads, configuration, versions. Of several runs, it puts them side by side: what differs, curves, the "
        "changes of the heads, what an aligned run has over its control, and what came out; runs that differ in the "
        "seed only are shown by mean and range. The page opens from disk, without network. A run that goes on or was "
        "killed can be reported too; the page says what is missing and how to get it.",
        epilog='Needs plotly: pip install "hera-trainer[report]"\n\nexamples:\n'
        "  hera report out                                   writes out/report.html\n"
        "  hera report out --output pages/run1.html\n"
        "  hera report runs/sft runs/aligned runs/control    writes runs/comparison.html",
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="output_dir of a run")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the file to write (default: RUN_DIR/report.html; of several runs, comparison.html beside the first)",
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    args = _parser().parse_args(arguments)
    from ..runs.report import write_report

    path = write_report(args.run_dirs, args.output)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
