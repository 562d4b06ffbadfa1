"""`hera encode`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .parser import Parser, positive

if TYPE_CHECKING:
    from ..teacher.cache import Entry


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hera encode",
        description="Computes the vision teacher's vector of every image of a data set and keeps them in the cache "
        "(`HF_HOME`), where training finds them: it then loads no teacher. A run that is interrupted goes on where it "
        "was.",
        epilog="examples:\n"
        "  hera encode trl-lib/llava-instruct-mix\n"
        "  hera encode data/train.jsonl --teacher facebook/dinov2-base --batch-size 128\n"
        "  accelerate launch --num_processes 8 -m hera_trainer encode trl-lib/llava-instruct-mix\n\n"
        "DATASET is a name on the Hub, a folder, or a .json, .jsonl, .parquet or .csv file. Encode the same rows that "
        "you train on: with a part held out (--test_split_size), training encodes anew.",
    )
    parser.add_argument("dataset", metavar="DATASET", help="data with images, as for training")
    parser.add_argument("--teacher", default="facebook/dinov2-large", help="vision teacher [%(default)s]")
    parser.add_argument("--split", default="train", help="split, or a part such as train[:10%%] [%(default)s]")
    parser.add_argument("--dataset-config", default=None, help="configuration (subset) of the data set")
    parser.add_argument("--batch-size", type=positive, default=32, help="images in a forward pass [%(default)s]")
    return parser


def _num_cached(entry: Entry, distinct: int) -> int:
    """Images whose vectors are in the cache: all of a finished entry, or those that an interrupted run has saved."""
    if entry.load() is not None:
        return distinct
    chunks = [path.stem.split("-") for path in entry.directory.glob(f"{entry.key}-*-*.safetensors")]
    return sum(int(stop) - int(start) for _, start, stop in chunks)


def main(arguments: Sequence[str]) -> None:
    args = _parser().parse_args(arguments)
    from accelerate import PartialState

    from ..common.processes import Team
    from ..teacher.cache import Entry
    from ..teacher.column import TEACHER_COLUMN
    from ..teacher.encoder import teacher_identity
    from ..teacher.images import ImageColumn
    from ..teacher.vectors import add_teacher_features, cache_root
    from .paths import local_path
    from .rows import load_rows

    begin = time.perf_counter()
    team = Team(distributed=True)
    teacher = local_path(args.teacher)
    with PartialState().main_process_first():  # the others find the data in the cache
        rows = load_rows(args.dataset, config=args.dataset_config, split=args.split)
    if TEACHER_COLUMN in rows.column_names:
        raise ValueError(f"The data set brings vectors of its own, in column `{TEACHER_COLUMN}`: nothing to encode.")
    column = ImageColumn(rows)
    images = column.scan("Teacher vectors")
    distinct = len(images.digests)
    entry = Entry(cache_root() / "teacher_features", images.key(teacher_identity(teacher)), len(column))
    cached = _num_cached(entry, distinct)
    team.wait()  # all have looked before one begins to write
    add_teacher_features(rows, teacher, batch_size=args.batch_size, distributed=True)
    if team.is_main:
        print(f"{len(rows)} rows, {len(images.ids)} images, {distinct} distinct")
        print(f"{distinct - cached} encoded, {cached} were in the cache; {time.perf_counter() - begin:.1f} s in all")
        print(f"Cache: {entry.path}")
