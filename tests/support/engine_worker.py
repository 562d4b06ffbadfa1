"""What the tests of training engines run in each of two processes, and in a single one for comparison.

As a script it reads orders from its standard input, a `Job` as JSON in each line, and forks the processes of each, so
that the libraries are imported once. The exit statuses come back as a line of JSON; what each process found is
`rank0.json`, `rank1.json` in the job's folder, and what they printed is `output.txt`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from tiny import image_dataset, sft_args
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from two_processes import free_port

from hera_trainer import HeRAConfig, HeRATrainer

TOWERS: list = []  # forwards of the vision tower in training
LOGGED = ("loss", "lm_loss", "alignment_loss", "temperature", "alignment_pool")
WATCHED = ("alignment_mknn", "image_gain", "eval_loss", "eval_alignment_loss")  # how their names begin
HELD_OUT = {"n": 20, "with_features": 8, "seed": 7}  # 5 batches, which two processes cannot share evenly
MEASURED = {"k": 3, "num_samples": 18, "batch_size": 4}


@dataclass(frozen=True)
class Job:
    """Some steps of 16 samples each.

    Args:
        folder: Where the result is written.
        model: Folder of the model.
        engine: `"zero2"`, `"zero3"`, `"fsdp2"` or `"ddp"`, in two processes; `""` for a single one.
        lora: Train adapters instead of all weights.
        checkpointing: Activation checkpointing.
        ranking: Rank the heads instead of naming them.
        encodes: Have the images encoded by the teacher beside the model, instead of bringing vectors.
        targets: Where adapters are.
        frozen: Modules whose weights are not trained.
        steps: Optimizer steps.
        watched: Evaluate, measure with the monitor and save every second step, with a queue of past samples.
        output: Folder of the run, `"out"` in `folder` by default.
        dies: Step after which all processes are killed.
        resume: Go on from the newest complete checkpoint.
    """

    folder: str
    model: str
    engine: str = ""
    lora: bool = False
    checkpointing: bool = False
    ranking: bool = False
    encodes: bool = False
    targets: str = "all-linear"
    frozen: tuple[str, ...] = ()
    steps: int = 5
    watched: bool = False
    output: str = ""
    dies: int = 0
    resume: bool = False

    def config(self) -> HeRAConfig:
        settings: dict[str, Any] = {
            "per_device_train_batch_size": 4 if self.engine else 8,
            "per_device_eval_batch_size": MEASURED["batch_size"],
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": self.checkpointing,
            "model_init_kwargs": {"dtype": "float32"},
            "aligned_heads": None if self.ranking else ["L1H3", "L0H1", "L1H0"],
            "num_aligned_heads": 3,
            "num_neighbors": 3,
            "alignment_weight": 1.0,
            "learning_rate": 1e-3,
            "max_steps": self.steps,
        }
        if self.engine.startswith("zero"):
            settings["deepspeed"] = zero(int(self.engine[-1]))
        if self.engine == "fsdp2":
            # LLaVA's `_no_split_modules` name a layer that its vision tower has not, which accelerate 1.15 refuses.
            layers = ["LlamaDecoderLayer", "CLIPEncoderLayer"]
            settings |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": layers}}
        if self.watched:
            settings |= {"queue_size": 24, "monitor_steps": 2, "monitor_num_samples": MEASURED["num_samples"]}
            settings |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
        return HeRAConfig(**sft_args(self.output or Path(self.folder, "out"), **settings))


def zero(stage: int) -> dict[str, Any]:
    """Configuration of DeepSpeed."""
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    divided = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    zero = {"stage": stage, **(divided if stage == 3 else {})}
    return {**dict.fromkeys(auto, "auto"), "zero_optimization": zero, "zero_allow_untested_optimizer": True}


def start(engine: str) -> None:
    """What launchers and accelerate do on GPUs, and do not do on a CPU."""
    if engine.startswith("zero"):
        import deepspeed

        deepspeed.ops.__compatible_ops__.clear()  # nothing is compiled: gloo communicates
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    if engine == "fsdp2":
        set_state = PartialState.__init__

        def tell_gpus(state: PartialState, *args: Any, **kwargs: Any) -> None:
            """On a CPU, `AcceleratorState` leaves FSDP out and DDP trains, without a word (accelerate 1.15): it takes
            the settings for kinds of accelerators alone."""
            set_state(state, *args, **kwargs)
            if state.distributed_type == DistributedType.MULTI_CPU:
                state.distributed_type = DistributedType.MULTI_GPU

        PartialState.__init__ = tell_gpus  # type: ignore[method-assign]


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


class Killed(TrainerCallback):
    """Dies after a step, as of `kill -9`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(job: Job) -> HeRATrainer:
    start(job.engine)
    args = job.config()
    data = image_dataset(n=16 * job.steps, with_features=None if job.encodes else 8)
    trainer = HeRATrainer(
        job.model,
        args,
        train_dataset=data,
        eval_dataset=image_dataset(**HELD_OUT) if job.watched else None,
        teacher=str(Path(job.model).with_name("teacher")) if job.encodes else None,
        peft_config=LoraConfig(target_modules=job.targets, r=4) if job.lora else None,
        callbacks=[Killed(job.dies)],
    )
    fill_adapters(trainer.model, divided=job.engine == "zero3")
    for name in job.frozen:
        trainer.model.get_submodule(name).requires_grad_(False)
    trainer._get_train_sampler = lambda *args: SequentialSampler(data)  # the same samples however a step is cut
    trainer.prepare_alignment()
    patches = next(module for module in trainer.model.modules() if isinstance(module, nn.Conv2d))
    patches.register_forward_hook(lambda *args: TOWERS.append(args[2].shape))
    TOWERS.clear()
    trainer.train(resume_from_checkpoint=job.resume or None)
    if job.watched:
        trainer.save_model()
        trainer.evaluate()
    return trainer


def result(trainer: HeRATrainer) -> dict[str, Any]:
    history = trainer.state.log_history
    assert trainer.alignment is not None
    queue = trainer.alignment.contrast.queue
    return {
        "log": [{name: entry[name] for name in LOGGED} for entry in history if "loss" in entry],
        "watched": [
            {name: value for name, value in entry.items() if name.startswith((*WATCHED, "step"))}
            for entry in history
            if any(name.startswith(WATCHED) for name in entry)
        ],
        "queue": None if queue is None else {"heads": queue.heads.tolist(), "teacher": queue.teacher.tolist()},
        "heads": [str(head) for head in trainer.aligned_heads or []],
        "engine": "FSDPModule" if isinstance(trainer.model, FSDPModule) else type(trainer.model_wrapped).__name__,
        "towers": len(TOWERS),
    }


def process(job: Job, rank: int, count: int, port: int) -> None:
    """One of the processes of a job."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    datasets.config.HF_CACHE_HOME = Path(job.folder, "cache")  # no ranking of another run
    found = result(run(job))
    Path(job.folder, f"rank{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fork(job: Job, rank: int, count: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    log = os.open(Path(job.folder, "output.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        process(job, rank, count, port)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def statuses(children: list[int]) -> list[int]:
    """Exit statuses; the first that fails takes the others with it, which would wait for it forever."""
    found: dict[int, int] = {}
    while len(found) < len(children):
        child, status = os.wait()
        found[child] = os.waitstatus_to_exitcode(status)
        if found[child]:
            for other in set(children) - set(found):
                os.kill(other, signal.SIGKILL)
    return [found[child] for child in children]


def encode(job: Job) -> str:
    return json.dumps(asdict(job))


def decode(line: str) -> Job:
    return Job(**{**json.loads(line), "frozen": tuple(json.loads(line)["frozen"])})


def main() -> None:
    for name in ("deepspeed", "matplotlib.pyplot", "trackio"):  # which the jobs would import, each for itself
        with suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        job, port = decode(line), free_port()
        count = 2 if job.engine else 1
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        children = [fork(job, rank, count, port) for rank in range(count)]
        print(json.dumps(statuses(children)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
