"""What the tests of streamed data share: runs on few rows, and what two runs are compared by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import build_vlm, image_dataset, sft_args

from hera_trainer import HeRAConfig, HeRATrainer, VisionTeacher
from hera_trainer.data.collator import TEACHER_COLUMN

HEADS = ["L1H3", "L0H1", "L2H0"]


def build(folder: Any, dataset: Any, family: str = "llava", **settings: Any) -> HeRATrainer:
    model, processor = build_vlm(family)
    own = {
        name: settings.pop(name)
        for name in ("teacher", "eval_dataset", "callbacks", "peft_config", "data_collator")
        if name in settings
    }
    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_neighbors": 2,
        "num_aligned_heads": 3,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "alignment_weight": 1.0,
        "train_sampling_strategy": "sequential",
    }
    args = HeRAConfig(**sft_args(folder, **{**defaults, **settings}))
    return HeRATrainer(model, args, train_dataset=dataset, processing_class=processor, **own)


def rows_of_all_kinds() -> Dataset:
    """24 rows: most with one image, some with none, two or three; rows 5 and 11 share theirs."""
    rows = image_dataset(n=24)
    images = [list(row) for row in rows["images"]]
    images[2], images[9] = [], []
    images[4] = [images[4][0], images[7][0]]
    images[6] = [images[0][0], images[1][0], images[6][0]]
    images[11] = [images[5][0]]
    columns = {"images": images, "prompt": rows["prompt"][:], "completion": rows["completion"][:]}
    prompts = []
    for row, own in zip(columns["prompt"], images, strict=True):
        content = [*({"type": "image", "text": None} for _ in own), {"type": "text", "text": row[0]["content"]}]
        prompts.append([{"role": "user", "content": content}])
    features = rows.features.copy()
    del features["prompt"]
    dataset = Dataset.from_dict({**columns, "prompt": prompts}).cast_column("images", features["images"])
    return dataset


def watched_vectors(trainer: HeRATrainer) -> list[torch.Tensor]:
    """The teacher vectors of all micro-batches that the trainer is going to train on."""
    vectors: list[torch.Tensor] = []
    fetch: Callable = trainer.get_batch_samples

    def watched(*args: Any, **kwargs: Any) -> Any:
        batches, count = fetch(*args, **kwargs)
        vectors.extend(batch[TEACHER_COLUMN].clone() for batch in batches)
        return batches, count

    trainer.get_batch_samples = watched
    return vectors


def count_images(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images in each forward pass of a teacher from now on."""
    passes: list[int] = []
    forward = VisionTeacher.forward_prepared

    def counting(self: VisionTeacher, prepared: Any) -> torch.Tensor:
        passes.append(len(prepared["pixel_values"]))
        return forward(self, prepared)

    monkeypatch.setattr(VisionTeacher, "forward_prepared", counting)
    return passes


def logs(trainer: HeRATrainer, *names: str) -> list[list[float]]:
    names = names or ("loss", "lm_loss", "alignment_loss", "alignment_pool", "grad_norm", "temperature")
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_run(a: HeRATrainer, b: HeRATrainer) -> None:
    assert logs(a) == logs(b) != []
    assert torch.equal(a.criterion.log_temperature, b.criterion.log_temperature)
    others = dict(b.model.named_parameters())
    for name, parameter in a.model.named_parameters():
        assert torch.equal(parameter, others[name]), name
