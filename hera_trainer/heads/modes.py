"""Running a model for a moment in another mode, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import XLoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.pytorch_utils import Conv1D

from .quantized import frozen_packing, restored_flags


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and nothing compiled inside; every module's own flag is restored afterwards.

    4-bit layers keep their training layout (see [`~heads.quantized.frozen_packing`]).
    """
    with restored_flags(list(model.modules())):
        model.eval()
        # Compiling for a few passes costs more than it saves, and compiled code would go on without hooks placed later.
        with frozen_packing(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Nothing is drawn at random in `module` and below, everything else is as it is.

    Not every adapter drops with an `nn.Dropout`: LoHa and LoKr look at their own flag, BOFT has a layer of its own,
    PVeRA and MonteCLoRA draw noise. So PEFT's layers are in eval mode as a whole. The layer that they wrap keeps its
    mode, by which quantized ones choose a kernel; only its dropout, if it has any, is off.
    """
    adapted: set[nn.Module] = set()
    wrapped: set[nn.Module] = set()
    for layer in module.modules():
        parts = layer.modules()
        if isinstance(layer, BaseTunerLayer):
            adapted.update(parts)
            wrapped.update(layer.get_base_layer().modules())
    random = [layer for layer in module.modules() if layer in adapted - wrapped or isinstance(layer, _DropoutNd)]
    with restored_flags(random):
        for layer in random:
            layer.training = False  # not by `eval()`, which goes on to the layers inside
        yield


def needs_whole_forward(model: nn.Module) -> bool:
    """Whether a forward pass must not be left by an exception: for aLoRA, PEFT places hooks in each, and takes them
    away at its end only."""
    configs = getattr(model, "peft_config", None) or {}
    return any(getattr(config, "alora_invocation_tokens", None) for config in configs.values())


@contextmanager
def without_bias(module: nn.Module) -> Iterator[None]:
    """Biases off in `module` and below (for a LoRA layer: those of its base layer and of the adapters).

    A bias may be a parameter, a buffer (GPTQ, AWQ) or a mere attribute (HQQ); all of them may be `None`.
    """
    # PEFT's wrappers have no bias of their own: they show that of the layer inside, which is met below.
    layers = [m for m in module.modules() if not isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    biases = {layer: layer.bias for layer in layers if isinstance(getattr(layer, "bias", None), Tensor)}
    try:
        for layer, bias in biases.items():
            # The forward of `Conv1D` cannot do without.
            layer.bias = nn.Parameter(torch.zeros_like(bias), False) if isinstance(layer, Conv1D) else None
        yield
    finally:
        for layer, bias in biases.items():
            layer.bias = bias


@contextmanager
def compiling_with_hooks() -> Iterator[None]:
    """Lets `torch.compile` trace modules that have hooks as those without differ from them, and forgets what it traced
    before the hooks came. Dropout masks of compiled code are those of eager code inside."""
    # Not with the other imports: only who trains needs them, and they are slow.
    import torch._dynamo.config
    import torch._inductor.config

    torch.compiler.reset()
    # By default, code compiled for a layer without a hook runs for an equal layer with one, and leaves the hook out.
    guarded = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
    with guarded, torch._inductor.config.patch(fallback_random=True):
        yield


# Ways to initialize LoRA that take out of the base weights what the adapter then adds (PiSSA, OLoRA, ...).
_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adapters_complete_base(model: nn.Module) -> bool:
    """Whether the base weights are a model only together with the adapters, which were initialized from them."""
    found = (getattr(module, "peft_config", None) for module in model.modules())
    adapters = (adapter for adapters in found if isinstance(adapters, dict) for adapter in adapters.values())
    ways = {getattr(adapter, "init_lora_weights", None) for adapter in adapters}
    return any(isinstance(way, str) and way.lower().startswith(_FROM_BASE) for way in ways)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model computes what it would without its adapters inside, whether they are those of a `PeftModel` or were
    injected into a model. Which layers have theirs on, which adapters are active and which parameters are trained is
    afterwards as it was. Merged adapters are merged again, up to rounding. Nothing happens for a model without any."""
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    disabled = [layer.disable_adapters for layer in layers]
    merged = [(x, list(x.merged_adapters)) for x in layers if isinstance(x, BaseTunerLayer) and x.merged]
    routers = [router for router in model.modules() if isinstance(router, XLoraModel) and not router.disabled]
    # PEFT makes every parameter of an active adapter trainable when it switches the adapter on again.
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for layer, _ in merged:
            layer.unmerge()  # a layer that is off would do so in its first forward
        for layer in layers:
            layer.enable_adapters(False)
        for router in routers:
            router.disabled = True  # it replaces the forward of its layers, which then ask it alone
        yield
    finally:
        for router in routers:
            router.disabled = False
        for layer, was_disabled in zip(layers, disabled, strict=True):
            layer.enable_adapters(not was_disabled)
        for layer, adapters in merged:
            layer.merge(adapter_names=adapters)
        for parameter, trained in before:
            parameter.requires_grad_(trained)
