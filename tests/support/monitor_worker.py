"""What the test of a monitored run in two processes runs in each of them.

As a script: `python -m torch.distributed.run --nproc_per_node 2 monitor_worker.py <folder>`.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig
from tiny import build_vlm, image_dataset, save_tiny_dinov2, sft_args

from hera_trainer import HeRAConfig, HeRATrainer

STEP = 12  # samples of an optimizer step


def train(folder: Path, teacher: str, batch: int, **settings: Any) -> dict[str, Any]:
    """What was logged, and the trained parameters."""
    model, processor = build_vlm("llava")
    args = HeRAConfig(
        **sft_args(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            num_neighbors=3,
            num_aligned_heads=2,
            max_steps=2,
            learning_rate=1e-2,
            teacher_model_name_or_path=teacher,
            **settings,
        )
    )
    torch.manual_seed(1)
    trainer = HeRATrainer(
        model,
        args,
        train_dataset=image_dataset(n=STEP * 2),
        eval_dataset=image_dataset(n=15, seed=7),
        processing_class=processor,
        peft_config=LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_dropout=0.1),
    )
    trainer.train()
    return {
        "logs": [{k: v for k, v in e.items() if "runtime" not in k} for e in trainer.state.log_history],
        "parameters": [hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for p in trainer.model.parameters()],
    }


def main(folder: Path) -> None:
    gc.freeze()  # what the libraries hold is no garbage, for which each training looks
    state = PartialState(cpu=True)
    teacher = folder / "teacher"
    if state.is_main_process:
        save_tiny_dinov2(teacher)
    state.wait_for_everyone()
    known = {
        "watched": train(folder / "watched", str(teacher), STEP // 2, monitor_steps=1, monitor_num_samples=13),
        "plain": train(folder / "plain", str(teacher), STEP // 2),
    }
    (folder / f"rank{state.process_index}.json").write_text(json.dumps(known))
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
