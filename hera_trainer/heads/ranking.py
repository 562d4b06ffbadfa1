"""Scoring every attention head by how well its neighbourhoods agree with the teacher's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .. import __version__
from ..common.files import write_atomically
from ..common.precision import exact_products
from ..common.processes import Team
from ..common.sharded import gathered_in_forward, part_of
from ..objectives.metrics import check_clip_quantile, nearest_neighbors, neighbor_overlap
from ..teacher.encoder import VisionTeacher
from .head import AlignedUnit, AttentionHead, DecoderLayer
from .heat_map import plot_head_scores
from .modes import evaluating
from .observer import Observer, run_text, run_with_images
from .pooling import placeholder_token_ids
from .registry import get_head_accessor, unwrap_model
from .samples import Samples, draw_samples, second_vectors
from .scoring import score_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _versions() -> dict[str, str]:
    return {"hera-trainer": __version__, **{name: version(name) for name in ("transformers", "torch", "peft")}}


@dataclass
class HeadRanking:
    """Alignment scores of all attention heads and decoder layers with a teacher, and what to hold them against.

    A score depends on k and N (see [`mutual_knn`]), so with it stands what unrelated spaces score. `null_mean` and
    `null_p95` are those of *one* head: 500 random pairings of head and teacher samples, dealt out over all heads and
    taken together, so that one in twenty heads that have nothing to do with the teacher scores above `null_p95`. Of
    hundreds of heads some do by chance; the mean over several heads strays less than one head.

    Args:
        scores (`Tensor` of shape `[L, largest H]`):
            Mutual k-NN score of each head, float32; NaN where a layer has no such softmax-attention head.
        layer_scores (`Tensor` of shape `[L]`):
            The same for the pooled hidden states that leave each layer, by which layers are chosen; NaN where text
            alone does not go through a layer (cross-attention to images), or several residual streams leave it.
        k (`int`): Number of neighbours.
        num_samples (`int`): Number N of samples scored.
        seed (`int`): Seed of the choice of samples.
        context (`str`): `"text"` if the text went through the language model alone, `"image"` if with its image.
        model (`str`): Name of the model.
        teacher (`str`): Name of the teacher.
        dataset_fingerprint (`str`): Fingerprint of the data set.
        versions (`dict[str, str]`): Versions of the libraries that computed it.
        null_mean (`float`, *optional*): Mean score of a head with permuted pairs; an estimate of `chance`.
        null_p95 (`float`, *optional*): The 95th percentile of these scores. Files of before have neither.
        ceiling (`float`, *optional*): Score of a second vision encoder with the teacher, on the same images.
        ceiling_model (`str`): Name of that encoder.
        clip_quantile (`float`, *optional*): Quantile at which values were clipped, `None` if they were not.
        center (`bool`): Whether each space's mean was taken away.
        normalize (`bool`): Whether vectors were L2-normalized, so that neighbours are nearest in cosine similarity.
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
    null_mean: float | None = None
    null_p95: float | None = None
    ceiling: float | None = None
    ceiling_model: str = ""
    clip_quantile: float | None = None
    center: bool = False
    normalize: bool = True

    @property
    def chance(self) -> float:
        """Score of unrelated spaces on average, `k / (N - 1)`."""
        return self.k / (self.num_samples - 1)

    @property
    def scale(self) -> str:
        """What scores are measured with: `"k = 10, N = 1,000"`. Those of rankings that differ in it cannot be
        compared."""
        return f"k = {self.k}, N = {self.num_samples:,}{self.spaces}"

    @property
    def spaces(self) -> str:
        """How vectors were compared where it is not as by default, such as `", centred"`."""
        clipped = "" if self.clip_quantile is None else f", clipped at quantile {self.clip_quantile:g}"
        return clipped + ", centred" * self.center + ", by dot products" * (not self.normalize)

    def references(self, digits: int = 4) -> list[str]:
        """What to hold the scores against, in words: what unrelated spaces score, and the ceiling if there is one.

        Args:
            digits (`int`, *optional*, defaults to `4`): Digits after the point.
        """
        percentile = "" if self.null_p95 is None else f" (95th percentile {self.null_p95:.{digits}f})"
        found = [f"unrelated spaces {self.chance:.{digits}f}{percentile}"]
        if self.ceiling is not None:
            found.append(f"ceiling {self.ceiling:.{digits}f} ({self.ceiling_model})")
        return found

    def heads(self) -> list[AttentionHead]:
        """Every scored head, by layer and head."""
        return [AttentionHead(layer, head) for layer, head in torch.isfinite(self.scores).nonzero().tolist()]

    def units(self, granularity: str) -> list[AlignedUnit]:
        """Every scored head or, with the granularity `"layer"`, every scored decoder layer."""
        if granularity == "head":
            return [*self.heads()]
        return [DecoderLayer(layer) for layer in torch.isfinite(self.layer_scores).nonzero().flatten().tolist()]

    def score(self, head: AlignedUnit) -> float:
        """Score of one head or decoder layer."""
        if isinstance(head, DecoderLayer):
            return self.layer_scores[head.layer].item()
        return self.scores[head.layer, head.head].item()

    def select(
        self, selection: str = "worst", m: int = 5, seed: int = 0, granularity: str = "head"
    ) -> list[AlignedUnit]:
        """Chooses m heads or layers.

        Args:
            selection (`str`, *optional*, defaults to `"worst"`):
                `"worst"`: lowest scores, least aligned first. `"top"`: highest scores, most aligned first. `"random"`:
                a seeded draw. `"middle"`: the layers nearest the middle of the depth, the nearest first, which heads
                have not. Equal ones are taken in the order of layer and head.
            m (`int`, *optional*, defaults to `5`): Number of heads or layers.
            seed (`int`, *optional*, defaults to `0`): Seed of the random draw.
            granularity (`str`, *optional*, defaults to `"head"`): What is chosen: `"head"` or `"layer"`.

        Raises:
            `ValueError`: If `selection` is unknown or the model has fewer than m heads or layers.
        """
        heads = self.units(granularity)
        if not 1 <= m <= len(heads):
            raise ValueError(
                f"`num_aligned_heads` ({m}) must be between 1 and the {len(heads)} {granularity}s of the ranking."
            )
        if selection == "worst":
            return sorted(heads, key=self.score)[:m]
        if selection == "top":
            return sorted(heads, key=lambda head: -self.score(head))[:m]
        if selection == "random":
            chosen = np.random.default_rng(seed).choice(len(heads), size=m, replace=False)
            return [heads[i] for i in chosen]
        if selection == "middle" and granularity == "layer":
            middle = (len(self.layer_scores) - 1) / 2
            return sorted(heads, key=lambda layer: abs(layer.layer - middle))[:m]
        raise ValueError(
            f"`head_selection` must be 'worst', 'top' or 'random' (or, of layers, 'middle'), got {selection!r}."
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes the ranking as JSON (NaN as null), atomically."""
        content = asdict(self)
        content["scores"] = _to_json(self.scores)
        content["layer_scores"] = _to_json(self.layer_scores)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1)))

    def plot(
        self,
        path: str | os.PathLike | None = None,
        heads: Sequence[AlignedUnit] = (),
        before: HeadRanking | None = None,
        title: str | None = None,
    ) -> Figure:
        """Draws the scores as a heat map of layers and heads.

        Args:
            path (`str`, *optional*): Where to write; the ending (`.png`, `.svg`, `.pdf`) decides the format.
            heads (sequence of [`AttentionHead`] or of [`DecoderLayer`], *optional*):
                Heads or layers to outline, such as the aligned ones.
            before ([`HeadRanking`], *optional*):
                An earlier ranking of the same model. Panels show it, this one, and the difference.
            title (`str`, *optional*): Title of the figure.

        Returns:
            `matplotlib.figure.Figure`.

        Raises:
            `ImportError`: If matplotlib is not installed.
            `ValueError`: If `before` is of another model, or its scores are of another scale.
        """
        panels = self if before is None else {"before": before, "after": self}
        named = {} if title is None else {"title": title}
        return plot_head_scores(panels, path, heads, difference=before is not None, **named)

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
    distributed: bool = False,
    text_column: str | None = None,
    clip_quantile: float | None = None,
    ceiling: VisionTeacher | str | None = None,
    center: bool = False,
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
            Rows with `teacher_features` and a text: the assistant turns of `messages`, `completion`, or `text`. Rows
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
        distributed (`bool`, *optional*, defaults to `False`):
            Divide the forward passes among all processes of the run, each of which must then call this function alike.
            All get the same ranking, the one that a single process computes.
        text_column (`str`, *optional*):
            Column of the texts. By default the one that SFTTrainer trains on: `messages`, or `completion` beside a
            `prompt`, or `text`.
        clip_quantile (`float`, *optional*):
            Clamp the values of each space to this quantile first (see [`mutual_knn`]), 0.95 in the reference code of
            the metric. Each head is then scored in d_model dimensions instead of its own d_head, which takes
            d_model / d_head times the work of its products, a sort of each vector, and memory for one head's
            `[N, d_model]`.
        center (`bool`, *optional*, defaults to `False`):
            Take each space's mean over the samples away before vectors are normalised (see [`mutual_knn`]).
        ceiling ([`VisionTeacher`] or `str`, *optional*):
            A second vision encoder, or its name. What it scores with the teacher on the images of the same samples is
            kept in the ranking, as what two good views of the same images agree on. `dataset` needs the images.

    Returns:
        [`HeadRanking`]. The same for the same seed, model and data.

    Raises:
        `ValueError`: If fewer than `k + 2` samples can be used, the model type is unknown, its text decoder can't run
            on text alone, or a sample has no image for `ceiling` to look at.
    """
    check_clip_quantile(clip_quantile)
    if data_collator is None:
        _check_text_alone(model)  # before a sample is looked at
    tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
    samples = draw_samples(dataset, tokenizer, k, num_samples, seed, text_column)
    second = None if ceiling is None else second_vectors(dataset, samples, ceiling, batch_size, distributed)
    ranking = rank_samples(
        model,
        processing_class,
        dataset,
        samples,
        k=k,
        batch_size=batch_size,
        normalize=normalize,
        data_collator=data_collator,
        teacher_name=teacher_name,
        progress=progress,
        distributed=distributed,
        clip_quantile=clip_quantile,
        center=center,
        second=second,
    )
    if ceiling is not None:
        ranking.ceiling_model = ceiling.name if isinstance(ceiling, VisionTeacher) else ceiling
    return ranking


def _check_text_alone(model: nn.Module) -> None:
    needs = get_head_accessor(model).needs
    if needs:
        raise ValueError(
            f"The text decoder of this {unwrap_model(model).config.model_type!r} model needs {needs}, so its heads "
            "cannot be ranked on text. Read them with `HeadCapture`, and compare with `mutual_knn`."
        )


def rank_samples(
    model: nn.Module,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    dataset: Dataset,
    samples: Samples,
    *,
    k: int,
    batch_size: int,
    normalize: bool,
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    teacher_name: str,
    progress: bool,
    distributed: bool,
    clip_quantile: float | None = None,
    center: bool = False,
    second: Tensor | None = None,
) -> HeadRanking:
    """Scores all attention heads on samples that were drawn. Arguments and result are those of [`rank_heads`]; `second`
    are the vectors `[N, d]` of the samples by the second encoder."""
    accessor, base = get_head_accessor(model), unwrap_model(model)
    if data_collator is None:
        _check_text_alone(model)
    team = Team(distributed)
    observer = Observer(accessor, team)
    handles = observer.attach()
    try:
        with evaluating(model):
            with team.together(), gathered_in_forward(model):
                if data_collator is None:
                    with part_of(model, accessor.decoder) as decoder:
                        run_text(observer, decoder, samples.tokens, batch_size, progress)
                else:
                    ids = placeholder_token_ids(base.config, processing_class)
                    rows = samples.indices
                    run_with_images(observer, model, dataset, rows, data_collator, ids, batch_size, progress)
            pooled, layers = observer.gather()
            if len(pooled) < k + 2:
                raise ValueError(
                    f"Only {len(pooled)} samples have a label outside of their images, but {k + 2} are needed for {k} "
                    "neighbours. Use more data, or a smaller k."
                )
            teacher = samples.teacher[pooled].to(observer.device)
            with exact_products(teacher.device):
                targets = nearest_neighbors(teacher, k, normalize, clip_quantile, center)
                scores, layer_scores, null = score_layers(
                    accessor, layers, targets, normalize, clip_quantile, samples.seed, center
                )
                ceiling = None
                if second is not None:
                    others = nearest_neighbors(second[pooled].to(targets.device), k, normalize, clip_quantile, center)
                    ceiling = neighbor_overlap(others, targets)
            # Another device may round a tie to the other side, and all processes must choose the same heads.
            scores, layer_scores = team.same(scores), team.same(layer_scores)
    finally:
        for handle in handles:
            handle.remove()
    return HeadRanking(
        scores=scores,
        layer_scores=layer_scores,
        k=k,
        num_samples=len(pooled),
        seed=samples.seed,
        context="text" if data_collator is None else "image",
        model=base.config.name_or_path,
        teacher=teacher_name,
        dataset_fingerprint=dataset._fingerprint,
        null_mean=null.mean,
        null_p95=null.p95,
        ceiling=ceiling,
        clip_quantile=clip_quantile,
        center=center,
        normalize=normalize,
    )
