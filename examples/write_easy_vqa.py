"""Writes easy-VQA as a data set for `hera eval`: a JSON lines file and the images beside it.

    pip install "hera-trainer[demo]"
    python examples/write_easy_vqa.py easy-vqa --questions 240
    hera eval hera-demo/hera/adapter --dataset easy-vqa/test.jsonl --metric exact_match --max-new-tokens 5

These are the 240 questions of `hera demo`: as many on colours, shapes and yes or no, half of the latter with yes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hera_trainer.demo.data import TEST_SEED, easy_vqa
from hera_trainer.demo.job import SEED

DEMO = TEST_SEED + SEED


def write_easy_vqa(folder: str | Path, split: str = "test", questions: int | None = None, seed: int = DEMO) -> Path:
    """Writes questions and images.

    Args:
        folder (`str` or `Path`): Where to.
        split (`str`): `"train"` or `"test"`.
        questions (`int`, *optional*): How many, balanced; all of them by default.
        seed (`int`): Seed of the draw, by default that of `hera demo`, which is 11 more than its `--seed`.

    Returns:
        `Path`: The JSON lines file, with the columns `id`, `image`, `prompt`, `answer` and `question_type`.
    """
    rows = easy_vqa(split, questions, seed)
    images = Path(folder, split)
    images.mkdir(parents=True, exist_ok=True)
    path = Path(folder, f"{split}.jsonl")
    with path.open("w", encoding="utf-8") as file:
        for index, row in enumerate(rows):
            name = f"{split}/{row['image_id']}.png"
            row["images"][0].save(Path(folder, name))
            line = {"id": index, "image": name, "prompt": row["prompt"], "answer": row["answer"]}
            file.write(json.dumps({**line, "question_type": row["question_type"]}) + "\n")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder to write")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--questions", type=int, default=None, help="how many, balanced [all]")
    parser.add_argument("--seed", type=int, default=DEMO, help="seed of the draw [%(default)s]")
    args = parser.parse_args(arguments)
    path = write_easy_vqa(args.folder, args.split, args.questions, args.seed)
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
