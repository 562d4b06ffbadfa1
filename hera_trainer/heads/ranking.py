"""[`HeadRanking`]: what all attention heads scored, how heads are chosen by it, and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..common.files import write_atomically
from .head import AlignedUnit, AttentionHead, DecoderLayer
from .heat_map import plot_head_scores

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
