"""What the tests of several processes run in each of them, and in a single one for comparison.

As a script: `python -m torch.distributed.run --nproc_per_node 2 distributed_worker.py <folder>`.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset, Features, Image
from peft import LoraConfig
from safetensors.torch import save_file
from tiny import build_vlm, image_dataset, save_tiny_dinov2, sft_args
from tiny_teachers import count_work, encoded, noise_image, vectors_of
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import hera_trainer.teacher.cache as feature_cache
from hera_trainer import HeRAConfig, HeRATrainer, rank_heads
from hera_trainer.alignment.contrast import Contrast
from hera_trainer.data.collator import TEACHER_COLUMN
from hera_trainer.objectives.contrastive import HeRALoss
from hera_trainer.objectives.queue import SampleQueue
from hera_trainer.teacher.vectors import add_teacher_features

STEP = 8  # samples of an optimizer step, however it is cut


@dataclass(frozen=True)
class Case:
    """A training run that is compared between one process and two.

    Args:
        lora: Train adapters alone.
        targets: Where they are.
        cuts: Batch and accumulation steps in each of two processes.
        single: Batch and accumulation steps in one process.
        without: Rows of each step that have no image.
        long: Rows of each step whose answer is long.
        settings: Of the trainer.
    """

    family: str = "llava"
    lora: bool = False
    targets: str = "all-linear"
    cuts: tuple[tuple[int, int], ...] = ((4, 1), (2, 2))
    single: tuple[int, int] = (STEP, 1)
    without: tuple[int, ...] = ()
    long: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llava full": Case(),
    "llava lora": Case(lora=True),
    "qwen2_5_vl full": Case("qwen2_5_vl"),
    "qwen2_5_vl lora": Case("qwen2_5_vl", lora=True),
    # Rows 6 and 7 lie on the second process in both cuts: as half of its batch, and as a whole micro-batch.
    "no image": Case(without=(6, 7)),
    "padding": Case(long=(6, 7)),
    "checkpointing": Case(
        lora=True,
        cuts=((2, 2),),
        settings={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    "frozen tower": Case(lora=True, targets=r".*language_model.*\.(q_proj|o_proj)", cuts=((2, 2),)),
    "queue of a step": Case(settings={"queue_size": 8, "max_steps": 2}),
    "centered": Case(settings={"similarity": "centered_cosine", "queue_size": 8, "max_steps": 2}),
    "queue of less": Case(settings={"queue_size": 3, "max_steps": 2}, without=(6,)),
    "micro_batch": Case(cuts=((4, 1),), settings={"contrast_scope": "micro_batch"}),
    "micro_batch queue": Case(
        cuts=((2, 2),),
        single=(4, 2),
        settings={"contrast_scope": "micro_batch", "queue_size": 5, "max_steps": 2, "num_neighbors": 2},
    ),
    "temperature": Case(settings={"max_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-3}),
}
# What SFTTrainer alone does to Qwen2.5-VL depends on the cut, so that it is subtracted.
CASES |= {
    f"{name} plain": replace(case, settings={"alignment_weight": 0.0})
    for name, case in CASES.items()
    if case.family == "qwen2_5_vl"
}


def training_rows(case: Case) -> Dataset:
    rows = image_dataset(n=STEP * case.settings.get("max_steps", 1), with_features=6)
    images, completions, features = rows["images"][:], rows["completion"][:], rows[TEACHER_COLUMN][:]
    for i in range(len(rows)):
        if i % STEP in case.without:
            images[i], features[i] = [], None
        if i % STEP in case.long:
            completions[i] = [{"role": "assistant", "content": f"{completions[i][0]['content']} " * 12}]
    columns = {"images": images, "completion": completions, TEACHER_COLUMN: features}
    return Dataset.from_dict({**columns, "prompt": rows["prompt"][:]}, features=rows.features)


class Keep(TrainerCallback):
    """Keeps the gradients before the last optimizer step, and the temperature's gradient before each."""

    def __init__(self, trainer: HeRATrainer) -> None:
        self.trainer = trainer
        self.gradients: dict[str, torch.Tensor] = {}
        self.temperature_gradients: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = {n: p.grad for n, p in self.trainer.model.named_parameters() if p.grad is not None}
        if self.trainer.criterion is not None:
            named["log_temperature"] = self.trainer.criterion.log_temperature.grad
            self.temperature_gradients.append(named["log_temperature"].item())
        self.gradients = {name: gradient.detach().clone() for name, gradient in named.items()}


def train(case: Case, cut: tuple[int, int], folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Gradients of all parameters at the last step, and what this process knows besides."""
    model, processor = build_vlm(case.family)
    settings = {
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "optim": "sgd",  # Adam would turn the rounding of a tiny gradient into a whole step
        "learning_rate": 1e-2,
        "num_neighbors": 3,
        "alignment_weight": 5.0,
        "aligned_heads": ["L1H3", "L0H1", "L1H0"],
        "gradient_checkpointing": False,
        **case.settings,
    }
    args = HeRAConfig(
        **sft_args(folder, per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1], **settings)
    )
    lora = LoraConfig(target_modules=case.targets, r=4, init_lora_weights=False) if case.lora else None
    rows = training_rows(case)
    trainer = HeRATrainer(model, args, train_dataset=rows, processing_class=processor, peft_config=lora)
    trainer._get_train_sampler = lambda *args: SequentialSampler(rows)
    keep = Keep(trainer)
    trainer.add_callback(keep)
    trainer.prepare_alignment()
    towers: list[Any] = []
    patches = next(m for m in trainer.model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    patches.register_forward_hook(lambda *args: towers.append(args))
    trainer.train()
    known: dict[str, Any] = {"logs": trainer.state.log_history[: args.max_steps], "towers": len(towers)}
    if trainer.criterion is not None:
        known["log_temperature"] = trainer.criterion.log_temperature.item()
        known["temperature_gradients"] = keep.temperature_gradients
        queue = trainer.alignment.contrast.queue
        if queue is not None:
            known["queue"] = {"heads": queue.heads.tolist(), "teacher": queue.teacher.tolist()}
    return keep.gradients, known


def uneven_pools(accelerator: Accelerator | None) -> dict[str, Any]:
    """Pools to which two processes contribute differently: 3 and 7 samples, then none and 10, two micro-batches each;
    one sample of each pool cannot take part. Without an accelerator, all samples in the order of processes."""
    criterion = HeRALoss(num_neighbors=3)
    queue = SampleQueue(12)
    contrast = Contrast(criterion, accelerator, queue)
    generator = torch.Generator().manual_seed(0)
    known: dict[str, Any] = {}
    for first in (3, 0):
        heads, teacher = torch.randn(2, 10, 5, generator=generator), torch.randn(10, 4, generator=generator)
        valid = torch.arange(10) != 4
        turns = torch.tensor([*([0, 1, 1][:first]), *([0] * 4 + [1] * (6 - first))])
        own = slice(None)
        if accelerator is not None:
            own = slice(0, first) if accelerator.is_main_process else slice(first, None)
        pool = contrast(heads[:, own], teacher[own], valid[own], turns[own])
        known[f"first has {first}"] = {
            "value": pool.value.item(),
            "heads_grad": pool.heads_grad.tolist(),
            "temperature_grad": pool.parameter_grads[0].item(),
            "samples": int(pool.samples),
            "left_out": int(pool.left_out),
            "queue": queue.teacher.tolist(),
        }
    return known


def ranking(distributed: bool) -> dict[str, Any]:
    """Scores of a tiny model's heads: batches that cannot be dealt out evenly, one batch for all, with images."""
    model, processor = build_vlm("llava")
    rows = image_dataset(n=26, with_features=6, seed=4)
    collator = DataCollatorForVisionLanguageModeling(processor)
    forwards = [0]
    model.get_decoder().register_forward_hook(lambda *args: forwards.append(forwards.pop() + 1))
    results = {}
    for name, batch_size, data_collator in (("uneven", 4, None), ("one batch", 32, None), ("images", 4, collator)):
        result = rank_heads(
            model,
            processor,
            rows,
            k=3,
            num_samples=25,
            batch_size=batch_size,
            data_collator=data_collator,
            progress=False,
            distributed=distributed,
        )
        scores = {"scores": result.scores.tolist(), "layer_scores": result.layer_scores.tolist()}
        results[name] = {**scores, "num_samples": result.num_samples, "forwards": forwards[0]}
        forwards[0] = 0
    return results


def image_rows(broken: int | None = None) -> Dataset:
    """50 rows of 35 different images, some rows without."""
    files = [encoded(noise_image(seed)) for seed in range(37)]
    if broken is not None:
        files[broken] = b"no picture"
    images = [None if i % 10 == 9 else files[i % 37] for i in range(50)]
    return Dataset.from_dict({"image": images}, features=Features({"image": Image()}))


def teacher_columns(folder: Path, teacher: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Encodes the same images into a cache that all processes share, into one of each, and broken ones."""
    work, written = count_work(monkeypatch), []
    write = feature_cache.write_atomically

    def watched(path: Path, *args: Any) -> None:
        written.append(path.name)
        write(path, *args)

    monkeypatch.setattr(feature_cache, "write_atomically", watched)
    known = {}
    for name, cache in (("shared", folder / "cache"), ("apart", folder / f"cache {rank}")):
        column = vectors_of(
            add_teacher_features(image_rows(), teacher, batch_size=4, cache_dir=cache, distributed=True)
        )
        known[name] = {"written": [*written], "images": work["images"], "nulls": sum(row is None for row in column)}
        np.save(folder / f"{name}-{rank}.npy", np.stack([row for row in column if row is not None]))
        written.clear()
        work["images"] = 0
    try:
        add_teacher_features(image_rows(broken=36), teacher, batch_size=4, cache_dir=folder / "cache", distributed=True)
    except ValueError as error:
        known["error"] = str(error)
    return known


# 21 rows: two pools of 8, a remainder of 4 and a row without an image; the last batches are uneven.
VECTORS = [None if i == 3 else [math.sin(i + j * j) for j in range(16)] for i in range(21)]


def whole_run(folder: Path, teacher: str, batch_size: int) -> dict[str, Any]:
    """From images to a trained model, teacher's vectors, ranking and the order of samples included."""
    model, processor = build_vlm("llava")
    args = HeRAConfig(
        **sft_args(
            folder / "whole",
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=1,
            per_device_eval_batch_size=4,
            num_neighbors=3,
            teacher_batch_size=4,
        )
    )
    trainer = HeRATrainer(model, args, train_dataset=image_dataset(n=16), processing_class=processor, teacher=teacher)
    trainer.train()
    assert trainer.aligned_heads is not None and trainer.head_ranking is not None
    trainer.args.per_device_eval_batch_size = batch_size // 2
    evaluation = trainer.evaluate(image_dataset(n=21, seed=4).add_column("teacher_features", VECTORS))
    return {
        "evaluation": {name: evaluation[f"eval_{name}"] for name in ("alignment_loss", "alignment_left_out")},
        "heads": [str(head) for head in trainer.aligned_heads],
        "scores": trainer.head_ranking.scores.tolist(),
        "logs": trainer.state.log_history[:1],
    }


def main(folder: Path) -> None:
    gc.freeze()  # what the libraries hold is no garbage, for which each training looks
    state = PartialState(cpu=True)
    rank = state.process_index
    known: dict[str, Any] = {}
    for name, case in CASES.items():
        for batch, accumulation in case.cuts:
            key = f"{name} {batch}x{accumulation}"
            gradients, known[key] = train(case, (batch, accumulation), folder / "out")
            if state.is_main_process:
                save_file({n: value.contiguous() for n, value in gradients.items()}, folder / f"{key}.safetensors")
    known["pools"] = uneven_pools(Accelerator(cpu=True))
    known["ranking"] = ranking(distributed=True)
    teacher = folder / "teacher"
    if state.is_main_process:
        save_tiny_dinov2(teacher)
    state.wait_for_everyone()
    known["whole"] = whole_run(folder, str(teacher), STEP // 2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        known["teacher"] = teacher_columns(folder, str(teacher), rank, monkeypatch)
    (folder / f"rank{rank}.json").write_text(json.dumps(known))
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
