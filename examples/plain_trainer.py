"""Head-wise representation alignment in a plain `transformers.Trainer`, no TRL.

    accelerate launch examples/plain_trainer.py \\
        --model Qwen/Qwen2.5-VL-3B-Instruct --dataset trl-lib/llava-instruct-mix --split "train[:2000]" \\
        --output_dir out --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --learning_rate 1e-4

Every option of `TrainingArguments` is one of the script. The data is that of `custom_loop.py`, and so is the collator.
The class `AlignedTrainer` is the part to copy: it gives the gradients that `HeRATrainer` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from custom_loop import collate
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hera_trainer import (
    Alignment,
    AttentionHead,
    HeadRanking,
    HeRALoss,
    ObjectiveCallback,
    add_teacher_features,
    rank_heads,
)
from hera_trainer.cli.rows import load_rows


class AlignedTrainer(Trainer):
    """Adds the alignment loss to the model's. Batches have `labels` and `teacher_features` `[B, d_teacher]`, NaN for no
    image."""

    def __init__(
        self,
        *args: Any,
        heads: Sequence[AttentionHead],
        criterion: HeRALoss,
        weight: float,
        target_pull: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        criterion.to(self.args.device)
        self.alignment = Alignment(
            self.model, criterion, heads, weight, target_pull, accelerator=self.accelerator, args=self.args
        )
        self.add_callback(ObjectiveCallback(self.alignment))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.alignment.reset()
        with self.alignment.attached():
            return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.alignment.begin_step(len(self.batches))
        return self.batches, num_items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.alignment.needs_first_pass:  # without gradient, up to the deepest aligned head
            model.train()
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            self.alignment.first_pass(
                self.batches,
                lambda batch: self.compute_loss(model, self._prepare_inputs(batch), False, num_items_in_batch),
                whole=model if sharded else None,
            )
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.alignment.end_micro_batch()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            inputs.pop("teacher_features", None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.alignment.observe(inputs)  # reads the heads of the next forward pass
        with self.alignment.same_randomness():  # the dropout of the first pass
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # `Trainer` divides by the number of micro-batches unless the loss is one over all tokens of the step already.
        scaled = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        loss = self.alignment.add_to(loss, divided_later=not scaled)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # all processes log it; what a callback logs, one of them may log alone
            logs = {**logs, **self.alignment.metrics()}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self.alignment.save(Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.alignment.load(checkpoint)


@dataclass
class ScriptArguments:
    model: str
    dataset: str  # name on the Hub, or folder of `save_to_disk`
    split: str = "train"
    teacher: str = "facebook/dinov2-large"
    num_neighbors: int = 10
    num_heads: int = 5
    ranking_samples: int = 1000
    weight: float = 0.01
    target_pull: float | None = None  # that the weight follows (docs/choosing.md)


def main(arguments: Sequence[str] | None = None) -> AlignedTrainer:
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses(arguments)
    args.remove_unused_columns = False  # the collator takes images and messages, which no model knows
    set_seed(args.seed)
    model: Any = AutoModelForImageTextToText.from_pretrained(script.model, dtype="auto").to(args.device)
    processor = AutoProcessor.from_pretrained(script.model)
    dataset = add_teacher_features(load_rows(script.dataset, split=script.split), script.teacher, distributed=True)

    # The heads are ranked before anything is trained, and stay the same.
    ranking_file = Path(args.output_dir, "head_ranking.json")
    if args.resume_from_checkpoint:
        ranking = HeadRanking.load(ranking_file)
    else:
        samples = {"k": script.num_neighbors, "num_samples": script.ranking_samples}
        ranking = rank_heads(model, processor, dataset, **samples, distributed=True)

    trainer = AlignedTrainer(
        get_peft_model(model, LoraConfig(target_modules="all-linear")),
        args,
        partial(collate, processor=processor),
        dataset.with_format(None),
        processing_class=processor,
        heads=ranking.select("worst", script.num_heads),
        criterion=HeRALoss(script.num_neighbors),
        weight=script.weight,
        target_pull=script.target_pull,
    )
    if args.should_save:
        ranking.save(ranking_file)
    trainer.train(args.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
