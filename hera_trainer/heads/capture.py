"""Reading pooled representations of heads or layers out of a running forward pass, and feeding their gradient back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..common.precision import exact_products
from .accessor import HeadAccessor
from .head import AlignedUnit, AttentionHead, granularity_of
from .modes import compiling_with_hooks
from .projection import project_heads


def check_positions(x: Tensor, mask: Tensor) -> None:
    """Raises a `ValueError` unless hidden states `[B, T, d]` belong to the positions of `mask`, `[B, T]`."""
    if x.ndim > 3:
        raise ValueError(
            f"The layers of this language model put out several residual streams side by side, {list(x.shape)}, so "
            'that none of them is the layer\'s representation. Align heads (`alignment_granularity="head"`).'
        )
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
    with exact_products(x.device):
        # Masked before the sum: attention may leave NaN at padding positions, and 0 * NaN is NaN.
        total = x.float().masked_fill(~mask[:, :, None, None], 0.0).sum(1)
    return total / count[:, None, None]


def hidden_states_of(out: Any) -> Tensor:
    """The residual stream `[B, T, d_model]` in what a decoder layer returns, which may be a tuple."""
    return out[0] if isinstance(out, tuple) else out


# Called in a backward pass with the gradient at the output of a projection (or of an aligned layer) `[B, T, d_model]`,
# that of the loss at the vectors `[B, h, d_model]` read there, and the positions that were pooled, `[B, T]`.
GradientObserver = Callable[[Tensor, Tensor, Tensor], None]


@dataclass
class _Slot:
    """What one layer's tap keeps between forward and backward."""

    leaf: Tensor  # [B, h, d_model], the loss is built on it
    mask: Tensor  # [B, T], positions that were pooled
    on_gradients: GradientObserver | None = None
    runs: int = 1  # how often the layer was run, but for recomputations
    others: WeakSet[_Other] = field(default_factory=WeakSet)  # runs in further forwards whose graphs are still there
    recomputed: int = 0  # how often the layer was run again under activation checkpointing
    delivered: bool = False  # the gradient has gone to the vectors that were read

    def is_own_turn(self, passes: int) -> bool:
        """Whether the recomputation that begins is one of the pass that was read. The backward visits what was run
        last first: further forwards, and of a looped layer the last of its passes."""
        self.recomputed += 1
        own = self.recomputed - len(self.others)
        return not self.delivered and own > 0 and own % passes == 0


class _Other:
    """A run of a layer in a further forward. It lives as long as its autograd graph does."""


class _Held(torch.autograd.Function):
    """Identity, whose graph holds an object."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, held: object) -> Tensor:
        ctx.held = held
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Tap(torch.autograd.Function):
    """Identity on a module's output; its backward hands the leaf's gradient to the vectors that were read there.

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
        slot = ctx.slot
        if slot.leaf.grad is None:
            raise RuntimeError(
                "The alignment loss gave no gradient to what is aligned before the layer's backward. It must be part "
                "of the loss that is given to `backward`. If you override `compute_loss`, add to the loss it returns."
            )
        if slot.on_gradients is not None:
            slot.on_gradients(grads[0], slot.leaf.grad, slot.mask)
        slot.delivered = True
        return grads[0], slot.leaf.grad, None


@dataclass
class _Record:
    """One forward pass under observation."""

    mask: Tensor
    train: bool
    last_layer: int | None = None  # the forward is left after what is read of this layer
    slots: dict[int, _Slot] = field(default_factory=dict)


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
    """Reads the pooled representations of attention heads, or of whole decoder layers, from a model's forward pass.

    Between `start` and `stop`, the first pass through each chosen layer is read; every other forward of the model is
    left alone. In training, the representations are leaves of the autograd graph: a loss built on `vectors()` and
    added to the loss of that forward pass gets its gradient to the model through the tap in the layer, under any kind
    of activation checkpointing.

    Args:
        accessor ([`~heads.accessor.HeadAccessor`]): The model's attention heads.
        heads (sequence of [`AttentionHead`] or of [`DecoderLayer`]):
            Heads to read, or layers, in the order of `vectors()`.
        model_type (`str`): Named in error messages.
        on_gradients (`Callable`, *optional*):
            Called in the backward pass of each chosen layer with the gradient at the output of the projection (or of
            the aligned layer) `[B, T, d_model]`, that of the loss at the vectors read there `[B, h, d_model]`, and the
            mask `[B, T]`.

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

    def __init__(
        self,
        accessor: HeadAccessor,
        heads: Sequence[AlignedUnit],
        model_type: str,
        on_gradients: GradientObserver | None = None,
    ) -> None:
        self.granularity = granularity_of(heads)
        if any(head.granularity != self.granularity for head in heads):
            raise ValueError("Attention heads and whole layers cannot be read together. Name either in `heads`.")
        known = set(accessor.units(self.granularity))
        for head in heads:
            if head not in known:
                raise ValueError(
                    f"{head.kind.capitalize()} {head} does not exist in this {model_type!r} model, which "
                    f"{_what_there_is(accessor, head)}. Correct `aligned_heads`."
                )
        if len(set(heads)) != len(heads):
            raise ValueError(f"`aligned_heads` names the same {heads[0].kind} twice.")
        self.accessor = accessor
        self.heads = list(heads)
        self.model_type = model_type
        self.on_gradients = on_gradients
        self._by_layer: dict[int, list[AlignedUnit]] = {}
        for head in self.heads:
            self._by_layer.setdefault(head.layer, []).append(head)
        self.dtype = torch.float32  # what the layers compute in, once a forward pass was read
        self._record: _Record | None = None
        self._attached = 0
        self._reading = False
        self._stop_early = False

    @property
    def layers(self) -> list[int]:
        """Layers that are chosen or have a chosen head, ascending."""
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
                    module = self.accessor.module(self._by_layer[layer][0])
                    stack.callback(module.register_forward_hook(partial(self._on_forward, layer)).remove)
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
            stop_early (`bool`): Leave each by [`ForwardDone`] after the deepest chosen head or layer.
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
            stop_early (`bool`): Leave the forward pass after the deepest chosen head or layer.

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
        """Representations z of the observed forward pass, and the end of that pass.

        Returns:
            `Tensor` of shape `[m, B, d_model]`, float32, in the order of `heads`.

        Raises:
            `RuntimeError`: If the forward pass did not go through a chosen layer or its output projection.
        """
        record = self._record
        missing = [layer for layer in self.layers if record is None or layer not in record.slots]
        if record is None or missing:
            what = "" if self.granularity == "layer" else "the attention output projection of "
            raise RuntimeError(
                f"The forward pass of this {self.model_type!r} model did not go through {what}layer {missing[0]}, so "
                "nothing of it can be aligned. A patched forward (Unsloth, fused kernels) does this: use the model as "
                "transformers ships it, or set `alignment_weight=0` to train without alignment."
            )
        vectors = []
        for head in self.heads:
            leaf = record.slots[head.layer].leaf
            vectors.append(leaf[:, self._by_layer[head.layer].index(head)])
        return torch.stack(vectors)

    def _read(self, layer: int, module: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        """Vectors `[B, h, d_model]` of the aligned heads of a layer, whose projection is given `x`, or of the layer
        that puts out `x`."""
        heads = [unit.head for unit in self._by_layer[layer] if isinstance(unit, AttentionHead)]
        if not heads:
            return pool_heads(x, mask, 1)
        return project_heads(module, pool_heads(x, mask, self.accessor.num_heads(layer), heads), heads)

    @torch.compiler.disable
    def _on_forward(self, layer: int, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """Post-forward hook: the first firing reads, recomputation during backward repeats the same arithmetic.

        Compiled code leaves for it and comes back: what it writes down and its tap must not be traced away.
        """
        record = self._record
        if record is None:
            return None
        slot = record.slots.get(layer)
        stream = hidden_states_of(out)
        if slot is not None:
            if torch._C._current_graph_task_id() == -1:  # not in a backward, so it is no recomputation
                slot.runs += 1
                if slot.runs <= self.accessor.passes(layer) or not torch.is_grad_enabled():
                    return None
                slot.others.add(other := _Other())  # a further forward: the loss was built on the first one
                return _in_place_of_stream(out, _Held.apply(stream, other))
            if not slot.is_own_turn(self.accessor.passes(layer)):
                return None
        x = stream if self.granularity == "layer" else args[0]
        with exact_products(stream.device):
            vectors = self._read(layer, module, x, record.mask)
        if slot is None:
            # The leaf needs a gradient also where grad mode is off: reentrant checkpointing runs the first forward so.
            leaf = vectors.detach().requires_grad_(record.train)
            slot = record.slots[layer] = _Slot(leaf, record.mask, self.on_gradients)
            self.dtype = x.dtype
            if layer == record.last_layer:
                raise ForwardDone
        if not torch.is_grad_enabled():
            return None
        return _in_place_of_stream(out, _Tap.apply(stream, vectors, slot))


def _in_place_of_stream(out: Any, stream: Any) -> Any:
    return (stream, *out[1:]) if isinstance(out, tuple) else stream


def _what_there_is(accessor: HeadAccessor, unit: AlignedUnit) -> str:
    if unit.granularity == "layer":
        return f"has {accessor.num_layers} layers, counted from 0"
    if unit.layer in accessor.layers_with_heads:
        return f"has {accessor.num_heads(unit.layer)} heads in layer {unit.layer}, counted from 0"
    return f"has heads in layers {', '.join(map(str, accessor.layers_with_heads))}"
