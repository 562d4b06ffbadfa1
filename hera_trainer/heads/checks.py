"""What must hold before heads of a model are aligned."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn

from ..common.redaction import public_name
from ..common.sharded import gathered, gathered_in_forward
from .accessor import HeadAccessor
from .capture import ForwardDone, hidden_states_of
from .head import AlignedUnit, DecoderLayer
from .modes import evaluating, needs_whole_forward
from .projection import contributions_add_up, passes_gradient, project_heads
from .ranking import HeadRanking
from .registry import get_head_accessor, unwrap_model


def check_compiled(model: nn.Module) -> None:
    """Refuses a model that `torch.compile` wrapped, whole or in parts: the forward that SFTTrainer sets on the model
    bypasses the wrapper, so nothing would be compiled, and a wrapped part changes the names under which weights are
    saved. Compiling in place (`model.compile()`) does neither.

    Raises:
        `ValueError`: Naming the settings that pass.
    """
    if any(is_compiled_module(module) for module in model.modules()):
        raise ValueError(
            "The model, or a part of it, is the result of `torch.compile(...)`, which training would bypass or save "
            "under other names. Pass the model as it was before and set `torch_compile=True`, or compile in place with "
            "`model.compile()` (for single layers, `layer.compile()`)."
        )


def check_decoder(model: nn.Module, accessor: HeadAccessor) -> None:
    """Refuses a model whose text decoder does not read the text that has the labels, token by token.

    Raises:
        `ValueError`: If it is an encoder-decoder, or its decoder can't run on text alone.
    """
    config = unwrap_model(model).config
    problem = f"its text decoder can't run without {accessor.needs}" if accessor.needs else ""
    if getattr(config, "is_encoder_decoder", False):
        problem = "it is an encoder-decoder, whose decoder's positions are not those of the labels"
    if problem:
        raise ValueError(
            f"HeRATrainer can't align the heads of this {config.model_type!r} model: {problem}. Train a decoder-only "
            "model, read the heads with `HeadCapture` in a loop of your own, or set `alignment_weight=0`."
        )


# Adapters by which a token's output depends on other tokens, or on more than what the projection is given: where aLoRA
# acts, and which of several adapters Arrow and Lily mix, is decided for whole tokens, not for a head's slice of one.
_MIXED = {"ALoraLinearVariant": "aLoRA", "ArrowLinearVariant": "Arrow"}


def _mixing_adapter(projection: nn.Module) -> str | None:
    """Name of an adapter on a projection whose update cannot be told apart by heads, if it has one."""
    if type(projection).__module__.startswith("peft.tuners.lily."):
        return "Lily"
    variants = getattr(projection, "lora_variant", {}).values()
    return next((_MIXED[name] for variant in variants if (name := type(variant).__name__) in _MIXED), None)


def check_device_map(model: nn.Module, what: str, cure: str = "") -> None:
    """Refuses a model that is split over several devices, where heads are to be read.

    Args:
        model (`nn.Module`): The model.
        what (`str`): What cannot be done there, for the message.
        cure (`str`, *optional*): What else to do than to load it on one device.

    Raises:
        `ValueError`: If it is.
    """
    devices = {str(device) for device in getattr(unwrap_model(model), "hf_device_map", {}).values()}
    if len(devices) > 1:
        raise ValueError(
            f"The model is split over several devices ({', '.join(sorted(devices))}), which {what} does not support "
            f"yet. Load it on one device (`device_map=None`){cure}."
        )


def check_attention_kernel(model: nn.Module, device: torch.device) -> None:
    """Refuses a model that is read on the CPU, since an engine moves it later, with an attention that cannot run there.

    Args:
        model (`nn.Module`): The model, where it is read.
        device (`torch.device`): Where it will be trained.

    Raises:
        `ValueError`: If so.
    """
    accessor = get_head_accessor(model)
    kernel = str(getattr(getattr(accessor.decoder, "config", None), "_attn_implementation", None))
    if "flash" in kernel and accessor.device.type == "cpu" != device.type:
        raise ValueError(
            "FSDP and ZeRO-3 leave the model on the CPU until training begins, and heads are ranked and checked there: "
            f"`attn_implementation={kernel!r}` has no kernel for it. Load the model with `attn_implementation='sdpa'`."
        )


def check_projections(model: nn.Module, accessor: HeadAccessor, layers: Sequence[int]) -> None:
    """Runs a few tokens through the text decoder and checks, on what really flowed through the output projections of
    `layers`, that the contributions of all heads plus the bias add up to the projection's output.

    Raises:
        `ValueError`: If a projection is bypassed, or its heads don't add up (wrong head size, fused or patched
            projection, an adapter that heads have in common), or it passes no gradient.
    """
    model_type = unwrap_model(model).config.model_type
    for layer in layers:
        if (adapter := _mixing_adapter(accessor.projection(layer))) is not None:
            raise ValueError(
                f"The {adapter} adapter on the output projection of layer {layer} cannot be told apart by attention "
                "heads, so they would be aligned without it. Leave the output projections out of its `target_modules`, "
                'or train with `alignment_granularity="layer"`.'
            )
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            seen[layer] = (args[0].detach().flatten(0, -2), out.detach().flatten(0, -2))

        return accessor.projection(layer).register_forward_hook(hook)

    handles = [watch(layer) for layer in layers]
    try:
        with evaluating(model), gathered_in_forward(model):
            accessor.decoder(**_some_tokens(accessor))
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        if layer not in seen:
            raise ValueError(
                f"The text decoder of this {model_type!r} model does not call the output projection of layer {layer}: "
                "its forward is patched. Use the model as transformers ships it, or set `alignment_weight=0`."
            )
        with evaluating(model), gathered(accessor.projection(layer).parameters()):
            if not contributions_add_up(accessor.projection(layer), accessor.num_heads(layer), *seen[layer]):
                raise ValueError(
                    f"In layer {layer} of this {model_type!r} model, the contributions of the "
                    f"{accessor.num_heads(layer)} attention heads do not add up to the output of the output "
                    "projection, so they would be aligned wrongly. The projection is patched, or the accessor of this "
                    "model type is wrong: see `hera_trainer.register_head_accessor`."
                )
            if not passes_gradient(accessor.projection(layer), accessor.num_heads(layer)):
                raise ValueError(
                    f"In layer {layer} of this {model_type!r} model, the output projection passes no gradient back, so "
                    "nothing below it can be trained: its kernel is made for inference, or rounds its input (torchao's "
                    "dynamic schemes). Load the model in a precision that can be trained, such as a weight-only scheme."
                )


def check_trainable(
    model: nn.Module,
    accessor: HeadAccessor,
    heads: Sequence[AlignedUnit],
    batch: Callable[[], dict[str, Any]] | None = None,
) -> None:
    """Checks that every chosen head or layer depends on a trainable parameter, by the graph that autograd builds.

    A few tokens go through the text decoder. Heads that nothing trainable reaches there (a frozen language model) can
    still depend on what lies before it, a projector or a vision tower: then a batch with an image goes through the
    whole model. Nothing is kept for a backward pass, so this takes no more memory than a forward pass without
    gradients, and works under quantization, adapters, activation checkpointing and ZeRO-3 alike. That an adapter is
    active and not merged, that a layer comes before the head, that images enter below it: the graph knows.

    Args:
        model (`nn.Module`): The model.
        accessor ([`~heads.accessor.HeadAccessor`]): Its attention heads.
        heads (sequence of [`AttentionHead`] or of [`DecoderLayer`]): The aligned heads or layers.
        batch (`Callable`, *optional*):
            Returns inputs of the model with at least one image, called if they are needed. Without it, trainable
            parameters outside of the decoder, other than the LM head's, are taken to influence all heads.

    Raises:
        `ValueError`: Naming the head or layer whose alignment gradient would be nothing.
    """
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    layers = {head.layer: head for head in sorted(heads)}  # the heads of one layer depend on the same
    tokens = _some_tokens(accessor)
    units = list(layers.values())
    reached = _reached_layers(model, accessor, units, trained.keys(), lambda: accessor.decoder(**tokens))
    if len(reached) < len(units) and _outside_decoder(model, accessor) & trained.keys():
        if batch is None:
            return
        device = tokens["input_ids"].device
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch().items()}
        reached |= _reached_layers(model, accessor, units, trained.keys(), lambda: model(**inputs, use_cache=False))
    for head in heads:
        if head.layer not in reached:
            names = ", such as " + " and ".join(f"`{name}`" for name in list(trained.values())[:2]) if trained else ""
            raise ValueError(
                f"No trainable parameter influences {head.kind} {head}: its alignment gradient would be nothing. "
                f"{len(trained)} parameters are trained{names}. Train something at or below layer {head.layer} (for "
                "LoRA, `target_modules` and `layers_to_transform` decide, and the adapter must be active and not "
                "merged; a projector counts where images enter at or below that layer), or choose others with "
                "`aligned_heads`."
            )


def check_same_modules(model: nn.Module, accessor: HeadAccessor, units: Sequence[AlignedUnit]) -> None:
    """Refuses a model in which what is read was replaced since its heads were found, as by an adapter put on it later.

    Raises:
        `ValueError`: Saying what to do first.
    """
    now = get_head_accessor(model)
    if any(now.module(unit) is not accessor.module(unit) for unit in units):
        raise ValueError(
            "Layers of the model were replaced after the trainer was made (an adapter on them, or quantization), and "
            "their heads would be read without it. Change the model first, and then make the trainer."
        )


def _some_tokens(accessor: HeadAccessor) -> dict[str, Any]:
    """Inputs of the text decoder."""
    embeddings = accessor.decoder.get_input_embeddings().weight
    with gathered([embeddings]):
        tokens = torch.arange(8, device=embeddings.device).remainder(embeddings.shape[0])[None]
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}


def _reached_layers(
    model: nn.Module,
    accessor: HeadAccessor,
    units: Sequence[AlignedUnit],
    trained: Set[int],
    forward: Callable[[], Any],
) -> set[int]:
    """The layers of those of `units`, one a layer and ascending, that depend on a trained parameter in a forward
    pass."""
    seen: set[int] = set()  # of a looped layer, the first pass is the one whose heads are read
    reached: set[int] = set()
    whole = needs_whole_forward(model)

    def watch(unit: AlignedUnit) -> Any:
        layer = unit.layer

        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if layer in seen:
                return
            seen.add(layer)
            if isinstance(unit, DecoderLayer):
                read = hidden_states_of(out)
            else:
                heads = args[0].flatten(0, -2).mean(0).unflatten(0, (accessor.num_heads(layer), -1))[None]
                read = project_heads(module, heads[:, :1], [0])
            if _depends_on(read, trained):
                reached.add(layer)
            if unit == units[-1] and not whole:
                raise ForwardDone

        return accessor.module(unit).register_forward_hook(hook)

    handles = [watch(unit) for unit in units]
    nothing_saved = torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda saved: saved)
    try:
        # In eval mode nothing is checkpointed: reentrant checkpoints would hide the parameters inside from the graph.
        with evaluating(model), torch.enable_grad(), nothing_saved, gathered_in_forward(model), suppress(ForwardDone):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return reached


def _depends_on(tensor: Tensor, parameters: Set[int]) -> bool:
    """Whether the graph of `tensor` begins at one of the parameters with these ids."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in parameters:
            return True
        nodes += [source for source, _ in node.next_functions]
    return False


def trains_outside_decoder(model: nn.Module, accessor: HeadAccessor) -> bool:
    """Whether all that is trained belongs to neither the text decoder nor the LM head."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    return bool(trained) and trained <= _outside_decoder(model, accessor)


def _outside_decoder(model: nn.Module, accessor: HeadAccessor) -> set[int]:
    """Parameters of neither the text decoder nor the LM head."""
    output = unwrap_model(model).get_output_embeddings()
    inside = {id(p) for module in (accessor.decoder, output) if module is not None for p in module.parameters()}
    return {id(p) for p in model.parameters()} - inside


def check_ranking(ranking: HeadRanking, accessor: HeadAccessor, model_type: str) -> None:
    """Refuses a ranking of another model.

    Raises:
        `ValueError`: If the layers and heads of the ranking are not those of the model.
    """
    if len(ranking.scores) != accessor.num_layers or ranking.heads() != accessor.heads():
        raise ValueError(
            f"The head ranking was computed for {ranking.model or 'another model'!r} with {len(ranking.scores)} layers "
            f"and {len(ranking.heads())} heads; this {model_type!r} model has {accessor.num_layers} layers and "
            f"{len(accessor.heads())} heads. Use the ranking of this model, or leave `head_ranking_path` and "
            "`head_ranking` at `None` to compute it."
        )


def other_ranking_advice(
    ranking: HeadRanking, *, teacher: str, k: int, clip_quantile: float | None, center: bool, normalize: bool
) -> str | None:
    """What to say of a ready ranking that ranks heads otherwise than a run would, which chooses others.

    Args:
        ranking ([`HeadRanking`]): Ready ranking.
        teacher (`str`): Name of the run's teacher; empty where it is not known.
        k, clip_quantile, center, normalize: As [`rank_heads`] would be called.

    Returns:
        `str` or `None`: What differs, and what to do; `None` if nothing does.
    """
    differs = []
    if ranking.teacher and teacher and public_name(ranking.teacher) != public_name(teacher):
        differs.append(f"the teacher is {ranking.teacher!r}, not {teacher!r}")
    if ranking.k != k:
        differs.append(f"k is {ranking.k}, not {k}")
    if ranking.context != "text":
        differs.append("images were in context")
    own = replace(ranking, clip_quantile=clip_quantile, center=center, normalize=normalize)
    if ranking.spaces != own.spaces:
        ranked, asked = (spaces.removeprefix(", ") or "by cosines" for spaces in (ranking.spaces, own.spaces))
        differs.append(f"vectors were compared {ranked}, not {asked}")
    if not differs:
        return None
    return (
        f"The head ranking that was given is not the one that this run would make: {'; '.join(differs)}. Heads are "
        "chosen from it as it is. Leave `head_ranking_path` and `head_ranking` at `None` to rank them by this run's "
        "settings."
    )


def resumed_heads_advice(heads: Sequence[AlignedUnit], chosen: Sequence[AlignedUnit]) -> str | None:
    """What to say where a run goes on with the heads of its checkpoint, although a ranking was given that would choose
    others; `None` if it would not."""
    if set(heads) == set(chosen):
        return None
    return (
        f"The run goes on with the heads of its checkpoint, {' '.join(map(str, heads))}, and not with those of the "
        f"head ranking that was given, {' '.join(map(str, chosen))}. To align these, begin a new run in another "
        "`output_dir`."
    )
