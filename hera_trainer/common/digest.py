"""A digest of a model's weights, by which a cache tells models apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .sharded import gathered

# Numbers copied from an accelerator at a time, so that no whole embedding matrix need fit beside the model.
_PIECE = 1 << 26


def weights_digest(model: nn.Module, adapters: bool = True) -> str:
    """Hex digest of all bytes of a model's weights, with their names, shapes and dtypes.

    Every number counts: a sample of them, at whatever distance, leaves a head, a row or an adapter unseen. sha256
    takes 0.6 s a GB on one core of an AMD EPYC with SHA instructions; tensors are hashed in threads. A model that
    DeepSpeed ZeRO-3 divided is read in all processes, which must call this alike.

    Args:
        model (`nn.Module`): Any model, quantized ones included.
        adapters (`bool`, *optional*, defaults to `True`):
            Whether the weights of PEFT adapters count. Without them, an adapted model has the digest of its base model.
    """
    tensors = list(_tensors(model, adapters))
    if is_deepspeed_zero3_enabled():  # gathering is a collective operation: in one order, and in this thread
        lines = [_line(tensor) for tensor in tensors]
    else:
        with ThreadPoolExecutor() as pool:
            lines = list(pool.map(_line, tensors))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _tensors(model: nn.Module, adapters: bool) -> Iterator[tuple[str, Tensor]]:
    inner = {name: _inner(module) for name, module in model.named_modules() if _inner(module)}
    for key, tensor in model.state_dict(keep_vars=True).items():
        name = key if adapters else _base_name(key, inner)
        if name is not None and torch.is_tensor(tensor):
            yield from plain_tensors(name, tensor)


def _inner(module: nn.Module) -> str | None:
    """Where a layer of PEFT keeps the one that it wraps."""
    if isinstance(module, BaseTunerLayer):
        return "base_layer"
    if isinstance(module, TrainableTokensWrapper):
        return "token_adapter"  # a tuner layer, which has the base layer
    return "original_module" if isinstance(module, AuxiliaryTrainingWrapper) else None


def _base_name(key: str, inner: dict[str, str | None]) -> str | None:
    """The key that a tensor has in the base model; None for one of an adapter."""
    kept: list[str] = []
    path: list[str] = []
    for part in key.split("."):
        wrapped = inner.get(".".join(path))
        if wrapped is None:
            kept.append(part)
        elif part != wrapped:
            return None
        path.append(part)
    return ".".join(kept)


def _line(named: tuple[str, Tensor]) -> str:
    name, tensor = named
    digest = hashlib.sha256()
    with torch.no_grad(), gathered([tensor]):
        head = f"{name} {list(tensor.shape)} {tensor.dtype}"
        for piece in tensor.detach().contiguous().flatten().split(_PIECE):
            digest.update(piece.view(torch.uint8).cpu().numpy())
    return f"{head} {digest.hexdigest()}"


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The ordinary tensors that a tensor consists of, with their names: of torchao's packed tensors the integers and
    the scales, which can be looked at as the packed tensor itself cannot; of any other, itself.

    Args:
        name (`str`): Name of the tensor.
        tensor (`Tensor`): Any tensor or parameter.
    """
    if not hasattr(tensor, "__tensor_flatten__"):  # torch's protocol of tensors that wrap others
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(f"{name}.{part}", getattr(tensor, part))
