"""Image features: computed once a micro-batch, in the first pass of a step, and given again in its training pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ..common.limits import HOST_SHARE

# Ends of names of attributes that position embeddings of changing length keep.
_ROTARY = ("max_seq_len_cached", "original_inv_freq", "attention_scaling")
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)


class _Touched(TorchFunctionMode):
    """Notes the tensors that any function of torch is given inside."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def note(self, *values: Any) -> None:
        self.ids.update(map(id, _tensors(values)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(args, kwargs)
        return func(*args, **(kwargs or {}))


@dataclass
class _Call:
    """One call of a module in the first pass.

    Args:
        module (`nn.Module`): The module.
        signature (`object`): Of what shapes and values its arguments were.
        given (`list[Tensor]`): Tensors among its arguments.
        random_states (`list[Tensor]`): The random states before it.
        leaves (`list`, *optional*): What it returned, flattened; `None` where it must be computed again.
        spec (`TreeSpec`, *optional*): How that is put together.
        versions (`list[int]`): How often each of these tensors had been written to in place.
        devices (`list`): Where they belong.
        buffers (`list[tuple[Tensor, Tensor]]`): The module's buffers, and copies of them after the call.
    """

    module: nn.Module
    signature: object
    given: list[Tensor]
    random_states: list[Tensor]
    leaves: list[Any] | None = None
    spec: TreeSpec | None = None
    versions: Sequence[int] = ()
    devices: Sequence[Any] = ()
    buffers: Sequence[tuple[Tensor, Tensor]] = ()

    def returned(self, out: Any) -> None:
        """Takes down what the call returned, unless it depends on more than the arguments."""
        before, now = self.random_states, _random_states(self.module)
        leaves, spec = tree_flatten(out)
        drew = any(not torch.equal(a, b) for a, b in zip(before, now, strict=True))
        if drew or not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
            return
        self.leaves, self.spec = leaves, spec
        self.versions = [leaf._version for leaf in self.tensors()]
        self.devices = [leaf.device if isinstance(leaf, Tensor) else None for leaf in leaves]
        self.buffers = [(buffer, buffer.clone()) for buffer in _state(self.module)]

    def tensors(self) -> list[Tensor]:
        return _tensors(self.leaves)

    def move(self, device: str) -> None:
        """Moves what is kept to another device."""
        self.leaves = [
            leaf.to(device) if isinstance(leaf, Tensor) and not leaf.is_meta else leaf for leaf in self.leaves or []
        ]

    @torch.compiler.disable
    def again(self) -> Any:
        """What the call returned, and the buffers that it left."""
        assert self.leaves is not None and self.spec is not None
        for buffer, value in self.buffers:
            buffer.copy_(value)
        leaves = [
            leaf.to(device) if isinstance(leaf, Tensor) and not leaf.is_meta else leaf
            for leaf, device in zip(self.leaves, self.devices, strict=True)
        ]
        return tree_unflatten(leaves, self.spec)


class ImageFeatures:
    """What a vision tower, a projector and the like compute in the first pass of a step, for the training pass.

    The modules that lie beside the way from the model to its decoder layers are looked at. Where such a module has
    nothing that is trained, and drew no random numbers, the training pass of the same micro-batch is given what it
    returned in the first pass instead of computing it again: the same numbers. What depends on something trained is
    computed again, so that its gradient flows. Buffers that a module moves (batch normalization) move in the training
    pass, as they would without a first pass.

    What is kept are the tensors that anything outside of the module looked at. They stay on the device up to `limit`,
    are moved to main memory up to four times as much, and are computed again beyond that, micro-batch by micro-batch.

    Modules whose parameters are divided among processes (FSDP, DeepSpeed ZeRO-3, tensor parallelism) or that
    communicate themselves (synchronized batch normalization) run as often as ever: all processes must run them alike.

    Args:
        model (`nn.Module`): The transformers model, not wrapped.
        layers (sequence of `nn.Module`): Its decoder layers.
        limit (`float`): Bytes of features that may be kept on the device; 0 for none anywhere.
        compiled (`bool`, *optional*, defaults to `False`):
            Whether a wrapper compiles the model. What looks at which tensors is then unknown, and all of them are kept.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], limit: float, compiled: bool = False) -> None:
        self.limit = limit
        self._model, self._layers, self._compiled = model, list(layers), compiled
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}
        self._stand_ins: dict[nn.Module, Callable[..., Any]] = {}
        # What is given the features: the modules around the first layer, down to it.
        around = (m for m in model.modules() if any(part is self._layers[0] for part in m.modules()))
        self._way = [m for m in around if m is not model and not isinstance(m, nn.ModuleList)]
        self._positions = [m for m in model.modules() if _rotary(m)]
        self._modules: list[nn.Module] = []  # that may be given again what they return
        self._looks = True  # notes what looks at which tensors
        self._recorded: list[_Call] | None = None  # of the micro-batch whose first pass is under way
        self._touched: _Touched | None = None
        self._watching = False
        self._answers: list[_Call] = []  # of the micro-batch that is trained on
        self.reset()

    def reset(self) -> None:
        """Forgets a run."""
        self._before_trained: set[nn.Module] = set()
        self.clear()

    def clear(self) -> None:
        """Forgets a step."""
        self._kept: list[list[_Call]] = []
        self.device_bytes = self.host_bytes = 0

    # The first pass

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Context of the first pass of a step. Buffers are afterwards as they were."""
        self.clear()
        if self.limit:
            found = _beside(self._model, set(self._layers))
            self._modules = [m for m in found if m not in self._before_trained and not _must_run(m)]
        in_place = (m._compiled_call_impl is not None for m in self._model.modules())
        self._looks = not self._compiled and not any(in_place)
        buffers = [(buffer, buffer.clone()) for buffer in _state(self._model)]
        rotary = [(module, dict(module._buffers), _rotary(module)) for module in self._positions]
        try:
            yield
        finally:
            for module, own, values in rotary:  # before their values: they may have been put in their place
                module._buffers.update(own)
                vars(module).update(values)
            for buffer, value in buffers:
                buffer.copy_(value)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Context of the next micro-batch's forward in the first pass, also if it is left by an exception."""
        calls: list[_Call] = []
        self._recorded = calls
        self._touched = _Touched() if self._looks else None
        way = self._way if self._looks and self._modules else []
        try:
            with self._standing_in([*self._modules, *way]):
                yield
        finally:
            self._stop_recording()
            self._keep(calls, self._touched)
            self._touched = None

    def _stop_recording(self) -> None:
        self._watch(False)
        self._recorded = None

    def _watch(self, on: bool) -> None:
        """Begins or stops to note which tensors are looked at."""
        if self._touched is not None and on != self._watching:
            self._watching = on
            self._touched.__enter__() if on else self._touched.__exit__(None, None, None)

    def _keep(self, calls: list[_Call], touched: _Touched | None) -> None:
        """Keeps what a micro-batch's calls returned where there is room for it."""
        for call in calls:
            if [tensor._version for tensor in call.tensors()] != call.versions:
                call.leaves = None  # written to since
        if touched is not None:
            _drop_untouched(calls, touched.ids)
        size = _storage_bytes(tensor for call in calls for tensor in call.tensors())
        if self.device_bytes + size <= self.limit:
            self.device_bytes += size
        elif self.host_bytes + size <= HOST_SHARE * self.limit:
            self.host_bytes += size
            for call in calls:
                if call.leaves is not None:
                    call.move("cpu")
        else:
            calls = []
        self._kept.append(calls)

    # The training pass

    @contextmanager
    def reused(self, position: int) -> Iterator[None]:
        """Context of the training forward of the micro-batch that was the `position`-th in the first pass."""
        if position < len(self._kept):
            self._answers, self._kept[position] = self._kept[position], []
        try:
            with self._standing_in({call.module for call in self._answers}):
                yield
        finally:
            self._answers = []

    @contextmanager
    def _standing_in(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """The modules' forward is `_call` inside."""
        own = {module: module.__dict__.get("forward") for module in modules}
        for module in own:
            self._forwards[module] = module.forward
            module.forward = self._stand_in(module)
        try:
            yield
        finally:
            for module, forward in own.items():
                if forward is None:
                    del module.forward  # the one of its class shows again
                else:
                    module.forward = forward

    def _stand_in(self, module: nn.Module) -> Callable[..., Any]:
        """Always the same for a module: compiled code is valid for one function."""
        if module not in self._stand_ins:

            @wraps(module.forward)
            def forward(*args: Any, **kwargs: Any) -> Any:
                return self._call(module, args, kwargs)

            # Nothing here is compiled, but for what the module itself does.
            self._stand_ins[module] = torch.compiler.disable(forward, recursive=False)
        return self._stand_ins[module]

    @torch.compiler.disable(recursive=False)
    def _call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = self._begin(module, args, kwargs)
        if call is not None and self._recorded is None:
            return call.again()
        out = self._forwards[module](*args, **kwargs)
        if call is not None:
            self._end(call, out)
        return out

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> _Call | None:
        """The call to be recorded, or the one of the first pass that this one repeats."""
        if module in self._way:
            if self._touched is not None:
                self._touched.note(args, kwargs)
            if module is self._layers[0]:  # what a model does with features, it has done by now
                self._stop_recording()
            return None
        if self._recorded is None:
            return self._answer(module, args, kwargs)
        self._watch(False)
        return _Call(module, _signature(args, kwargs), _tensors((args, kwargs)), _random_states(module))

    @torch.compiler.disable
    def _end(self, call: _Call, out: Any) -> None:
        call.returned(out)
        if self._recorded is not None:
            self._recorded.append(call)
            self._watch(True)

    def _answer(self, module: nn.Module, args: Any, kwargs: Any) -> _Call | None:
        """The call of the first pass that this one repeats, if what it returned may be given again."""
        if not self._answers:
            return None
        call = self._answers[0]
        if call.module is not module or call.signature != _signature(args, kwargs):
            self._answers.clear()  # the passes went different ways
            return None
        del self._answers[0]
        if any(tensor.requires_grad for tensor in _tensors((args, kwargs))):
            self._before_trained.add(module)  # a gradient must flow through it
            return None
        return None if call.leaves is None else call


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _drop_untouched(calls: list[_Call], touched: set[int]) -> None:
    """Tensors that nothing looked at (most of a tower's hidden states) become empty ones of their shape."""
    returned: set[int] = set()
    looked_at = set(touched)
    for call in calls:
        # A call that is given nothing but what is given again is itself not computed again.
        numbers = [tensor for tensor in call.given if tensor.is_floating_point() or tensor.is_complex()]
        if call.leaves is None or not returned.issuperset(map(id, numbers)):
            looked_at.update(map(id, call.given))
        returned.update(map(id, call.tensors()))
    for call in calls:
        call.given = []
        if call.leaves is not None:
            call.leaves = [
                torch.empty_like(leaf, device="meta")
                if isinstance(leaf, Tensor) and id(leaf) not in looked_at
                else leaf
                for leaf in call.leaves
            ]


def _beside(model: nn.Module, layers: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules beside the way from a model to its decoder layers, each as a whole: vision towers, projectors."""
    for child in model.children():
        if child in layers or isinstance(child, nn.Embedding):
            continue
        if type(child).forward is nn.Module.forward or not layers.isdisjoint(child.modules()):
            yield from _beside(child, layers)  # a list of modules, or a part of the way
        else:
            yield child


def _must_run(module: nn.Module) -> bool:
    """Whether a module's forward must run: something in it is trained, or all processes must run it alike. What has no
    parameters costs nothing."""
    if any(isinstance(part, (FullyShardedDataParallel, nn.SyncBatchNorm)) for part in module.modules()):
        return True
    parameters = list(module.parameters())
    return not parameters or any(
        p.requires_grad or isinstance(p, DTensor) or hasattr(p, "ds_status")  # of DeepSpeed ZeRO-3
        for p in parameters
    )


def _state(module: nn.Module) -> list[Tensor]:
    """Buffers that a forward may move, such as the statistics of batch normalization: numbers. Packed weights, masks
    and positions are integers."""
    return [buffer for buffer in module.buffers() if buffer.is_floating_point() or buffer.numel() == 1]


def _rotary(module: nn.Module) -> dict[str, Any]:
    """Attributes that position embeddings replace, beside their buffers, when a longer text comes (dynamic RoPE)."""
    return {name: value for name, value in vars(module).items() if name.endswith(_ROTARY)}


def _random_states(module: nn.Module) -> list[Tensor]:
    """The random states that the forward of `module` may draw from."""
    device = next(module.parameters()).device
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _signature(args: Any, kwargs: Any) -> object:
    """Structure of arguments, shapes of tensors, plain values."""
    leaves, spec = tree_flatten((args, kwargs))

    def of(leaf: Any) -> object:
        if isinstance(leaf, Tensor):
            return leaf.shape, leaf.dtype
        return leaf if isinstance(leaf, _PLAIN) else type(leaf)

    return spec, [of(leaf) for leaf in leaves]


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory that tensors hold, of which several may be views of the same."""
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
