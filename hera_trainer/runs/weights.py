"""Reading the weights of a checkpoint back into a model in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from torch import nn
from transformers import PreTrainedModel


def load_weights(model: PreTrainedModel, checkpoint: str | os.PathLike) -> None:
    """Loads a checkpoint that `save_pretrained` wrote into a model in memory.

    `save_pretrained` writes parameters under the names of the published checkpoints, which for LLaVA, Gemma 3 and
    others are not those of the modules. `Trainer` looks for the modules' names when it resumes (transformers 5.24),
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
