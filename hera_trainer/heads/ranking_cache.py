"""Head rankings, from a cache where the same one was computed before."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from datasets import Dataset
from torch import nn

from ..common.digest import weights_digest
from ..common.precision import rounds_products
from ..common.processes import Team
from ..teacher.checkpoint import plain_config
from ..teacher.vectors import cache_root
from .accessor import HeadAccessor
from .modes import adapters_complete_base, without_adapters
from .rank import rank_samples
from .ranking import HeadRanking
from .registry import has_common_layout, unwrap_model
from .samples import draw_samples

_RANKING_FORMAT = 2


def cached_ranking(
    model: nn.Module,
    processing_class: Any,
    dataset: Dataset,
    accessor: HeadAccessor,
    *,
    k: int,
    num_samples: int,
    batch_size: int,
    seed: int,
    normalize: bool,
    clip_quantile: float | None,
    center: bool,
    precision: str,
    teacher_name: str,
    progress: bool = True,
) -> HeadRanking:
    """The ranking of the model's heads without adapters (but for those that the base weights need), from the cache
    where the same one was computed before. To be called by all processes alike, which divide the work.

    The cache goes by what the ranking is computed from, not by names: a data set's fingerprint does not tell what a
    function read from elsewhere, and another tokenizer makes other tokens of the same text.

    Args:
        model (`nn.Module`): The model.
        processing_class: Its processor.
        dataset ([`~datasets.Dataset`]): Rows with teacher vectors.
        accessor ([`HeadAccessor`]): The model's heads.
        k (`int`), num_samples (`int`), batch_size (`int`), seed (`int`), normalize (`bool`), clip_quantile (`float`),
            center (`bool`):
            As for [`rank_heads`].
        precision (`str`): Mixed precision that the forward runs in, part of the cache key.
        teacher_name (`str`): Kept in the ranking.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.
    """
    base = unwrap_model(model)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    samples = draw_samples(dataset, tokenizer, k, num_samples, seed)
    team = Team(distributed=True)
    kept = adapters_complete_base(model)
    with nullcontext() if kept else without_adapters(model):
        settings = {
            "format": _RANKING_FORMAT,
            "samples": samples.digest(),
            "weights": weights_digest(accessor.decoder, adapters=kept),
            "config": plain_config(getattr(accessor.decoder, "config", base.config)),
            "precision": precision,
            "k": k,
            "num_samples": num_samples,
            "normalize": normalize,
            "seed": seed,
            # Only where they are set, so that what was computed before there were such settings is found.
            **({} if clip_quantile is None else {"clip_quantile": clip_quantile}),
            **({"center": True} if center else {}),
            **({"rounds_products": True} if rounds_products() else {}),
            **({} if has_common_layout(model) else {"layout": _layout(accessor)}),
            # Before there was this key, TF32 might have rounded what was computed on a GPU.
            **({} if next(model.parameters()).device.type == "cpu" else {"exact": True}),
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        path = cache_root() / "head_rankings" / f"{key}.json"
        if not team.any(not path.is_file()):  # unless all processes have it, all compute it
            names = {"model": base.config.name_or_path, "teacher": teacher_name}
            return replace(HeadRanking.load(path), dataset_fingerprint=dataset._fingerprint, **names)
        ranking = rank_samples(
            model,
            processing_class,
            dataset,
            samples,
            k=k,
            batch_size=batch_size,
            normalize=normalize,
            clip_quantile=clip_quantile,
            center=center,
            teacher_name=teacher_name,
            progress=progress,
            distributed=True,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if team.index == team.sharers(path.parent)[0]:  # one process writes it, on each file system
        ranking.save(path)
    return ranking


def _layout(accessor: HeadAccessor) -> list[Any]:
    """What an accessor of the user's own takes for layers and heads: it may be corrected between two runs."""
    names = {id(module): name for name, module in accessor.decoder.named_modules()}
    heads = {i: [accessor.num_heads(i), names.get(id(accessor.projection(i)))] for i in accessor.layers_with_heads}
    return [[names.get(id(layer)), *heads.get(i, [])] for i, layer in enumerate(accessor.layers)]
