"""Scoring every attention head by how well its neighbourhoods agree with the teacher's."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data import TEACHER_COLUMN, answer_text, placeholder_token_ids, pooling_mask, text_tokens
from ..features import check_teacher_features
from ..metrics import nearest_neighbors, neighbor_overlap
from ..version import __version__
from .capture import pool_heads
from .head import AttentionHead
from .modes import evaluating, without_autocast
from .projection import projection_blocks
from .registry import HeadAccessor, get_head_accessor, unwrap_model


def _versions() -> dict[str, str]:
    return {"hera-trainer": __version__, **{name: version(name) for name in ("transformers", "torch", "peft")}}


@dataclass
class HeadRanking:
    """Alignment scores of all attention heads with a teacher.

    Args:
        scores (`Tensor` of shape `[L, largest H]`):
            Mutual k-NN score of each head, float32; NaN where a layer has no such softmax-attention head.
        layer_scores (`Tensor` of shape `[L]`):
            The same for the pooled hidden states that leave each layer, for comparison.
        k (`int`): Number of neighbours.
        num_samples (`int`): Number N of samples scored.
        seed (`int`): Seed of the choice of samples.
        context (`str`): `"text"` if the text went through the language model alone, `"image"` if with its image.
        model (`str`): Name of the model.
        teacher (`str`): Name of the teacher.
        dataset_fingerprint (`str`): Fingerprint of the data set.
        versions (`dict[str, str]`): Versions of the libraries that computed it.
    """

    scores: Tensor
    layer_scores: Tensor
    k: int
    num_samples: int
    seed: int = 0
    context: str = "text"
    model: str = ""
    teacher: str = ""
    dataset_fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=_versions)

    def heads(self) -> list[AttentionHead]:
        """Every scored head, by layer and head."""
        return [AttentionHead(layer, head) for layer, head in torch.isfinite(self.scores).nonzero().tolist()]

    def score(self, head: AttentionHead) -> float:
        """Score of one head."""
        return self.scores[head.layer, head.head].item()

    def select(self, selection: str = "worst", m: int = 5, seed: int = 0) -> list[AttentionHead]:
        """Chooses m heads.

        Args:
            selection (`str`, *optional*, defaults to `"worst"`):
                `"worst"`: lowest scores, least aligned first. `"top"`: highest scores, most aligned first. `"random"`:
                a seeded draw. Equal scores are taken in the order of layer and head.
            m (`int`, *optional*, defaults to `5`): Number of heads.
            seed (`int`, *optional*, defaults to `0`): Seed of the random draw.

        Raises:
            `ValueError`: If `selection` is unknown or the model has fewer than m heads.
        """
        heads = self.heads()
        if not 1 <= m <= len(heads):
            raise ValueError(f"`num_aligned_heads` ({m}) must be between 1 and the {len(heads)} heads of the ranking.")
        if selection == "worst":
            return sorted(heads, key=self.score)[:m]
        if selection == "top":
            return sorted(heads, key=lambda head: -self.score(head))[:m]
        if selection == "random":
            chosen = np.random.default_rng(seed).choice(len(heads), size=m, replace=False)
            return [heads[i] for i in chosen]
        raise ValueError(f"`head_selection` must be 'worst', 'top' or 'random', got {selection!r}.")

    def save(self, path: str | os.PathLike) -> None:
        """Writes the ranking as JSON (NaN as null), atomically."""
        content = asdict(self)
        content["scores"] = _to_json(self.scores)
        content["layer_scores"] = _to_json(self.layer_scores)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=1))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> HeadRanking:
        """Reads a ranking that [`~HeadRanking.save`] wrote.

        Raises:
            `ValueError`: If the file is no such ranking.
        """
        try:
            content = json.loads(Path(path).read_text())
            for name in ("scores", "layer_scores"):
                content[name] = torch.tensor(_from_json(content[name]))
            ranking = cls(**content)
            if ranking.scores.ndim != 2 or ranking.layer_scores.shape != ranking.scores.shape[:1]:
                raise ValueError("its scores are not one row a layer")
            return ranking
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} is not a head ranking that can be read ({error}). Correct `head_ranking_path`, or "
                "leave it at `None` to rank the heads again."
            ) from error


def _to_json(scores: Tensor) -> Any:
    return [_to_json(row) for row in scores] if scores.ndim else (None if scores.isnan() else scores.item())


def _from_json(scores: Any) -> Any:
    if isinstance(scores, list):
        return [_from_json(row) for row in scores]
    return float("nan" if scores is None else scores)


class _Observer:
    """Collects pooled projection inputs and pooled layer outputs of all layers, one forward pass a batch."""

    def __init__(self, accessor: HeadAccessor) -> None:
        self.accessor = accessor
        self.mask: Tensor | None = None
        self.pooled: dict[int, list[Tensor]] = {layer: [] for layer in accessor.layers_with_heads}
        self.hidden: list[list[Tensor]] = [[] for _ in accessor.layers]

    def attach(self) -> list[Any]:
        handles = []
        for layer in self.accessor.layers_with_heads:
            handles.append(self.accessor.projection(layer).register_forward_pre_hook(self._heads_hook(layer)))
        for layer, module in enumerate(self.accessor.layers):
            handles.append(module.register_forward_hook(self._hidden_hook(layer)))
        return handles

    def _heads_hook(self, layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert self.mask is not None
            pooled = pool_heads(args[0], self.mask, self.accessor.num_heads(layer))
            self.pooled[layer].append(pooled[self.mask.any(1)].cpu())

        return hook

    def _hidden_hook(self, layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            assert self.mask is not None
            hidden = out[0] if isinstance(out, tuple) else out
            self.hidden[layer].append(pool_heads(hidden, self.mask, 1)[self.mask.any(1), 0].cpu())

        return hook


def rank_heads(
    model: nn.Module,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    dataset: Dataset,
    k: int = 10,
    num_samples: int = 1000,
    batch_size: int = 16,
    seed: int = 0,
    normalize: bool = True,
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    teacher_name: str = "",
    progress: bool = True,
) -> HeadRanking:
    """Scores all attention heads of a language model by mutual k-NN with a vision teacher (eq. 3 of the
    [HeRA paper](https://huggingface.co/papers/2606.23885)).

    As in the paper, only text goes through the language model: each sample's answer or caption, without chat template
    and without image. Special tokens are fed but not pooled. The model is taken as it is: to rank the heads of a PEFT
    model without its adapter, call this inside `model.disable_adapter()`.

    Args:
        model (`nn.Module`):
            Model whose heads are ranked, in any wrapping that [`get_head_accessor`] understands.
        processing_class ([`~transformers.ProcessorMixin`] or tokenizer):
            Its processor.
        dataset ([`~datasets.Dataset`]):
            Rows with `teacher_features` and a text: `completion`, the assistant turns of `messages`, or `text`. Rows
            without a vector or without text are passed over, and an image that occurs in several rows counts once.
        k (`int`, *optional*, defaults to `10`):
            Number of neighbours.
        num_samples (`int`, *optional*, defaults to `1000`):
            Number of samples, drawn with `seed`; all there are if there are fewer.
        batch_size (`int`, *optional*, defaults to `16`):
            Samples in one forward pass.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        normalize (`bool`, *optional*, defaults to `True`):
            L2-normalise both spaces first.
        data_collator (`Callable`, *optional*):
            If given, the whole model runs on the batches it makes, with the images in context, and the positions with
            labels are pooled, as in training. The ranking's `context` is then `"image"`.
        teacher_name (`str`, *optional*):
            Kept in the ranking.
        progress (`bool`, *optional*, defaults to `True`):
            Show a progress bar.

    Returns:
        [`HeadRanking`]. The same for the same seed, model and data.

    Raises:
        `ValueError`: If fewer than `k + 2` samples can be used, or the model type is unknown.
    """
    accessor = get_head_accessor(model)
    base = unwrap_model(model)
    tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
    if num_samples < k + 2:
        raise ValueError(f"`num_samples` ({num_samples}) must be at least k + 2 = {k + 2}.")
    rows, teacher = _draw_samples(dataset, tokenizer, k, num_samples, seed)
    observer = _Observer(accessor)
    handles = observer.attach()
    try:
        with evaluating(model):
            if data_collator is None:
                order = _run_text(observer, tokenizer, [answer_text(row) for row in rows], batch_size, progress)
            else:
                ids = placeholder_token_ids(base.config, processing_class)
                indices = [row["index"] for row in rows]
                order = _run_with_images(observer, model, dataset, indices, data_collator, ids, batch_size, progress)
            if len(order) < k + 2:
                raise ValueError(
                    f"Only {len(order)} samples have a label outside of their images, but {k + 2} are needed for {k} "
                    "neighbours. Use more data, or a smaller k."
                )
            with without_autocast(teacher):
                scores, layer_scores = _score(observer, teacher[order], k, normalize)
    finally:
        for handle in handles:
            handle.remove()
    return HeadRanking(
        scores=scores,
        layer_scores=layer_scores,
        k=k,
        num_samples=len(order),
        seed=seed,
        context="text" if data_collator is None else "image",
        model=base.config.name_or_path,
        teacher=teacher_name,
        dataset_fingerprint=dataset._fingerprint,
    )


def _draw_samples(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, k: int, num_samples: int, seed: int
) -> tuple[list[dict[str, Any]], Tensor]:
    """Rows (text columns and `index`) of distinct images with text, and their teacher vectors `[N, d]`."""
    if TEACHER_COLUMN not in dataset.column_names:
        raise ValueError(
            f"`dataset` has no `{TEACHER_COLUMN}` column. Add it with `hera_trainer.add_teacher_features`."
        )
    check_teacher_features(dataset)
    text_columns = [name for name in ("messages", "prompt", "completion", "text") if name in dataset.column_names]
    table = dataset.with_format(None).select_columns([TEACHER_COLUMN, *text_columns])  # images are not decoded
    rows, vectors, images = [], [], set()
    for index in np.random.default_rng(seed).permutation(len(table)).tolist():
        row = table[index]
        vector = row.pop(TEACHER_COLUMN)
        if vector is None:
            continue
        image = np.asarray(vector, dtype=np.float32)  # equal images have equal vectors
        if image.tobytes() in images or not text_tokens(tokenizer, answer_text(row))[1].any():
            continue
        images.add(image.tobytes())
        rows.append({**row, "index": index})
        vectors.append(image)
        if len(rows) == num_samples:
            break
    if len(rows) < k + 2:
        raise ValueError(
            f"Heads can be ranked on {len(rows)} samples with distinct images and an answer text only, but "
            f"{k + 2} are needed for {k} neighbours. Use more data, a smaller `num_neighbors`, or choose heads with "
            "`aligned_heads` or `head_ranking_path`."
        )
    distinct = len({answer_text(row) for row in rows})
    if distinct < len(rows) // 2:
        warnings.warn(
            f"The {len(rows)} samples on which attention heads are ranked have only {distinct} different texts, and "
            "equal texts have equal representations, so neighbours are arbitrary. Rank on descriptive captions: pass "
            "`head_ranking=rank_heads(model, processor, captions)` or `head_ranking_path`.",
            stacklevel=3,
        )
    return rows, torch.from_numpy(np.stack(vectors))


def _batches(lengths: Sequence[int], batch_size: int, progress: bool) -> Any:
    """Batches of indices, longest first: little padding, and memory is short in the first batch or never."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return tqdm(batches, desc="Ranking attention heads", disable=not progress)


def _run_text(
    observer: _Observer, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int, progress: bool
) -> list[int]:
    """Runs the text decoder on each text alone. Returns the order in which samples were observed."""
    encoded = [text_tokens(tokenizer, text) for text in texts]
    device = observer.accessor.decoder.get_input_embeddings().weight.device
    order: list[int] = []
    for batch in _batches([len(ids) for ids, _ in encoded], batch_size, progress):
        ids = nn.utils.rnn.pad_sequence([encoded[i][0] for i in batch], batch_first=True).to(device)
        attention = nn.utils.rnn.pad_sequence([torch.ones_like(encoded[i][0]) for i in batch], batch_first=True)
        observer.mask = nn.utils.rnn.pad_sequence([encoded[i][1] for i in batch], batch_first=True).to(device)
        observer.accessor.decoder(input_ids=ids, attention_mask=attention.to(device), use_cache=False)
        order += batch
    return order


def _run_with_images(
    observer: _Observer,
    model: nn.Module,
    dataset: Dataset,
    indices: list[int],
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    placeholder_ids: Sequence[int],
    batch_size: int,
    progress: bool,
) -> list[int]:
    """Runs the whole model on collated batches. Returns the order in which samples were observed."""
    device = observer.accessor.decoder.get_input_embeddings().weight.device
    order: list[int] = []
    for batch in _batches([0] * len(indices), batch_size, progress):
        inputs = dict(data_collator([dataset[indices[i]] for i in batch]))
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        observer.mask = pooling_mask(inputs.pop("labels"), inputs["input_ids"], placeholder_ids)
        inputs.pop(TEACHER_COLUMN, None)
        model(**inputs, use_cache=False)
        order += [i for i, pooled in zip(batch, observer.mask.any(1).tolist(), strict=True) if pooled]
    return order


def _score(observer: _Observer, teacher: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Scores `[L, largest H]` and layer scores `[L]` of what was observed, in the teacher's order of samples."""
    accessor = observer.accessor
    device = accessor.decoder.get_input_embeddings().weight.device
    targets = nearest_neighbors(teacher.to(device), k, normalize)
    widest = max(accessor.num_heads(layer) for layer in accessor.layers_with_heads)
    scores = torch.full((accessor.num_layers, widest), torch.nan)
    layer_scores = torch.full((accessor.num_layers,), torch.nan)
    for layer in range(accessor.num_layers):
        hidden = torch.cat(observer.hidden[layer]).to(device)
        if hidden.isfinite().all():
            layer_scores[layer] = neighbor_overlap(nearest_neighbors(hidden, k, normalize), targets)
        if layer not in observer.pooled:
            continue
        pooled = torch.cat(observer.pooled[layer]).to(device)  # [N, H, d_head]
        if not pooled.isfinite().all():
            raise ValueError(f"The attention heads of layer {layer} give NaN or inf. Rank them in bf16 or float32.")
        factors = _gram_factors(projection_blocks(accessor.projection(layer), accessor.num_heads(layer)))
        for head in range(accessor.num_heads(layer)):
            vectors = pooled[:, head] @ factors[head]
            scores[layer, head] = neighbor_overlap(nearest_neighbors(vectors, k, normalize), targets)
    return scores, layer_scores


def _gram_factors(blocks: Tensor) -> Tensor:
    """Square matrices F with `p F` as long as, and at the same angles as, `p W`: neighbours are the same in d_head
    dimensions as in d_model.

    Args:
        blocks (`Tensor` of shape `[H, d_head, d_model]`): Each head's weight W.

    Returns:
        `Tensor` of shape `[H, d_head, d_head]`, with `F F^T = W W^T`.
    """
    gram = blocks.double() @ blocks.double().transpose(1, 2)
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0).sqrt()[:, None]).float()
