"""Writes the files that `tests/runs/test_before.py` reads: those of a small run, and what its objects held.

Run it with the version of the package whose files are to be kept: `python tests/support/files_of_before.py <folder>`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import TrainerCallback

SAVED_STEP, LAST_STEP = 2, 3


def settings(output_dir: str | Path, **kwargs: Any) -> dict[str, Any]:
    """Settings of the run, the one of then and the one that goes on from it."""
    from tiny import sft_args

    return sft_args(
        output_dir,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=LAST_STEP,
        save_strategy="steps",
        save_steps=SAVED_STEP,
        learning_rate=1e-2,
        num_neighbors=2,
        similarity="cosine",  # the default of then
        num_aligned_heads=2,
        ranking_num_samples=10,
        queue_size=6,
        **kwargs,
    )


def lora() -> LoraConfig:
    """The smallest adapter."""
    return LoraConfig(target_modules=["v_proj"], r=1, lora_alpha=1)


class Kept(TrainerCallback):
    """Keeps what a checkpoint holds, when it is written and when training goes on from it."""

    trainer: Any = None
    saved: dict[str, Any]
    begun: dict[str, Any]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = self._now()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == SAVED_STEP:
            self.saved = self._now()

    def _now(self) -> dict[str, Any]:
        alignment = self.trainer.alignment
        queue = alignment.contrast.queue
        temperature = self.trainer.criterion.log_temperature
        return {
            "temperature": {
                "log_temperature": temperature.item(),
                "optimizer": {name: x.item() for name, x in alignment.optimizer._adam.state[temperature].items()},
            },
            "queue": {} if queue.heads is None else {"heads": queue.heads.tolist(), "teacher": queue.teacher.tolist()},
            "aligned_heads": [str(head) for head in self.trainer.aligned_heads],
            "adapter": {name: p.tolist() for name, p in self.trainer.model.named_parameters() if "lora" in name},
        }


def content(ranking: Any) -> dict[str, Any]:
    """What a ranking says."""
    named = {name: getattr(ranking, name) for name in ("k", "num_samples", "seed", "context", "model", "versions")}
    return {"scores": ranking.scores.tolist(), "layer_scores": ranking.layer_scores.tolist(), **named}


def write(folder: Path) -> None:
    """Trains in `folder`, a new one, and leaves there what is to be kept."""
    folder.mkdir(parents=True)
    os.chdir(folder)  # so that all paths that are written down are relative ones
    os.environ.update(HF_HOME=str(Path("home").absolute()), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    # Only now: the folders of the caches are fixed when these are imported.
    from datasets import Dataset
    from tiny import image_dataset, save_tiny_dinov2, save_vlm
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    from hera_trainer import HeRAConfig, HeRATrainer, __version__, read_run

    save_vlm("llava", "model", hidden_size=8, num_hidden_layers=2)
    save_tiny_dinov2("teacher", hidden_size=4, image_size=14, patch_size=7)
    image_dataset(n=12, image_size=8).to_parquet("train.parquet")
    kept = Kept()
    trainer = HeRATrainer(
        AutoModelForImageTextToText.from_pretrained("model"),
        HeRAConfig(
            **settings("run", teacher_model_name_or_path="teacher", monitor_steps=SAVED_STEP, monitor_num_samples=8)
        ),
        train_dataset=Dataset.from_parquet("train.parquet"),
        eval_dataset=image_dataset(n=8, image_size=8, seed=1),
        processing_class=AutoProcessor.from_pretrained("model"),
        peft_config=lora(),
        callbacks=[kept],
    )
    kept.trainer = trainer
    trainer.train()
    run = read_run("run")
    expected = {
        "version": __version__,
        "checkpoint": kept.saved,
        "ranking": content(trainer.head_ranking),
        "teacher_vectors": trainer.train_dataset["teacher_features"][:],
        "record": run.record,
        "log_history": run.log_history,
        "monitored": {name: {step: content(m) for step, m in steps.items()} for name, steps in run.monitored.items()},
        "reported": {
            "image_processor": AutoImageProcessor.from_pretrained("teacher").to_dict(),
            "decoder": trainer.alignment.accessor.decoder.config.to_dict(),
        },
    }
    Path("expected.json").write_text(json.dumps(expected, indent=1))
    shutil.move("home/hera_trainer", "cache")
    for alias in Path("cache").glob("*/*.key"):  # of one machine: they go by the paths and times of files
        alias.unlink()
    for name in ("home", "run/hera", f"run/checkpoint-{LAST_STEP}"):
        shutil.rmtree(name)
    for card in Path("run").rglob("README.md"):
        card.unlink()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
