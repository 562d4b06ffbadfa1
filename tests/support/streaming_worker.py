"""What the test of streams in several processes runs in each of them, and in a single one for comparison.

As a script: `python -m torch.distributed.run --nproc_per_node 2 streaming_worker.py <folder>`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import IterableDataset
from streams import logs, rows_of_all_kinds
from tiny import build_vlm, image_dataset, save_tiny_dinov2, sft_args
from transformers import TrainerCallback

from hera_trainer import HeRAConfig, HeRATrainer, VisionTeacher

STEP = 8  # samples of an optimizer step


class Weights(TrainerCallback):
    """Keeps a digest of the weights at the end."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.total = sum(p.double().abs().sum().item() for p in model.parameters())


def run(
    folder: Path,
    teacher: str,
    dataset: IterableDataset,
    processes: int,
    workers: int = 0,
    ranked: int = 14,
    steps: int = 2,
) -> dict[str, Any]:
    """A whole run, its ranking and an evaluation; what this process knows of it."""
    passes: list[int] = []
    forward = VisionTeacher.forward_prepared
    VisionTeacher.forward_prepared = lambda self, x: [passes.append(len(x["pixel_values"])), forward(self, x)][1]
    model, processor = build_vlm("llava")
    args = HeRAConfig(
        **sft_args(folder / "out", dataloader_num_workers=workers),
        max_steps=steps,
        per_device_train_batch_size=STEP // 2 // processes,
        per_device_eval_batch_size=4 // processes,
        gradient_accumulation_steps=2,
        num_neighbors=2,
        num_aligned_heads=3,
        alignment_weight=1.0,
        teacher_batch_size=4,
        ranking_num_samples=ranked,
        learning_rate=1e-3,
        optim="sgd",
        train_sampling_strategy="sequential",
    )
    keep = Weights()
    trainer = HeRATrainer(
        model, args, train_dataset=dataset, processing_class=processor, teacher=teacher, callbacks=[keep]
    )
    try:
        trainer.prepare_alignment()
        ranking = sum(passes)
        trainer.train()
        evaluation = trainer.evaluate(image_dataset(n=16, seed=4).to_iterable_dataset())
    finally:
        VisionTeacher.forward_prepared = forward
    assert trainer.head_ranking is not None
    return {
        "logs": logs(trainer),
        "weights": keep.total,
        "scores": trainer.head_ranking.scores.tolist(),
        "evaluation": [evaluation[f"eval_{name}"] for name in ("alignment_loss", "alignment_left_out")],
        "images": [ranking, sum(passes) - ranking],
    }


def main(folder: Path) -> None:
    gc.freeze()  # what the libraries hold is no garbage, for which each training looks
    state = PartialState(cpu=True)
    teacher = folder / "teacher"
    if state.is_main_process:
        save_tiny_dinov2(teacher)
    state.wait_for_everyone()
    rows = rows_of_all_kinds()
    known: dict[str, Any] = {}
    for workers in (0, 1):
        known[f"workers {workers}"] = run(folder, str(teacher), rows.to_iterable_dataset(), 2, workers)
    known["shards"] = run(folder, str(teacher), rows.to_iterable_dataset(num_shards=2), 2, ranked=30)
    # After three steps, one process has a row left, and the other none.
    uneven = image_dataset(n=25).to_iterable_dataset(num_shards=2)
    known["uneven"] = run(folder, str(teacher), uneven, 2, steps=5)
    # Another order of rows in each process.
    shuffled = rows.to_iterable_dataset().shuffle(seed=state.process_index, buffer_size=24)
    try:
        run(folder, str(teacher), shuffled, 2)
    except ValueError as error:
        known["error"] = str(error)
    (folder / f"rank{state.process_index}.json").write_text(json.dumps(known))
    state.destroy_process_group()


if __name__ == "__main__":
    os.environ["HF_HOME"] = str(Path(sys.argv[1]) / "home")
    main(Path(sys.argv[1]))
