"""Forward passes of which every attention head and every layer is observed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..common.processes import Team
from ..teacher.column import TEACHER_COLUMN
from .accessor import HeadAccessor
from .capture import check_positions, hidden_states_of
from .pooling import pooling_mask
from .registry import unwrap_model


class Observer:
    """Collects pooled projection inputs and pooled layer outputs of all layers, one forward pass a batch.

    Args:
        accessor ([`~heads.accessor.HeadAccessor`]): The model's attention heads.
        team ([`~common.processes.Team`]): The processes that divide the batches.
    """

    def __init__(self, accessor: HeadAccessor, team: Team) -> None:
        self.accessor = accessor
        self.team = team
        self.mask: Tensor | None = None
        self._positions = self._starts = torch.empty(0, dtype=torch.long)
        self._pooled: dict[int, list[Tensor]] = {layer: [] for layer in accessor.layers_with_heads}
        self._hidden: list[list[Tensor]] = [[] for _ in accessor.layers]
        self._observed = 0  # forward passes; of a looped layer, only its first turn in each counts
        self._samples: list[int] = []  # of this process, in the order of the rows; -1 for those that do not count

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.accessor.device

    def attach(self) -> list[Any]:
        """Places the hooks and returns their handles."""
        handles = []
        for layer in self.accessor.layers_with_heads:
            handles.append(self.accessor.projection(layer).register_forward_pre_hook(self._heads_hook(layer)))
        for layer, module in enumerate(self.accessor.layers):
            handles.append(module.register_forward_hook(self._hidden_hook(layer)))
        return handles

    def _heads_hook(self, layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if len(self._pooled[layer]) < self._observed:
                pooled = self._pool(args[0]).unflatten(-1, (self.accessor.num_heads(layer), -1))
                self._pooled[layer].append(pooled)

        return hook

    def _hidden_hook(self, layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            hidden = hidden_states_of(out)
            # Residual streams side by side (Gemma 3n, hyper-connections) are no one representation of a layer.
            if hidden.ndim == 3 and len(self._hidden[layer]) < self._observed:
                self._hidden[layer].append(self._pool(hidden))

        return hook

    def _pool(self, x: Tensor) -> Tensor:
        """What [`~heads.capture.pool_heads`] computes of the samples that have a position to pool, without a gradient:
        `[n, d]` of `[B, T, d]`, float32, on the CPU."""
        assert self.mask is not None
        check_positions(x, self.mask)
        # One pass over the positions that count; attention may leave NaN at the others.
        return F.embedding_bag(self._positions, x.flatten(0, 1).float(), self._starts, mode="mean").cpu()

    def observe(self, mask: Tensor) -> None:
        """To be called before each forward pass.

        Args:
            mask (`BoolTensor` of shape `[B, T]`): Positions to pool over.
        """
        self._observed += 1
        self.mask = mask
        self._positions = mask.flatten().nonzero().flatten()
        counts = mask.sum(1)
        counts = counts[counts > 0]
        self._starts = counts.cumsum(0) - counts  # of each sample's positions among all

    def batches(self, lengths: Sequence[int], batch_size: int, progress: bool) -> Iterator[list[int]]:
        """This process's batches of samples, longest first: little padding, and memory is short in the first batch or
        never. To be called once, with `observe` and one forward pass for each batch.

        Args:
            lengths (sequence of `int`): Length of each sample.
            batch_size (`int`): Samples in a batch.
            progress (`bool`): Show a progress bar.
        """
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        rounds = -(-len(batches) // self.team.count)
        for turn in tqdm(range(rounds), desc="Ranking attention heads", disable=not (progress and self.team.is_main)):
            number = turn * self.team.count + self.team.index
            # A sharded model runs in all processes or not at all: one that is left without a batch repeats the last.
            batch = batches[min(number, len(batches) - 1)]
            yield batch
            assert self.mask is not None
            pooled = self.mask.any(1).tolist()
            seen = [sample for sample, any_token in zip(batch, pooled, strict=True) if any_token]
            self._samples += seen if number < len(batches) else [-1] * len(seen)

    def gather(self) -> tuple[list[int], Iterator[tuple[int, Tensor | None, Tensor | None]]]:
        """What all processes observed, the same in each of them.

        Returns:
            The samples that had a position to pool, ascending; and, layer by layer, its number, the hidden states of
            these samples `[N, d_model]`, or `None` where the layer has several residual streams or was left out
            (cross-attention, without an image), and their pooled heads `[N, H, d_head]` or `None` where it has none.
        """
        samples = self.team.gather_rows(torch.tensor(self._samples, dtype=torch.long)).cpu()
        # In the order of samples, not of batches, which depends on the number of processes.
        places = samples.argsort(stable=True)[(samples < 0).sum() :]
        complete = torch.tensor([[int(len(parts) == self._observed) for parts in self._hidden]])
        observed = self.team.gather_rows(complete).all(0).tolist()

        def rows(parts: list[Tensor]) -> Tensor:
            gathered = self.team.gather_rows(torch.cat(parts))
            return gathered[places.to(gathered.device)].to(self.device)

        def layers() -> Iterator[tuple[int, Tensor | None, Tensor | None]]:
            for layer in range(self.accessor.num_layers):
                hidden = rows(self._hidden[layer]) if observed[layer] else None
                yield layer, hidden, rows(self._pooled[layer]) if layer in self._pooled else None

        return samples[places].tolist(), layers()


def run_text(
    observer: Observer,
    decoder: Callable[..., Any],
    encoded: list[tuple[Tensor, Tensor]],
    batch_size: int,
    progress: bool,
) -> None:
    """Runs the text decoder on each text alone, given as [`~heads.text.TextTokens`] gives it."""
    device = observer.device
    for batch in observer.batches([len(ids) for ids, _ in encoded], batch_size, progress):
        ids = nn.utils.rnn.pad_sequence([encoded[i][0] for i in batch], batch_first=True).to(device)
        attention = nn.utils.rnn.pad_sequence([torch.ones_like(encoded[i][0]) for i in batch], batch_first=True)
        observer.observe(nn.utils.rnn.pad_sequence([encoded[i][1] for i in batch], batch_first=True).to(device))
        decoder(input_ids=ids, attention_mask=attention.to(device), use_cache=False)


def run_with_images(
    observer: Observer,
    model: nn.Module,
    dataset: Dataset,
    indices: list[int],
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    placeholder_ids: Sequence[int],
    batch_size: int,
    progress: bool,
) -> None:
    """Runs the whole model on collated batches."""
    device = observer.device
    # Nobody reads the logits, and those of all positions may not fit.
    takes = inspect.signature(unwrap_model(model).forward).parameters
    few = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    for batch in observer.batches([0] * len(indices), batch_size, progress):
        inputs = dict(data_collator([dataset[indices[i]] for i in batch]))
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        observer.observe(pooling_mask(inputs.pop("labels"), inputs["input_ids"], placeholder_ids))
        inputs.pop(TEACHER_COLUMN, None)
        model(**inputs, use_cache=False, **few)
