"""Stage 1, once: trains the projector of the demo's model, with vision tower and language model frozen.

    python examples/paper_study/projector.py --output hera_trainer/demo/projector.safetensors

Captions of emoji whose concepts are not reserved, and easy-VQA's training questions, half of each; no alignment. What
is held out in demo and study is not seen. The log is written beside this file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import concatenate_datasets
from images import captions, load_images, split
from safetensors.torch import save_file
from train import HELD_OUT, commit, versions

from hera_trainer import HeRAConfig, HeRATrainer
from hera_trainer.demo.data import easy_vqa
from hera_trainer.demo.evaluate import accuracy, answer, majority_accuracy
from hera_trainer.demo.job import IMAGE_SIZE, scoring_labels_alone
from hera_trainer.demo.parts import build_llava, computes_bf16, write_plainly

LOG = Path(__file__).resolve().parent / "results" / "projector.json"
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "seed": 0,
}
QUESTIONS = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/study"), help="for the images")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=240)
    args = parser.parse_args()
    rows = args.steps * SETTINGS["per_device_train_batch_size"] // 2
    emoji = captions(split(load_images(args.folder), 0, HELD_OUT)[0])
    columns = ["images", "prompt", "completion"]
    epochs = -(-rows // len(emoji))
    shown = concatenate_datasets([emoji.select_columns(columns)] * epochs).shuffle(seed=0).select(range(rows))
    questions = easy_vqa("train", rows)
    data = concatenate_datasets([shown, questions.select_columns(columns)])
    model, processor = build_llava(IMAGE_SIZE)
    model.set_attn_implementation("eager")
    write_plainly(model, processor)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("multi_modal_projector" in name)
    begin = time.perf_counter()
    with TemporaryDirectory() as output:
        settings = HeRAConfig(
            output_dir=output,
            alignment_weight=0.0,
            max_steps=args.steps,
            gradient_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=computes_bf16(),
            **SETTINGS,
        )
        trainer = HeRATrainer(model, settings, train_dataset=data, processing_class=processor)
        with scoring_labels_alone():
            trainer.train()
        losses = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    weights = model.model.multi_modal_projector.state_dict()
    save_file({name: weight.to("cpu", torch.bfloat16).contiguous() for name, weight in weights.items()}, args.output)
    test = easy_vqa("test", QUESTIONS)
    said = answer(model.eval(), processor, test, max_new_tokens=5)
    record = {
        "steps": args.steps,
        "config": SETTINGS,
        "versions": versions(),
        "commit": commit(),
        "loss": losses,
        "easy_vqa": {
            "accuracy": accuracy(said, test["answer"]),
            "wording alone": majority_accuracy(
                questions["answer"], test["answer"], questions["question"], test["question"]
            ),
        },
        "seconds": round(time.perf_counter() - begin),
    }
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text(json.dumps(record, indent=1) + "\n")
    print(record["easy_vqa"], record["seconds"], "s")


if __name__ == "__main__":
    main()
