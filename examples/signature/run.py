"""Does the teacher teach? SFT, alignment and its control, from the same start, on the demo's model and captions.

    python examples/signature/run.py              # three seeds of each arm; what is in the results is not run again
    python examples/signature/run.py --table      # the table of what is there

Each arm trains LoRA on a LLaVA-style model of SmolLM2-135M-Instruct and DINOv2 ViT-S/14 with 64 emoji captions a step.
Held-out captions, with the image in context, are measured before, in between and after. The arms:

- `sft`: no alignment
- `aligned`: centred similarity, weight 0.1, temperature 0.07
- `control`: the same, each image with another image's teacher vector
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from hera_trainer import (
    AlignmentMonitorCallback,
    AttentionHead,
    HeadRanking,
    HeRAConfig,
    HeRATrainer,
    add_teacher_features,
    rank_heads,
    read_run,
)
from hera_trainer.demo.data import emoji_captions
from hera_trainer.demo.parts import build_llava, save_teacher
from hera_trainer.demo.run import HELD_OUT_CAPTIONS, IMAGE_SIZE, LINEAR_LAYERS, TEACHER_NAME

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "results.jsonl"
ARMS: dict[str, dict[str, Any]] = {
    "sft": {"alignment_weight": 0.0},
    "aligned": {},
    "control": {"teacher_control": "permuted"},
}
ALIGNMENT = {"similarity": "centered_cosine", "alignment_weight": 0.1, "temperature": 0.07}
BATCH_SIZE = 64
LEARNING_RATE = 4e-4


def parts(folder: Path) -> tuple[Dataset, Dataset, list[AttentionHead]]:
    """Training captions, held-out ones, and the heads to align. Model, teacher and ranking are made once."""
    if not (folder / "head_ranking.json").exists():
        model, processor = build_llava(IMAGE_SIZE)
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        save_teacher(folder / "teacher")
    rows = add_teacher_features(emoji_captions(seed=0), str(folder / "teacher"))
    held_out, train = rows.select(range(HELD_OUT_CAPTIONS)), rows.select(range(HELD_OUT_CAPTIONS, len(rows)))
    if not (folder / "head_ranking.json").exists():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rank_heads(model, processor, train, batch_size=64, teacher_name=TEACHER_NAME).save(
                folder / "head_ranking.json"
            )
    return train, held_out, HeadRanking.load(folder / "head_ranking.json").select("worst", 5)


def train_arm(folder: Path, arm: str, seed: int, steps: int, every: int) -> dict[str, Any]:
    """One run, and what was measured of it."""
    train, held_out, heads = parts(folder)
    settings = {**ALIGNMENT, **ARMS[arm], "aligned_heads": [str(head) for head in heads]}
    with TemporaryDirectory() as output:
        args = HeRAConfig(
            output_dir=output,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=1,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            **settings,
        )
        monitor = AlignmentMonitorCallback(
            held_out, every=every, contexts=["image"], num_samples=len(held_out), heads=heads
        )
        trainer = HeRATrainer(
            model=str(folder / "model"),
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            teacher=str(folder / "teacher"),
            callbacks=[monitor],
            peft_config=LoraConfig(
                r=16,
                lora_alpha=32,
                target_modules=LINEAR_LAYERS,
                modules_to_save=["multi_modal_projector"],
                task_type="CAUSAL_LM",
            ),
        )
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
        loss = trainer.evaluate()["eval_loss"]
        run = read_run(output)
    top = run.monitored["image"][0].select("top", 5)
    groups = {"aligned": heads, "top": top, "all": run.monitored["image"][0].heads()}
    names = ("lm_loss", "alignment_loss", "alignment_pull", "alignment_spread", "temperature")
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "config": {"learning_rate": LEARNING_RATE, "batch_size": BATCH_SIZE, **settings},
        "versions": {name: version(name) for name in ("hera-trainer", "trl", "transformers", "peft", "torch")},
        "commit": os.popen("git rev-parse --short HEAD").read().strip(),
        "held_out": len(held_out),
        "mknn": {
            name: {
                step: sum(map(ranking.score, group)) / len(group) for step, ranking in run.monitored["image"].items()
            }
            for name, group in groups.items()
        },
        "held_out_loss": loss,
        "log": {name: run.curve(name)[1] for name in names if run.curve(name)[1]},
        "seconds": round(seconds),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown: one row an arm, its seeds in one cell."""
    steps = sorted({int(step) for result in results for step in result["mknn"]["aligned"]})
    header = ["arm", *(f"aligned five, step {step}" for step in steps), "top five, last", "all, last"]
    header += ["held-out loss", "pull, last", "seconds"]
    lines = [header, ["---"] * len(header)]
    for arm in ARMS:
        runs = sorted((result for result in results if result["arm"] == arm), key=lambda result: result["seed"])
        if not runs:
            continue

        def cell(values: Sequence[float], digits: int = 3) -> str:
            return " / ".join(f"{value:.{digits}f}" for value in values)

        last = [str(max(map(int, run["mknn"]["aligned"]))) for run in runs]
        row = [f"{arm}, seeds {' / '.join(str(run['seed']) for run in runs)}"]
        for step in steps:
            row.append(cell([run["mknn"]["aligned"][str(step)] for run in runs if str(step) in run["mknn"]["aligned"]]))
        for group in ("top", "all"):
            row.append(cell([run["mknn"][group][step] for run, step in zip(runs, last, strict=True)]))
        row.append(cell([run["held_out_loss"] for run in runs]))
        row.append(cell([run["log"]["alignment_pull"][-1] for run in runs if "alignment_pull" in run["log"]], 2))
        row.append(cell([run["seconds"] for run in runs], 0))
        lines.append(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("out/signature"), help="for model, teacher and ranking")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that each finished run is added to")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of 64 captions")
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements")
    parser.add_argument("--table", action="store_true", help="print the table of the results and end")
    args = parser.parse_args(arguments)
    results = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    done = {(result["arm"], result["seed"], result["steps"]) for result in results}
    for seed in [] if args.table else args.seeds:
        for arm in args.arms:
            if (arm, seed, args.steps) in done:
                continue
            # As JSON has it: the keys of steps are strings.
            result = json.loads(json.dumps(train_arm(args.output_dir, arm, seed, args.steps, args.every)))
            args.results.parent.mkdir(parents=True, exist_ok=True)
            with args.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            results.append(result)
            print(table([result for result in results if result["steps"] == args.steps]), flush=True)
    if args.table:
        for steps in sorted({result["steps"] for result in results}):
            print(f"{steps} steps\n\n{table([result for result in results if result['steps'] == steps])}\n")


if __name__ == "__main__":
    main()
