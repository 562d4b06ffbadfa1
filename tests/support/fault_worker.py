"""Runs one training command again and again, each time in a process of its own that a fault may kill.

`test_faults.py` starts it once, so that the libraries are imported once, and writes orders to its standard input, a
line of JSON each: `folder` (for everything that is written), `resume` (`train`'s argument) and `fault` (a name in
`FAULTS`, or null). The process is forked from this one; its exit status comes back as a line of JSON, what it learned
as `result.json` in the folder, and what it printed as `log.txt`.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from tiny import build_vlm, image_dataset, sft_args
from transformers import TrainerState

from hera_trainer import HeRAConfig, HeRATrainer, VisionTeacher
from hera_trainer import trainer as trainer_module
from hera_trainer.heads import ranking_cache
from hera_trainer.heads.registry import get_head_accessor
from hera_trainer.runs import checkpoints
from hera_trainer.teacher import vectors

STEPS, SAVE_STEPS, ROWS = 4, 2, 24
COUNTS = {"encoded": 0, "ranked": 0}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner: Any, name: str, before: Callable | None = None, after: Callable | None = None) -> None:
    """Calls `before` and `after` with the arguments of a function whenever it is called."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return result

    setattr(owner, name, wrapper)


def die_at(condition: Callable[..., bool]) -> Callable:
    return lambda *args, **kwargs: die() if condition(*args, **kwargs) else None


def half_a_state(step: int) -> Callable:
    """Dies in the middle of `TrainerState.save_to_json`."""

    def before(state: TrainerState, path: str) -> None:
        if state.global_step == step:
            Path(path).write_text('{"global_step": ')
            die()

    return before


# Wrappers are placed on top of those that count, so a call that dies is not counted.
FAULTS: dict[str, Callable[[], None]] = {
    "teacher": lambda: wrap(VisionTeacher, "encode", before=die_at(lambda *_, **__: COUNTS["encoded"] == 12)),
    "ranking": lambda: COUNTS.update(last_ranked=2),
    "between the passes": lambda: wrap(
        HeRATrainer, "_first_pass", after=die_at(lambda trainer, *_: trainer.state.global_step == 2)
    ),
    "after the adapter": lambda: wrap(
        HeRATrainer, "save_model", after=die_at(lambda trainer, *_, **__: trainer.state.global_step == STEPS)
    ),
    "in the state": lambda: wrap(TrainerState, "save_to_json", before=half_a_state(STEPS)),
    "before the marker": lambda: wrap(trainer_module, "mark_complete", before=die_at(lambda _, step: step == STEPS)),
    "in deleting": lambda: wrap(
        checkpoints.shutil,
        "rmtree",
        before=die_at(
            lambda path, **_: (
                Path(path).name == f"checkpoint-{SAVE_STEPS}" and Path(path, "trainer_state.json").exists()
            )
        ),
    ),
    "in the first checkpoint": lambda: wrap(TrainerState, "save_to_json", before=half_a_state(SAVE_STEPS)),
}


def count_work() -> None:
    """Counts images that a teacher encodes and forward passes of the ranking."""

    def encoded(teacher: VisionTeacher, images: list, *args: Any, **kwargs: Any) -> None:
        COUNTS["encoded"] += len(images)

    def ranked(*args: Any) -> None:
        COUNTS["ranked"] += 1
        if COUNTS["ranked"] > COUNTS.get("last_ranked", ROWS):
            die()

    def begin_ranking(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        get_head_accessor(model).decoder.register_forward_pre_hook(ranked)

    def end_ranking(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        get_head_accessor(model).decoder._forward_pre_hooks.popitem()

    wrap(VisionTeacher, "encode", after=encoded)
    wrap(ranking_cache, "rank_samples", before=begin_ranking, after=end_ranking)
    vectors.add_teacher_features.__kwdefaults__["chunk_size"] = 8  # so that there are three


def train(folder: Path, teacher: str, resume: bool | None, fault: str | None) -> dict[str, Any]:
    """The command."""
    datasets.config.HF_CACHE_HOME = folder / "cache"
    count_work()
    if fault is not None:
        FAULTS[fault]()
    model, processor = build_vlm("llava")
    args = HeRAConfig(
        **sft_args(
            folder / "out",
            per_device_train_batch_size=6,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=2,
            num_neighbors=3,
            num_aligned_heads=3,
            queue_size=8,
            teacher_model_name_or_path=teacher,
            teacher_batch_size=4,
            learning_rate=1e-2,
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=SAVE_STEPS,
            save_total_limit=1,
        )
    )
    lora = LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.1)
    data = image_dataset(n=ROWS)
    trainer = HeRATrainer(model, args, train_dataset=data, processing_class=processor, peft_config=lora)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=resume)
    return {
        **COUNTS,
        # SFTTrainer counts its tokens from the start again when a run is resumed.
        "logs": [
            {name: value for name, value in entry.items() if name != "num_tokens"}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "heads": [str(head) for head in trainer.aligned_heads],
        "log_temperature": trainer.criterion.log_temperature.item(),
        "parameters": {
            name: hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
            for name, parameter in trainer.model.named_parameters()
        },
        "warnings": [str(warning.message) for warning in caught if "interrupted" in str(warning.message)],
    }


def main() -> None:
    gc.collect()
    gc.freeze()  # what the libraries hold is no garbage, for which each training of a child looks
    for line in sys.stdin:
        order = json.loads(line)
        folder = Path(order.pop("folder"))
        child = os.fork()
        if child == 0:
            log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                (folder / "result.json").write_text(json.dumps(train(folder, **order)))
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps(status), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
