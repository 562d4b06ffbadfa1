"""`hera report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .parser import Parser


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hera report",
        description="Makes one HTML page of a training run: maps of the attention heads before and after, curves, the "
        "aligned heads, configuration, versions. The page opens from disk, without network. A run that goes on or was "
        "killed can be reported too; the page says what is missing and how to get it.",
        epilog='Needs plotly: pip install "hera-trainer[report]"\n\nexamples:\n'
        "  hera report out                           writes out/report.html\n"
        "  hera report out --output pages/run1.html",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of the run")
    parser.add_argument("-o", "--output", metavar="FILE", help="the file to write (default: RUN_DIR/report.html)")
    return parser


def main(arguments: Sequence[str]) -> None:
    args = _parser().parse_args(arguments)
    from ..runs.report import write_report

    path = write_report(args.run_dir, args.output)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
