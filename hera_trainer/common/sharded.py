"""Parameters that DeepSpeed ZeRO-3 divided among processes when the model was loaded, before an engine wraps it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Whole parameters inside, in all processes, which must enter together. They are read only: nothing that is written
    to them stays. Nothing happens for parameters that are not divided, or are whole already.

    Args:
        parameters (iterable of `Tensor`): Parameters of any model, or other tensors.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    # What is whole already belongs to someone who would find it divided again.
    missing = [p for p in parameters if getattr(p, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE]
    with GatheredParameters(missing, enabled=bool(missing)):
        yield


@contextmanager
def gathered_in_forward(model: nn.Module) -> Iterator[None]:
    """Each module of `model` has its own parameters whole while its forward runs, as in a DeepSpeed engine. Never more
    than those of the running modules are in memory. All processes must run the same number of forward passes.

    Args:
        model (`nn.Module`): Any model; nothing happens for one that is not divided.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    running: list[ExitStack] = []

    def enter(module: nn.Module, args: Any) -> None:
        running.append(ExitStack())
        running[-1].enter_context(gathered(list(module.parameters(recurse=False))))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        running.pop().close()

    with ExitStack() as hooks:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                # Also called when the forward fails, so that nothing stays whole.
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield
