"""One run of the study: a model is trained from the common start, and measured."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from encoders import ENCODERS, load_encoder
from images import captions, load_images, split
from measure import HeldOut, measure
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hera_trainer import (
    AttentionHead,
    HeadRanking,
    HeRAConfig,
    HeRATrainer,
    VisionTeacher,
    add_teacher_features,
    rank_heads,
)
from hera_trainer.common.files import write_atomically
from hera_trainer.demo.data import easy_vqa, emoji_captions
from hera_trainer.demo.job import IMAGE_SIZE, LINEAR_LAYERS, scoring_labels_alone
from hera_trainer.demo.parts import build_llava, computes_bf16

HELD_OUT, OPENMOJI_HELD_OUT, QUESTIONS = 360, 400, 960
TRAINED_ON = 1920  # drawings of emoji, or questions
RANKING_SAMPLES = 1000
SAVE_STEPS = 10
SETTINGS: dict[str, Any] = {
    "learning_rate": 4e-4,
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant",
}
CHOICE = ("head_selection", "num_aligned_heads")  # settings by which a run's heads are chosen here
TRAINED = {"lora": "", "full": "", "projector": "multi_modal_projector"}  # parts of the names of parameters
LORA = {"r": 16, "lora_alpha": 32}
LOGGED = ("loss", "lm_loss", "alignment_loss", "alignment_pull", "alignment_spread", "alignment_weight", "temperature")


@dataclass
class Run:
    """What is run: everything that a result depends on.

    Args:
        arm (`str`): Its name.
        seed (`int`): Seed of adapter, order of the data and dropout.
        draw (`int`): Which concepts are held out.
        steps (`int`): Optimizer steps.
        teacher (`str`): The encoder that teaches, and by which heads are ranked.
        settings (`dict`): What of `HeRAConfig` is set besides [`SETTINGS`].
        adapter (`str`): What is trained: `"lora"` (adapter and projector), `"full"` (all but the vision tower), or
            `"projector"` (it alone).
        images (`str`): `"emoji"`, by all artists with keywords, `"openmoji"`, by one artist with their names alone, or
            `"mixed"`, these and questions about shapes. What is held out are emoji, and with `"mixed"` questions,
            too.
        start (`str`): The projector to begin with: `"stage1"`, or `"random"`, which has never seen an image.
        every (`int`, *optional*): Steps between two measurements on the way, of the heads with the image in context.
        in_full (`bool`): Measure all there is at the end.
        before (`dict`, *optional*): Settings of a stage before this one, which trains the projector alone.
    """

    arm: str
    seed: int = 0
    draw: int = 0
    steps: int = 30
    teacher: str = "efficientnet"
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: str = "lora"
    images: str = "emoji"
    start: str = "stage1"
    every: int | None = None
    in_full: bool = True
    before: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """What tells runs apart."""
        fields = {name: value for name, value in asdict(self).items() if name != "before" or value}
        return json.dumps(fields, sort_keys=True)


class Laboratory:
    """The parts that runs share, made once in a folder: images, encoders, the model to start from, rankings.

    Args:
        folder (`Path`): Where they are kept.
        device (`str`): `"cpu"` or `"cuda"`.
        rankings (`Path`, *optional*): Where rankings are kept, by default in `folder`. CPUs that round otherwise rank
            otherwise: runs that are compared must align the same heads, wherever they run.
    """

    def __init__(self, folder: Path, device: str = "cpu", rankings: Path | None = None) -> None:
        self.folder, self.device, self.rankings = folder, device, rankings or folder
        self._splits: dict[tuple[str, int], tuple[Dataset, Dataset]] = {}

    def start(self, projector: str) -> str:
        """Path of the model that runs begin with."""
        path = self.folder / f"start-{projector}"
        if not path.exists():
            model, processor = build_llava(IMAGE_SIZE, projector=projector)
            model.save_pretrained(path.with_suffix(".part"))
            processor.save_pretrained(path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        return str(path)

    def rows(self, images: str, draw: int) -> tuple[Dataset, Dataset]:
        """Rows to train on and held-out ones, with a column of vectors by each encoder."""
        if (images, draw) not in self._splits:
            self._splits[images, draw] = self._split(images, draw)
        return self._splits[images, draw]

    def _split(self, images: str, draw: int) -> tuple[Dataset, Dataset]:
        if images == "mixed":
            train, held_out = self.rows("openmoji", draw)
            questions = self._with_vectors(self._questions())
            columns = ["images", "prompt", "completion", *ENCODERS]
            return concatenate_datasets([part.select_columns(columns) for part in (train, questions)]), held_out
        if images == "emoji":
            train, held_out = split(load_images(self.folder), draw, HELD_OUT)
            train = train.shuffle(seed=0).select(range(TRAINED_ON))
            return captions(self._with_vectors(train)), captions(self._with_vectors(held_out))
        rows = self._with_vectors(emoji_captions(seed=0))
        order = random.Random(draw).sample(range(len(rows)), len(rows)) if draw else list(range(len(rows)))
        return rows.select(order[OPENMOJI_HELD_OUT:]), rows.select(order[:OPENMOJI_HELD_OUT])

    def _with_vectors(self, rows: Dataset) -> Dataset:
        for name in ENCODERS:
            path, dtype = load_encoder(self.folder, name), torch.bfloat16 if computes_bf16() else torch.float32
            encoder = VisionTeacher.from_pretrained(path, dtype=dtype)
            rows = add_teacher_features(rows, encoder, desc=name).rename_column("teacher_features", name)
        return rows

    def held_out(self, run: Run) -> HeldOut:
        """What a run is measured on."""
        rows = self.rows(run.images, run.draw)[1]
        vectors = {name: torch.tensor(rows.with_format(None)[name][:]) for name in ENCODERS}
        if run.images != "mixed":  # a model that was never asked anything has no answers
            return HeldOut(rows, vectors)
        return HeldOut(rows, vectors, easy_vqa("test", QUESTIONS, seed=run.draw), self._questions())

    def _questions(self) -> Dataset:
        return easy_vqa("train", TRAINED_ON)

    def ranking(self, run: Run, teacher: str) -> HeadRanking:
        """How the heads that runs begin with agree with an encoder, on captions to train on, text only."""
        images = "openmoji" if run.images == "mixed" else run.images
        path = self.rankings / f"ranking-{images}-{teacher}-{run.draw}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = taught_by(self.rows(images, run.draw)[0], teacher)
            model = load_model(self, run)
            processor = AutoProcessor.from_pretrained(self.start(run.start))
            ranking = rank_heads(
                model, processor, rows, num_samples=RANKING_SAMPLES, batch_size=64, teacher_name=teacher
            )
            replace(ranking, model=Path(ranking.model).name).save(path)  # not where this machine keeps it
        return HeadRanking.load(path)

    def aligned(self, run: Run, teacher: str) -> list[AttentionHead]:
        """The heads that a run with this teacher aligns."""
        chosen = {name: run.settings[name] for name in CHOICE if name in run.settings}
        return self.ranking(run, teacher).select(
            chosen.get("head_selection", "worst"), chosen.get("num_aligned_heads", 5)
        )

    def running(self, key: str) -> Path:
        """Folder that a run goes on from if it is stopped."""
        return self.folder / "running" / hashlib.sha256(key.encode()).hexdigest()[:16]

    def finished(self, key: str) -> None:
        """Removes it."""
        shutil.rmtree(self.running(key), ignore_errors=True)


def taught_by(rows: Dataset, teacher: str) -> Dataset:
    """Rows with the vectors of one encoder as the teacher's."""
    others = [name for name in ENCODERS if name != teacher]
    return rows.remove_columns(others).rename_column(teacher, "teacher_features")


def load_model(lab: Laboratory, run: Run) -> Any:
    """The model that a run begins with. For texts of 30 tokens, plain attention is the fastest on a CPU."""
    model: Any = AutoModelForImageTextToText.from_pretrained(lab.start(run.start), attn_implementation="eager")
    return model.to(lab.device)


def train(lab: Laboratory, run: Run) -> dict[str, Any]:
    """Trains and measures. Returns the run's record."""
    begin = time.perf_counter()
    aligned = {name: lab.aligned(run, name) for name in ENCODERS}
    held_out = lab.held_out(run)
    processor = AutoProcessor.from_pretrained(lab.start(run.start))
    model: Any = load_model(lab, run)
    output = lab.running(run.key)
    log: dict[str, list[float]] = {}
    measured = _Measured(output / "measured.json")

    def look(model: Any, step: int, in_full: bool) -> None:
        measured.add(step, measure(model, processor, held_out, aligned, in_full))

    if run.before:
        model.model.multi_modal_projector.load_state_dict(load_file(trained_before(lab, run)))
        if not measured.found:
            look(model, 0, False)
    if run.steps:
        trainer = _trainer(lab, run, model, str(output))
        if run.every:
            trainer.add_callback(_Look(run.every, run.steps, lambda step: look(trainer.model, step, False)))
        _go_on(trainer)
        model = trainer.model
        for entry in trainer.state.log_history:
            for name in LOGGED:
                if name in entry:
                    log.setdefault(name, []).append(round(entry[name], 5))
    look(model, run.steps, run.in_full)
    settings = {name: value for name, value in asdict(run).items() if name not in ("arm", "seed", "settings")}
    return {
        "arm": run.arm,
        "seed": run.seed,
        "config": {**settings, **SETTINGS, **run.settings, "bf16": computes_bf16()},
        "versions": versions(),
        "commit": commit(),
        "key": run.key,
        "aligned_heads": {name: list(map(str, heads)) for name, heads in aligned.items()},
        "references": held_out.references(),
        "measured": measured.found,
        "log": log,
        "seconds": round(time.perf_counter() - begin),
    }


def trained_before(lab: Laboratory, run: Run) -> Path:
    """The projector that the stage before a run has trained. Runs that have it in common share it."""
    settings = dict(run.before or {})
    stage = replace(run, arm="", steps=settings.pop("max_steps"), settings=settings, adapter="projector", before=None)
    path = lab.running(stage.key).with_suffix(".safetensors")
    if not path.exists():
        model = load_model(lab, stage)
        _go_on(_trainer(lab, stage, model, str(lab.running(stage.key))))
        weights = model.model.multi_modal_projector.state_dict()
        write_atomically(path, lambda part: save_file(weights, part))
        lab.finished(stage.key)
    return path


def _go_on(trainer: HeRATrainer) -> None:
    """Trains, from the last checkpoint if there is one."""
    output = Path(trainer.args.output_dir)
    with scoring_labels_alone():
        trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if output.exists() else None)


class _Measured:
    """Measurements by step, kept in a file until the run is done: one that is stopped goes on from its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, step: int, values: dict[str, Any]) -> None:
        self.found[str(step)] = values
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, lambda path: path.write_text(json.dumps(self.found)))


class _Look(TrainerCallback):
    """Measures every so many steps, but for the last."""

    def __init__(self, every: int, steps: int, look: Callable[[int], None]) -> None:
        self.every, self.steps, self.look = every, steps, look

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < self.steps:
            self.look(state.global_step)


def _trainer(lab: Laboratory, run: Run, model: Any, output: str) -> HeRATrainer:
    lora = LoraConfig(
        **LORA, target_modules=LINEAR_LAYERS, modules_to_save=["multi_modal_projector"], task_type="CAUSAL_LM"
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINED[run.adapter] in name and "vision_tower" not in name)
    args = HeRAConfig(
        output_dir=output,
        max_steps=run.steps,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=lab.device == "cpu",
        bf16=computes_bf16(),
        seed=run.seed,
        aligned_heads=list(map(str, lab.aligned(run, run.teacher))),
        **SETTINGS | {name: value for name, value in run.settings.items() if name not in CHOICE},
    )
    rows = taught_by(lab.rows(run.images, run.draw)[0], run.teacher)
    return HeRATrainer(model=model, args=args, train_dataset=rows, peft_config=lora if run.adapter == "lora" else None)


def versions() -> dict[str, str]:
    """Of the libraries that results depend on."""
    return {name: version(name) for name in ("hera-trainer", "trl", "transformers", "peft", "torch")}


def commit() -> str:
    """The commit that runs."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
