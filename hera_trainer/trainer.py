"""[`HeRATrainer`]: SFTTrainer plus head-wise representation alignment."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import fields
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from .alignment import Alignment
from .callbacks import WatchingMixin
from .checkpoints import RANKING_FILE, CheckpointMixin
from .completion import find_checkpoint
from .config import HeRAConfig
from .contrast import EvalPools
from .data import TEACHER_COLUMN
from .evaluating import EvaluationMixin
from .heads.capture import HeadCapture
from .heads.checks import check_compiled, check_decoder, check_projections, check_trainable
from .heads.head import AttentionHead
from .heads.quantized import check_not_packed
from .heads.ranking import HeadRanking
from .heads.registry import get_head_accessor, unwrap_model
from .loss import HeRALoss
from .preparation import (
    cached_ranking,
    check_arguments,
    check_dataset,
    check_device_map,
    check_loss_scaling,
    check_pool,
    check_ranking,
    check_steps,
    check_tokens_stay,
    checkpoint_ranking,
    choose_heads,
)
from .publishing import PublishingMixin
from .randomness import same_randomness
from .teacher import VisionTeacher
from .temperature import scheduled_rate
from .vectors import TeacherVectorsMixin

logger = get_logger(__name__)


class HeRATrainer(PublishingMixin, CheckpointMixin, EvaluationMixin, TeacherVectorsMixin, WatchingMixin, SFTTrainer):
    """
    Trainer for supervised fine-tuning of vision-language models with Head-Wise Representation Alignment (HeRA).

    Before training, the images' vectors are computed once with a frozen vision encoder, the attention heads of the
    language model are ranked by how well their neighbourhoods agree with it, and the least aligned are chosen. While
    training, a contrastive loss beside the language-model loss pulls the representations of these heads towards the
    teacher's neighbourhoods. The result is an ordinary model or PEFT adapter.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in [`~trl.SFTTrainer`].
        args ([`HeRAConfig`], *optional*):
            Configuration. An [`~trl.SFTConfig`] or [`~transformers.TrainingArguments`] is completed with the defaults
            of [`HeRAConfig`].
        data_collator (`Callable`, *optional*):
            As in [`~trl.SFTTrainer`]. It is wrapped, so that teacher vectors ride beside what it returns.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Any vision data set that [`~trl.SFTTrainer`] takes. A column `teacher_features` (one vector a row), if it
            has one, is used instead of a teacher. The images of a stream are encoded as they come: the teacher stays in
            memory, and heads are ranked on the first samples. `eval_dataset` may be a stream, too.
        teacher ([`VisionTeacher`] or `str`, *optional*):
            Teacher, instead of `args.teacher_model_name_or_path`.
        head_ranking ([`HeadRanking`] or path, *optional*):
            Ready ranking. No ranking runs.
        **kwargs:
            All other arguments of [`~trl.SFTTrainer`].

    Attributes:
        aligned_heads (`list[AttentionHead]` or `None`): The chosen heads, once they are known.
        head_ranking ([`HeadRanking`] or `None`): The ranking they were chosen from.
        criterion ([`HeRALoss`] or `None`): The alignment loss, `None` with `alignment_weight=0`.
        alignment ([`~alignment.Alignment`] or `None`): What reads heads and compares samples; `None` likewise.

    Example:

    ```python
    >>> from hera_trainer import HeRAConfig, HeRATrainer
    >>> trainer = HeRATrainer(
    ...     model="Qwen/Qwen2.5-VL-3B-Instruct",
    ...     args=HeRAConfig(output_dir="out", per_device_train_batch_size=16),
    ...     train_dataset=dataset,
    ...     peft_config=LoraConfig(),
    ... )
    >>> trainer.train()
    ```
    """

    args: HeRAConfig
    model: Any
    optimizer: Any

    _tag_names = ["trl", "sft", "hera"]
    _name = "HeRA"
    _paper = {
        "title": "Mind the Heads: Topological Representation Alignment for Multimodal LLMs",
        "id": "2606.23885",
        # docstyle-ignore
        "citation": (
            "@article{caffagni2026mind,\n"
            "    title        = {{Mind the Heads: Topological Representation Alignment for Multimodal LLMs}},\n"
            "    author       = {Davide Caffagni and others},\n"
            "    year         = 2026,\n"
            "    journal      = {arXiv preprint arXiv:2606.23885}\n"
            "}"
        ),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: HeRAConfig | SFTConfig | TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        *sft_args: Any,
        teacher: VisionTeacher | str | None = None,
        head_ranking: HeadRanking | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        args = _as_hera_config(model, args)
        self.aligned_heads: list[AttentionHead] | None = None
        self.head_ranking: HeadRanking | None = None
        self.criterion: HeRALoss | None = None
        self._teacher: VisionTeacher | str = args.teacher_model_name_or_path if teacher is None else teacher
        self.alignment: Alignment | None = None
        self._eval_pools: EvalPools | None = None
        self._batches: list[dict[str, Any]] = []
        if args.alignment_weight > 0:  # what can be known without the model is said before it is loaded
            check_arguments(args)
            check_dataset(train_dataset, "train_dataset")
            check_steps(train_dataset, args)
        super().__init__(model, args, data_collator, train_dataset, *sft_args, **kwargs)
        if args.alignment_weight > 0:
            self._init_alignment(head_ranking)
        self._init_watching()

    def _init_alignment(self, head_ranking: HeadRanking | str | os.PathLike | None) -> None:
        """Everything about alignment that needs the model but neither teacher nor ranking."""
        args = self.args
        check_device_map(self.model)
        check_compiled(self.model)
        check_tokens_stay(self.model, self.accelerator)
        check_loss_scaling(args, self.accelerator)
        check_decoder(self.model, get_head_accessor(self.model))
        self.criterion = self.create_criterion().to(args.device)
        self.alignment = Alignment(
            self.model,
            self.criterion,
            weight=args.alignment_weight,
            scope=args.contrast_scope,
            queue_size=args.queue_size,
            accelerator=self.accelerator,
            processing_class=self.processing_class,
            args=args,
        )
        accessor = self.alignment.accessor
        if args.aligned_heads is not None:
            named = [AttentionHead.parse(head) for head in args.aligned_heads]
            HeadCapture(accessor, named, self._model_type)  # says now if one does not exist
        elif args.num_aligned_heads > len(accessor.heads()):
            raise ValueError(
                f"`num_aligned_heads` ({args.num_aligned_heads}) exceeds the {len(accessor.heads())} attention heads "
                f"of this {self._model_type!r} model. Lower it."
            )
        ready = args.head_ranking_path if head_ranking is None else head_ranking
        self.head_ranking = HeadRanking.load(ready) if isinstance(ready, (str, os.PathLike)) else ready
        self.add_callback(_TemperatureCallback(self.alignment))

    def create_criterion(self) -> HeRALoss:
        """Makes the alignment objective. Override it to train with another of the same interface.

        Returns:
            [`HeRALoss`]: Any module derived from it; its `forward` may compare samples otherwise.
        """
        args = self.args
        return HeRALoss(args.num_neighbors, args.temperature, args.learn_temperature, args.normalize)

    @property
    def _model_type(self) -> str:
        return unwrap_model(self.model).config.model_type

    # Preparation: teacher vectors, then heads

    def prepare_alignment(self, resume_from_checkpoint: str | None = None) -> None:
        """Computes (or loads) the teacher's vectors and the head ranking, and chooses the heads to align.

        `train`, `evaluate` and `predict` call it when it has not been called. Call it yourself to look at
        `aligned_heads` and `head_ranking` before training.

        Args:
            resume_from_checkpoint (`str`, *optional*):
                Checkpoint whose ranking is taken instead of a new one.

        Raises:
            `ValueError`: If the data, the teacher or the heads cannot be used; the message names the cure.
        """
        if self.alignment is None:
            return
        # A run must draw the same random numbers whether teacher and ranking come from a cache or not.
        with same_randomness(self.args.device):
            check_not_packed(self.model)
            if self.args.aligned_heads is None:
                # A checkpoint goes on with its own heads, also where others were chosen before it was named.
                self.head_ranking = checkpoint_ranking(resume_from_checkpoint, RANKING_FILE) or self.head_ranking
            self._prepare_data(ranks_heads=self.args.aligned_heads is None and self.head_ranking is None)
            self._choose_heads()

    def _choose_heads(self) -> None:
        assert self.alignment is not None
        args, accessor = self.args, self.alignment.accessor
        if args.aligned_heads is not None:
            heads = [AttentionHead.parse(head) for head in args.aligned_heads]
        else:
            if self.head_ranking is None:
                samples = self._ranking_samples()
                with self.accelerator.autocast():
                    self.head_ranking = cached_ranking(
                        self.model,
                        self.processing_class,
                        samples,
                        args,
                        accessor,
                        precision=self.accelerator.mixed_precision,
                        teacher_name=self.teacher_name,
                    )
            check_ranking(self.head_ranking, accessor, self._model_type)
            heads = choose_heads(args, self.head_ranking)
        if heads == self.aligned_heads:
            return
        check_projections(self.model, accessor, sorted({head.layer for head in heads}))
        with self.accelerator.autocast():
            check_trainable(self.model, accessor, heads, self._image_batch)
        self.alignment.align(heads)
        self.aligned_heads = heads
        self._save_ranking(self.args.output_dir)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self.alignment is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        checkpoint = find_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        self.prepare_alignment(checkpoint)
        with self.alignment.attached():
            return super().train(checkpoint, *args, **kwargs)

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        self._best_step = None
        if self.alignment is not None:
            check_pool(self.args, batch_size)  # `auto_find_batch_size` comes back with smaller ones
            self.alignment.reset()
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self.alignment is not None:
            self._batches = batches
            self.alignment.begin_step(len(batches))
        return batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if self.alignment is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self.alignment.needs_first_pass:  # not in `get_batch_samples`: resuming restores random states after it
            self._first_pass(model, num_items_in_batch)
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.alignment.end_micro_batch()

    def _first_pass(self, model: nn.Module, num_items_in_batch: torch.Tensor | int | None) -> None:
        """Takes all micro-batches of the optimizer step the way of `training_step`, as far as the deepest aligned head.

        Whatever stands in that way (a subclass, an optimizer's weights, an adapter's forward) must act in both passes.
        """
        assert self.alignment is not None
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):  # schedule-free ones swap weights
            self.optimizer.train()

        def forward(batch: dict[str, Any]) -> None:
            inputs = self._prepare_inputs(dict(batch))
            # Copies: what `compute_loss` does to its inputs must not meet the training pass.
            inputs = {name: value.clone() if torch.is_tensor(value) else value for name, value in inputs.items()}
            with self.compute_loss_context_manager():
                self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

        # Sharded parameters are gathered, and let go, by the forward of the whole model only. Otherwise, weights are
        # cast once for all micro-batches.
        sharded = self._is_sharded
        with nullcontext() if sharded else self.accelerator.autocast():
            self.alignment.first_pass(self._batches, forward, whole=model if sharded else None)

    def compute_loss_context_manager(self) -> ExitStack:
        stack = super().compute_loss_context_manager()
        if self.alignment is not None:
            stack.enter_context(self.alignment.same_randomness())
        return stack

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        alignment, training = self.alignment, self.model.training
        if alignment is None or not alignment.is_attached or not alignment.observe(inputs, train=training):
            inputs.pop(TEACHER_COLUMN, None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not training:
            if self._eval_pools is not None:
                self._eval_pools.add(*alignment.take())
            alignment.end_micro_batch()
            return result
        loss, outputs = result if return_outputs else (result, None)
        steps = self.current_gradient_accumulation_steps
        divided = self._trainer_divides_loss(num_items_in_batch)
        alignment.meter.add_micro_batch(lm_loss=loss / steps if divided else loss, share=1.0 / steps)
        loss = loss + (steps if divided else 1) * alignment.term()
        return (loss, outputs) if return_outputs else loss

    def _trainer_divides_loss(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether `Trainer.training_step` divides the returned loss by the number of accumulation steps. Each
        micro-batch's alignment loss must be divided by it exactly once."""
        if self.loss_is_scaled_for_ga is not None:
            return not self.loss_is_scaled_for_ga
        scaled = (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func
        return not scaled

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.alignment is not None and self.model.training:
            metrics = self.alignment.metrics()
            if metrics.get("alignment_not_finite") and not self.alignment.meter.has_warned:
                self.alignment.meter.has_warned = True  # not `warning_once`, which is silent in the process's next run
                logger.warning(
                    "The alignment loss or its gradient was NaN or infinite in some steps; it was left out of them "
                    "(`alignment_not_finite` counts them)."
                )
            logs.update(metrics)
        super().log(logs, start_time)


class _TemperatureCallback(TrainerCallback):
    """Trains the temperature beside the model, at the schedule's rate of `learning_rate`."""

    def __init__(self, alignment: Alignment) -> None:
        self.alignment = alignment

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.alignment.temperature.before_step()

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.alignment.temperature.step(scheduled_rate(args.learning_rate, kwargs["optimizer"]))


def _as_hera_config(model: Any, args: TrainingArguments | None) -> HeRAConfig:
    """The arguments as a [`HeRAConfig`], as [`~trl.SFTTrainer`] makes an [`~trl.SFTConfig`] of others. What a class of
    the user's own has besides is kept as plain attributes."""
    if isinstance(args, HeRAConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else model.config.name_or_path
        return HeRAConfig(f"{name.split('/')[-1] or 'model'}-HeRA")
    values = {name: getattr(args, name) for name in args.to_dict() if hasattr(args, name)}  # to_dict hides tokens
    known = {field.name for field in fields(HeRAConfig) if field.init}
    config = HeRAConfig(**{name: value for name, value in values.items() if name in known})
    for name in values.keys() - {field.name for field in fields(HeRAConfig)}:
        setattr(config, name, values[name])
    return config
