"""Parameters that an engine divided among processes: DeepSpeed ZeRO-3, already while a model is loaded, and FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Whole parameters inside, in all processes, which must enter together. They are read only: nothing that is written
    to them stays. Nothing happens for parameters that ZeRO-3 did not divide, or that are whole already.

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
def whole(module: nn.Module) -> Iterator[None]:
    """A module with whole parameters inside, whichever engine divided them, in all processes, which must enter
    together. They are read only, as in [`gathered`].

    Args:
        module (`nn.Module`): A module that is small enough to be in memory as a whole.
    """
    with gathered(module.parameters()), ExitStack() as divided:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if isinstance(parameter, DTensor):
                    part._parameters[name] = nn.Parameter(parameter.full_tensor(), requires_grad=False)
                    divided.callback(part._parameters.__setitem__, name, parameter)
        yield


@contextmanager
def gathered_in_forward(model: nn.Module) -> Iterator[None]:
    """Each module of `model` has its own parameters whole while its forward runs, as in a DeepSpeed engine. Never more
    than those of the running modules are in memory. All processes must run the same number of forward passes.

    Args:
        model (`nn.Module`): Any model; nothing happens for one that ZeRO-3 did not divide.
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


@contextmanager
def part_of(model: nn.Module, part: nn.Module) -> Iterator[Callable[..., Any]]:
    """What runs a module inside of `model` alone. FSDP2 takes the module whose forward runs first for the outermost
    one, and would refuse the whole model from then on, so there it is run as a forward of the whole model.

    Args:
        model (`nn.Module`): Any model, as the engine wraps it.
        part (`nn.Module`): One of its modules.
    """
    if not isinstance(model, FSDPModule):
        yield part
        return
    name = "forward_of_part"
    setattr(model, name, lambda *args, **kwargs: part(*args, **kwargs))
    try:
        register_fsdp_forward_method(model, name)
        yield getattr(model, name)
    finally:
        delattr(model, name)


@contextmanager
def engine_at_rest(engine: nn.Module) -> Iterator[None]:
    """A DeepSpeed engine of ZeRO-3 leaves its model alone inside, and trains afterwards as if nothing had run
    meanwhile; nothing happens for other models. Forward passes need [`gathered_in_forward`].

    The engine fetches parameters in the order that it saw modules run in. Training reads the weight of the LM head
    without running that module, and passes in which it runs have the weight missing in the next backward.

    Args:
        engine (`nn.Module`): A model as it is trained.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from trl.models.utils import add_hooks, remove_hooks

    remove_hooks(engine)
    try:
        yield
    finally:
        add_hooks(engine)
