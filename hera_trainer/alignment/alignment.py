"""Head-wise alignment as a training loop holds it, whatever loop that is."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from transformers import TrainingArguments

from ..common.files import write_atomically
from ..data.batch import TeacherBatch, pop_teacher
from ..heads.accessor import HeadAccessor
from ..heads.capture import ForwardDone, HeadCapture, done_after
from ..heads.head import AlignedUnit
from ..heads.modes import needs_whole_forward
from ..heads.pooling import placeholder_token_ids, pooling_mask
from ..heads.registry import get_head_accessor, unwrap_model
from ..objectives.objective import AlignmentObjective
from ..objectives.queue import SampleQueue
from .contrast import Contrast, PoolLoss
from .features import ImageFeatures
from .meter import AlignmentMeter
from .optimizer import ObjectiveOptimizer
from .pull import Pull
from .window import StepWindow, seeded

logger = get_logger(__name__)

STATE_FILE = "hera_state.json"
OBJECTIVE_FILE = "hera_objective.safetensors"
OBJECTIVE_FOLDER = "hera_objective"  # beside a result, which it lies in
QUEUE_FILE = "hera_queue.safetensors"


class Alignment:
    """The alignment loss of a model in training: reads the aligned heads, compares samples, and gives each micro-batch
    its term of the loss. It knows neither `Trainer` nor TRL.

    A training loop calls, for each optimizer step: `begin_step`; `first_pass` if `needs_first_pass`; for each
    micro-batch `observe` before the model's forward, `add_to` (or `term`) after it, and `end_micro_batch` after the
    backward; then `before_optimizer_step` and `optimizer_step` around the step of its optimizer. All of it inside
    `attached`.

    Args:
        model (`nn.Module`): The model, in any wrapping that [`get_head_accessor`] understands.
        criterion ([`AlignmentObjective`]): The objective, such as [`HeRALoss`], on the device of the model.
        heads (sequence of [`AttentionHead`] or of [`DecoderLayer`], *optional*):
            The heads to align, or whole layers; `align` names them later.
        weight (`float`, *optional*, defaults to `0.01`): Weight of the alignment loss.
        target_pull (`float`, *optional*): Pull that the weight shall follow (see [`~alignment.pull.Pull`]).
        scope (`str`, *optional*, defaults to `"step"`):
            Which samples are compared: `"step"`, all of an optimizer step, or `"micro_batch"`.
        queue_size (`int`, *optional*, defaults to `0`): Number of past samples that join the candidates.
        accelerator ([`~accelerate.Accelerator`], *optional*): Gathers samples of all processes.
        processing_class (*optional*): The model's processor, which may know ids of image tokens besides the model's.
        args ([`~transformers.TrainingArguments`], *optional*): Adam's settings for the objective's parameters.
        teacher_width (`int`, *optional*, defaults to `0`):
            Width of the teacher vectors, for objectives with parameters as wide.
        seed (`int`, *optional*, defaults to `42`): Seed for parameters that are drawn.
        image_feature_gib (`float`, *optional*, defaults to `1.0`):
            GiB of image features that may be kept on the device between the two passes of a step.

    Attributes:
        capture ([`HeadCapture`] or `None`): Reads the heads, once they are named.
        features ([`~alignment.features.ImageFeatures`]): What frozen vision modules compute once for both passes.
        meter ([`~alignment.meter.AlignmentMeter`]): Sums up what is logged.
        optimizer ([`~alignment.optimizer.ObjectiveOptimizer`]): Trains the objective's parameters.
        pull ([`~alignment.pull.Pull`]): How strongly the loss pulls at the heads, and its weight.
        window ([`StepWindow`] or `None`): The optimizer step under way, if it takes two passes.
        teacher_identity (`str`), teacher_width (`int`):
            Which teacher the vectors are of. Past samples of a checkpoint are taken for the same one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: AlignmentObjective,
        heads: Sequence[AlignedUnit] | None = None,
        weight: float = 0.01,
        target_pull: float | None = None,
        scope: str = "step",
        queue_size: int = 0,
        accelerator: Accelerator | None = None,
        processing_class: Any = None,
        args: TrainingArguments | None = None,
        teacher_width: int = 0,
        seed: int = 42,
        image_feature_gib: float = 1.0,
    ) -> None:
        base = unwrap_model(model)
        config: Any = base.config
        self.accessor: HeadAccessor = get_head_accessor(model)
        compiled = accelerator is not None and accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        self.features = ImageFeatures(base, self.accessor.layers, image_feature_gib * 2**30, compiled)
        self.criterion = criterion
        self.pull = Pull(weight, target_pull, accelerator)
        self.scope = scope
        self.seed = seed
        self.contrast = Contrast(criterion, accelerator, SampleQueue(queue_size) if queue_size else None)
        self._args = args
        self._whole = model if needs_whole_forward(model) else None
        self.optimizer = ObjectiveOptimizer(criterion, accelerator, args)
        self.meter = AlignmentMeter()
        self.capture: HeadCapture | None = None
        self.window: StepWindow | None = None
        self.teacher_identity, self.teacher_width = "", teacher_width
        self._model_type: str = config.model_type
        self.placeholder_ids = placeholder_token_ids(config, processing_class)
        self._count = 1
        self._compared = torch.zeros((), dtype=torch.bool)  # whether samples were, in the step under way
        self._observed: tuple[TeacherBatch, Tensor] | None = None
        self._checks_passes = True
        if heads is not None:
            self.align(heads)

    def align(self, heads: Sequence[AlignedUnit]) -> None:
        """Names the heads, or whole layers, to align.

        Raises:
            `ValueError`: If the model has no such head or layer.
        """
        self.capture = HeadCapture(self.accessor, heads, self._model_type, self.pull.observe)
        self.criterion.prepare(len(self.heads), self.accessor.width, self.teacher_width, self.seed)
        self.criterion.to(self.device)
        self.optimizer = ObjectiveOptimizer(self.criterion, self.contrast.accelerator, self._args)

    @property
    def device(self) -> torch.device:
        """Where samples are compared: where the model is, or, as an engine may move it there only when training begins,
        where the accelerator is if the model is still in main memory."""
        accelerator = self.contrast.accelerator
        own = self.accessor.device
        if accelerator is None or own.type not in ("cpu", "meta") or own.type == accelerator.device.type:
            return own
        return accelerator.device

    @property
    def heads(self) -> list[AlignedUnit]:
        """The aligned heads or layers."""
        return [] if self.capture is None else self.capture.heads

    @property
    def learns(self) -> bool:
        """Whether the objective changes while it trains: it has trained parameters of its own, or buffers."""
        parameters, buffers = self.criterion.parameters(), self.criterion.buffers()
        return any(parameter.requires_grad for parameter in parameters) or next(buffers, None) is not None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The heads can be read inside. May be nested."""
        assert self.capture is not None, "`align` names the heads first"
        with self.capture.attached():
            yield

    @property
    def is_attached(self) -> bool:
        """Whether the heads can be read now."""
        return self.capture is not None and self.capture.is_attached

    def reset(self) -> None:
        """Forgets a run, also one that broke off within a step. The temperature and its optimizer stay as they are."""
        self.window, self._count = None, 1
        self.features.reset()
        self.meter = AlignmentMeter()
        self.pull.reset()
        self.contrast.reset()
        self.check_passes()

    def check_passes(self) -> None:
        """Has the two passes of the next step compared. To be called when something happened in between, such as an
        evaluation, that could make them differ."""
        self._checks_passes = True

    # An optimizer step

    def begin_step(self, num_micro_batches: int) -> None:
        """An optimizer step of so many micro-batches begins."""
        self.window, self._count, self._compared = None, num_micro_batches, torch.zeros((), dtype=torch.bool)
        self.features.clear()

    @property
    def needs_first_pass(self) -> bool:
        """Whether the micro-batches of this step must be read before they are trained on. With a single one, the
        training forward itself collects all there is to compare."""
        return self.scope == "step" and self._count > 1 and self.window is None

    def first_pass(
        self, batches: Sequence[Any], forward: Callable[[Any], object], whole: nn.Module | None = None
    ) -> None:
        """Reads all micro-batches of a step and compares them. The model's buffers are afterwards as they were.

        Args:
            batches (sequence): The micro-batches.
            forward (`Callable`):
                Takes a micro-batch the way of training, through `observe` and the model's forward, out of which it is
                thrown by an exception as soon as the heads are read.
            whole (`nn.Module`, *optional*): A module whose forward must be run to its end (sharded parameters).
        """
        assert self.capture is not None
        device, whole = self.device, self._whole if whole is None else whole
        seeds = torch.randint(2**31, (len(batches),)).tolist()
        first = []
        reading = self.capture.reading(stop_early=whole is None)
        with torch.no_grad(), reading, done_after(whole), self.features.first_pass():
            for batch, seed in zip(batches, seeds, strict=True):
                with seeded(seed, device), suppress(ForwardDone), self.features.recorded():
                    forward(batch)
                first.append(self.take())
                self.end_micro_batch()
        self.window = StepWindow(self.contrast, first, seeds, device)
        self._add_pool(self.window.pool)

    @contextmanager
    def same_randomness(self) -> Iterator[None]:
        """Context of a micro-batch's training forward, so that it draws what the first pass drew, and is given the
        image features that the first pass computed."""
        if self.window is None:
            yield
            return
        with self.window.same_randomness(), self.features.reused(self.window.position):
            yield

    def observe(self, inputs: dict[str, Any], train: bool = True) -> bool:
        """The next forward pass of the model is read. Takes the teacher vectors out of its inputs.

        Args:
            inputs (`dict`): Inputs of the model, with `labels`, `input_ids` and `teacher_features`.
            train (`bool`, *optional*, defaults to `True`): Whether `term` will be backpropagated.

        Returns:
            `bool`: Whether there are teacher vectors; without them nothing is read.

        Raises:
            `ValueError`: If there are none in training.
        """
        assert self.capture is not None
        teacher = pop_teacher(inputs)
        if teacher is None:
            if train and self._observed is not None:
                raise ValueError(
                    "The loss of a micro-batch was asked for twice. Call `super().compute_loss` once, which reads the "
                    "heads, and the model itself for any further forward."
                )
            if train:
                raise ValueError(
                    "A training batch has no teacher vectors, so nothing could be aligned. If you make the data loader "
                    "yourself, let it use the trainer's `train_dataset` and `data_collator` as they are when training "
                    "begins; otherwise set `alignment_weight=0` to train without alignment."
                )
            return False
        mask = pooling_mask(inputs["labels"], inputs["input_ids"], self.placeholder_ids)
        self._observed = teacher, mask
        self.capture.start(mask, train)
        return True

    def take(self) -> tuple[Tensor, TeacherBatch, Tensor]:
        """Head representations `[m, B, d_model]` of the forward pass that was observed, its teacher vectors, and the
        positions that were pooled, `[B, T]`."""
        if self.capture is None or self._observed is None:
            raise RuntimeError("No forward pass was observed. A `compute_loss` of your own must call `super()`'s.")
        return self.capture.vectors(), *self._observed

    def term(self) -> Tensor:
        """The micro-batch's term of the step's loss, to be added to it before the backward: a scalar, weighted. The
        terms of all micro-batches add up to the alignment loss of the step times its weight.

        Raises:
            `RuntimeError`: If the step needs a first pass and had none.
        """
        if self.needs_first_pass:
            raise RuntimeError(
                f"This optimizer step has {self._count} micro-batches, which are compared as one: `first_pass` reads "
                "them before the first is trained on. Call it where `needs_first_pass` is true (a `training_step` of "
                "your own: call `super()`'s), or set `contrast_scope='micro_batch'`."
            )
        heads, teacher, mask = self.take()
        parameters = self.contrast.parameters
        if self.window is not None:
            if self._checks_passes:
                assert self.capture is not None
                self.window.check(heads, self.capture.dtype)
            part = self.window.carrier(heads, parameters)
            self._checks_passes = self._checks_passes and self.window.is_open
            return self.pull.weight * part
        # Micro-batches by themselves: their mean.
        pool = self.contrast(heads, teacher.vectors, teacher.valid(mask))
        self._add_pool(pool)
        return self.pull.weight * pool.carrier(heads, parameters, start=0, share=1.0) / self._count

    def _add_pool(self, pool: PoolLoss) -> None:
        self.meter.add_pool(pool)
        self._compared = self._compared.to(pool.skipped.device) | (pool.skipped == 0)

    def add_to(self, loss: Tensor, divided_later: bool = False) -> Tensor:
        """The micro-batch's loss with its `term`: what is to be backpropagated. Both losses are counted for the log.

        Args:
            loss (`Tensor`): The language-model loss, scalar: the micro-batch's part of the step's loss.
            divided_later (`bool`, *optional*, defaults to `False`):
                Whether the loop divides what it gets by the number of micro-batches, and `loss` is a mean, of the
                micro-batch alone. The term, a part already, is multiplied by that number then.
        """
        times = self._count if divided_later else 1
        self.meter.add_micro_batch(loss / times, share=1.0 / self._count)
        accelerator = self.contrast.accelerator
        if not loss.requires_grad and accelerator is not None and accelerator.num_processes > 1:
            raise RuntimeError(
                "Nothing that is trained takes part in this micro-batch, whose rows have no image, so that the other "
                "processes would wait for its gradients. Leave rows without an image out while the projector alone is "
                "trained."
            )
        return loss + times * self.term()

    def end_micro_batch(self) -> None:
        """To be called after the backward, which may run layers again (activation checkpointing)."""
        self._observed = None
        if self.capture is not None:
            self.capture.stop()

    def before_optimizer_step(self) -> None:
        """To be called by all processes when the backward passes of an optimizer step are done."""
        self.optimizer.before_step()
        self.pull.before_step(self._compared)

    def optimizer_step(self, learning_rate: float) -> None:
        """Trains the objective's parameters. To be called when the model's optimizer has made its step.

        Args:
            learning_rate (`float`): Rate of this step.
        """
        self.optimizer.step(learning_rate)

    # What is logged

    def metrics(self) -> dict[str, float]:
        """What there is to log since the last call, of all processes, which must call it alike; empty if nothing
        happened."""
        accelerator, meter = self.contrast.accelerator, self.meter
        sums = torch.cat([self.pull.take_logged(self.device), meter.as_tensor(self.device)])
        if accelerator is not None:
            sums = accelerator.reduce(sums, reduction="sum")
        metrics = meter.drain(sums[2:], self.contrast.num_processes)
        if not metrics:
            return {}
        self._warn_once(metrics)
        return {**metrics, **self.pull.metrics(sums[:2]), **self.criterion.metrics()}

    def _warn_once(self, metrics: dict[str, float]) -> None:
        # Not `warning_once`, which is silent in the process's next run.
        meter = self.meter
        if metrics["alignment_not_finite"] and not meter.has_warned:
            meter.has_warned = True
            logger.warning(
                "The alignment loss or its gradient was NaN or infinite in some steps; it was left out of them "
                "(`alignment_not_finite` counts them)."
            )
        advice = None if meter.spread is None or meter.has_advised else self.criterion.advice(meter.spread)
        if advice is not None:
            meter.has_advised = True
            logger.warning(advice)

    # Checkpoints

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the objective's parameters, the weight, the names of the aligned heads, and the queue into a
        checkpoint."""
        state = {"aligned_heads": [str(head) for head in self.heads], "pull": self.pull.state_dict()}
        write_atomically(Path(folder, STATE_FILE), lambda path: path.write_text(json.dumps(state, indent=1)))
        self.optimizer.save(Path(folder, OBJECTIVE_FILE))
        if self.contrast.queue is not None:
            self.contrast.queue.save(Path(folder, QUEUE_FILE), self._queue_identity())

    def save_objective(self, folder: str | os.PathLike) -> None:
        """Writes what the objective has learned beside a result; nothing if it learns nothing. It lies in a folder of
        its own: what loads a model may read all weights beside it."""
        if self.learns:
            path = Path(folder, OBJECTIVE_FOLDER, OBJECTIVE_FILE)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.optimizer.save(path)

    def load(self, folder: str | os.PathLike) -> None:
        """Takes what `save` wrote; nothing from a checkpoint without it. Warns if other heads were aligned then."""
        path, queue = Path(folder, STATE_FILE), Path(folder, QUEUE_FILE)
        if not path.is_file():
            return
        state = json.loads(path.read_text())
        self.pull.load_state_dict(state.get("pull", {}), self.device)
        if "log_temperature" in state:  # as it was written before there were other parameters
            self.optimizer.load_temperature(state)
        else:
            self.load_objective(folder, required=False)
        if state["aligned_heads"] != [str(head) for head in self.heads]:
            warnings.warn(
                f"The checkpoint was trained with aligned heads {', '.join(state['aligned_heads'])}, this run goes on "
                f"with {', '.join(map(str, self.heads))}.",
                stacklevel=2,
            )
        if self.contrast.queue is not None and queue.is_file():
            self._load_queue(self.contrast.queue, queue, state["aligned_heads"])

    def load_objective(self, folder: str | os.PathLike, required: bool = True) -> None:
        """Takes what the objective has learned alone, of a checkpoint or a result, to whose weights it belongs.

        Args:
            folder (`str` or `os.PathLike`): Folder of the checkpoint or result.
            required (`bool`, *optional*, defaults to `True`):
                Whether it must be there. A checkpoint that was trained without alignment has none.

        Raises:
            `FileNotFoundError`: If an objective that learns has left nothing there.
        """
        found = (Path(folder, OBJECTIVE_FILE), Path(folder, OBJECTIVE_FOLDER, OBJECTIVE_FILE))
        path = next((path for path in found if path.is_file()), None)
        if path is not None:
            self.optimizer.load(path)
        elif required and self.learns:
            raise FileNotFoundError(f"{str(folder)!r} holds nothing that an alignment objective has learned.")

    def _queue_identity(self) -> dict[str, str]:
        """What samples of the queue depend on, beside the weights of the model."""
        return {
            "aligned heads": " ".join(map(str, self.heads)),
            "teacher": self.teacher_identity,
        }

    def _load_queue(self, queue: SampleQueue, path: Path, heads: list[str]) -> None:
        """Takes the queue of a checkpoint, unless its samples mean something else in this run."""
        # Earlier versions named the heads in the file beside it only.
        then = {"aligned heads": " ".join(heads), **SampleQueue.identity_of(path)}
        now = {**self._queue_identity(), "teacher width": str(self.teacher_width)}
        # Nor does it matter how samples were compared: they are kept as they are.
        differing = [name for name, value in then.items() if name != "normalize" and now.get(name) != value]
        if not differing:
            queue.load(path, self.device)
            return
        logger.warning(
            f"The queue of past samples in {path} is not taken: they are of another run ({', '.join(differing)} "
            "differ). It fills again within the next steps."
        )
