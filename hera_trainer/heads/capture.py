"""Reading pooled head representations out of a running forward pass, and feeding their gradient back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .accessor import HeadAccessor
from .head import AttentionHead
from .modes import compiling_with_hooks, without_autocast
from .projection import project_heads


def check_positions(x: Tensor, mask: Tensor) -> None:
    """Raises a `ValueError` unless hidden states `[B, T, d]` belong to the positions of `mask`, `[B, T]`."""
    if x.ndim != 3 or x.shape[:2] != mask.shape:
        raise ValueError(
            f"The language model runs on hidden states of shape {list(x.shape)}, but the batch has labels of shape "
            f"{list(mask.shape)}: its tokens cannot be matched. Packing, padding-free batches, sequence parallelism "
            "and prompt-learning adapters (prefix, prompt tuning) do this. Turn them off, or set `alignment_weight=0`."
        )


def pool_heads(x: Tensor, mask: Tensor, num_heads: int, heads: Sequence[int] | None = None) -> Tensor:
    """Mean of heads' slices over the positions of each sample that count.

    Args:
        x (`Tensor` of shape `[B, T, num_heads * d_head]`): Input of an output projection.
        mask (`BoolTensor` of shape `[B, T]`): Positions to pool over.
        num_heads (`int`): Number of heads that share the last dimension.
        heads (sequence of `int`, *optional*): Heads to pool, all by default.

    Returns:
        `Tensor` of shape `[B, h, d_head]`, float32; zeros for a sample without such a position.
    """
    check_positions(x, mask)
    x = x.unflatten(-1, (num_heads, -1))  # [B, T, H, d_head]
    if heads is not None:
        x = x[:, :, list(heads)]
    count = mask.sum(1).clamp(min=1)
    with without_autocast(x):
        # Masked before the sum: attention may leave NaN at padding positions, and 0 * NaN is NaN.
        total = x.float().masked_fill(~mask[:, :, None, None], 0.0).sum(1)
    return total / count[:, None, None]


@dataclass
class _Slot:
    """What one layer's tap keeps between forward and backward."""

    leaf: Tensor | None = None  # [B, h, d_model], the loss is built on it
    recomputed: int = 0  # how often the layer was run again under activation checkpointing


class _Tap(torch.autograd.Function):
    """Identity on the projection's output; its backward hands the leaf's gradient to the head vectors.

    The loss on the leaves is younger in the graph than any layer, so its backward has filled `leaf.grad` before a
    layer's backward reaches the tap. Recomputation under activation checkpointing builds the tap anew on the
    recomputed tensors, while the leaf stays the one of the first forward.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, vectors: Tensor, slot: _Slot) -> Tensor:
        ctx.slot = slot
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        leaf = ctx.slot.leaf
        if leaf is None or leaf.grad is None:
            raise RuntimeError(
                "The alignment loss gave no gradient to an attention head before the layer's backward. It must be part "
                "of the loss that is given to `backward`. If you override `compute_loss`, add to the loss it returns."
            )
        return grads[0], leaf.grad, None


@dataclass
class _Record:
    """One forward pass under observation."""

    mask: Tensor
    train: bool
    last_layer: int | None = None  # the forward is left after this layer's projection
    slots: dict[int, _Slot] = field(default_factory=dict)
    forward_done: bool = False


class ForwardDone(Exception):
    """Leaves a forward pass of which nothing more is needed."""


@contextmanager
def done_after(module: nn.Module | None) -> Iterator[None]:
    """Each forward of `module` ends with [`ForwardDone`] inside: it is run, and what calls it is left. Nothing happens
    without a module."""

    def hook(*_: Any) -> None:
        raise ForwardDone

    handle = None if module is None else module.register_forward_hook(hook)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


class HeadCapture:
    """Reads the pooled representations of attention heads from a model's forward pass.

    Between `start` and `stop`, the first pass through each chosen layer is read; every other forward of the model is
    left alone. In training, the representations are leaves of the autograd graph: a loss built on `vectors()` and
    added to the loss of that forward pass gets its gradient to the model through the tap in the layer, under any kind
    of activation checkpointing.

    Args:
        accessor ([`~heads.registry.HeadAccessor`]): The model's attention heads.
        heads (sequence of [`AttentionHead`]): Heads to read, in the order of `vectors()`.
        model_type (`str`): Named in error messages.

    Example:

    ```python
    >>> capture = HeadCapture(get_head_accessor(model), [AttentionHead(3, 4)], "llava")
    >>> with capture.attached():
    ...     capture.start(mask)
    ...     loss = model(**batch).loss
    ...     loss = loss + 0.01 * criterion(capture.vectors(), teacher)
    ...     loss.backward()
    ...     capture.stop()
    ```
    """

    def __init__(self, accessor: HeadAccessor, heads: Sequence[AttentionHead], model_type: str) -> None:
        known = set(accessor.heads())
        for head in heads:
            if head not in known:
                there = f"has heads in layers {', '.join(map(str, accessor.layers_with_heads))}"
                if head.layer in accessor.layers_with_heads:
                    there = f"has {accessor.num_heads(head.layer)} heads in layer {head.layer}, counted from 0"
                raise ValueError(
                    f"Attention head {head} does not exist in this {model_type!r} model, which {there}. Correct "
                    "`aligned_heads`."
                )
        if len(set(heads)) != len(heads):
            raise ValueError("`aligned_heads` names an attention head twice.")
        self.accessor = accessor
        self.heads = list(heads)
        self.model_type = model_type
        self._by_layer: dict[int, list[int]] = {}
        for head in self.heads:
            self._by_layer.setdefault(head.layer, []).append(head.head)
        self.dtype = torch.float32  # what the heads compute in, once a forward pass was read
        self._record: _Record | None = None
        self._attached = 0
        self._reading = False
        self._stop_early = False

    @property
    def layers(self) -> list[int]:
        """Layers with a chosen head, ascending."""
        return sorted(self._by_layer)

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are in place."""
        return self._attached > 0

    @contextmanager
    def attached(self) -> Iterator[HeadCapture]:
        """Hooks in place inside, none of them left afterwards, also after an error. May be nested."""
        with ExitStack() as stack:
            if not self._attached:
                stack.enter_context(compiling_with_hooks())
                for layer in self.layers:
                    hook = partial(self._on_projection, layer)
                    stack.callback(self.accessor.projection(layer).register_forward_hook(hook).remove)
            self._attached += 1
            try:
                yield self
            finally:
                self._attached -= 1
                if not self._attached:
                    self.stop()

    def start(self, mask: Tensor, train: bool = True) -> None:
        """Observe the next forward pass.

        Args:
            mask (`BoolTensor` of shape `[B, T]`): Positions to pool over.
            train (`bool`, *optional*, defaults to `True`): Whether a loss on `vectors()` will be backpropagated.
        """
        last_layer = self.layers[-1] if self._stop_early else None
        self._record = _Record(mask, train and not self._reading, last_layer)

    @contextmanager
    def reading(self, stop_early: bool) -> Iterator[None]:
        """Forward passes inside are read for their head representations alone.

        Args:
            stop_early (`bool`): Leave each by [`ForwardDone`] after the deepest chosen head.
        """
        before = self._reading, self._stop_early
        self._reading, self._stop_early = True, stop_early
        try:
            yield
        finally:
            self._reading, self._stop_early = before
            self.stop()

    def read(
        self, forward: Callable[[dict[str, Any]], Any], inputs: dict[str, Any], mask: Tensor, stop_early: bool
    ) -> Tensor:
        """Runs a forward pass for its head representations alone, to be called without gradients.

        Args:
            forward (`Callable`): Runs the model on `inputs`.
            inputs (`dict`): Its inputs.
            mask (`BoolTensor` of shape `[B, T]`): Positions to pool over.
            stop_early (`bool`): Leave the forward pass after the deepest chosen head.

        Returns:
            `Tensor` of shape `[m, B, d_model]`, as `vectors` gives it.
        """
        with self.reading(stop_early):
            self.start(mask)
            with suppress(ForwardDone):
                forward(inputs)
            return self.vectors()

    def stop(self) -> None:
        """Forget the observed pass. To be called after its backward, which may recompute activations."""
        self._record = None

    def vectors(self) -> Tensor:
        """Head representations z of the observed forward pass, and the end of that pass.

        Returns:
            `Tensor` of shape `[m, B, d_model]`, float32, in the order of `heads`.

        Raises:
            `RuntimeError`: If the forward pass did not go through the output projection of a chosen layer.
        """
        record = self._record
        missing = [layer for layer in self.layers if record is None or layer not in record.slots]
        if record is None or missing:
            raise RuntimeError(
                f"The forward pass of this {self.model_type!r} model did not go through the attention output "
                f"projection of layer {missing[0]}, so its heads cannot be aligned. A patched forward (Unsloth, fused "
                "kernels) does this: use the model as transformers ships it, or set `alignment_weight=0` to train "
                "without alignment."
            )
        record.forward_done = True
        vectors = []
        for head in self.heads:
            leaf = record.slots[head.layer].leaf
            assert leaf is not None  # filled when the slot is made
            vectors.append(leaf[:, self._by_layer[head.layer].index(head.head)])
        return torch.stack(vectors)

    @torch.compiler.disable
    def _on_projection(self, layer: int, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """Post-forward hook: the first firing reads, recomputation during backward repeats the same arithmetic.

        Compiled code leaves for it and comes back: what it writes down and its tap must not be traced away.
        """
        record = self._record
        if record is None:
            return None
        slot = record.slots.get(layer)
        first = slot is None
        if not first and not (record.forward_done and torch.is_grad_enabled()):
            return None  # a further forward (label smoothing, metrics): the loss was built on the first one
        if slot is not None:
            slot.recomputed += 1
            # The backward visits the passes through a looped layer from the last to the first, which is the one read.
            if slot.recomputed % self.accessor.passes(layer):
                return None
        num_heads, heads = self.accessor.num_heads(layer), self._by_layer[layer]
        with without_autocast(out):
            vectors = project_heads(module, pool_heads(args[0], record.mask, num_heads, heads), heads)
        if slot is None:
            # The leaf needs a gradient also where grad mode is off: reentrant checkpointing runs the first forward so.
            slot = record.slots[layer] = _Slot(vectors.detach().requires_grad_(record.train))
            self.dtype = args[0].dtype
            if layer == record.last_layer:
                raise ForwardDone
        return _Tap.apply(out, vectors, slot) if torch.is_grad_enabled() else None
