"""Head maps of the model before training: how firm a ranking is, and whether a head stands above every layer."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from gemma import load_gemma
from images import caption
from train import Laboratory, Run, commit, load_model, taught_by, versions
from transformers import AutoProcessor

from hera_trainer import rank_heads

TEXT = "text"


@dataclass
class HeadMap:
    """What is ranked: everything that a map depends on.

    Args:
        arm (`str`): Its name.
        seed (`int`): Seed of the draw of captions.
        samples (`int`): Their number.
        teacher (`str`): The encoder.
        style (`str`): Captions: `"keywords"` or `"name"`.
        clip_quantile (`float`, *optional*): See [`rank_heads`].
        center (`bool`): See [`rank_heads`].
        bos (`bool`): Whether the token that begins a text, which SmolLM2's tokenizer leaves out, is there and pooled.
        model (`str`): The language model: `"smollm2"`, that of all other experiments, or `"gemma"`.
    """

    arm: str
    seed: int = 0
    samples: int = 1000
    teacher: str = "dinov2"
    style: str = "keywords"
    clip_quantile: float | None = None
    center: bool = False
    bos: bool = False
    model: str = "smollm2"

    @property
    def key(self) -> str:
        """What tells maps apart."""
        fields = {name: value for name, value in asdict(self).items() if (name, value) != ("model", "smollm2")}
        return json.dumps(fields, sort_keys=True)


def rank(lab: Laboratory, wanted: HeadMap) -> dict[str, Any]:
    """Ranks the heads. Returns the map's record."""
    begin, run = time.perf_counter(), Run(wanted.arm)
    if wanted.model == "gemma":
        model, processor = load_gemma(lab.folder, lab.device)
    else:
        model, processor = load_model(lab, run), AutoProcessor.from_pretrained(lab.start(run.start))
    rows = taught_by(lab.rows(run.images, run.draw)[0], wanted.teacher)
    begins = processor.tokenizer.bos_token if wanted.bos else ""
    named = zip(rows["name"], rows["keywords"], strict=True)
    rows = rows.add_column(TEXT, [begins + caption(name, words, wanted.style) for name, words in named])
    ranking = rank_heads(
        model,
        processor,
        rows,
        num_samples=wanted.samples,
        batch_size=64,
        seed=wanted.seed,
        text_column=TEXT,
        clip_quantile=wanted.clip_quantile,
        center=wanted.center,
        progress=False,
    )
    config = {name: value for name, value in asdict(wanted).items() if name not in ("arm", "seed")}
    return {
        "arm": wanted.arm,
        "seed": wanted.seed,
        "config": config,
        "versions": versions(),
        "commit": commit(),
        "key": wanted.key,
        "scores": [[round(score, 4) for score in layer] for layer in ranking.scores.tolist()],
        "layer_scores": [round(score, 4) for score in ranking.layer_scores.tolist()],
        "null": [ranking.null_mean, ranking.null_p95],
        "seconds": round(time.perf_counter() - begin),
    }
