"""What an aligned run adds to checkpoints, and how it is read back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from .alignment import Alignment
from .completion import make_room, mark_complete, rotate
from .config import HeRAConfig
from .heads.ranking import HeadRanking
from .redaction import public_name

RANKING_FILE = "head_ranking.json"

# The mixin calls on to a Trainer: type checkers must see it, the class hierarchy must not repeat it.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


def load_weights(model: PreTrainedModel, checkpoint: str | os.PathLike) -> None:
    """Loads a checkpoint that `save_pretrained` wrote into a model in memory.

    `save_pretrained` writes parameters under the names of the published checkpoints, which for LLaVA, Qwen-VL and
    others are not those of the modules. `Trainer` looks for the modules' names when it resumes (transformers 5.23),
    finds none, warns, and goes on with the weights it has. `from_pretrained` knows both.

    Every weight and buffer is afterwards what was saved, bit for bit: all are read in the widest dtype of the model,
    which may mix several, and not in that of its configuration.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, on any device.
        checkpoint (`str`): Folder of the checkpoint.

    Raises:
        `RuntimeError`: If a weight of the model is not in the checkpoint.
    """
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    dtypes = {dtype for dtype in dtypes if dtype.itemsize > 1}  # float8 is read as it is, and has no wider relative
    loaded, report = type(model).from_pretrained(
        checkpoint, config=model.config, dtype=reduce(torch.promote_types, dtypes), output_loading_info=True
    )
    if report["missing_keys"]:
        raise RuntimeError(
            f"Checkpoint {str(checkpoint)!r} lacks weights of this model, such as {min(report['missing_keys'])!r}. "
            "Resume with the model that wrote it."
        )
    model.load_state_dict(loaded.state_dict())


@contextmanager
def kept_dtypes(model: nn.Module) -> Iterator[None]:
    """Parameters have afterwards the dtype that they had before. PEFT makes adapters float32 when it loads weights into
    them; those of a quantized backbone, which SFTTrainer trains in bfloat16, would not be trained further as before."""
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}  # PEFT replaces some of them
    yield
    for name, parameter in model.named_parameters():
        dtype = before.get(name, parameter.dtype)
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def public_ranking(ranking: HeadRanking) -> HeadRanking:
    """A ranking as others may read it: of folders of this computer, it names the last part only."""
    return replace(ranking, model=public_name(ranking.model), teacher=public_name(ranking.teacher))


class CheckpointMixin(_Base):
    """Saves and restores the head ranking, the temperature and the queue beside a trainer's checkpoints."""

    args: HeRAConfig
    model: Any
    alignment: Alignment | None
    head_ranking: HeadRanking | None
    _rotates_itself = False
    _best_step: int | None = None  # of which step the weights are, where training ended with loading the best ones

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self._save_ranking(output_dir or self.args.output_dir)
        if self._rotates_itself:  # only now: `training_args.bin` tells the limit that was set
            self.args.save_total_limit = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.alignment is None:
            return super()._save_checkpoint(model, trial)
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
            self.alignment.save(checkpoint)  # also where `save_only_model` leaves out the optimizer
            mark_complete(checkpoint, self.state.global_step)
            best = self.state.best_model_checkpoint
            rotate(output_dir, limit, {checkpoint, *([] if best is None else [Path(best)])})

    def _save_ranking(self, directory: str | None) -> None:
        if self.head_ranking is not None and self.args.should_save and directory is not None:
            public_ranking(self.head_ranking).save(os.path.join(directory, RANKING_FILE))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # `Trainer` looks whether a run is over only when it has done a step more: resuming a finished one would.
        if self.alignment is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._loads_whole_model and Path(resume_from_checkpoint, CONFIG_NAME).is_file():
            load_weights(self.model, resume_from_checkpoint)
        else:
            with nullcontext() if self.alignment is None else kept_dtypes(self.model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._loads_whole_model and self.state.best_model_checkpoint is not None:
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            with nullcontext() if self.alignment is None else kept_dtypes(self.model):
                super()._load_best_model()
        self._best_step = self.state.best_global_step

    @property
    def _loads_whole_model(self) -> bool:
        """Whether a checkpoint holds all weights of an unsharded model, which `Trainer` may fail to find there."""
        return self.alignment is not None and not self._is_sharded and isinstance(self.model, PreTrainedModel)

    @property
    def _is_sharded(self) -> bool:
        """Whether an engine (FSDP, DeepSpeed) holds the parameters and the optimizer."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.alignment is not None and checkpoint is not None:
            self.alignment.load(checkpoint)
