"""What is checked and chosen before the first training step."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from bisect import bisect_left
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import nn

from .config import HeRAConfig
from .features import TEACHER_COLUMN, add_teacher_features, cache_root, check_teacher_features
from .heads.digest import weights_digest
from .heads.head import AttentionHead
from .heads.modes import without_adapters
from .heads.ranking import HeadRanking, rank_samples
from .heads.registry import HeadAccessor, unwrap_model
from .heads.samples import draw_samples
from .processes import Team
from .stream_start import column_names
from .teacher import VisionTeacher
from .teacher_checkpoint import plain_config

logger = get_logger(__name__)

_RANKING_FORMAT = 2

# Shares of pools that go without alignment: above the first that is warned of, above the second refused.
_FEW, _MOST = 0.1, 0.5


def check_pool(args: HeRAConfig, micro_batch_size: int | None = None) -> None:
    """Refuses settings under which too few samples are compared: with no more than `num_neighbors + 1`, every other
    sample is a neighbour and the alignment loss carries nothing.

    Args:
        args ([`HeRAConfig`]): The settings.
        micro_batch_size (`int`, *optional*): The batch size in force, if it is not the configured one.

    Raises:
        `ValueError`: Naming the smallest setting that passes.
    """
    batch = micro_batch_size or args.per_device_train_batch_size
    pool = args.pool_size(micro_batch_size) + args.queue_size
    least = args.num_neighbors + 2
    if pool >= least:
        return
    missing = least - args.queue_size
    if args.contrast_scope == "step":
        made_of = "`per_device_train_batch_size` x `gradient_accumulation_steps` x processes + `queue_size`"
        numbers = f"{batch} x {args.gradient_accumulation_steps} x {args.world_size} + {args.queue_size}"
        cure = f"gradient_accumulation_steps={-(-missing // (batch * args.world_size))}"
    else:
        made_of = "`per_device_train_batch_size` x processes + `queue_size`"
        numbers = f"{batch} x {args.world_size} + {args.queue_size}"
        cure = f"per_device_train_batch_size={-(-missing // args.world_size)}"
    raise ValueError(
        f"Too few samples are compared for `num_neighbors` ({args.num_neighbors}): {pool} ({made_of} = {numbers}), but "
        f"{least} are needed, or every other sample is a neighbour. Set `{cure}` or more, or lower `num_neighbors`."
    )


def skipped_share(pool: int, least: int, usable: int, rows: int, is_stream: bool) -> float:
    """Share of pools with fewer than `least` samples that can take part, exactly.

    Args:
        pool (`int`): Samples of a pool.
        least (`int`): Samples that must be able to take part.
        usable (`int`): Rows that can.
        rows (`int`): All rows.
        is_stream (`bool`):
            Whether these are the first rows of many more, so that samples are drawn independently (binomial), and not
            without replacement (hypergeometric).
    """
    if is_stream:
        ways = (comb(pool, i) * usable**i * (rows - usable) ** (pool - i) for i in range(min(least, pool + 1)))
        return sum(ways) / rows**pool
    few, many = sorted((usable, min(pool, rows)))  # an epoch gives no more; what is drawn from what is the same
    ways = (comb(many, i) * comb(rows - many, few - i) for i in range(min(least, few + 1)))
    return sum(ways) / comb(rows, few)


def check_expected_pool(args: HeRAConfig, usable: int, rows: int, is_stream: bool) -> None:
    """Says how many samples of a pool can be expected to take part, and refuses data of which so few can that most
    pools would be skipped: that would be plain fine-tuning.

    Args:
        args ([`HeRAConfig`]): The settings.
        usable (`int`): Rows that have an image and a label.
        rows (`int`): All rows, or the first ones of a stream.
        is_stream (`bool`): Whether they are of a stream.

    Raises:
        `ValueError`: Naming the smallest setting that passes.
    """
    whole_step = args.contrast_scope == "step"
    pool, least = args.pool_size(), max(1, args.num_neighbors + 2 - args.queue_size)
    skipped = skipped_share(pool, least, usable, rows, is_stream)
    queue = f", beside {args.queue_size} past ones," if args.queue_size else ""
    expected = (
        f"{usable:,} of {'the first ' if is_stream else ''}{rows:,} rows have an image and a label. Of the {pool} "
        f"samples compared, {pool * usable / rows:.1f}{queue} are expected to take part in the alignment loss, and "
        f"{skipped:.1%} of the {'optimizer steps' if whole_step else 'micro-batches'} to go without it."
    )
    if skipped <= _MOST:
        logger.log(logging.WARNING if skipped > _FEW else logging.INFO, expected)
        return
    more = "shuffle the stream, so that rows with images come early" if is_stream else "add rows with images"
    if args.max_length is not None:
        more += f", or raise `max_length` ({args.max_length}), which cuts labels and image tokens off"
    if usable < (1 if is_stream else least):  # not even all of them in one pool would do
        raise ValueError(f"{expected} Please {more}, or set `alignment_weight=0` to train as SFTTrainer does.")
    name = "gradient_accumulation_steps" if whole_step else "per_device_train_batch_size"
    unit = pool // getattr(args, name)
    enough = -(-2 * least * rows // (usable * unit))  # on average twice as many as are needed
    value = 1 + bisect_left(
        range(1, enough), True, key=lambda n: skipped_share(n * unit, least, usable, rows, is_stream) <= _MOST
    )
    raise ValueError(
        f"{expected} Set `{name}={value}` or more, a larger `queue_size` or a smaller `num_neighbors`, or {more}."
    )


def check_arguments(args: HeRAConfig) -> None:
    """Refuses settings under which the alignment loss would mean nothing.

    Raises:
        `ValueError`: Naming the setting and the value that passes.
    """
    check_pool(args)
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs, over which Trainer would divide each batch (`nn.DataParallel`), and "
            "head representations cannot be read there. Start one process a GPU with `accelerate launch`, or let it "
            "see one: `CUDA_VISIBLE_DEVICES=0`."
        )
    for name in ("packing", "padding_free"):
        if getattr(args, name):
            raise ValueError(
                f"`{name}=True` mixes several samples in one sequence, so head representations cannot be pooled by "
                f"sample. Set `{name}=False`, or `alignment_weight=0`."
            )


def check_dataset(dataset: Any, name: str) -> None:
    """Refuses data that cannot have teacher vectors. Of a stream, one row is read.

    Raises:
        `ValueError`: Naming the cure.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}, but head alignment needs a `datasets.Dataset` or a streamed "
            "`datasets.IterableDataset`. Convert it, or set `alignment_weight=0`."
        )
    if not {"image", "images", TEACHER_COLUMN} & column_names(dataset, name):
        raise ValueError(
            f"`{name}` has no column `image`, `images` or `{TEACHER_COLUMN}`, so there is nothing to align with. Add "
            "one, or set `alignment_weight=0` to train as SFTTrainer does. If all images lie in videos or inside of "
            "messages, let it be a column `images` of empty lists: that is how SFTTrainer knows vision data."
        )


def check_steps(dataset: Any, args: HeRAConfig) -> None:
    """Refuses a stream without `max_steps`, which `Trainer` would do after the model is loaded.

    Raises:
        `ValueError`: Naming the setting.
    """
    if isinstance(dataset, IterableDataset) and args.max_steps <= 0:
        raise ValueError(
            "`max_steps` must be set: `train_dataset` is a stream (`IterableDataset`), whose length is not known, and "
            "the learning-rate schedule needs the number of steps."
        )


def with_teacher_features(
    dataset: Any, name: str, teacher: VisionTeacher | str, batch_size: int, width: int | None = None
) -> Dataset:
    """A data set with teacher vectors, computed, read from the cache, or brought along. To be called by all processes
    alike, which divide the work.

    Args:
        dataset ([`~datasets.Dataset`]): The data set, which has passed [`check_dataset`].
        name (`str`): What the trainer calls it, for messages.
        teacher ([`VisionTeacher`] or `str`): The teacher.
        batch_size (`int`): Images encoded at a time.
        width (`int`, *optional*): Width that the vectors must have.

    Raises:
        `ValueError`: If the data or the teacher cannot be used, or the vectors have another width.
    """
    dataset = add_teacher_features(
        dataset, teacher, batch_size=batch_size, desc=f"Teacher vectors of {name}", distributed=True
    )
    if width is not None:
        check_width(check_teacher_features(dataset), name, width)
    return dataset


def check_width(found: int, name: str, width: int | None) -> None:
    """Refuses teacher vectors of another width than the training data's, if that is known.

    Raises:
        `ValueError`: Naming both.
    """
    if width is not None and found != width:
        raise ValueError(
            f"The teacher vectors of `{name}` have {found} dimensions, those of `train_dataset` {width}. Compute both "
            "with the same teacher."
        )


def check_device_map(model: nn.Module) -> None:
    """Refuses a model that is split over several devices: gradients of heads have not been proven there."""
    devices = {str(device) for device in getattr(unwrap_model(model), "hf_device_map", {}).values()}
    if len(devices) > 1:
        raise ValueError(
            f"The model is split over several devices ({', '.join(sorted(devices))}), which head alignment does not "
            "support yet. Load it on one device (`device_map=None`), train with several processes, or set "
            "`alignment_weight=0`."
        )


def check_tokens_stay(model: nn.Module, accelerator: Accelerator) -> None:
    """Refuses what gives the language model other positions than the labels have: prompt-learning adapters (prompt,
    prefix and P-tuning), which put some in front, and parallelism that divides sequences.

    Raises:
        `ValueError`: Naming the cure.
    """
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        if adapter.is_prompt_learning:
            raise ValueError(
                f"The prompt-learning adapter {name!r} ({adapter.peft_type.value}) puts virtual tokens before the text,"
                " so head representations cannot be matched with labels. Use another adapter, such as LoRA, or set "
                "`alignment_weight=0`."
            )
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "Context and sequence parallelism divide the tokens of a sample over processes, so head representations "
            "cannot be pooled. Set `cp_size` and `sp_size` of the parallelism config to 1, or `alignment_weight=0`."
        )


def check_loss_scaling(args: HeRAConfig, accelerator: Accelerator) -> None:
    """Refuses to learn the temperature under DeepSpeed in fp16: its engine scales the loss by a factor of its own, and
    takes it out of the gradients of the model's parameters only.

    Raises:
        `ValueError`: Naming the settings that pass.
    """
    if args.learn_temperature and accelerator.state.deepspeed_plugin and accelerator.mixed_precision == "fp16":
        raise ValueError(
            "The temperature cannot be learned under DeepSpeed in fp16, whose loss scale is taken out of the model's "
            "gradients only. Use bf16, or set `learn_temperature=False`."
        )


def check_ranking(ranking: HeadRanking, accessor: HeadAccessor, model_type: str) -> None:
    """Refuses a ranking of another model.

    Raises:
        `ValueError`: If the layers and heads of the ranking are not those of the model.
    """
    if len(ranking.scores) != accessor.num_layers or ranking.heads() != accessor.heads():
        raise ValueError(
            f"The head ranking was computed for {ranking.model or 'another model'!r} with {len(ranking.scores)} layers "
            f"and {len(ranking.heads())} heads; this {model_type!r} model has {accessor.num_layers} layers and "
            f"{len(accessor.heads())} heads. Use the ranking of this model, or leave `head_ranking_path` and "
            "`head_ranking` at `None` to compute it."
        )


def cached_ranking(
    model: nn.Module,
    processing_class: Any,
    dataset: Dataset,
    args: HeRAConfig,
    accessor: HeadAccessor,
    precision: str,
    teacher_name: str,
) -> HeadRanking:
    """The ranking of the model's heads without adapters, from the cache where the same one was computed before. To be
    called by all processes alike, which divide the work.

    The cache goes by what the ranking is computed from, not by names: a data set's fingerprint does not tell what a
    function read from elsewhere, and another tokenizer makes other tokens of the same text.

    Args:
        model (`nn.Module`): The model.
        processing_class: Its processor.
        dataset ([`~datasets.Dataset`]): Rows with teacher vectors.
        args ([`HeRAConfig`]): Settings of the ranking.
        accessor ([`~heads.registry.HeadAccessor`]): The model's heads.
        precision (`str`): Mixed precision that the forward runs in, part of the cache key.
        teacher_name (`str`): Kept in the ranking.
    """
    base = unwrap_model(model)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    samples = draw_samples(dataset, tokenizer, args.num_neighbors, args.ranking_num_samples, args.seed)
    team = Team(distributed=True)
    with without_adapters(model):
        settings = {
            "format": _RANKING_FORMAT,
            "samples": samples.digest(),
            "weights": weights_digest(accessor.decoder, adapters=False),
            "config": plain_config(getattr(accessor.decoder, "config", base.config)),
            "precision": precision,
            "k": args.num_neighbors,
            "num_samples": args.ranking_num_samples,
            "normalize": args.normalize,
            "seed": args.seed,
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
            k=args.num_neighbors,
            batch_size=args.per_device_eval_batch_size,
            normalize=args.normalize,
            teacher_name=teacher_name,
            progress=not args.disable_tqdm,
            distributed=True,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if team.index == team.sharers(path.parent)[0]:  # one process writes it, on each file system
        ranking.save(path)
    return ranking


def choose_heads(args: HeRAConfig, ranking: HeadRanking) -> list[AttentionHead]:
    """The heads that the configuration picks from a ranking."""
    return ranking.select(args.head_selection, args.num_aligned_heads, args.seed)


def checkpoint_ranking(checkpoint: str | os.PathLike | None, file_name: str) -> HeadRanking | None:
    """The ranking that a checkpoint carries, if it carries one."""
    path = None if checkpoint is None else Path(checkpoint, file_name)
    return HeadRanking.load(path) if path is not None and path.is_file() else None
