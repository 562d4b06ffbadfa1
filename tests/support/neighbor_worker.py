"""What the test of neighbour groups in several processes runs in each of them, and in a single one for comparison.

As a script: `python -m torch.distributed.run --nproc_per_node 2 neighbor_worker.py <folder>`.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, List, Value
from tiny import build_vlm, image_dataset, sft_args

from hera_trainer import HeRAConfig, HeRATrainer
from hera_trainer.teacher.column import TEACHER_COLUMN

GROUP, CLUSTERS = 4, 12  # as many rows in a cluster as in a group
POOL = 12  # samples of an optimizer step, three groups
STEPS, SAVED = 8, 6  # two epochs; the checkpoint lies in the middle of the second


def clustered_rows() -> Dataset:
    """Rows of clusters that lie far apart; those of a cluster are not beside each other."""
    rng = np.random.default_rng(0)
    centers = np.eye(CLUSTERS, 16) * 10
    vectors = [(centers[i % CLUSTERS] + rng.standard_normal(16)).astype(np.float32) for i in range(GROUP * CLUSTERS)]
    feature = List(Value("float32"))
    return image_dataset(n=len(vectors)).add_column(TEACHER_COLUMN, vectors, feature=feature)


class Watched(HeRATrainer):
    """Keeps the numbers of the rows of each micro-batch of each optimizer step."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        numbers = {np.float32(vector).tobytes(): i for i, vector in enumerate(clustered_rows()[TEACHER_COLUMN])}
        found = [[numbers[vector.numpy().tobytes()] for vector in batch[TEACHER_COLUMN]] for batch in batches]
        self.seen = [*getattr(self, "seen", []), found]
        return batches, num_items


def watched(folder: Path, batch: int, accumulation: int, **settings: Any) -> Watched:
    model, processor = build_vlm("llava", num_hidden_layers=1)
    defaults = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "gradient_checkpointing": False,
        "num_neighbors": 2,
        "aligned_heads": ["L0H1"],
        "neighbor_group_size": GROUP,
    }
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    args = HeRAConfig(**sft_args(folder, **{**defaults, **sizes, **settings}))
    return Watched(model, args, train_dataset=clustered_rows(), processing_class=processor)


def rows_seen(folder: Path, batch: int, accumulation: int, resume: bool = False, **settings: Any) -> Any:
    """Rows of each micro-batch of each step, of this process."""
    trainer = watched(folder, batch, accumulation, **settings)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if resume else None)
    return trainer.seen


def main(folder: Path) -> None:
    gc.freeze()  # what the libraries hold is no garbage, for which each training looks
    state = PartialState(cpu=True)
    known = {
        "step": rows_seen(folder / "step", 3, 2),
        "resumed": rows_seen(folder / "step", 3, 2, resume=True),
        "micro_batch": rows_seen(folder / "micro_batch", 2, 3, contrast_scope="micro_batch", save_strategy="no"),
    }
    (folder / f"rank{state.process_index}.json").write_text(json.dumps(known))
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
