"""`hera rank`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..heads.head import GRANULARITIES, SELECTIONS
from ..objectives.similarity import SIMILARITIES, comparison
from .parser import Parser, positive

if TYPE_CHECKING:
    from datasets import Dataset

# What captions are the answer to where images are in context and the data has no question of its own.
CAPTION_QUESTION = "Describe the image."

DEFAULT_TEACHER = "facebook/dinov2-large"
_TEXT_COLUMNS = ("completion", "messages", "text")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hera rank",
        description="Scores every attention head of a model by how well its neighbourhoods agree with those of a "
        "vision teacher (mutual k-NN). Writes the scores as JSON, for training, and as a PNG beside it, and says which "
        "heads the paper would align.",
        epilog="examples:\n"
        "  hera rank Qwen/Qwen2.5-VL-3B-Instruct trl-lib/llava-instruct-mix --output heads.json\n"
        "  hera rank my-adapter photos.jsonl --image-column photo --caption-column caption --dtype bfloat16\n"
        "  hera sft --head_ranking_path heads.json ...      trains with them\n\n"
        "MODEL and DATASET are names on the Hub or folders; DATASET may be a .json, .jsonl, .parquet or .csv file too.",
    )
    parser.add_argument("model", metavar="MODEL", help="model, or PEFT adapter, which is ranked with its base model")
    parser.add_argument("dataset", metavar="DATASET", help="images with captions, `messages` or `completion`")
    parser.add_argument("--output", default="head_ranking.json", help="JSON file to write [%(default)s]")
    parser.add_argument("--teacher", default=None, help=f"vision teacher [{DEFAULT_TEACHER}]")
    parser.add_argument("--num-samples", type=positive, default=1000, help="samples with distinct images [%(default)s]")
    parser.add_argument("--k", type=positive, default=10, help="neighbours [%(default)s]")
    parser.add_argument(
        "--clip-quantile",
        type=float,
        default=None,
        help="clamp the values of each space to this quantile first, 0.95 as the metric's reference code [no clipping]",
    )
    parser.add_argument(
        "--similarity",
        choices=SIMILARITIES,
        default="cosine",
        help="how vectors are compared, as `metric_similarity` in training [%(default)s]",
    )
    parser.add_argument(
        "--ceiling",
        metavar="ENCODER",
        default=None,
        help="second vision encoder, the score of which with the teacher, on the same images, stands beside the heads'",
    )
    parser.add_argument(
        "--granularity", choices=GRANULARITIES, default="head", help="choose heads, or whole layers [%(default)s]"
    )
    parser.add_argument("--selection", choices=SELECTIONS, default="worst", help="which of them [%(default)s]")
    parser.add_argument("--m", type=positive, default=5, help="number of heads or layers to choose [%(default)s]")
    parser.add_argument(
        "--context",
        choices=("text", "image"),
        default="text",
        help="text: captions go through the language model alone, as in the paper; image: after their image, as in "
        f"training. Captions then answer {CAPTION_QUESTION!r} [%(default)s]",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--split", default="train", help="split, or a part such as train[:10%%] [%(default)s]")
    data.add_argument("--dataset-config", default=None, help="configuration (subset) of the data set")
    data.add_argument("--image-column", default=None, help="column of images [image or images]")
    data.add_argument(
        "--caption-column",
        default=None,
        help="column of texts; of a list, the first [the assistant's turns in messages, text, or completion]",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--revision", default=None, help="branch, tag or commit of MODEL")
    model.add_argument("--base-model", default=None, help="base model of an adapter, if not the one that it names")
    model.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="[auto]")
    model.add_argument("--load-in-4bit", action="store_true", help="quantize to 4 bit (bitsandbytes NF4)")
    model.add_argument("--device", default=None, help="such as cuda:1 or cpu [the accelerator if there is one]")
    model.add_argument("--batch-size", type=positive, default=16, help="samples in a forward pass [%(default)s]")
    parser.add_argument(
        "--teacher-batch-size", type=positive, default=32, help="images the teacher encodes [%(default)s]"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of samples [%(default)s]")
    parser.add_argument("--no-plot", action="store_true", help="no PNG (needs no matplotlib)")
    return parser


def with_image_column(dataset: Dataset, image_column: str | None, caption_column: str | None) -> Dataset:
    """The data set with its images under a name by which they are looked for.

    Args:
        dataset ([`~datasets.Dataset`]): Images with texts.
        image_column (`str`, *optional*): Column of images. `image` or `images` if not given.
        caption_column (`str`, *optional*): Column of texts, or of lists of them. `completion`, `messages` or `text` if
            not given.

    Raises:
        `ValueError`: If a column is missing.
    """
    from ..teacher.image_sources import IMAGE_COLUMNS

    names = dataset.column_names
    for option, name in (("--image-column", image_column), ("--caption-column", caption_column)):
        if name is not None and name not in names:
            raise ValueError(f"{option}: the data set has no column {name!r}. It has {', '.join(names)}.")
    if image_column is None and not set(IMAGE_COLUMNS) & set(names):
        raise ValueError(f"Say which column has the images: --image-column. There are {', '.join(names)}.")
    if caption_column is None and not set(_TEXT_COLUMNS) & set(names):
        raise ValueError(f"Say which column has the texts: --caption-column. There are {', '.join(names)}.")
    if image_column is not None:
        others = [name for name in IMAGE_COLUMNS if name in names and name != image_column]
        dataset = dataset.remove_columns(others) if others else dataset
    return dataset if image_column in (None, *IMAGE_COLUMNS) else dataset.rename_column(image_column, "image")


def with_turns(dataset: Dataset, caption_column: str | None) -> tuple[Dataset, str | None]:
    """A data set whose captions are turns with these alone and in a column in which they are looked for, and no name
    of a column any more; any other data set and name as they are.

    Args:
        dataset ([`~datasets.Dataset`]): Images with texts.
        caption_column (`str`, *optional*): See [`with_image_column`].
    """
    if caption_column is None:
        return dataset, None
    from ..teacher.json_columns import may_hold_turns

    if caption_column != "messages" and not may_hold_turns(dataset.features[caption_column]):
        return dataset, caption_column
    name = caption_column if caption_column == "completion" else "messages"
    kept = {caption_column, "prompt"} if name == "completion" else {caption_column}
    others = [column for column in ("prompt", *_TEXT_COLUMNS) if column in dataset.column_names and column not in kept]
    dataset = dataset.remove_columns(others)
    return (dataset if name == caption_column else dataset.rename_column(caption_column, name)), None


def with_text_column(dataset: Dataset, caption_column: str | None, context: str, processor: Any) -> Dataset:
    """The data set with its texts under a name by which they are looked for.

    Args:
        dataset ([`~datasets.Dataset`]): Images with texts.
        caption_column (`str`, *optional*): See [`with_image_column`].
        context (`str`): `"text"`, or `"image"`: then captions become answers.
        processor: The model's, which tells placeholders from words.
    """
    if caption_column is None and {"completion", "messages"} & set(dataset.column_names):
        return dataset
    column = caption_column or "text"
    others = [name for name in ("prompt", *_TEXT_COLUMNS) if name in dataset.column_names and name != column]
    from ..heads.text import special_tokens

    special = special_tokens(getattr(processor, "tokenizer", processor))
    make = partial(_as_answer, special=special) if context == "image" else _as_text
    return dataset.map(
        make,
        batched=True,
        input_columns=[column],
        remove_columns=[*others, column],
        desc="Captions",
        load_from_cache_file=True,
    )


def _first(caption: Any) -> str | None:
    return (caption[0] if caption else None) if isinstance(caption, list) else caption


def _as_text(captions: list[Any]) -> dict[str, list[Any]]:
    return {"text": [_first(caption) for caption in captions]}


def _as_answer(captions: list[Any], special: re.Pattern[str] | None) -> dict[str, list[Any]]:
    from ..heads.text import words

    question = {"role": "user", "content": CAPTION_QUESTION}
    answers = [{"role": "assistant", "content": words(_first(caption) or "", special)} for caption in captions]
    return {"prompt": [[question] for _ in captions], "completion": [[answer] for answer in answers]}


def draw(dataset: Dataset, num_samples: int, seed: int, caption_column: str | None = None) -> Dataset:
    """So many rows that `num_samples` of them can be ranked on, or all: the teacher need not see the rest. Those have
    a text, and images that none of the others has."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(dataset))
    size = num_samples
    while size < len(dataset):
        rows = dataset.select(order[:size])
        if _count_usable(rows, caption_column) >= num_samples:
            return rows
        size *= 2
    return dataset


def _count_usable(rows: Dataset, caption_column: str | None) -> int:
    from ..heads.text import TextColumns, answer_text
    from ..teacher.images import ImageColumn

    column = ImageColumn(rows)
    images = column.scan("Distinct images")
    name = caption_column or TextColumns().ranked(rows.column_names)
    if name is None:  # which is said when heads are ranked
        return len(images.digests)
    texts = (row[name] for row in rows.with_format(None).select_columns([name]))
    if caption_column is None:
        texts = (text and answer_text({name: text}, TextColumns(named=name)) for text in texts)
    pairs = zip(column.by_row(images), map(_first, texts), strict=True)
    return len({tuple(ids.tolist()) for ids, text in pairs if len(ids) and text})


def _collator(processor: Any, dataset: Dataset) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """What `HeRATrainer` makes batches with, for the data at hand."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    from ..data.collator import TeacherCollator
    from ..heads.text import TextColumns
    from ..teacher.column import check_teacher_features

    if not hasattr(processor, "image_processor"):
        raise ValueError("--context image needs a vision-language model; this one has a tokenizer only.")
    is_answer = TextColumns().ranked(dataset.column_names) == "completion"
    inner = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=is_answer)
    return TeacherCollator(inner, check_teacher_features(dataset))


def main(arguments: Sequence[str]) -> None:
    args = _parser().parse_args(arguments)
    output = Path(args.output)
    if output.suffix != ".json":
        raise ValueError(f"--output {args.output!r} must end in .json.")
    if args.selection == "middle" and args.granularity == "head":
        raise ValueError("--selection middle chooses whole layers: --granularity layer.")
    if args.num_samples < args.k + 2:
        raise ValueError(f"--num-samples {args.num_samples} must be at least {args.k + 2} for --k {args.k}.")
    if not args.no_plot and find_spec("matplotlib") is None:
        raise ImportError('The heat map needs matplotlib: `pip install "hera-trainer[plot]"`, or `--no-plot`.')
    from ..heads.heat_map import plot_head_scores
    from ..heads.rank import rank_heads
    from ..heads.registry import get_head_accessor
    from ..objectives.metrics import check_clip_quantile
    from ..teacher.encoder import teacher_identity
    from ..teacher.vectors import TEACHER_COLUMN, add_teacher_features, cached_teacher_features
    from .loading import check_device, check_model, load_model
    from .paths import local_path
    from .rows import IMAGE_COLUMNS, load_rows

    check_device(args.device)
    check_model(args.model, args.revision, args.base_model)  # before the teacher works for long
    check_clip_quantile(args.clip_quantile, "--clip-quantile")
    name = args.teacher or DEFAULT_TEACHER
    teacher = local_path(name)
    ceiling = None if args.ceiling is None else local_path(args.ceiling)
    if ceiling is not None:
        teacher_identity(ceiling)
    images = IMAGE_COLUMNS if args.image_column is None else (args.image_column,)
    rows = load_rows(args.dataset, config=args.dataset_config, split=args.split, image_columns=images)
    brings_vectors = TEACHER_COLUMN in rows.column_names
    if brings_vectors and args.teacher is not None:
        raise ValueError(
            f"The data brings its own `{TEACHER_COLUMN}`, with which heads are ranked, so that --teacher "
            f"{args.teacher!r} would not be used. Leave it out, or remove the column."
        )
    if not brings_vectors and args.ceiling == name:
        raise ValueError(f"--ceiling {args.ceiling!r} is the teacher itself. Name another encoder.")
    rows = with_image_column(rows, args.image_column, args.caption_column)
    if not brings_vectors:
        rows = cached_teacher_features(rows, teacher) or rows  # of all rows, as `hera encode` leaves them
    rows, captions = with_turns(rows, args.caption_column)
    rows = draw(rows, args.num_samples, args.seed, captions)
    rows = add_teacher_features(rows, teacher, batch_size=args.teacher_batch_size, device=args.device)
    model, processor = load_model(
        args.model,
        revision=args.revision,
        dtype=args.dtype,
        load_in_4bit=args.load_in_4bit,
        device=args.device,
        base_model=args.base_model,
    )
    rows = with_text_column(rows, captions, args.context, processor)
    units = len(get_head_accessor(model).units(args.granularity))
    if args.m > units:
        raise ValueError(f"--m {args.m} exceeds the {units} {args.granularity}s of this model.")
    ranking = rank_heads(
        model,
        processor,
        rows,
        k=args.k,
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        seed=args.seed,
        data_collator=_collator(processor, rows) if args.context == "image" else None,
        teacher_name="" if brings_vectors else name,  # of vectors that came with the data no more is known
        clip_quantile=args.clip_quantile,
        ceiling=ceiling,
        **comparison(args.similarity),
    )
    ranking = replace(ranking, model=args.model, ceiling_model=args.ceiling or "")
    ranking.save(output)
    heads = ranking.select(args.selection, args.m, args.seed, args.granularity)
    mean = ranking.scores[ranking.scores.isfinite()].mean()
    print(f"{len(ranking.heads())} heads, mutual k-NN with {ranking.scale}: mean {mean:.4f}")
    print(f"to hold it against: {', '.join(ranking.references())}")
    print(f"{args.selection}: {' '.join(f'{head}={ranking.score(head):.4f}' for head in heads)}")
    print(f"Scores: {output}")
    if not args.no_plot:
        heat_map = output.with_suffix(".png")
        plot_head_scores(ranking, heat_map, heads)
        print(f"Heat map: {heat_map}")
    chosen = f" --head_selection {args.selection} --num_aligned_heads {args.m}"
    chosen = "" if (args.selection, args.m) == ("worst", 5) else chosen
    chosen += f" --seed {args.seed}" if args.selection == "random" else ""
    chosen = f" --alignment_granularity layer{chosen}" if args.granularity == "layer" else chosen
    print(f"Train with: hera sft --head_ranking_path {output}{chosen} ...")
