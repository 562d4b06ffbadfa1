"""`hera demo`: the whole job on a small real model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..common.files import replacing_folder, write_atomically
from ..heads.head import AlignedUnit
from ..heads.heat_map import plot_head_scores
from ..heads.rank import rank_heads
from ..heads.ranking import HeadRanking
from ..runs.record import RunRecord, read_run
from ..runs.report import write_report
from ..trainer import HeRATrainer
from . import CREDITS
from .evaluate import accuracy, answer, majority_accuracy
from .job import (
    ARMS,
    BATCH_SIZE,
    IMAGE_SIZE,
    SEED,
    STAGES,
    STEPS,
    TEACHER_NAME,
    DemoData,
    folder_of,
    load_data,
    load_model,
    make_trainer,
    quantization,
    scoring_labels_alone,
    steps_of,
)
from .parts import build_llava, computes_bf16, save_teacher
from .table import closing_table, shown_answers

RANKING_SAMPLES = 1000
NUM_HEADS = 5
SHOWN = 6
CONTEXTS = {"image in context": "image", "text only": "text"}
# Logged values whose means over the last steps are printed.
TRAINING = ("lm_loss", "alignment_loss", "alignment_pull")
LAST_STEPS = 5
Runs = dict[str, list[RunRecord]]  # of each arm, both stages


class _Clock:
    """Prints what begins and keeps how long each part took."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, int] = {}
        self._name = ""

    def begin(self, name: str, text: str) -> None:
        self.end()
        self._name, self.last = name, time.perf_counter()
        print(f"\n[{self.last - self.start:4.0f} s] {text}", flush=True)

    def end(self) -> None:
        if self._name:
            self.seconds[self._name] = round(time.perf_counter() - self.last)
        self.seconds["in all"] = round(time.perf_counter() - self.start)


def run_demo(output_dir: str, steps: int | None = None, seed: int = SEED) -> dict[str, Any]:
    """Builds a small vision-language model, ranks its heads, trains it twice from the same start, without and with
    alignment, loads each adapter with PEFT alone, and prints what changed.

    Args:
        output_dir (`str`): Folder for the model, the adapters, the ranking, heat maps, `comparison.html` and
            `results.json`.
        steps (`int`, *optional*): Optimizer steps of 64 samples.
        seed (`int`, *optional*, defaults to `7`): Seed of data, adapters and training.

    Returns:
        `dict`: What `results.json` holds.

    Raises:
        `ImportError`: If a package of the demo is missing; the message says what to install.
    """
    steps = STEPS if steps is None else steps
    out, clock = Path(output_dir), _Clock()
    if not computes_bf16():
        print("This CPU does not multiply in bfloat16: training takes about three times as long, in float32.")
    clock.begin("build", "A LLaVA-style model of SmolLM2-135M-Instruct and DINOv2 ViT-S/14")
    processor = _build(out)
    clock.begin("teacher", "Teacher vectors of OpenMoji and easy-VQA images (cached for the next run)")
    data = load_data(out, steps * BATCH_SIZE, seed)
    clock.begin("ranking", f"Ranking its attention heads on {min(RANKING_SAMPLES, len(data.captions))} captions alone")
    model = AutoModelForImageTextToText.from_pretrained(out / "model", quantization_config=quantization())
    ranking = _rank(model, processor, data, out)
    heads = ranking.select("worst", NUM_HEADS)
    print("least aligned:", ", ".join(f"{head} ({ranking.score(head):.3f})" for head in heads))
    said = {"before": _answers(model, processor, data.questions)}
    del model
    for arm in ARMS:
        clock.begin(arm, f"{arm}: {_plan(steps)}")
        said[arm] = _train(out, data, arm, steps, seed)
    clock.end()
    runs = {arm: [read_run(folder_of(out, arm, stage)) for stage in STAGES] for arm in ARMS}
    results = {
        "settings": {"steps": steps, "seed": seed, "heads": list(map(str, heads)), "questions": len(data.questions)},
        **_measured(runs, ranking, heads),
        "vqa_accuracy": {name: accuracy(given, data.questions["answer"]) for name, given in said.items()},
        "vqa_baseline": _baseline(data),
        "training": {name: _last(runs, name) for name in TRAINING},
        "seconds": clock.seconds,
        "peak_memory_gb": round(_peak_memory(), 2),
    }
    write_atomically(out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
    _draw(out, runs, heads)
    print(shown_answers(data.questions, said, SHOWN))
    print(closing_table(results))
    print(
        "\nOne seed, and no control. What the teacher adds, in which settings, and whether the model is better for it, "
        "over several seeds: docs/results.md."
    )
    print(
        f"\nWritten to {out}: comparison.html, results.json, head_ranking.json, heads.png, sft/adapter/, hera/adapter/"
    )
    print("Parts: " + "; ".join(f"{credit.name} ({credit.license})" for credit in CREDITS))
    return results


def _build(out: Path) -> Any:
    model, processor = build_llava(IMAGE_SIZE)
    model.save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    save_teacher(out / "teacher")
    return AutoProcessor.from_pretrained(out / "model")


def _rank(model: Any, processor: Any, data: DemoData, out: Path) -> HeadRanking:
    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16) if computes_bf16() else nullcontext()
    with autocast:
        ranking = rank_heads(
            model, processor, data.captions, num_samples=RANKING_SAMPLES, batch_size=64, teacher_name=TEACHER_NAME
        )
    ranking.save(out / "head_ranking.json")
    return ranking


def _train(out: Path, data: DemoData, arm: str, steps: int, seed: int) -> list[str]:
    """Trains both stages, saves the adapter, loads it with PEFT alone, and answers the held-out questions."""
    for stage in STAGES:
        trainer: HeRATrainer = make_trainer(out, data, arm, stage, steps, seed)
        with scoring_labels_alone():
            trainer.train()
        if stage == 1:
            trainer.save_model()
    with replacing_folder(out / arm.lower() / "adapter") as adapter:
        trainer.save_model(str(adapter))
    processor = trainer.processing_class
    del trainer
    model = PeftModel.from_pretrained(load_model(out, arm, 2), out / arm.lower() / "adapter")
    return _answers(model, processor, data.questions)


def _plan(steps: int) -> str:
    first, second = (steps_of(stage, steps) for stage in STAGES)
    base = "float32" if quantization() is None else "4-bit"
    return f"{first} steps of {BATCH_SIZE} samples for the projector alone, then {second} with LoRA on the {base} model"


def _answers(model: Any, processor: Any, questions: Dataset) -> list[str]:
    dtype = torch.bfloat16 if computes_bf16() else None
    return answer(model, processor, questions, batch_size=48, max_new_tokens=5, autocast_dtype=dtype)


def _measured(runs: Runs, ranking: HeadRanking, heads: Sequence[AlignedUnit]) -> dict[str, Any]:
    """What the monitors measured on held-out captions: before training, and after each run."""
    groups: dict[str, Sequence[AlignedUnit]]
    groups = {"aligned": heads, "top": ranking.select("top", len(heads)), "all": ranking.heads()}
    scores: dict[str, Any] = {}
    null: dict[str, Any] = {}
    for name, context in CONTEXTS.items():
        found = _rankings(runs, context)
        scores[name] = {
            group: {column: sum(map(found[column].score, units)) / len(units) for column in found}
            for group, units in groups.items()
        }
        null[name] = {"mean": found["before"].chance, "p95": found["before"].null_p95}
    gains = {"before": runs["SFT"][0].image_gains[0]}
    gains |= {arm: last.image_gains[max(last.image_gains)] for arm, (_, last) in runs.items()}
    return {
        "mknn": scores,
        "null": null,
        "held_out_loss": {column: found.loss for column, found in gains.items()},
        "image_gain": {column: found.gain for column, found in gains.items()},
    }


def _rankings(runs: Runs, context: str) -> dict[str, HeadRanking]:
    """Heads before training, which is the same for all runs, and after each arm's last stage."""
    found: dict[str, HeadRanking] = {}
    for arm, stages in runs.items():
        first, last = (stage.before_after(context) for stage in stages)
        assert first is not None and last is not None  # the monitor measures before and after
        found.setdefault("before", first[0])
        found[arm] = last[1]
    return found


def _last(runs: Runs, name: str) -> dict[str, float]:
    """Mean of what was logged in the last steps, of the runs that logged it. SFT's loss is the language model's."""
    curves = {
        arm: last.curve(name)[1] or (last.curve("loss")[1] if name == "lm_loss" else [])
        for arm, (_, last) in runs.items()
    }
    return {arm: sum(found[-LAST_STEPS:]) / len(found[-LAST_STEPS:]) for arm, found in curves.items() if found}


def _baseline(data: DemoData) -> float:
    """Accuracy of the commonest answer in training to the same question, which is what the wording alone tells."""
    return majority_accuracy(
        data.train_answers, data.questions["answer"], data.train_questions, data.questions["question"]
    )


def _peak_memory() -> float:
    """Peak resident memory of this process in GB; NaN on Windows, which keeps no count."""
    if sys.platform == "win32":
        return float("nan")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kilobytes elsewhere


def _draw(out: Path, runs: Runs, heads: Sequence[AlignedUnit]) -> None:
    """Heads after either run and their difference, and the page that sets the runs side by side."""
    after = _rankings(runs, "image")
    panels = {arm: after[arm] for arm in ARMS}
    title = "SmolLM2-135M: agreement of its heads with DINOv2 ViT-S on held-out captions, image in context"
    plot_head_scores(panels, out / "heads.png", heads, title, difference=True)
    write_report([str(stage.path) for stages in runs.values() for stage in stages], out / "comparison.html")
