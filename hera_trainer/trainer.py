"""[`HeRATrainer`]: SFTTrainer plus head-wise representation alignment."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTConfig, SFTTrainer

from .callbacks import WatchingMixin
from .checkpoints import RANKING_FILE, CheckpointMixin
from .completion import find_checkpoint
from .config import HeRAConfig
from .contrast import AlignmentMeter, Contrast, EvalPools
from .data import placeholder_token_ids, pooling_mask, pop_teacher
from .evaluating import EvaluationMixin
from .heads.capture import HeadCapture
from .heads.checks import check_compiled, check_decoder, check_projections, check_trainable
from .heads.head import AttentionHead
from .heads.quantized import check_not_packed
from .heads.ranking import HeadRanking
from .heads.registry import get_head_accessor, unwrap_model
from .loss import HeRALoss
from .memory import SampleQueue
from .preparation import (
    cached_ranking,
    check_arguments,
    check_dataset,
    check_device_map,
    check_loss_scaling,
    check_pool,
    check_ranking,
    check_steps,
    checkpoint_ranking,
    choose_heads,
)
from .publishing import PublishingMixin
from .teacher import VisionTeacher
from .temperature import CompanionOptimizer, TemperatureCallback
from .vectors import TeacherVectorsMixin
from .window import StepWindow

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
        self._capture: HeadCapture | None = None
        self._eval_pools: EvalPools | None = None
        self._pending_batches: list[dict[str, Any]] | None = None
        self._window: StepWindow | None = None
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
        check_loss_scaling(args, self.accelerator)
        accessor = get_head_accessor(self.model)
        check_decoder(self.model, accessor)
        if args.aligned_heads is not None:
            heads = [AttentionHead.parse(head) for head in args.aligned_heads]
            HeadCapture(accessor, heads, self._model_type)  # says now if one does not exist
        elif args.num_aligned_heads > len(accessor.heads()):
            raise ValueError(
                f"`num_aligned_heads` ({args.num_aligned_heads}) exceeds the {len(accessor.heads())} attention heads "
                f"of this {self._model_type!r} model. Lower it."
            )
        ready = args.head_ranking_path if head_ranking is None else head_ranking
        self.head_ranking = HeadRanking.load(ready) if isinstance(ready, (str, os.PathLike)) else ready
        self._placeholder_ids = placeholder_token_ids(unwrap_model(self.model).config, self.processing_class)
        self.criterion = self.create_criterion().to(args.device)
        queue = SampleQueue(args.queue_size) if args.queue_size else None
        self._contrast = Contrast(self.criterion, self.accelerator, queue)
        self._meter = AlignmentMeter()
        self._temperature = TemperatureCallback(self.criterion, self.accelerator)
        self.add_callback(self._temperature)

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
        if self.criterion is None or self._capture is not None:
            return
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        # A run must draw the same random numbers whether teacher and ranking come from a cache or not.
        with torch.random.fork_rng(devices=devices):
            check_not_packed(self.model)
            if self.args.aligned_heads is None:
                self.head_ranking = checkpoint_ranking(resume_from_checkpoint, RANKING_FILE) or self.head_ranking
            self._attach_teacher_features(self.args.aligned_heads is None and self.head_ranking is None)
            self._choose_heads()

    def _choose_heads(self) -> None:
        args = self.args
        accessor = get_head_accessor(self.model)
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
        check_projections(self.model, accessor, sorted({head.layer for head in heads}))
        with self.accelerator.autocast():
            check_trainable(self.model, accessor, heads, self._image_batch)
        self._capture = HeadCapture(accessor, heads, self._model_type)
        self.aligned_heads = heads
        self._save_ranking(self.args.output_dir)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self.criterion is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        checkpoint = find_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        self.prepare_alignment(checkpoint)
        assert self._capture is not None
        with self._capture.attached():
            return super().train(checkpoint, *args, **kwargs)

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        self._best_step = None
        if self.criterion is not None:
            check_pool(self.args, batch_size)  # `auto_find_batch_size` comes back with smaller ones
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._window = None
        # With one micro-batch, the training forward itself collects all there is to compare.
        whole_step = self.criterion is not None and self.args.contrast_scope == "step" and len(batches) > 1
        self._pending_batches = batches if whole_step else None
        return batches, num_items

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._pending_batches is not None:  # not in `get_batch_samples`: resuming restores random states after it
            self._window = self._first_pass(model, self._pending_batches)
            self._pending_batches = None
        try:
            return super().training_step(model, *args, **kwargs)
        finally:
            if self._capture is not None:
                self._capture.stop()  # only now: activation checkpointing runs layers again during backward

    def _first_pass(self, model: nn.Module, batches: list[dict[str, Any]]) -> StepWindow:
        assert self._capture is not None
        model.train()
        # Sharded parameters are gathered by the forward of the whole model only.
        sharded = self._is_sharded
        runs = model if sharded else unwrap_model(self.model).base_model

        def forward(inputs: dict[str, Any]) -> None:
            # The way of the training forward: ZeRO-3 expects to see each parameter used the same way every time. No
            # position has a label, so no logits are computed.
            like_training: dict[str, Any] = {}
            if sharded:
                like_training = {"labels": torch.full_like(inputs["input_ids"], -100), "fused_lm_head": True}
            with self.accelerator.autocast():
                runs(**inputs, **like_training, use_cache=False)

        # Weights are cast once for all micro-batches where autocast can keep them; gathered ones must be let go.
        precision = nullcontext() if sharded else self.accelerator.autocast()

        prepared = []
        for batch in batches:
            inputs = self._prepare_inputs(dict(batch))
            teacher = pop_teacher(inputs)
            mask = pooling_mask(inputs.pop("labels"), inputs["input_ids"], self._placeholder_ids)
            assert teacher is not None
            prepared.append((inputs, teacher, mask))
        window = StepWindow(self._capture, self._contrast, prepared, forward, not sharded, self.args.device, precision)
        self._meter.add_pool(window.pool)
        return window

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        teacher = pop_teacher(inputs)
        if self._capture is None or teacher is None or not self._capture.is_attached:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mask = pooling_mask(inputs["labels"], inputs["input_ids"], self._placeholder_ids)
        window = self._window if self.model.training else None
        self._capture.start(mask, train=self.model.training)
        with nullcontext() if window is None else window.same_randomness():
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        heads = self._capture.vectors()
        if not self.model.training:
            self._capture.stop()
            if self._eval_pools is not None:
                self._eval_pools.add(heads, teacher, mask)
            return result
        loss, outputs = result if return_outputs else (result, None)
        loss = self._with_alignment(loss, heads, teacher.vectors, teacher.valid(mask), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _with_alignment(
        self, loss: torch.Tensor, heads: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor, num_items: Any
    ) -> torch.Tensor:
        """The language-model loss of a micro-batch plus its part of the alignment loss."""
        assert self.criterion is not None
        steps = self.current_gradient_accumulation_steps
        divided = self._trainer_divides_loss(num_items)
        self._meter.add_micro_batch(lm_loss=loss / steps if divided else loss, share=1.0 / steps)
        log_temperature = self.criterion.log_temperature
        if self._window is not None:  # its parts add up to the loss of the step
            part = self._window.carrier(heads, log_temperature)
        else:  # the mean over micro-batches
            pool = self._contrast(heads, teacher, valid)
            self._meter.add_pool(pool)
            part = pool.carrier(heads, log_temperature, start=0, share=1.0) / steps
        return loss + self.args.alignment_weight * (steps if divided else 1) * part

    def _trainer_divides_loss(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether `Trainer.training_step` divides the returned loss by the number of accumulation steps. Each
        micro-batch's alignment loss must be divided by it exactly once."""
        if self.loss_is_scaled_for_ga is not None:
            return not self.loss_is_scaled_for_ga
        scaled = (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func
        return not scaled

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        ours = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        learned = self.criterion is not None and self.criterion.log_temperature.requires_grad
        if learned and not self._temperature.is_optimized:
            assert self.criterion is not None
            plain = type(optimizer).add_param_group is torch.optim.Optimizer.add_param_group
            if ours and plain and not self._is_sharded:
                optimizer.add_param_group({"params": [self.criterion.log_temperature], "weight_decay": 0.0})
            else:
                self._temperature.companion = CompanionOptimizer(self.criterion, self.args)
            self._temperature.is_optimized = True
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.criterion is not None and self.model.training:
            sums = self.accelerator.reduce(self._meter.as_tensor(self.args.device), reduction="sum")
            metrics = self._meter.drain(sums, self.accelerator.num_processes)
            if metrics.get("alignment_not_finite") and not self._meter.has_warned:
                self._meter.has_warned = True  # `warning_once` would be silent in the next run of the same process
                logger.warning(
                    "The alignment loss or its gradient was NaN or infinite in some steps; it was left out of them "
                    "(`alignment_not_finite` counts them)."
                )
            if metrics:
                logs.update(metrics, temperature=self.criterion.temperature)
        super().log(logs, start_time)


def _as_hera_config(model: Any, args: TrainingArguments | None) -> HeRAConfig:
    """The arguments as a [`HeRAConfig`], as [`~trl.SFTTrainer`] makes an [`~trl.SFTConfig`] of others."""
    if isinstance(args, HeRAConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else model.config.name_or_path
        return HeRAConfig(f"{name.split('/')[-1] or 'model'}-HeRA")
    values = args.to_dict()
    tokens = {name: getattr(args, name) for name in values if name.endswith("_token")}  # to_dict hides them
    return HeRAConfig(**{**values, **tokens})
