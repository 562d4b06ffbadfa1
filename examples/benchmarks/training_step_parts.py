"""What `training_step.py` compares: three trainers, one optimizer step of each, and the peak memory of a process."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, PrinterCallback
from trl import SFTConfig, SFTTrainer

# hera_trainer is imported inside functions: the process that measures SFTTrainer's memory must do without it.

ROOT = Path(__file__).resolve().parent.parent.parent
LINEAR_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
TEACHER_COLUMN = "teacher_features"
SAMPLES = 1920  # those of the demo, whose teacher vectors may be cached already
RANKING_SAMPLES = 1000
WEIGHT = 0.01


@dataclass(frozen=True)
class Setting:
    """What both sides of a comparison have in common, and the aligned heads.

    Args:
        folder (`str`): Folder that `build` has filled.
        heads (`list[str]`): Aligned heads.
        batch_size (`int`): Samples of a micro-batch.
        accumulation (`int`): Micro-batches of an optimizer step.
        steps (`int`): Optimizer steps of one measurement, over a fixed list of batches.
        num_neighbors (`int`): The alignment loss's k.
        device (`str`): `"cpu"` or `"cuda"`.
        four_bit (`bool`): Whether the decoder's linear layers are quantized to nf4.
        trains_projector (`bool`): Whether the projector is trained beside the adapters.
        image_feature_gib (`float`): GiB of image features that HeRATrainer keeps between the two passes of a step.
    """

    folder: str
    heads: list[str]
    batch_size: int
    accumulation: int
    steps: int
    num_neighbors: int
    device: str = "cpu"
    four_bit: bool = False
    trains_projector: bool = True
    image_feature_gib: float = 1.0


def build(folder: Path, small: bool) -> None:
    """Fills a folder with a model, its teacher, training data with teacher vectors, and a ranking of the heads. What a
    former call has built is kept.

    Args:
        folder (`Path`): The folder.
        small (`bool`): Tiny random models and data of the test suite instead of the demo's real ones.
    """
    if (folder / "head_ranking.json").is_file():
        return
    from hera_trainer import rank_heads

    if small:
        sys.path.insert(0, str(ROOT / "tests" / "support"))
        from tiny import build_vlm, image_dataset, save_tiny_dinov2

        model, processor = build_vlm("llava")
        save_tiny_dinov2(folder / "teacher")
        train = captions = image_dataset(n=32, with_features=16)
    else:
        from hera_trainer.demo.job import load_data
        from hera_trainer.demo.parts import build_llava, save_teacher

        model, processor = build_llava()
        save_teacher(folder / "teacher")
        data = load_data(folder, SAMPLES, seed=0)
        train, captions = data.train, data.captions
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    train.save_to_disk(folder / "data")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        count = min(RANKING_SAMPLES, len(captions))
        ranking = rank_heads(model, processor, captions, k=3 if small else 10, num_samples=count, batch_size=64)
    ranking.save(folder / "head_ranking.json")


def aligned_heads(folder: Path, count: int = 5) -> tuple[list[str], list[str], int]:
    """The worst heads of the ranking; as many of the first third of the layers; and the number of layers.

    Of the first third, the last head is the worst one of its deepest layer: the costliest choice that it allows.
    """
    from hera_trainer import HeadRanking

    ranking = HeadRanking.load(folder / "head_ranking.json")
    order = ranking.select("worst", len(ranking.heads()))
    num_layers = 1 + max(head.layer for head in order)
    deepest = max(0, -(-num_layers // 3) - 1)
    last = next(head for head in order if head.layer == deepest)
    early = [head for head in order if head.layer <= deepest and head != last][: count - 1]
    return list(map(str, order[:count])), list(map(str, [*early, last])), num_layers


def make_trainer(kind: str, setting: Setting) -> SFTTrainer:
    """A trainer of `setting`, ready for `Steps`.

    Args:
        kind (`str`): `"sft"`, `"ours"` or `"naive"`.
        setting ([`Setting`]): Everything else.
    """
    folder = Path(setting.folder)
    shared: dict[str, Any] = {
        "output_dir": str(folder / "training"),
        "per_device_train_batch_size": setting.batch_size,
        "gradient_accumulation_steps": setting.accumulation,
        "max_steps": 1000,
        "learning_rate": 1e-5,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": True,
        "use_cpu": setting.device == "cpu",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "seed": 0,
    }
    needed = setting.batch_size * setting.accumulation * setting.steps
    data = load_from_disk(str(folder / "data"))
    assert isinstance(data, Dataset) and len(data) >= needed
    data = data.select(range(needed))
    objects: dict[str, Any] = {
        "model": str(folder / "model"),
        "processing_class": AutoProcessor.from_pretrained(folder / "model"),
        "peft_config": LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=LINEAR_LAYERS,
            modules_to_save=["multi_modal_projector"] if setting.trains_projector else None,
            task_type="CAUSAL_LM",
        ),
    }
    if setting.four_bit:
        from hera_trainer.demo.parts import four_bit_config

        objects["quantization_config"] = four_bit_config()
    if kind == "ours":
        from hera_trainer import HeRAConfig, HeRATrainer

        ours = {"alignment_weight": WEIGHT, "num_neighbors": setting.num_neighbors, "aligned_heads": setting.heads}
        ours["image_feature_gib"] = setting.image_feature_gib
        trainer = HeRATrainer(args=HeRAConfig(**shared, **ours), train_dataset=data, **objects)
        trainer.prepare_alignment()
    else:
        data = data.remove_columns(TEACHER_COLUMN)
        args = SFTConfig(**shared)
        if kind == "sft":
            trainer = SFTTrainer(args=args, train_dataset=data, **objects)
        else:
            trainer = NaiveTrainer(setting, args=args, train_dataset=data, **objects)
    trainer.remove_callback(PrinterCallback)
    return trainer


class NaiveTrainer(SFTTrainer):
    """Head-wise alignment as it is written down first: the vision teacher sees the images of each step, every token of
    a chosen head goes through the head's block of the output projection, and only then the tokens are averaged.

    The images arrive prepared for the teacher: decoding and resizing them, which workers may do, is not measured.
    """

    def __init__(self, setting: Setting, **kwargs: Any) -> None:
        from hera_trainer import AttentionHead, HeRALoss
        from hera_trainer.heads.registry import get_head_accessor

        super().__init__(**kwargs)
        accessor = get_head_accessor(self.model)
        self.heads = [AttentionHead.parse(head) for head in setting.heads]
        self.criterion = HeRALoss(setting.num_neighbors).to(self.args.device)
        teacher = Path(setting.folder) / "teacher"
        self.teacher = AutoModel.from_pretrained(teacher).eval().requires_grad_(False).to(self.args.device)
        self.image_processor = AutoImageProcessor.from_pretrained(teacher)
        self.inner_collator, self.data_collator = self.data_collator, self.collate
        self.projections = {head.layer: accessor.projection(head.layer) for head in self.heads}
        self.num_heads = {layer: accessor.num_heads(layer) for layer in self.projections}
        self.seen: dict[int, Tensor] = {}
        for layer, projection in self.projections.items():
            projection.register_forward_hook(lambda _, args, out, layer=layer: self.seen.update({layer: args[0]}))

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        images = [row["images"][0].convert("RGB") for row in rows]
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return {**self.inner_collator(rows), "teacher_pixels": pixels}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        from hera_trainer.heads.pooling import placeholder_token_ids, pooling_mask

        pixels = inputs.pop("teacher_pixels")
        mask = pooling_mask(inputs["labels"], inputs["input_ids"], placeholder_token_ids(self.model.config))
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        with self.accelerator.autocast():
            with torch.no_grad():
                teacher = self.teacher(pixel_values=pixels).last_hidden_state[:, 0]  # [B, d_teacher]
            vectors = [self.head_vector(head.layer, head.head, mask) for head in self.heads]
        alignment = self.criterion(torch.stack(vectors), teacher) / self.current_gradient_accumulation_steps
        return loss + WEIGHT * alignment

    def head_vector(self, layer: int, head: int, mask: Tensor) -> Tensor:
        """`[B, d_model]` by way of `[B, T, d_model]`."""
        projection, x = self.projections[layer], self.seen[layer]
        weight = dequantize_module_weight(projection.get_base_layer()) + projection.get_delta_weight("default")
        width = x.shape[-1] // self.num_heads[layer]
        columns = slice(head * width, (head + 1) * width)
        tokens = nn.functional.linear(x[..., columns], weight[:, columns]).float()  # [B, T, d_model]
        return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class Steps:
    """Optimizer steps of a trainer over a fixed list of collated batches.

    A call runs what the training loop of transformers runs: `get_batch_samples` and `training_step` of the trainer for
    each micro-batch (moving to the device, forward, loss, backward, all passes that the trainer adds), clipping, the
    callbacks around the optimizer step, the optimizer step itself, the scheduler, and zeroing gradients. Reading and
    collating data, logging and saving are not part of it.

    Args:
        trainer ([`~trl.SFTTrainer`]): Made by `make_trainer`. It is prepared for training here.
        setting ([`Setting`]): Its setting.
    """

    def __init__(self, trainer: SFTTrainer, setting: Setting) -> None:
        self.trainer = trainer
        rows: Any = trainer.train_dataset
        size, per_step = setting.batch_size, setting.accumulation
        starts = range(0, setting.steps * per_step * size, size)
        batches = [dict(trainer.data_collator([rows[i] for i in range(start, start + size)])) for start in starts]
        self.batches = [batches[i : i + per_step] for i in range(0, len(batches), per_step)]
        trainer.create_optimizer()
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.create_scheduler(num_training_steps=trainer.args.max_steps)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(trainer.callback_handler, name, getattr(trainer, name))
        self.hooks = ExitStack()
        if getattr(trainer, "alignment", None) is not None:
            self.hooks.enter_context(trainer.alignment.attached())

    def __call__(self) -> None:
        for batches in self.batches:
            self._step(batches)

    def _step(self, batches: list[dict[str, Any]]) -> None:
        trainer = self.trainer
        copies = iter([dict(batch) for batch in batches])
        samples, num_items = trainer.get_batch_samples(copies, len(batches), trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(samples)
        for place, inputs in enumerate(samples):
            last = place == len(samples) - 1
            trainer.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else trainer.accelerator.no_sync(model=self.model):
                trainer.training_step(self.model, inputs, num_items)
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        events = trainer.callback_handler
        events.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
        trainer.optimizer.step()
        events.on_optimizer_step(trainer.args, trainer.state, trainer.control)
        trainer.lr_scheduler.step()
        self.model.zero_grad()


class _Reached(Exception):
    """The deepest layer of interest is done."""


class PlainForward:
    """A forward pass of the model without gradients over the same batches, left after one layer's attention: the least
    that must be computed before the representations of all samples of a step are known.

    Args:
        steps ([`Steps`]): Whose model and batches these are.
        heads (`list[str]`): The pass ends after the deepest of them.
    """

    def __init__(self, steps: Steps, heads: list[str]) -> None:
        from hera_trainer import AttentionHead
        from hera_trainer.heads.registry import get_head_accessor, unwrap_model

        self.steps = steps
        self.layer = max(AttentionHead.parse(head).layer for head in heads)
        self.projection = get_head_accessor(steps.trainer.model).projection(self.layer)
        self.base_model = unwrap_model(steps.trainer.model).base_model

    def __call__(self) -> None:
        trainer = self.steps.trainer
        with self._stopping(), torch.no_grad(), trainer.accelerator.autocast():
            for batch in (batch for batches in self.steps.batches for batch in batches):
                inputs = {name: value.to(trainer.args.device) for name, value in batch.items() if name != "labels"}
                with suppress(_Reached):
                    self.base_model(**inputs, use_cache=False)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        def stop(*_: Any) -> None:
            raise _Reached

        handle = self.projection.register_forward_hook(stop)
        try:
            yield
        finally:
            handle.remove()


def peak_memory(kind: str, setting: Setting) -> dict[str, float]:
    """Peak memory in MB of two rounds of steps in this process, to be run in a fresh one.

    On a GPU it is what torch allocated at most. On the CPU it is the largest resident memory of the whole process
    during the steps, libraries and weights included; Linux forgets what loading took before. Nothing is subtracted;
    what was there before the first step is given too.
    """
    steps = Steps(make_trainer(kind, setting), setting)
    if setting.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
    else:
        before = _reset_peak()
    steps()
    steps()
    if setting.device == "cuda":
        return {"before": before, "peak": torch.cuda.max_memory_allocated() / 1e6}
    return {"before": before, "peak": _resident("VmHWM")}


def _resident(name: str) -> float:
    """Resident memory of this process in MB: `VmRSS` now, `VmHWM` at most."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
        return int(line.split()[1]) / 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def _reset_peak() -> float:
    """Makes `VmHWM` what is resident now, and returns it. `ru_maxrss` would tell the peak of loading the model, or that
    of the process which started this one."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")
    return _resident("VmRSS")


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(peak_memory(job["kind"], Setting(**job["setting"]))))
