"""What must hold before heads of a model are aligned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .head import AttentionHead
from .modes import evaluating
from .projection import contributions_add_up
from .registry import HeadAccessor, unwrap_model
from .sharded import gathered, gathered_in_forward


def check_projections(model: nn.Module, accessor: HeadAccessor, layers: Sequence[int]) -> None:
    """Runs a few tokens through the text decoder and checks, on what really flowed through the output projections of
    `layers`, that the contributions of all heads plus the bias add up to the projection's output.

    Raises:
        `ValueError`: If a projection is bypassed, or its heads don't add up (wrong head size, fused or patched
            projection).
    """
    model_type = unwrap_model(model).config.model_type
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            seen[layer] = (args[0].detach().flatten(0, -2), out.detach().flatten(0, -2))

        return accessor.projection(layer).register_forward_hook(hook)

    handles = [watch(layer) for layer in layers]
    embeddings = accessor.decoder.get_input_embeddings().weight
    try:
        with gathered([embeddings]):
            tokens = torch.arange(8, device=embeddings.device).remainder(embeddings.shape[0])[None]
        with evaluating(model), gathered_in_forward(model):
            accessor.decoder(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
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


def check_trainable(model: nn.Module, accessor: HeadAccessor, heads: Sequence[AttentionHead]) -> None:
    """Checks that every chosen head depends on a trainable parameter.

    Counted are parameters of earlier layers, of the head's own attention module and the norm before it, and whatever
    is not part of the decoder's layers (vision tower, projector, embeddings). Not counted is what comes after the
    head: later layers, its own layer's MLP, the final norm, the LM head.

    Raises:
        `ValueError`: Naming the head whose alignment gradient would be nothing.
    """
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    after = _after_last_layer(model, accessor)
    inside_layers = {id(p) for layer in accessor.layers for p in layer.parameters()}
    if trainable - inside_layers - after:  # embeddings, vision tower, projector: below every head
        return
    for head in heads:
        below = {id(p) for layer in accessor.layers[: head.layer] for p in layer.parameters()}
        below |= {id(p) for p in accessor.attention(head.layer).parameters()}
        for name, child in accessor.layers[head.layer].named_children():
            if "norm" in name and "input" in name:  # the norm before attention; the others come after the head
                below |= {id(p) for p in child.parameters()}
        if not below & trainable:
            raise ValueError(
                f"No trainable parameter influences attention head {head}: its alignment gradient would be nothing. "
                f"Train something at or below layer {head.layer} (for LoRA, `target_modules` and `layers_to_transform` "
                "decide), or choose other heads with `aligned_heads`."
            )


def _after_last_layer(model: nn.Module, accessor: HeadAccessor) -> set[int]:
    """Parameters that only run after the decoder's layers: its final norm and an LM head that is not tied."""
    base = unwrap_model(model)
    embeddings = {id(p) for p in accessor.decoder.get_input_embeddings().parameters()}
    output = base.get_output_embeddings()
    after = set() if output is None else {id(p) for p in output.parameters()}
    for name, child in accessor.decoder.named_children():
        if "norm" in name:
            after |= {id(p) for p in child.parameters()}
    return after - embeddings
