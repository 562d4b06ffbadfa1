"""What tests of the head ranking share: its definition, one text at a time, full-width vectors, neighbours as sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from hera_trainer.heads.head import AttentionHead
from hera_trainer.heads.rank import rank_heads
from hera_trainer.heads.ranking import HeadRanking

HEADS = 4
K = 4


def text_decoder(model: nn.Module) -> nn.Module:
    inner = model.base_model.model if hasattr(model, "peft_config") else model
    return inner.model.text_model if hasattr(inner.model, "text_model") else inner.model.language_model


def weight_of(projection: nn.Module) -> Tensor:
    """`[d_model, heads * d_head]`, with the update of a LoRA adapter that is switched on."""
    if not hasattr(projection, "lora_A"):
        return projection.weight.double()
    update = projection.lora_B["default"].weight.double() @ projection.lora_A["default"].weight.double()
    return projection.base_layer.weight.double() + (0 if projection.disable_adapters else 2.0 * update)


@contextmanager
def watched(decoder: nn.Module) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """What goes into each output projection and what leaves each layer in the last forward pass."""
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def keep(store: dict[int, Tensor], layer: int, value: Any) -> None:
        store[layer] = value[0] if isinstance(value, tuple) else value

    hooks = []
    for i, layer in enumerate(decoder.layers):
        hooks.append(layer.register_forward_hook(lambda m, args, out, i=i: keep(outputs, i, out)))
        if hasattr(layer, "self_attn"):
            projection = layer.self_attn.o_proj
            hooks.append(projection.register_forward_hook(lambda m, args, out, i=i: keep(inputs, i, args)))
    yield inputs, outputs
    for hook in hooks:
        hook.remove()


Vectors = dict[AttentionHead | int, list[Tensor]]  # a head's or a layer's pooled vector, sample by sample


@torch.no_grad()
def vectors_of(model: nn.Module, samples: Sequence[tuple[Callable[[], Any], Tensor]]) -> Vectors:
    """Runs each sample alone; `samples` are forward passes and the positions to pool."""
    decoder = text_decoder(model)
    found: Vectors = {}
    with watched(decoder) as (inputs, outputs):
        for forward, positions in samples:
            forward()
            for layer in outputs:
                found.setdefault(layer, []).append(outputs[layer][0, positions].double().mean(0))
            for layer, x in inputs.items():
                pooled = x[0, positions].double().mean(0)
                weight = weight_of(decoder.layers[layer].self_attn.o_proj)
                width = len(pooled) // HEADS
                for head in range(HEADS):
                    part = slice(head * width, (head + 1) * width)
                    found.setdefault(AttentionHead(layer, head), []).append(weight[:, part] @ pooled[part])
    return found


def text_samples(model: nn.Module, tokenizer: Any, texts: Sequence[str], num_special: int = 0) -> list:
    """Each text alone through the text decoder; its first `num_special` tokens are fed and not pooled."""
    decoder = text_decoder(model)
    samples = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        forward = lambda ids=ids: decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)  # noqa: E731
        samples.append((forward, torch.arange(num_special, ids.shape[1])))
    return samples


def neighbor_sets(vectors: Sequence[Tensor], k: int, normalize: bool) -> list[set[int]]:
    if normalize:
        vectors = [vector / vector.norm() for vector in vectors]
    sets = []
    for i, anchor in enumerate(vectors):
        similarity = {j: float(anchor @ other) for j, other in enumerate(vectors) if j != i}
        sets.append(set(sorted(similarity, key=similarity.get, reverse=True)[:k]))
    return sets


def mutual_knn_by_definition(a: Sequence[Tensor], b: Sequence[Tensor], k: int, normalize: bool) -> float:
    pairs = zip(neighbor_sets(a, k, normalize), neighbor_sets(b, k, normalize), strict=True)
    return sum(len(x & y) / k for x, y in pairs) / len(a)


def assert_ranking(
    ranking: HeadRanking, vectors: Vectors, teacher: Sequence[Any], k: int = K, normalize: bool = True
) -> None:
    """Scores of `ranking` are those of the vectors. A neighbour that flips by rounding would be 1 / (N k)."""
    teacher = [torch.as_tensor(vector, dtype=torch.float64) for vector in teacher]
    layers = [key for key in vectors if isinstance(key, int)]
    expected = torch.full((len(layers), HEADS), torch.nan)
    expected_layers = torch.full((len(layers),), torch.nan)
    for key, values in vectors.items():
        score = mutual_knn_by_definition(values, teacher, k, normalize)
        if isinstance(key, int):
            expected_layers[key] = score
        else:
            expected[key.layer, key.head] = score
    assert expected[expected.isfinite()].unique().numel() > 2  # heads differ, so a mix-up would show
    torch.testing.assert_close(ranking.scores, expected, rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(ranking.layer_scores, expected_layers, rtol=0, atol=1e-6)
    assert ranking.scores.dtype == ranking.layer_scores.dtype == torch.float32
    assert (ranking.k, ranking.num_samples) == (k, len(teacher))


def answers(dataset: Dataset) -> list[str]:
    return [completion[0]["content"] for completion in dataset["completion"]]


@contextmanager
def fed_texts(model: nn.Module, tokenizer: Any) -> Iterator[list[str]]:
    """The texts that the text decoder is given inside."""
    texts: list[str] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        for ids, attention in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            texts.append(tokenizer.decode(ids[attention.bool()]))

    hook = text_decoder(model).register_forward_pre_hook(note, with_kwargs=True)
    yield texts
    hook.remove()


def rank(model: nn.Module, processor: Any, dataset: Dataset, **settings: Any) -> HeadRanking:
    return rank_heads(model, processor, dataset, **{"k": K, "progress": False, **settings})
