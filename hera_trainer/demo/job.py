"""The demo's job: its data, and the trainer as a user would write it down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from .. import AlignmentMonitorCallback, HeRAConfig, HeRATrainer, add_teacher_features
from .data import TEST_SEED, concept, easy_vqa, emoji_captions, is_reserved
from .parts import computes_bf16, four_bit_config

# 56 x 56 pixels are 16 image tokens: small enough for two CPU cores, large enough to tell shapes and colours.
IMAGE_SIZE = 56
TEACHER_NAME = "DINOv2 ViT-S/14"
BATCH_SIZE = 64
STEPS = 20
LEARNING_RATE = 4e-4
HELD_OUT_CAPTIONS = 300
QUESTIONS = 240
LINEAR_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
# Both are trained from the same start on the same samples in the same order.
ARMS: dict[str, dict[str, Any]] = {
    "SFT": {"alignment_weight": 0.0},
    # Settings in which the teacher was seen to add something, beside a control (docs/results.md).
    "HeRA": {"similarity": "centered_cosine", "temperature": 0.07, "alignment_weight": 0.1},
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
        seed (`int`): Seed of the draw.
    """
    teacher = str(out / "teacher")
    emoji = emoji_captions(seed=seed)
    reserved = [is_reserved(concept(caption.removesuffix("."))) for caption in emoji["caption"]]
    held_out = emoji.select([i for i, kept in enumerate(reserved) if kept][:HELD_OUT_CAPTIONS])
    captions = emoji.select([i for i, kept in enumerate(reserved) if not kept])
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


def make_trainer(out: Path, data: DemoData, arm: str, steps: int, seed: int) -> HeRATrainer:
    """The trainer as a user would write it down. `out` holds the model and the ranking of its heads."""
    args = HeRAConfig(
        output_dir=str(out / arm.lower()),
        head_ranking_path=str(out / "head_ranking.json"),
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=50,
        gradient_accumulation_steps=1,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        model_init_kwargs={"attn_implementation": "eager"},  # the fastest on a CPU for texts of 40 tokens
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=computes_bf16(),
        seed=seed,
        **ARMS[arm],
    )
    return HeRATrainer(
        model=str(out / "model"),
        args=args,
        train_dataset=data.train,
        callbacks=[AlignmentMonitorCallback(data.held_out, every=steps, num_samples=len(data.held_out))],
        quantization_config=quantization(),
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=LINEAR_LAYERS,
            modules_to_save=["multi_modal_projector"],
            task_type="CAUSAL_LM",
        ),
    )


def quantization() -> BitsAndBytesConfig | None:
    """4 bit on a GPU. On a CPU, taking the weights out of them would take most of the time."""
    return four_bit_config() if torch.cuda.is_available() else None
