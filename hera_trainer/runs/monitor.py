"""Watching alignment while training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..common.processes import Team
from ..common.randomness import same_randomness
from ..common.sharded import engine_at_rest, gathered_in_forward
from ..data.checks import check_dataset, with_teacher_features
from ..data.collator import RowCollator
from ..data.rows import collatable
from ..evaluation.image_gain import ImageGain, image_shape, measure_image_gain, other_rows
from ..heads.checks import check_device_map, check_ranking
from ..heads.head import AlignedUnit, granularity_of, parse_unit
from ..heads.heat_map import pixels, plot_head_scores
from ..heads.modes import evaluating
from ..heads.rank import rank_heads
from ..heads.ranking import HeadRanking
from ..heads.registry import get_head_accessor, unwrap_model
from ..heads.samples import TooFewSamplesError, draw_samples
from ..heads.scoring import NotFiniteError
from ..objectives.similarity import comparison
from ..teacher.column import TEACHER_COLUMN
from ..teacher.encoder import VisionTeacher
from .plots import monitor_group
from .record import CONTEXTS, forget_measurements, measurement_path, measurements, public_ranking

logger = get_logger(__name__)


class AlignmentMonitorCallback(TrainerCallback):
    """Measures, while a [`HeRATrainer`] trains, how well attention heads agree with the vision teacher on held-out
    samples: the mutual k-NN score (MKNN, eq. 3 of the [HeRA paper](https://huggingface.co/papers/2606.23885)) of every
    head, before the first step, every so many steps, and after the last.

    The means over three groups of heads, or of layers if these are aligned, are logged through the trainer, so that
    they reach all that `report_to` names: `alignment_mknn/aligned`, `alignment_mknn/top` (as many heads, the best of
    the ranking that the aligned ones were chosen from) and `alignment_mknn/all`; with the image in context, the group
    is `alignment_mknn_image`. What a head that has nothing to do with the teacher reaches in one of twenty cases is
    logged once, as `alignment_mknn/null_p95`. TensorBoard, Trackio and Weights & Biases also get a heat map of all
    heads and of their change, if matplotlib is installed.

    Beside them, `image_gain` says whether the model looks at its images: by how much its language-model loss on the
    samples rises, in nats a labelled token, when each of them gets the images of another one.

    Every measurement is kept in the folder `alignment_monitor` of the run, as a [`HeadRanking`] and an
    [`~evaluation.image_gain.ImageGain`].

    Training is the same with and without it, bit for bit: random states, modes and gradients are left as they were.
    `HeRAConfig(monitor_steps=...)` adds one that measures on `eval_dataset`.

    Args:
        dataset ([`~datasets.Dataset`], *optional*):
            Held-out rows in a form that [`HeRATrainer`] takes, the trainer's `eval_dataset` by default. The teacher
            encodes all their images once, unless they have a column `teacher_features`.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            The model's processor, the trainer's by default.
        teacher ([`VisionTeacher`] or `str`, *optional*):
            A teacher to measure with, the trainer's by default.
        every (`int`, *optional*, defaults to `100`):
            Number of optimizer steps between two measurements.
        contexts (sequence of `str`, *optional*):
            `"text"`: answers and captions go through the language model alone, as heads are ranked. `"image"`: the
            whole model runs, with the image in context, and the positions with labels are pooled, as in training;
            `image_gain` is measured beside it. By default both, or the second alone if the text decoder can't run on
            text alone.
        num_samples (`int`, *optional*, defaults to `500`):
            Number of samples with distinct images, the same in every measurement; all there are if there are fewer.
        k (`int`, *optional*):
            Number of neighbours, `num_neighbors` of the trainer by default. Unrelated spaces score
            `k / (num_samples - 1)` on average. Runs with another k or `num_samples` cannot be compared.
        heads (sequence of [`AttentionHead`], [`DecoderLayer`] or `str`, *optional*):
            The heads or layers of the group `aligned`, those that the trainer aligns by default. With
            `alignment_weight=0`, those that it would align, by its `head_ranking_path` or `aligned_heads`; without
            either there is no such group.

    Raises:
        `ValueError`: If a value is out of range. Data that cannot be used are refused before training starts.

    Example:

    ```python
    >>> monitor = AlignmentMonitorCallback(held_out, every=200)
    >>> trainer = HeRATrainer(model, args, train_dataset=dataset, callbacks=[monitor])
    ```
    """

    def __init__(
        self,
        dataset: Dataset | None = None,
        processing_class: Any = None,
        teacher: VisionTeacher | str | None = None,
        every: int = 100,
        contexts: Sequence[str] | None = None,
        num_samples: int = 500,
        k: int | None = None,
        heads: Sequence[AlignedUnit | str] | None = None,
    ) -> None:
        unknown = set(contexts or ()) - set(CONTEXTS)
        if unknown or (contexts is not None and not contexts) or isinstance(contexts, str):
            raise ValueError(f"`contexts` must be a sequence of {' and '.join(map(repr, CONTEXTS))}, got {contexts!r}.")
        for name, value, least in (("every", every, 1), ("k", 1 if k is None else k, 1)):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        self.dataset = dataset
        self.processing_class = processing_class
        self.teacher = teacher
        self.every = every
        self.contexts = contexts
        self.num_samples = num_samples
        self.k = k
        self.heads = heads
        self._trainer: Any = None
        self._rows: Dataset | None = None
        self._brings_vectors = False
        self._others: dict[int, int | None] = {}
        self._first: dict[str, HeadRanking] = {}
        self._first_values: dict[str, float] = {}
        self._last_step = -1

    # Before training

    def check(self, trainer: Any) -> None:
        """Refuses what cannot be measured; needs neither teacher nor ranking.

        Args:
            trainer ([`HeRATrainer`]): The trainer.

        Raises:
            `ValueError`: Naming the setting.
        """
        rows, name = (trainer.eval_dataset, "eval_dataset") if self.dataset is None else (self.dataset, "dataset")
        if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise ValueError(
                "`AlignmentMonitorCallback` cannot measure a model that FSDP of version 1 divides. Set `fsdp_version: "
                "2`, or leave it (or `monitor_steps`) out and rank the heads of the trained model with `rank_heads`."
            )
        check_device_map(trainer.model, "`AlignmentMonitorCallback` (`monitor_steps`)", ", or leave the monitor out")
        if rows is None:
            raise ValueError(
                "`AlignmentMonitorCallback` (`monitor_steps`) measures on held-out samples, but there is no "
                "`eval_dataset`. Give the trainer one, or the callback a `dataset`."
            )
        if isinstance(rows, dict):
            raise ValueError(
                f"`{name}` is a dictionary of data sets ({', '.join(map(repr, rows))}). Leave `monitor_steps` out and "
                "name the one to measure on: `callbacks=[AlignmentMonitorCallback(data_sets[name])]`."
            )
        if isinstance(rows, IterableDataset):
            raise ValueError(
                f"`{name}` is a stream (`IterableDataset`), but alignment is measured on the same samples every time. "
                "Give the callback some rows of it: "
                "`AlignmentMonitorCallback(Dataset.from_list(list(stream.take(500)), features=stream.features))`."
            )
        check_dataset(rows, name)
        vectors = trainer.teacher_vectors
        is_prepared = rows is vectors.eval_dataset
        self._brings_vectors = vectors.eval_brings_vectors if is_prepared else TEACHER_COLUMN in rows.column_names
        if self.teacher is not None and self._brings_vectors:
            raise ValueError(
                "`AlignmentMonitorCallback` is given a `teacher`, but the held-out data brings its own "
                f"`{TEACHER_COLUMN}`, with which heads would be measured. Leave `teacher` out, or remove the column."
            )
        k = self._neighbors(trainer)
        if self.num_samples < k + 2:
            raise ValueError(f"`num_samples` ({self.num_samples}) must be at least k + 2 = {k + 2}.")
        if len(rows) < k + 2:
            raise ValueError(_too_few(f"has {len(rows)} rows", name, k))
        accessor = get_head_accessor(trainer.model)
        if "text" in (self.contexts or ()) and accessor.needs:
            raise ValueError(
                f"The text decoder of this model needs {accessor.needs}, so its heads cannot be measured on text "
                'alone. Set `contexts=["image"]`.'
            )
        named = self._named_heads(trainer)
        missing = [unit for unit in named if unit not in accessor.units(granularity_of(named))]
        if missing:
            raise ValueError(
                f"This model has no {missing[0].kind} {missing[0]}. Correct `heads` or `aligned_heads`, which name "
                "heads or layers."
            )
        if trainer.head_ranking is not None:
            check_ranking(trainer.head_ranking, accessor, unwrap_model(trainer.model).config.model_type)

    def prepare(self, trainer: Any) -> None:
        """Attaches the teacher's vectors to the held-out rows. Called by the trainer in all processes, before training.

        Args:
            trainer ([`HeRATrainer`]): The trainer.

        Raises:
            `ValueError`: If the data or the teacher cannot be used.
        """
        self.check(trainer)
        self._trainer = trainer
        if self.contexts is None:
            self.contexts = tuple(CONTEXTS) if not get_head_accessor(trainer.model).needs else ("image",)
        rows = trainer.eval_dataset if self.dataset is None else self.dataset
        if self.teacher is None:
            rows = trainer.teacher_vectors.attach(rows, "the monitor's data set")
        else:
            batch_size = trainer.args.teacher_batch_size
            if TEACHER_COLUMN in rows.column_names:  # those of the trainer's teacher
                rows = rows.remove_columns(TEACHER_COLUMN)
            rows = with_teacher_features(rows, "the monitor's data set", self.teacher, batch_size)
        trainer.teacher_vectors.columns.required(rows.column_names)
        self._first, self._first_values, self._last_step = {}, {}, -1
        self._rows = rows
        self._others = self._other_rows() if "image" in self.contexts else {}

    def _other_rows(self) -> dict[int, int | None]:
        """For each of the samples that are measured, whose images it gets."""
        trainer = self._trainer
        processor = self.processing_class or trainer.processing_class
        tokenizer, k = getattr(processor, "tokenizer", processor), self._neighbors(trainer)
        try:
            samples = draw_samples(self._rows, tokenizer, k, self.num_samples, trainer.args.seed, self._text_column)
        except TooFewSamplesError as error:
            name = "eval_dataset" if self.dataset is None else "dataset"
            found = f"has {error.found} with distinct images and an answer"
            raise ValueError(_too_few(found, name, k)) from error
        indices = samples.indices
        shapes = [image_shape(self._read_row(i)) for i in indices]
        others = other_rows(shapes, indices, trainer.args.seed)  # the images of all samples are distinct
        if not any(other is not None for other in others):
            warnings.warn(
                "`image_gain` is not measured: among the held-out rows, no two have equally many images.", stacklevel=2
            )
            return {}
        return {i: None if other is None else indices[other] for i, other in zip(indices, others, strict=True)}

    def _neighbors(self, trainer: Any) -> int:
        return trainer.args.num_neighbors if self.k is None else self.k

    # While training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._rows is None:
            raise ValueError("`AlignmentMonitorCallback` works with `HeRATrainer`; other trainers do not prepare it.")
        if self._first_values:  # `auto_find_batch_size` begins anew: what was before training stays, the log does not
            self._last_step = state.global_step
            self._log(dict(self._first_values), control)
            if state.is_world_process_zero:
                forget_measurements(str(args.output_dir), after=state.global_step)
            return
        earlier: dict[str, Path] = {}
        for _, kind, path in measurements(str(args.output_dir)):
            earlier.setdefault(kind, path)
        # All processes must measure alike, also those that do not see the main one's files.
        going_on = Team(distributed=True).any(state.is_world_process_zero and set(self.contexts or ()) <= set(earlier))
        if state.global_step > 0 and going_on:  # resumed: what was measured before the first step stays
            self._first = {context: HeadRanking.load(path) for context, path in earlier.items() if context in CONTEXTS}
            self._last_step = state.global_step
        else:
            self._first_values = self._measure(args, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_last = control.should_training_stop or state.global_step >= state.max_steps
        if state.global_step % self.every == 0 or is_last:
            self._measure(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Here and not when training has ended: trackers may have closed their run by then.
        if control.should_training_stop and self._last_step != state.global_step:
            self._measure(args, state, control)

    def _log(self, values: dict[str, float], control: TrainerControl) -> None:
        should_log = control.should_log
        with evaluating(self._trainer.model):  # in training mode, TRL would take out what it sums up for the losses
            self._trainer.log(values)
        control.should_log = should_log  # logging answers the request, which is meant for the losses

    def _measure(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> dict[str, float]:
        """Measures, logs and keeps; returns what it has logged."""
        trainer = self._trainer
        values: dict[str, float] = {}
        resting = engine_at_rest(trainer.model_wrapped)
        with same_randomness(args.device), evaluating(trainer.model), resting:
            try:
                rankings = {context: self._rank(context) for context in self.contexts or ()}
            except NotFiniteError as error:  # in all processes alike
                if self._last_step < 0:  # of the model as it comes
                    raise
                logger.warning(f"Nothing is measured at step {state.global_step}: {error}")
                self._last_step = state.global_step
                return {}
            for context, ranking in rankings.items():
                self._first.setdefault(context, ranking)
                for name, heads in self._groups(context).items():
                    score = sum(map(ranking.score, heads)) / len(heads)
                    values[f"{monitor_group(context)}/{name}"] = score
                if self._last_step < 0 and ranking.null_p95 is not None:  # it hardly changes: once
                    values[f"{monitor_group(context)}/null_p95"] = ranking.null_p95
            gain = self._image_gain()
            if gain is not None:
                values["image_gain"] = gain.gain
        self._log(dict(values), control)
        self._last_step = state.global_step
        if state.is_world_process_zero:
            if gain is not None:
                gain.save(measurement_path(str(args.output_dir), state.global_step, "gain"))
            for context, ranking in rankings.items():
                public_ranking(ranking).save(measurement_path(str(args.output_dir), state.global_step, context))
                self._show(state, context, ranking)
        return values

    def _rank(self, context: str) -> HeadRanking:
        trainer = self._trainer
        assert self._rows is not None
        with trainer.accelerator.autocast():
            return rank_heads(
                trainer.model,
                self.processing_class or trainer.processing_class,
                self._rows,
                k=self._neighbors(trainer),
                num_samples=self.num_samples,
                batch_size=trainer.args.per_device_eval_batch_size,
                seed=trainer.args.seed,
                **comparison(trainer.args.metric_similarity),
                data_collator=None if context == "text" else self._collate,
                teacher_name=self._teacher_name(),
                progress=False,
                distributed=True,
                text_column=self._text_column,
                clip_quantile=trainer.args.ranking_clip_quantile,
            )

    def _image_gain(self) -> ImageGain | None:
        if not self._others:
            return None
        trainer = self._trainer
        with trainer.accelerator.autocast(), gathered_in_forward(trainer.model):
            return measure_image_gain(
                trainer.model,
                self._read_row,
                _uncut(self._inner_collator),
                self._others,
                trainer.args.per_device_eval_batch_size,
                distributed=True,
                placeholder_ids=trainer.teacher_vectors.placeholder_ids,
                fused_lm_head=True,  # as SFTTrainer in training: the logits of all positions may not fit
            )

    @property
    def _text_column(self) -> str | None:
        assert self._rows is not None
        return self._trainer.teacher_vectors.columns.ranked(self._rows.column_names)

    @property
    def _inner_collator(self) -> Callable:
        collator = self._trainer.data_collator
        return collator.inner if isinstance(collator, RowCollator) else collator

    def _read_row(self, index: int) -> dict[str, Any]:
        assert self._rows is not None
        return self._collatable(self._rows[index])

    def _collatable(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row as the collator gets it in training."""
        own = {name: value for name, value in row.items() if name != TEACHER_COLUMN}
        return collatable(own, self._inner_collator, self._trainer.teacher_vectors.columns)

    def _collate(self, rows: list[dict[str, Any]]) -> Any:
        """A batch as in training, but for the teacher's vectors."""
        return self._inner_collator([self._collatable(row) for row in rows])

    def _teacher_name(self) -> str:
        if self._brings_vectors:
            return ""
        if self.teacher is None:
            return self._trainer.teacher_name
        return self.teacher.name if isinstance(self.teacher, VisionTeacher) else self.teacher

    def _named_heads(self, trainer: Any) -> list[AlignedUnit]:
        return [parse_unit(head) for head in self.heads or trainer.args.aligned_heads or ()]

    def _aligned(self) -> list[AlignedUnit]:
        """The heads or layers of the group of that name: named ones, those that the trainer chose, or, without
        alignment, those that it would choose."""
        args, ranking = self._trainer.args, self._trainer.head_ranking
        found = self._named_heads(self._trainer) or self._trainer.aligned_heads
        if found or ranking is None:
            return found or []
        return ranking.select(args.head_selection, args.num_aligned_heads, args.seed, args.alignment_granularity)

    def _groups(self, context: str) -> dict[str, list[AlignedUnit]]:
        """The heads or layers whose mean scores are logged."""
        aligned = self._aligned()
        granularity = granularity_of(aligned) if aligned else self._trainer.args.alignment_granularity
        first = self._first[context]
        # Chosen on other data than measured on, where that can be: the best of one sample are worse on another.
        before = self._trainer.head_ranking or first
        every = first.units(granularity)
        count = min(len(aligned) or self._trainer.args.num_aligned_heads, len(every))
        groups = {"aligned": aligned, "top": before.select("top", count, granularity=granularity), "all": every}
        return {name: heads for name, heads in groups.items() if heads}

    def _show(self, state: TrainerState, context: str, ranking: HeadRanking) -> None:
        """Gives a heat map to those trackers of the trainer that take images."""
        trackers = [c for c in self._trainer.callback_handler.callbacks if isinstance(c, _WITH_IMAGES)]
        if not trackers:
            return
        step = state.global_step
        panels = {"first": self._first[context], f"step {step}": ranking}
        compared = self._first[context].scale == ranking.scale  # unless a resumed run measures otherwise
        if not compared:
            del panels["first"]
        try:
            figure = plot_head_scores(panels, None, self._aligned(), f"Alignment ({context})", difference=compared)
        except ImportError as error:
            warnings.warn(f"Trackers get no heat map of the attention heads. {error}", stacklevel=2)
            return
        image = pixels(figure)
        for tracker in trackers:
            _give_image(tracker, f"{monitor_group(context)}/heads", image, step)


def _uncut(collator: Any) -> Any:
    """A collator that cuts no row: where images have tokens by their size, other ones would leave other words."""
    if not isinstance(collator, DataCollatorForVisionLanguageModeling) or collator.max_length is None:
        return collator
    collator = copy(collator)  # a subclass of the user's own stays what it is
    collator.max_length = None
    return collator


_WITH_IMAGES = (TensorBoardCallback, TrackioCallback, WandbCallback)


def _too_few(found: str, name: str, k: int) -> str:
    return (
        f"`AlignmentMonitorCallback` (`monitor_steps`) finds {k} neighbours among at least {k + 2} held-out rows, but "
        f"`{name}` {found}. Hold out more (of `hera sft`: `--test_split_size`), lower `num_neighbors`, or leave the "
        "monitor out."
    )


def _give_image(tracker: TrainerCallback, name: str, image: np.ndarray, step: int) -> None:
    """Logs an image `[height, width, 3]` beside the scalars of a step, under names as the trackers' own."""
    name = f"train/{name}"
    if isinstance(tracker, TensorBoardCallback):
        if tracker.tb_writer is not None:
            tracker.tb_writer.add_image(name, image, step, dataformats="HWC")
            tracker.tb_writer.flush()
    elif isinstance(tracker, TrackioCallback):
        import trackio

        trackio.log({name: trackio.Image(image), "train/global_step": step})
    else:
        import wandb

        wandb.log({name: wandb.Image(image), "train/global_step": step})


def prepare_monitors(trainer: Any, monitors: Sequence[AlignmentMonitorCallback]) -> None:
    """Prepares the monitor of a trainer that is about to train. Random states are afterwards as they were.

    Raises:
        `ValueError`: If there is more than one, or it cannot measure.
    """
    if len(monitors) > 1:
        raise ValueError(
            "The trainer has more than one `AlignmentMonitorCallback`, and their measurements would replace each "
            "other. Leave one of them, or `monitor_steps`, out."
        )
    for monitor in monitors:
        with same_randomness(trainer.args.device):
            monitor.prepare(trainer)
