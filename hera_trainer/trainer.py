"""[`HeRATrainer`]: SFTTrainer plus head-wise representation alignment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from copy import copy
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, get_last_checkpoint, has_length
from transformers.utils import CONFIG_NAME, PushInProgress
from trl import SFTConfig, SFTTrainer

from .alignment.alignment import OBJECTIVE_FOLDER, STATE_FILE, Alignment
from .alignment.callback import ObjectiveCallback
from .alignment.checks import (
    check_arguments,
    check_best_metric,
    check_hooks_of_adapters,
    check_loss_scaling,
    check_not_monitored,
    check_rows_train,
    check_tokens_stay,
    check_unchanged,
    check_whole_layers,
)
from .alignment.eval_pools import EvalPools, evaluated
from .alignment.pull import advice as weak_pull_advice
from .common.randomness import same_randomness
from .config import HeRAConfig
from .data.checks import check_dataset, check_formatting, check_steps
from .data.collator import RowCollator
from .data.neighbor_batches import NeighborGroupSampler, check_neighbor_groups, neighbor_sampler
from .data.pool import check_pool
from .data.stream_steps import StreamSteps
from .data.teacher_vectors import TeacherVectors, signature_columns, without_vectors
from .heads.accessor import HeadAccessor
from .heads.capture import HeadCapture
from .heads.checks import (
    check_attention_kernel,
    check_compiled,
    check_decoder,
    check_device_map,
    check_projections,
    check_ranking,
    check_same_modules,
    check_trainable,
    other_ranking_advice,
    resumed_heads_advice,
)
from .heads.head import AlignedUnit, parse_units
from .heads.pooling import placeholder_token_ids
from .heads.quantized import check_not_packed, frozen_packing
from .heads.ranking import HeadRanking
from .heads.ranking_cache import cached_ranking
from .heads.registry import get_head_accessor, unwrap_model
from .hub import push
from .hub.card import write_model_card
from .hub.card_file import CardKeeper, licensed, recorded_files
from .objectives.objective import AlignmentObjective
from .objectives.registry import get_objective
from .objectives.similarity import comparison
from .runs.checkpoints import (
    best_checkpoint,
    checkpoint_ranking,
    clear_half,
    find_checkpoint,
    is_own,
    make_room,
    mark_complete,
    place_in_stream,
    put_aside,
    rotate,
    saved_step,
)
from .runs.control import mark_control, other_control_advice, read_control
from .runs.monitor import AlignmentMonitorCallback, prepare_monitors
from .runs.record import go_on_with_measurements, leave_out, other_heads_advice, public_ranking
from .runs.record_callback import RunRecordCallback
from .runs.weights import kept_dtypes, load_weights
from .runs.written_files import RANKING_FILE, RECORDS, written_by
from .teacher.column import TEACHER_COLUMN
from .teacher.encoder import VisionTeacher

logger = get_logger(__name__)


class HeRATrainer(SFTTrainer):
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
            Ready ranking. No ranking runs. Without alignment, the monitor takes its groups of heads from it.
        **kwargs:
            All other arguments of [`~trl.SFTTrainer`].

    Attributes:
        aligned_heads (`list[AttentionHead]`, `list[DecoderLayer]` or `None`):
            The aligned heads or layers, once they are known.
        head_ranking ([`HeadRanking`] or `None`): The ranking they were chosen from.
        criterion ([`AlignmentObjective`] or `None`): The alignment objective, `None` with `alignment_weight=0`.
        alignment ([`Alignment`] or `None`): What reads heads and compares samples; `None` likewise.
        teacher_vectors ([`~data.teacher_vectors.TeacherVectors`]): What attaches teacher vectors to the data.
        best_step (`int` or `None`): Step of the weights, where training ended with loading the best ones.

    Example:

    ```python
    >>> from hera_trainer import HeRAConfig, HeRATrainer
    >>> trainer = HeRATrainer(
    ...     model="Qwen/Qwen2.5-VL-3B-Instruct",
    ...     args=HeRAConfig(output_dir="out", per_device_train_batch_size=16),
    ...     train_dataset=dataset,
    ...     peft_config=LoraConfig(target_modules="all-linear"),
    ... )
    >>> trainer.train()
    ```
    """

    args: HeRAConfig
    model: Any
    optimizer: Any
    push_in_progress: Any
    _signature_columns: Any

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
        self.aligned_heads: list[AlignedUnit] | None = None
        self.head_ranking: HeadRanking | None = None
        self._ready_ranking = args.head_ranking_path if head_ranking is None else head_ranking
        self.criterion: AlignmentObjective | None = None
        self.alignment: Alignment | None = None
        self.best_step: int | None = None
        self._has_advised = False
        self._batches: list[dict[str, Any]] = []
        self._stream_steps: StreamSteps | None = None
        self._neighbor_sampler: NeighborGroupSampler | None = None
        self._eval_pools: EvalPools | None = None
        self._evaluated: dict[str, Any] = {}
        self._settings = args.own_settings()
        self._rotates_itself = False
        self._checkpoint_to_push: Path | None = None
        if args.alignment_weight > 0:  # what can be known without the model is said before it is loaded
            check_arguments(args)
            push.check_publishable(args.teacher_control, args.publish_control or not args.push_to_hub)
            check_dataset(train_dataset, "train_dataset")
            check_steps(train_dataset, args)
            check_neighbor_groups(args, train_dataset)
            check_formatting(kwargs.get("formatting_func"), train_dataset)
        else:  # nobody should take a baseline for an aligned model
            for name in ("_tag_names", "_name", "_paper"):
                if getattr(self, name) is getattr(HeRATrainer, name):  # and not a subclass's own
                    setattr(self, name, getattr(SFTTrainer, name))
        super().__init__(model, args, data_collator, train_dataset, *sft_args, **kwargs)
        if isinstance(model, str):
            _name_revision(self.model, cast(dict[str, Any], args.model_init_kwargs or {}).get("revision"))
        self.teacher_vectors = TeacherVectors(
            args,
            args.teacher_model_name_or_path if teacher is None else teacher,
            self.accelerator,
            self.processing_class,
            placeholder_token_ids(unwrap_model(self.model).config, self.processing_class),
        )
        self.teacher_vectors.data_collator = self.data_collator
        if args.alignment_weight > 0:
            self._init_alignment()
        else:
            self.data_collator = without_vectors(args, self.data_collator)
        self._init_watching()

    def _init_alignment(self) -> None:
        """Everything about alignment that needs the model but neither teacher nor ranking."""
        args = self.args
        cure = ", train with several processes, or set `alignment_weight=0`"
        check_device_map(self.model, "head alignment", cure)
        check_whole_layers(self.model, self.accelerator)
        check_compiled(self.model)
        check_tokens_stay(self.model, self.accelerator)
        check_hooks_of_adapters(self.model, args)
        check_decoder(self.model, get_head_accessor(self.model))
        self.criterion = self.create_criterion().to(args.device)
        check_loss_scaling(self.criterion, args, self.accelerator)
        self.alignment = Alignment(
            self.model,
            self.criterion,
            weight=args.alignment_weight,
            target_pull=args.target_pull,
            scope=args.contrast_scope,
            queue_size=args.queue_size,
            accelerator=self.accelerator,
            processing_class=self.processing_class,
            args=args,
            seed=args.seed,
            image_feature_gib=args.image_feature_gib,
        )
        accessor = self.alignment.accessor
        units = accessor.units(args.alignment_granularity)
        if args.aligned_heads is not None:
            named = parse_units(args.aligned_heads, args.alignment_granularity)
            HeadCapture(accessor, named, self._model_type)  # says now if one does not exist
        elif args.num_aligned_heads > len(units):
            raise ValueError(
                f"`num_aligned_heads` ({args.num_aligned_heads}) exceeds the {len(units)} {units[0].kind}s of this "
                f"{self._model_type!r} model. Lower it."
            )
        self._load_ranking()
        self.add_callback(ObjectiveCallback(self.alignment, args.objective_learning_rate))

    def _load_ranking(self) -> None:
        if isinstance(self._ready_ranking, (str, os.PathLike)):
            self._ready_ranking = HeadRanking.load(self._ready_ranking)
        if self.head_ranking is None:
            self.head_ranking = self._ready_ranking

    def _init_watching(self) -> None:
        args = self.args
        if args.monitor_steps is not None:
            self.add_callback(AlignmentMonitorCallback(every=args.monitor_steps, num_samples=args.monitor_num_samples))
        for monitor in self._monitors:  # before the teacher has worked for hours
            self._load_ranking()
            monitor.check(self)
        self._record = RunRecordCallback()
        if args.alignment_weight > 0 or self._monitors:
            self.add_callback(self._record)

    def create_criterion(self) -> AlignmentObjective:
        """Makes the alignment objective that `alignment_objective` names. Override it to train with one that no name
        can describe.

        Returns:
            [`AlignmentObjective`].
        """
        return get_objective(self.args.alignment_objective).from_config(self.args)

    @property
    def teacher_name(self) -> str:
        """Name of the teacher; empty where the training data brought their vectors, of which no more is known."""
        return self.teacher_vectors.name

    @property
    def micro_batch_size(self) -> int:
        """Samples that a device takes at a time: with `auto_find_batch_size`, not what was asked for."""
        return self._train_batch_size // max(1, self.args.n_gpu)

    @property
    def _groups_neighbors(self) -> bool:
        return self.alignment is not None and self.args.neighbor_group_size > 0

    @property
    def is_sharded(self) -> bool:
        """Whether an engine (FSDP, DeepSpeed) holds the parameters and the optimizer."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def _control(self) -> str:
        return "none" if self.alignment is None else self.args.teacher_control

    @property
    def _model_type(self) -> str:
        return unwrap_model(self.model).config.model_type

    @property
    def _monitors(self) -> list[AlignmentMonitorCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, AlignmentMonitorCallback)]

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
        self._place_model()
        # A run must draw the same random numbers whether teacher and ranking come from a cache or not.
        with same_randomness(self.args.device):
            check_not_packed(self.model)
            if self.args.aligned_heads is None:
                # A checkpoint goes on with its own heads, also where others were chosen before it was named.
                self.head_ranking = checkpoint_ranking(resume_from_checkpoint, RANKING_FILE) or self.head_ranking
            self._prepare_data(ranks_heads=self.args.aligned_heads is None and self.head_ranking is None)
            self._choose_heads()

    def _place_model(self) -> None:
        """Moves the model to where it will be trained, if `Trainer` leaves that for later and it is whole there."""
        full_eval = self.args.fp16_full_eval or self.args.bf16_full_eval
        zero = self.accelerator.state.deepspeed_plugin
        replicated = zero is not None and zero.zero_stage < 3
        if getattr(self.model, "quantization_method", None) is not None:  # on its device since it was loaded
            return
        if (full_eval and not self.is_sharded and not self.is_model_parallel) or replicated:
            self._move_model_to_device(self.model, self.args.device)
        check_attention_kernel(self.model, self.args.device)

    def _prepare_data(self, ranks_heads: bool = False) -> None:
        """Any of the data sets and the collator may have been replaced since the last time."""
        assert self.alignment is not None
        self._set_signature_columns_if_needed()
        columns = self._signature_columns if self.args.remove_unused_columns else None
        data = self.train_dataset, self.eval_dataset, self.data_collator
        prepared = self.teacher_vectors.prepare(*data, columns, ranks_heads)
        self.train_dataset, self.eval_dataset, self.data_collator = prepared
        self.alignment.teacher_width = self.teacher_vectors.width or 0
        self.alignment.teacher_identity = self.teacher_vectors.identity

    def _choose_heads(self) -> None:
        assert self.alignment is not None
        args, accessor = self.args, self.alignment.accessor
        granularity = args.alignment_granularity
        if args.aligned_heads is not None:
            heads = parse_units(args.aligned_heads, granularity)
        else:
            self.head_ranking = self.head_ranking or self._rank_heads()
            check_ranking(self.head_ranking, accessor, self._model_type)
            heads = self.head_ranking.select(args.head_selection, args.num_aligned_heads, args.seed, granularity)
        check_same_modules(self.model, accessor, heads)
        if heads == self.aligned_heads:
            return
        with self.accelerator.autocast():  # some kernels take nothing but 16 bit
            if granularity == "head":  # layers are read as they are
                check_projections(self.model, accessor, sorted({head.layer for head in heads}))
        self.alignment.align(heads)
        check_loss_scaling(self.alignment.criterion, self.args, self.accelerator)
        self.aligned_heads = heads
        if isinstance(ready := self._ready_ranking, HeadRanking) and args.aligned_heads is None:
            if self.head_ranking is ready:
                advice = other_ranking_advice(ready, teacher=self.teacher_name, **self._scoring)
            else:
                check_ranking(ready, accessor, self._model_type)
                chosen = ready.select(args.head_selection, args.num_aligned_heads, args.seed, granularity)
                advice = resumed_heads_advice(heads, chosen)
            if advice is not None:
                logger.warning(advice)

    @property
    def _scoring(self) -> dict[str, Any]:
        """What the scores of a ranking are measured with."""
        args = self.args
        return {
            "k": args.num_neighbors,
            "clip_quantile": args.ranking_clip_quantile,
            **comparison(args.metric_similarity),
        }

    def _rank_heads(self) -> HeadRanking:
        assert self.alignment is not None
        args, samples = self.args, self.teacher_vectors.ranking_samples()
        with self.accelerator.autocast():
            return cached_ranking(
                self.model,
                self.processing_class,
                samples,
                self.alignment.accessor,
                num_samples=args.ranking_num_samples,
                batch_size=args.per_device_eval_batch_size,
                seed=args.seed,
                precision=self.accelerator.mixed_precision,
                teacher_name=self.teacher_name,
                progress=not args.disable_tqdm,
                **self._scoring,
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.alignment is not None or isinstance(self.data_collator, RowCollator):
            columns: list[str] = self._signature_columns or []
            own = signature_columns(self.args, self.data_collator)
            self._signature_columns = [*columns, *(name for name in own if name not in columns)]

    def get_train_dataloader(self) -> Any:
        self._neighbor_sampler = None
        self._prepare_replaced_data()
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self._groups_neighbors:
            return super()._get_train_sampler(train_dataset)
        rows = self.teacher_vectors.right_rows  # also in a control run, which differs in nothing but the loss
        self._neighbor_sampler = neighbor_sampler(self.args, rows, self.micro_batch_size)
        return self._neighbor_sampler

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        own = self.eval_dataset
        self._prepare_replaced_data()
        if eval_dataset is own or eval_dataset is self.eval_dataset:  # as `evaluate` passes it on
            eval_dataset = None
        asked = self.teacher_vectors.prepare_eval(eval_dataset)
        named, keeps = asked is None or isinstance(asked, str), self.args.dataloader_persistent_workers
        if named:
            self._forget_replaced_loader(asked)
        try:
            # `Trainer` would keep one loader for all data sets without a name, and evaluate on the first of them.
            self.args.dataloader_persistent_workers = keeps and named
            return super().get_eval_dataloader(asked)
        finally:
            self.args.dataloader_persistent_workers = keeps

    def _forget_replaced_loader(self, name: str | None) -> None:
        """Of a data set that was put in the place of another one, `Trainer` must not keep the loader."""
        key, found = name or "eval", cast(Any, self.eval_dataset)
        rows = found if name is None else found[name]
        if self._evaluated.get(key) is not rows:
            getattr(self, "_eval_dataloaders", {}).pop(key, None)
            self._evaluated[key] = rows

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        self._prepare_replaced_data()
        if self.teacher_vectors.can_attach(test_dataset):
            test_dataset = self.teacher_vectors.attach(test_dataset, "test_dataset", self.teacher_vectors.width)
        return super().get_test_dataloader(test_dataset)

    def _prepare_replaced_data(self) -> None:
        if self.teacher_vectors.width is not None or self._groups_neighbors:  # otherwise, nothing was prepared yet
            with same_randomness(self.args.device):
                self._prepare_data()

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        output_dir = str(self.args.output_dir)
        check_unchanged(self._settings, self.args)
        check_not_monitored(self.args)
        if self.alignment is None:
            last = get_last_checkpoint(output_dir) if resume_from_checkpoint is True else resume_from_checkpoint or None
            self._begin_watching(last)
            return super().train(resume_from_checkpoint, *args, **kwargs)
        checkpoint = find_checkpoint(resume_from_checkpoint, output_dir)
        if checkpoint is not None and Path(checkpoint, STATE_FILE).is_file():
            if (then := read_control(checkpoint)) != self._control:
                logger.warning(other_control_advice(then, self._control))
        self.prepare_alignment(checkpoint)
        self._check_trained(self.alignment.accessor)
        check_best_metric(self.args, self.eval_dataset)
        self._begin_watching(checkpoint)
        with self.alignment.attached():
            try:
                return super().train(checkpoint, *args, **kwargs)
            finally:
                self._batches = []  # the last step's, with all its pixels

    def _check_trained(self, accessor: HeadAccessor) -> None:
        with self.accelerator.autocast(), same_randomness(self.args.device):
            check_trainable(self.model, accessor, self.aligned_heads or (), self.teacher_vectors.image_batch)
        if self.accelerator.num_processes > 1:
            check_rows_train(self.model, accessor, self.teacher_vectors.rows_without_image)

    def _begin_watching(self, checkpoint: str | None) -> None:
        if self._monitors:
            self._load_ranking()
        prepare_monitors(self, self._monitors)
        teacher = None if self.alignment is None else self.teacher_name  # without alignment, none has taught
        self._record.begin(self.train_dataset, self.aligned_heads or (), teacher, checkpoint)
        output_dir, goes_on = str(self.args.output_dir), is_own(checkpoint, str(self.args.output_dir))
        keeps_record = self._record in self.callback_handler.callbacks
        if self.args.should_save and not goes_on:
            kept = (checkpoint, best_checkpoint(checkpoint))
            used = [*_places_of(self.model), *(path for path in kept if path is not None)]
            put_aside(output_dir, used, RECORDS if keeps_record else recorded_files(output_dir))
        elif self.args.should_save and checkpoint is not None:
            clear_half(Path(checkpoint))
        if self.is_world_process_zero():
            if not keeps_record:
                leave_out(output_dir, recorded_files(output_dir))
            go_on_with_measurements(output_dir, checkpoint, saved_step(checkpoint))
            # What the objective has learned is saved with the result: until then, there is none of this run.
            others = [] if goes_on else [OBJECTIVE_FOLDER]
            leave_out(output_dir, [*others, *([RANKING_FILE] if self.head_ranking is None else [])])
        self._save_ranking(self.args.output_dir)

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        self.best_step, self._has_advised = None, False
        if self.alignment is not None:
            self._stream_steps = None if has_length(self.train_dataset) else StreamSteps(self.accelerator)
            check_pool(self.args, batch_size)  # `auto_find_batch_size` comes back with smaller ones
            self.alignment.reset()
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # `Trainer` looks whether a run is over only when it has done a step more: resuming a finished one would.
        if self.alignment is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._groups_neighbors:
            if self._neighbor_sampler is None:
                raise ValueError(
                    "`neighbor_group_size` is set, but the training data has an order of its own: it is a stream, or "
                    "`get_train_dataloader` or `_get_train_sampler` is overridden. Set `neighbor_group_size=0`."
                )
            # accelerate does not pass it on where one of several processes skips batches, to resume.
            self._neighbor_sampler.set_epoch(kwargs["epoch"])
        if self._stream_steps is not None:
            self._stream_steps.begin_epoch()
        super()._run_epoch(*args, **kwargs)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, *args: Any
    ) -> tuple[int, int]:
        begin = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, *args)
        best = best_checkpoint(resume_from_checkpoint)
        if best is not None and best != self.state.best_model_checkpoint:  # of which `Trainer` has said it was gone
            logger.warning(f"The best checkpoint is that in {best!r}.")
        self.state.best_model_checkpoint = best
        is_one_epoch = steps_per_epoch == max_steps  # so `Trainer` takes a stream, if its loader tells no length
        if self.alignment is None or has_length(self.train_dataset) or not is_one_epoch or self.args.ignore_data_skip:
            return begin
        return place_in_stream(resume_from_checkpoint, self.args.gradient_accumulation_steps) or begin

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, *args: Any, **kwargs: Any
    ) -> tuple[list, Any]:
        if self._stream_steps is not None:
            is_first = self.state.global_step == 0
            epoch_iterator = iter(self._stream_steps.take(epoch_iterator, num_batches, is_first))
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
        self.teacher_vectors.fill(batches)  # here, so that those batches that resuming skips are never encoded
        if self.alignment is not None:
            self._batches = batches
            self.alignment.begin_step(len(batches))
        return batches, num_items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        vectors = self.teacher_vectors.take(inputs)
        inputs = super()._prepare_inputs(inputs)
        return inputs if vectors is None else {**inputs, TEACHER_COLUMN: vectors}

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
        with nullcontext() if self.is_sharded else self.accelerator.autocast():
            self.alignment.first_pass(self._batches, forward, whole=model if self.is_sharded else None)

    def compute_loss_context_manager(self) -> ExitStack:
        stack = super().compute_loss_context_manager()
        # Evaluation has no first pass; a training step that broke off may have left its window open.
        if self.alignment is not None and self.model.training:
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
        if alignment is not None and training and not alignment.is_attached and torch.is_grad_enabled():
            raise RuntimeError(
                "Heads are read inside of `train` alone, so that this step would train without alignment. Call "
                "`prepare_alignment`, and then this inside of `with trainer.alignment.attached():`."
            )
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
        loss = alignment.add_to(loss, divided_later=self._trainer_divides_loss(num_items_in_batch))
        return (loss, outputs) if return_outputs else loss

    def _trainer_divides_loss(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether `Trainer.training_step` divides the returned loss by the number of accumulation steps. Each
        micro-batch's alignment loss must be divided by it exactly once."""
        if self.loss_is_scaled_for_ga is not None:
            return not self.loss_is_scaled_for_ga
        scaled = (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func
        return not scaled

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # All processes log these two, of training and at its end. What a callback logs, one of them may log alone.
        if self.alignment is not None and not {"loss", "total_flos"}.isdisjoint(logs):
            logs.update(self.alignment.metrics())
            self._advise_once(logs)
        super().log(logs, start_time)

    def _advise_once(self, logs: dict[str, float]) -> None:
        pull = logs.get("alignment_pull")
        if self._has_advised or pull is None or self.args.target_pull is not None:
            return
        self._has_advised = True
        if (advice := weak_pull_advice(pull, self.state.max_steps)) is not None:
            logger.warning(advice)

    # Evaluation: the language-model loss as SFTTrainer has it, the alignment loss beside it

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._prepare_evaluation()
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self._prepare_evaluation()
        return super().predict(*args, **kwargs)

    def _prepare_evaluation(self) -> None:
        is_first = self.aligned_heads is None
        self.prepare_alignment()
        if self.alignment is None or not is_first:
            return
        learned = OBJECTIVE_FOLDER if self.alignment.learns else None
        if (advice := other_heads_advice(str(self.args.output_dir), self.alignment.heads, learned)) is not None:
            logger.warning(advice)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        loop_args = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.alignment is None:
            return super().evaluation_loop(*loop_args)
        # As large as in training, also where `auto_find_batch_size` has found a smaller one.
        size = self.args.pool_size(self.micro_batch_size)
        pools = self._eval_pools = EvalPools(self.alignment.criterion, size, self.accelerator)
        try:
            with self.alignment.attached(), evaluated(self.alignment.criterion):
                output = super().evaluation_loop(*loop_args)
        finally:
            self._eval_pools = None
            self.alignment.check_passes()  # an optimizer may hold other weights for evaluation
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in pools.metrics().items()})
        return output

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.alignment is None else frozen_packing(self.model):
            return super().prediction_step(*args, **kwargs)

    # Saving and loading

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = output_dir or self.args.output_dir
        card = CardKeeper(self.args.output_dir, folder)  # before PEFT rewrites what it finds
        super().save_model(output_dir, _internal_call)
        self._save_ranking(folder)
        if self.args.should_save and folder is not None:
            for place in {"", self._named_adapter() or ""}:  # an adapter's own folder is merged without the outer one
                mark_control(os.path.join(folder, place), self._control)
            if self.alignment is not None and not self._rotates_itself:  # a checkpoint has it beside the optimizer
                self.alignment.save_objective(folder)
        if self._rotates_itself:  # only now: `training_args.bin` tells the limit that was set
            self.args.save_total_limit = None
        # What pushes and checkpoints save gets its card from them. Here, PEFT has left a blank form.
        if self.criterion is not None and not _internal_call and self.is_world_process_zero():
            card.write(lambda: self.create_model_card(model_name=self._repo_name.split("/")[-1]))

    def _save_ranking(self, folder: str | None) -> None:
        if self.head_ranking is not None and self.args.should_save and folder is not None:
            public_ranking(self.head_ranking).save(os.path.join(folder, RANKING_FILE))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.alignment is None:
            super()._save_checkpoint(model, trial)
        else:
            self._save_complete_checkpoint(self.alignment, model, trial)
        if self._checkpoint_to_push is not None:
            checkpoint, self._checkpoint_to_push = self._checkpoint_to_push, None
            self._push_checkpoint(checkpoint)

    def _save_complete_checkpoint(self, alignment: Alignment, model: nn.Module, trial: Any) -> None:
        output_dir = self._get_output_dir(trial=trial)
        checkpoint = Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            make_room(checkpoint)
        self.accelerator.wait_for_everyone()
        # `Trainer` would delete older checkpoints before this one is marked, when they may be the only complete ones.
        limit, self._rotates_itself = self.args.save_total_limit, True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self._rotates_itself = limit, False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            alignment.save(checkpoint)  # also where `save_only_model` leaves out the optimizer
            mark_complete(checkpoint, self.state.global_step)
            best = self.state.best_model_checkpoint
            rotate(output_dir, limit, {checkpoint, *([] if best is None else [Path(best)])})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.alignment is not None and checkpoint is not None:
            self.alignment.load(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._loads_whole_model(resume_from_checkpoint):
            load_weights(self.model, resume_from_checkpoint)
        else:
            with nullcontext() if self.alignment is None else kept_dtypes(self.model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if self._loads_whole_model(best):
            load_weights(self.model, best)
        else:
            with nullcontext() if self.alignment is None else kept_dtypes(self.model):
                if (adapter := self._named_adapter()) is None:
                    super()._load_best_model()
                else:  # beside it may lie an adapter of the default name, which `Trainer` would load in its place
                    cast(PeftModel, self.model).load_adapter(os.path.join(best, adapter), adapter)
        if self.alignment is not None:
            self.alignment.load_objective(best, required=False)
        # Not `best_global_step`: a better step need not have been saved.
        self.best_step = saved_step(best)

    def _named_adapter(self) -> str | None:
        """Name of the trained adapter, which PEFT saves in a folder of that name, unless it is the default."""
        if not isinstance(self.model, PeftModel) or self.is_sharded:
            return None
        name = self.model.active_adapters[0]
        return None if name == "default" else name

    def _loads_whole_model(self, checkpoint: str) -> bool:
        """Whether a checkpoint holds all weights of an unsharded model, which `Trainer` may fail to find there."""
        is_whole = isinstance(self.model, PreTrainedModel) and Path(checkpoint, CONFIG_NAME).is_file()
        return not self.is_sharded and is_whole

    # Publishing

    @cached_property
    def _hub(self) -> HfApi:
        return push.hub_api()

    @property
    def _repo_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name

    def create_model_card(  # type: ignore[override]  # as TRL's, which takes other arguments than Trainer's
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """Writes the model card, and the heat maps that it shows, into `output_dir`.

        With `alignment_weight=0`, the card is that of [`~trl.SFTTrainer`], with the licence.

        Args:
            model_name (`str`, *optional*): Name of the model.
            dataset_name (`str` or `list[str]`, *optional*):
                Name of the data set on the Hub, by default the one it was loaded from.
            tags (`str` or `list[str]`, *optional*): Further tags.
            license (`str`, *optional*):
                Licence, such as `"apache-2.0"`; a licence that was written into the card by hand stays otherwise.
        """
        if self.criterion is None:
            with licensed(str(self.args.output_dir), license, writes=self.is_world_process_zero()):
                super().create_model_card(model_name, dataset_name, tags)  # type: ignore[arg-type]
        elif self.is_world_process_zero():
            write_model_card(self, super().create_model_card, model_name, dataset_name, tags, license)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        with push.explained(self._repo_name, None):
            super().init_hf_repo(token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves the result in `output_dir` and uploads it to the repository `args.hub_model_id`.

        As in [`~transformers.Trainer`], but only what [`~hub.files.publishable_files`] names is uploaded.

        Args:
            commit_message (`str`, *optional*): Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to return only when everything is uploaded.
            token (`str`, *optional*): Access token that may write, instead of `args.hub_token`.
            revision (`str`, *optional*): Branch, `args.hub_revision` or `"main"` by default.
            private (`bool`, *optional*): Whether a new repository is private, `args.hub_private_repo` by default.
            **kwargs: Arguments of `create_model_card`: `model_name`, `dataset_name`, `tags`, `license`.

        Returns:
            [`~huggingface_hub.CommitInfo`] or, with `blocking=False`, a future of it; `None` on other processes than
            the first.

        Raises:
            [`~hub.push.PushError`]: If it failed. The result is complete in `output_dir`; call it again.
        """
        push.check_publishable(self._control, self.args.publish_control)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()  # it reads the files that are about to be written
        folder, token = str(self.args.output_dir), token if token is not None else self.args.hub_token
        how = push.push_settings(vars(self.args), private, revision)
        # Before anything is asked of the Hub, so that a refusal finds the result on disk, on all processes.
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        tags += [tag for tag in getattr(self.model, "model_tags", None) or () if tag not in tags]
        name = kwargs.pop("model_name", None) or self._repo_name.split("/")[-1]
        self.create_model_card(model_name=name, tags=tags, **kwargs)
        if self.hub_model_id is None:
            known_as = self._repo_name
            with push.explained(known_as, folder, **how):
                super().init_hf_repo(token, private)
            if self._repo_name != known_as:  # the code in the card names the repository in full
                self.create_model_card(model_name=name, tags=tags, **kwargs)
        push.warn_of_local_base(folder)
        files = push.result_files(folder, written_by(self.model, self.processing_class), token, self.args.hub_token)
        where = self._hub, self._repo_name, folder
        return push.upload(*where, files, commit_message or "End of training", token, blocking=blocking, **how)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # `Trainer` calls this while the checkpoint still lacks the marker that it is complete.
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self._checkpoint_to_push = Path(checkpoint_folder)

    def _push_checkpoint(self, checkpoint: Path) -> None:
        """Uploads in the background what a checkpoint has trained and, if `hub_strategy` says so, the checkpoint."""
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        written = written_by(self.model, self.processing_class)
        mark_control(str(self.args.output_dir), self._control)
        jobs = push.push_checkpoint(self._hub, self._repo_name, checkpoint, written, self.args, self.state)
        self.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]  # it takes a list

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        push.warn_of_failures(getattr(self, "push_in_progress", None))
        self.push_in_progress = None


def _places_of(model: nn.Module) -> list[str]:
    """Names or folders of the model and of what its adapters are trained on."""
    names = [unwrap_model(model).config.name_or_path]
    if isinstance(model, PeftModel):
        names += [config.base_model_name_or_path for config in model.peft_config.values()]
    return [name for name in names if name]


def _name_revision(model: nn.Module, revision: str | None) -> None:
    """Lets an adapter say which revision of its base model it is trained on. It would be put on the newest one."""
    if isinstance(model, PeftModel) and revision not in (None, "main"):
        for name, config in model.peft_config.items():
            model.peft_config[name] = config = copy(config)  # the user's own may serve another model next
            config.revision = config.revision or revision


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
