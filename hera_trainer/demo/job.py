"""The demo's job: its data, and the trainer as a user would write it down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel
from trl.trainer import utils as trl_utils

from ..config import HeRAConfig
from ..runs.monitor import AlignmentMonitorCallback
from ..teacher.vectors import add_teacher_features
from ..trainer import HeRATrainer
from .data import TEST_SEED, concept, easy_vqa, emoji_captions, is_reserved
from .parts import computes_bf16, four_bit_config

# 56 x 56 pixels are 16 image tokens: small enough for two CPU cores, large enough to tell shapes and colours.
IMAGE_SIZE = 56
TEACHER_NAME = "DINOv2 ViT-S/14"
BATCH_SIZE = 64
STEPS = 40
# The demo's settings were chosen in the study (docs/results.md) with lower seeds, on the first images in this order.
SEED, ORDER = 7, 0
# The projector alone, which has never seen an image, and then LoRA for a fifth of the steps.
STAGES = (1, 2)
LEARNING_RATES = {1: 2e-3, 2: 4e-4}
HELD_OUT_CAPTIONS = 300
QUESTIONS = 240
LINEAR_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
# Both are trained from the same start on the same samples in the same order.
ARMS: dict[str, dict[str, Any]] = {
    "SFT": {"alignment_weight": 0.0},
    # Settings in which the teacher was seen to add something, beside a control (docs/results.md).
    "HeRA": {"alignment_weight": 0.5},
}


@dataclass
class DemoData:
    """The demo's data sets, all with teacher vectors but the questions."""

    train: Dataset
    captions: Dataset
    held_out: Dataset
    questions: Dataset
    train_answers: Sequence[str]
    train_questions: Sequence[str]


def load_data(out: Path, num_samples: int, seed: int) -> DemoData:
    """Images with captions and questions. What is held out shows other concepts and other shapes than any image that
    the model, or its projector before it, is trained on.

    Args:
        out (`Path`): Folder with the teacher.
        num_samples (`int`): Training samples that are wanted, a quarter of them questions; there are fewer if captions
            run out.
        seed (`int`): Seed of the training samples and of the held-out questions.
    """
    teacher = str(out / "teacher")
    emoji = emoji_captions(seed=ORDER)
    reserved = [is_reserved(concept(caption.removesuffix("."))) for caption in emoji["caption"]]
    held_out = emoji.select([i for i, kept in enumerate(reserved) if kept][-HELD_OUT_CAPTIONS:])
    captions = emoji.select([i for i, kept in enumerate(reserved) if not kept]).shuffle(seed=seed)
    captions = add_teacher_features(captions, teacher, desc="OpenMoji")
    shown = captions.select(range(min(num_samples * 3 // 4, len(captions))))
    vqa = easy_vqa("train", len(shown) // 3, seed)
    vqa = add_teacher_features(vqa, teacher, desc="easy-VQA")
    columns = ["images", "prompt", "completion", "teacher_features"]
    return DemoData(
        train=concatenate_datasets([shown.select_columns(columns), vqa.select_columns(columns)]).shuffle(seed=seed),
        captions=captions,
        held_out=add_teacher_features(held_out, teacher, desc="held-out OpenMoji"),
        questions=easy_vqa("test", QUESTIONS, TEST_SEED + seed),
        train_answers=vqa["answer"],
        train_questions=vqa["question"],
    )


def steps_of(stage: int, steps: int) -> int:
    """Steps of a stage, at least one, of `steps` in all."""
    second = max(1, steps // 5)
    return second if stage == 2 else max(1, steps - second)


def folder_of(out: Path, arm: str, stage: int) -> Path:
    """What a stage writes."""
    return out / arm.lower() / "stage1" if stage == 1 else out / arm.lower()


def make_trainer(out: Path, data: DemoData, arm: str, stage: int, steps: int, seed: int) -> HeRATrainer:
    """The trainer as a user would write it down. `out` holds the model and the ranking of its heads, and stage 2 goes
    on from what stage 1 has saved."""
    args = HeRAConfig(
        output_dir=str(folder_of(out, arm, stage)),
        head_ranking_path=str(out / "head_ranking.json"),
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=50,
        gradient_accumulation_steps=1,
        max_steps=steps_of(stage, steps),
        learning_rate=LEARNING_RATES[stage],
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=computes_bf16(),
        seed=seed,
        **ARMS[arm],
    )
    return HeRATrainer(
        model=load_model(out, arm, stage),
        args=args,
        train_dataset=data.train,
        callbacks=[AlignmentMonitorCallback(data.held_out, every=args.max_steps, num_samples=len(data.held_out))],
        peft_config=adapter() if stage == 2 else None,
    )


def load_model(out: Path, arm: str, stage: int) -> PreTrainedModel:
    """The model that a stage begins with."""
    path = out / "model" if stage == 1 else folder_of(out, arm, 1)
    # Plain attention is the fastest on a CPU for texts of 40 tokens. Stage 1 trains a part of the model's own weights.
    model = AutoModelForImageTextToText.from_pretrained(
        path, attn_implementation="eager", quantization_config=quantization() if stage == 2 else None
    )
    if stage == 1:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("multi_modal_projector" in name)
    return model


def adapter() -> LoraConfig:
    """LoRA on the language model; the projector is trained as a whole."""
    return LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=LINEAR_LAYERS,
        modules_to_save=["multi_modal_projector"],
        task_type="CAUSAL_LM",
    )


@contextmanager
def scoring_labels_alone() -> Iterator[None]:
    """Without Triton, TRL makes the logits of all positions and then masks them, which takes two thirds of a step of
    this model. Those with a label, a fifth, give the same loss."""
    uses_triton = trl_utils._use_triton
    trl_utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl_utils._use_triton = uses_triton


def quantization() -> BitsAndBytesConfig | None:
    """4 bit on a GPU. On a CPU, taking the weights out of them would take most of the time."""
    return four_bit_config() if torch.cuda.is_available() else None
