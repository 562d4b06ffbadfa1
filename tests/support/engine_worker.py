"""What the tests of training engines run in each of two processes, and in a single one for comparison.

As a script: `python -m torch.distributed.run --standalone --nproc_per_node 2 engine_worker.py <job as JSON>`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from tiny import image_dataset, sft_args
from torch import nn
from torch.utils.data import SequentialSampler

from hera_trainer import HeRAConfig, HeRATrainer

TOWERS: list = []  # forwards of the vision tower in training
LOGGED = ("loss", "lm_loss", "alignment_loss", "temperature", "alignment_pool")


@dataclass(frozen=True)
class Job:
    """Five steps of 16 samples each.

    Args:
        folder: Where the result is written.
        model: Folder of the model.
        stage: Stage of ZeRO; 0 for no engine.
        lora: Train adapters instead of all weights, with activation checkpointing.
        ranking: Rank the heads instead of naming them.
        targets: Where adapters are.
    """

    folder: str
    model: str
    stage: int = 0
    lora: bool = False
    ranking: bool = False
    targets: str = "all-linear"

    def config(self) -> HeRAConfig:
        zero = {"stage": self.stage, **({"stage3_param_persistence_threshold": 0} if self.stage == 3 else {})}
        auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        deepspeed = {**dict.fromkeys((*auto, "gradient_clipping"), "auto"), "zero_optimization": zero}
        settings = {
            "deepspeed": {**deepspeed, "zero_allow_untested_optimizer": True} if self.stage else None,
            "per_device_train_batch_size": 4 if self.stage else 8,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": self.lora,
            "model_init_kwargs": {"dtype": "float32"},
            "aligned_heads": None if self.ranking else ["L1H3", "L0H1", "L1H0"],
            "num_aligned_heads": 3,
            "num_neighbors": 3,
            "alignment_weight": 1.0,
            "learning_rate": 1e-3,
            "max_steps": 5,
        }
        return HeRAConfig(**sft_args(self.folder, **settings))


def fill_adapters(model: nn.Module, divided: bool) -> None:
    """The same adapters however the model was loaded; drawing them depends on it."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        if not divided:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            continue
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def run(job: Job) -> HeRATrainer:
    args = job.config()
    if job.stage:
        import deepspeed

        deepspeed.ops.__compatible_ops__.clear()  # nothing is compiled: gloo communicates
        # On the CPU, accelerate leaves this to whoever needs it; on a GPU it does it itself.
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    data = image_dataset(n=80, with_features=8)
    lora = LoraConfig(target_modules=job.targets, r=4) if job.lora else None
    trainer = HeRATrainer(job.model, args, train_dataset=data, peft_config=lora)
    fill_adapters(trainer.model, divided=job.stage == 3)
    trainer._get_train_sampler = lambda *args: SequentialSampler(data)  # the same samples however a step is cut
    trainer.prepare_alignment()
    patches = next(module for module in trainer.model.modules() if isinstance(module, nn.Conv2d))
    patches.register_forward_hook(lambda *args: TOWERS.append(args[2].shape))
    TOWERS.clear()
    trainer.train()
    return trainer


def result(trainer: HeRATrainer) -> dict:
    return {
        "log": [{name: entry[name] for name in LOGGED} for entry in trainer.state.log_history if "loss" in entry],
        "heads": [str(head) for head in trainer.aligned_heads or []],
        "engine": type(trainer.model_wrapped).__name__,
        "towers": len(TOWERS),
    }


def encode(job: Job) -> str:
    return json.dumps(asdict(job))


if __name__ == "__main__":
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    outcome = run(job)
    rank = outcome.accelerator.process_index
    Path(job.folder, f"rank{rank}.json").write_text(json.dumps(result(outcome)))
    torch.distributed.destroy_process_group()
