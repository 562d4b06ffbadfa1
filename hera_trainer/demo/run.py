"""`hera demo`: the whole job on a small real model."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from .. import (
    AlignmentMonitorCallback,
    HeadRanking,
    HeRAConfig,
    HeRATrainer,
    add_teacher_features,
    plot_head_scores,
    rank_heads,
    read_run,
)
from ..common.files import replacing_folder, write_atomically
from ..heads.head import AlignedUnit
from ..runs.report import write_report
from . import CREDITS
from .data import easy_vqa, emoji_captions
from .evaluate import accuracy, answer, majority_accuracy
from .parts import build_llava, computes_bf16, four_bit_config, save_teacher

# 56 x 56 pixels are 16 image tokens: small enough for two CPU cores, large enough to tell shapes and colours.
IMAGE_SIZE = 56
TEACHER_NAME = "DINOv2 ViT-S/14"
BATCH_SIZE = 8
ACCUMULATION = 2
STEPS = 120
# Past samples that join the 16 of a step: many small steps teach the projector more than few large ones, and 16 samples
# alone would be few to find 10 neighbours among.
QUEUE_SIZE = 48
# Faster, the new projector does not settle and the model does not learn to look.
LEARNING_RATE = 4e-4
# Another draw of questions than the settings above were chosen with.
TEST_SEED = 1
RANKING_SAMPLES = 1000
HELD_OUT_CAPTIONS = 400
QUESTIONS = 240
SHOWN = 6
CAPTION_SHARE = 0.25

CONTEXTS = {"text only": "text", "with image": "image"}
LINEAR_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class DemoData:
    """The demo's data sets, all with teacher vectors but the questions."""

    train: Dataset
    captions: Dataset
    held_out: Dataset
    questions: Dataset
    train_answers: Sequence[str]
    train_questions: Sequence[str]


class _Clock:
    """Prints what begins and keeps how long each part took."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._name = ""

    def begin(self, name: str) -> None:
        self.end()
        self._name, self.last = name, time.perf_counter()
        print(f"\n[{self.last - self.start:4.0f} s] {name}", flush=True)

    def end(self) -> None:
        if self._name:
            self.seconds[self._name] = round(time.perf_counter() - self.last, 1)
            self._name = ""


def run_demo(
    output_dir: str, steps: int | None = None, alignment_weight: float = 0.01, seed: int = 0
) -> dict[str, Any]:
    """Builds a small vision-language model, ranks its heads, trains it, loads the adapter with PEFT alone, and prints
    what changed.

    Args:
        output_dir (`str`): Folder for the model, the adapter, the ranking, heat maps, `report.html` and `results.json`.
        steps (`int`, *optional*): Optimizer steps of 16 samples.
        alignment_weight (`float`, *optional*, defaults to `0.01`): Weight of the alignment loss.
        seed (`int`, *optional*, defaults to `0`): Seed of data, adapter and training.

    Returns:
        `dict`: What `results.json` holds.

    Raises:
        `ImportError`: If a package of the demo is missing; the message says what to install.
    """
    steps = STEPS if steps is None else steps
    out, clock = Path(output_dir), _Clock()
    clock.begin("Building a LLaVA-style model of SmolLM2-135M-Instruct and DINOv2 ViT-S/14")
    processor = _build(out)
    clock.begin("Teacher vectors of OpenMoji and easy-VQA images (cached for the next run)")
    data = load_data(out, steps * BATCH_SIZE * ACCUMULATION, seed)
    trainer = make_trainer(out, data, steps, alignment_weight, seed)
    clock.begin(f"Ranking the attention heads on {RANKING_SAMPLES} captions, text only")
    with trainer.accelerator.autocast(), trainer.model.disable_adapter():
        ranking = rank_heads(
            trainer.model,
            processor,
            data.captions,
            num_samples=RANKING_SAMPLES,
            batch_size=64,
            teacher_name=TEACHER_NAME,
        )
    trainer.head_ranking = ranking
    trainer.prepare_alignment()
    heads = ranking.select("worst", trainer.args.num_aligned_heads)
    print("least aligned:", ", ".join(f"{head} ({ranking.score(head):.3f})" for head in heads))
    clock.begin("Before training: held-out questions")
    answers_before = _answers(trainer.model, processor, data.questions)
    clock.begin(
        f"Training {steps} steps of {BATCH_SIZE} x {ACCUMULATION} samples, LoRA on the "
        f"{'4-bit' if computes_bf16() else 'float32'} model; "
        f"{HELD_OUT_CAPTIONS} held-out captions before and after"
    )
    trainer.train()
    with replacing_folder(out / "adapter") as adapter:
        trainer.save_model(str(adapter))
    measured = {name: _measured(out, context) for name, context in CONTEXTS.items()}
    clock.begin("Loading the adapter with PEFT alone and answering held-out questions")
    model = AutoModelForImageTextToText.from_pretrained(out / "model", quantization_config=_quantization())
    model = PeftModel.from_pretrained(model, out / "adapter")
    answers_after = _answers(model, processor, data.questions)
    clock.end()
    results = {
        "settings": {
            "steps": steps,
            "alignment_weight": alignment_weight,
            "seed": seed,
            "heads": list(map(str, heads)),
        },
        "mknn": {name: _scores(ranking, before, after, heads) for name, (before, after) in measured.items()},
        "losses": _losses(trainer),
        "vqa_accuracy": {
            "before": accuracy(answers_before, data.questions["answer"]),
            "after": accuracy(answers_after, data.questions["answer"]),
            "majority_answer": majority_accuracy(data.train_answers, data.questions["answer"]),
            "majority_answer_per_question": majority_accuracy(
                data.train_answers, data.questions["answer"], data.train_questions, data.questions["question"]
            ),
        },
        "seconds": {**clock.seconds, "in all": round(time.perf_counter() - clock.start, 1)},
        "peak_memory_gb": round(_peak_memory(), 2),
    }
    ranking.save(out / "head_ranking.json")
    write_atomically(out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
    plot_head_scores(ranking, out / "heads.png", heads, "SmolLM2-135M: agreement of attention heads with DINOv2 ViT-S")
    before, after = measured["with image"]
    after.plot(out / "heads_before_after.png", heads, before, "Held-out captions, image in context")
    write_report(out / "training", out / "report.html")
    _show_answers(data.questions, answers_before, answers_after)
    print(closing_table(results))
    files = "report.html, results.json, head_ranking.json, heads.png, heads_before_after.png, adapter/"
    print(f"\nWritten to {out}: {files}")
    print("Parts: " + "; ".join(f"{credit.name} ({credit.license})" for credit in CREDITS))
    return results


def _build(out: Path) -> Any:
    model, processor = build_llava(IMAGE_SIZE)
    model.save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    save_teacher(out / "teacher")
    return AutoProcessor.from_pretrained(out / "model")


def load_data(out: Path, num_samples: int, seed: int) -> DemoData:
    """Images with captions and questions; nothing held out is trained on or ranked with.

    Args:
        out (`Path`): Folder with the teacher.
        num_samples (`int`): Training samples, a quarter of them captions.
        seed (`int`): Seed of the draw.
    """
    teacher = str(out / "teacher")
    emoji = add_teacher_features(emoji_captions(seed=seed), teacher, desc="OpenMoji")
    held_out = emoji.select(range(HELD_OUT_CAPTIONS))
    captions = emoji.select(range(HELD_OUT_CAPTIONS, len(emoji)))
    num_captions = min(int(CAPTION_SHARE * num_samples), len(captions))
    vqa = add_teacher_features(easy_vqa("train", num_samples - num_captions, seed), teacher, desc="easy-VQA")
    columns = ["images", "prompt", "completion", "teacher_features"]
    parts = [captions.select(range(num_captions)).select_columns(columns), vqa.select_columns(columns)]
    return DemoData(
        train=concatenate_datasets(parts).shuffle(seed=seed),
        captions=captions,
        held_out=held_out,
        questions=easy_vqa("test", QUESTIONS, TEST_SEED + seed),
        train_answers=vqa["answer"],
        train_questions=vqa["question"],
    )


def make_trainer(out: Path, data: DemoData, steps: int, alignment_weight: float, seed: int) -> HeRATrainer:
    """The trainer as a user would write it down."""
    args = HeRAConfig(
        output_dir=str(out / "training"),
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=64,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=steps,
        queue_size=QUEUE_SIZE,
        learning_rate=LEARNING_RATE,
        adam_beta2=0.98,
        lr_scheduler_type="cosine",
        warmup_steps=min(5, steps // 10),
        alignment_weight=alignment_weight,
        gradient_checkpointing=False,
        logging_steps=max(1, steps // 12),
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=computes_bf16(),
        seed=seed,
    )
    return HeRATrainer(
        model=str(out / "model"),
        args=args,
        train_dataset=data.train,
        callbacks=[AlignmentMonitorCallback(data.held_out, every=steps, num_samples=len(data.held_out))],
        quantization_config=_quantization(),
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=LINEAR_LAYERS,
            modules_to_save=["multi_modal_projector"],
            task_type="CAUSAL_LM",
        ),
    )


def _quantization() -> BitsAndBytesConfig | None:
    """4 bit, but on a CPU that has no bfloat16: TRL trains the adapter of a 4-bit model in that."""
    return four_bit_config() if computes_bf16() else None


def _measured(out: Path, context: str) -> tuple[HeadRanking, HeadRanking]:
    """What the monitor measured on held-out captions before and after training."""
    measured = read_run(out / "training").before_after(context)
    assert measured is not None
    return measured


def _answers(model: Any, processor: Any, questions: Dataset) -> list[str]:
    dtype = torch.bfloat16 if computes_bf16() else None
    return answer(model, processor, questions, batch_size=48, max_new_tokens=5, autocast_dtype=dtype)


def _scores(
    ranking: HeadRanking, before: HeadRanking, after: HeadRanking, heads: Sequence[AlignedUnit]
) -> dict[str, Any]:
    """Scores before and after training of the aligned heads, as many best heads of the ranking, all heads, and what
    unrelated spaces score."""
    groups: dict[str, Sequence[AlignedUnit]]
    groups = {"aligned": heads, "top": ranking.select("top", len(heads)), "all": before.heads()}
    scores: dict[str, Any] = {str(head): [before.score(head), after.score(head)] for head in heads}
    for name, group in groups.items():
        scores[name] = [sum(map(ranking.score, group)) / len(group) for ranking in (before, after)]
    for name in ("chance", "null_p95"):
        scores[name] = [getattr(ranking, name) for ranking in (before, after)]
    return scores


def _losses(trainer: HeRATrainer) -> dict[str, list[float]]:
    """First and last logged value of each loss."""
    losses = {}
    for name in ("lm_loss", "alignment_loss", "temperature"):
        values = [entry[name] for entry in trainer.state.log_history if name in entry]
        if values:
            losses[name] = [values[0], values[-1]]
    return losses


def _peak_memory() -> float:
    """Peak resident memory of this process in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kilobytes elsewhere


def _show_answers(questions: Dataset, before: list[str], after: list[str]) -> None:
    print(f"\n{'question':<46}{'right':<12}{'before':<24}after")
    for i in range(SHOWN):
        right = questions["answer"][i]
        print(f"{questions['question'][i]:<46}{right:<12}{before[i][:20]!r:<24}{after[i][:20]!r}")


_SCORE_NAMES = {
    "aligned": "mean of aligned heads",
    "top": "mean of as many top heads",
    "all": "mean of all heads",
    "chance": "unrelated spaces, k / (N - 1)",
    "null_p95": "unrelated spaces, 95th percentile",
}


def closing_table(results: dict[str, Any]) -> str:
    """The demo's closing table as text."""
    lines = [f"\n{'':<44}{'before':>10}{'after':>10}"]

    def row(name: str, values: Sequence[float]) -> None:
        lines.append(f"{name:<44}{values[0]:>10.3f}{values[1]:>10.3f}")

    for context, scores in results["mknn"].items():
        lines.append(f"MKNN on held-out captions, {context}")
        for name, values in scores.items():
            row("  " + _SCORE_NAMES.get(name, name), values)
    lines.append("Training (first and last logged)")
    for name, values in results["losses"].items():
        row("  " + name.replace("_", " "), values)
    vqa = results["vqa_accuracy"]
    lines.append(f"easy-VQA, {QUESTIONS} held-out questions")
    row("  accuracy", (vqa["before"], vqa["after"]))
    lines.append(f"  {'always the majority answer':<42}{vqa['majority_answer']:>20.3f}")
    lines.append(f"  {'majority answer to the same question':<42}{vqa['majority_answer_per_question']:>20.3f}")
    lines.append(f"{'Time in all (s)':<44}{results['seconds']['in all']:>20.0f}")
    lines.append(f"{'Peak memory (GB)':<44}{results['peak_memory_gb']:>20.2f}")
    return "\n".join(lines)
