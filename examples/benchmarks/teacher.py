"""What encoding a data set of stored images costs beside the bare teacher, and what a second run costs.

    python examples/benchmarks/teacher.py            # DINOv2-S of the demo, float32 as it is loaded by default
    python examples/benchmarks/teacher.py --small    # a tiny random DINOv2 and few images, in seconds

1. `add_teacher_features` over PNG and JPEG images (reading, hashing, decoding, preparing, encoding, caching) against
   the teacher's forward pass alone on the same images, decoded and prepared before.
2. A second run over 100,000 rows whose vectors are cached, in a fresh process each: forward passes of the teacher
   (counted), and the seconds from the call to the finished column. Images inside the data set, and as files.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import datasets
import numpy as np
import PIL.Image
import torch
from harness import Result, Row, fresh_process, paired, seconds
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from hera_trainer import VisionTeacher, add_teacher_features
from hera_trainer.teacher.encoder import teacher_identity, to_rgb
from hera_trainer.teacher.vectors import TEACHER_COLUMN

BATCH_SIZE = 32
WIDTH = 384
StoredImage = dict[str, Any]


def save_teacher(folder: Path, small: bool) -> None:
    """Writes the demo's DINOv2-S, or a tiny random one."""
    if not small:
        from hera_trainer.demo import parts

        parts.save_teacher(folder)
        return
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=7
    )
    Dinov2Model(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    BitImageProcessor(size=size, crop_size={"height": 28, "width": 28}).save_pretrained(folder)


def photograph(rng: np.random.Generator, width: int = 640, height: int = 480) -> PIL.Image.Image:
    """An image that compresses as a photograph does: broad colours, and grain on top."""
    coarse = rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    smooth = np.asarray(PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC))
    grain = rng.normal(0, 6, (height, width, 1))
    return PIL.Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def encoded(image: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def stored_images(count: int) -> datasets.Dataset:
    """Every second image a JPEG, the others PNG, 640 x 480."""
    rng = np.random.default_rng(0)
    kinds: list[dict[str, Any]] = [{"kind": "JPEG", "quality": 90}, {"kind": "PNG"}]
    files = [encoded(photograph(rng), **kinds[i % 2]) for i in range(count)]
    column = [{"bytes": file, "path": None} for file in files]
    return datasets.Dataset.from_dict({"image": column}, features=datasets.Features({"image": datasets.Image()}))


def encoding(folder: Path, count: int, pairs: int) -> list[Row]:
    """Throughput beside the bare teacher's, and where the rest of the time goes."""
    teacher = VisionTeacher.from_pretrained(folder, device="cpu")
    dataset = stored_images(count)
    stored = dataset.cast_column("image", datasets.Image(decode=False))["image"][:]
    images = [to_rgb(PIL.Image.open(io.BytesIO(image["bytes"]))) for image in stored]
    batches = [images[start : start + BATCH_SIZE] for start in range(0, count, BATCH_SIZE)]
    prepared = [teacher.image_processor(images=batch, return_tensors="pt") for batch in batches]
    found: dict[str, Any] = {}

    def ours() -> None:
        # A cache of its own each time: nothing may be found in it.
        with tempfile.TemporaryDirectory() as cache:
            result = add_teacher_features(dataset, teacher, batch_size=BATCH_SIZE, cache_dir=cache)
            found["ours"] = np.array(result.with_format("numpy")[:][TEACHER_COLUMN])

    def bare() -> None:
        found["bare"] = torch.cat([teacher.forward_prepared(batch) for batch in prepared]).numpy()

    measured = paired(bare, ours, pairs)  # their ratio is a throughput: bare seconds by ours
    if not np.allclose(found["ours"], found["bare"], rtol=1e-4, atol=1e-4):
        raise AssertionError("The column's vectors are not the teacher's.")
    middle = statistics.median(measured.ratios)
    alone = {
        "decoding": seconds(lambda: [to_rgb(PIL.Image.open(io.BytesIO(image["bytes"]))) for image in stored]),
        "preparing": seconds(lambda: [teacher.image_processor(images=batch, return_tensors="pt") for batch in batches]),
        "forward": statistics.median(measured.ours),
    }
    share = ", ".join(f"{name} {1000 * spent / count:.2f}" for name, spent in alone.items())
    note = f"float32, {count} images of 640 x 480, half JPEG, half PNG, batches of {BATCH_SIZE}; "
    note += f"ms an image alone: {share}; add_teacher_features {1000 * statistics.median(measured.theirs) / count:.2f}"
    what = "teacher encoding, from stored images to the cached column: throughput"
    against = "bare teacher forward on decoded and prepared tensors"
    low, high = min(measured.ratios), max(measured.ratios)
    return [Row(what, against, middle, low, high, pairs, ">= 0.85", middle >= 0.85, note)]


class Pretender:
    """Fills the cache as the teacher would, without its work."""

    def __init__(self, folder: Path) -> None:
        self.identity = teacher_identity(folder)

    def encode(self, images: list[PIL.Image.Image], batch_size: int = BATCH_SIZE) -> torch.Tensor:
        return torch.randn(len(images), WIDTH)


def tiny_pngs(count: int) -> list[bytes]:
    """As many different images of 2 x 2 pixels."""
    pixels = np.arange(count, dtype="<u4").view(np.uint8).reshape(count, 2, 2)
    return [encoded(PIL.Image.fromarray(each), "PNG") for each in pixels]


def cache_vectors(folder: Path, count: int) -> None:
    """Two data sets on disk (images inside, and paths to them), whose vectors are in the cache."""
    files = tiny_pngs(count)
    (folder / "images").mkdir()
    paths = [folder / "images" / f"{number}.png" for number in range(count)]
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file)
    forms: dict[str, list[StoredImage]] = {
        "inside": [{"bytes": file, "path": None} for file in files],
        "files": [{"bytes": None, "path": str(path)} for path in paths],
    }
    for name, column in forms.items():
        # Written as a table: `save_to_disk` would put the files' bytes into the data set.
        features = datasets.Features({"image": datasets.Image(decode=False)})
        stored = datasets.Dataset.from_dict({"image": column}, features=features)
        stored.to_parquet(folder / f"{name}.parquet")
        teacher: Any = Pretender(folder / "teacher")
        add_teacher_features(load(folder, name), teacher, cache_dir=folder / "cache")


def load(folder: Path, name: str) -> datasets.Dataset:
    """One of the data sets, memory-mapped from disk."""
    column = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_parquet(str(folder / f"{name}.parquet"), cache_dir=str(folder / "hf"), features=column)


def second_run(folder: Path, name: str) -> dict[str, float]:
    """What a process finds in the cache: seconds, forward passes, teachers loaded."""
    forward, load_teacher = VisionTeacher.forward_prepared, VisionTeacher.from_pretrained
    dataset = load(folder, name)
    with (
        mock.patch.object(VisionTeacher, "forward_prepared", autospec=True, side_effect=forward) as forwards,
        mock.patch.object(VisionTeacher, "from_pretrained", side_effect=load_teacher) as loads,
    ):
        start = time.perf_counter()
        result = add_teacher_features(dataset, folder / "teacher", batch_size=BATCH_SIZE, cache_dir=folder / "cache")
        spent = time.perf_counter() - start
    if result[len(result) - 1][TEACHER_COLUMN] is None:
        raise AssertionError("The last row has no vector.")
    return {"seconds": spent, "forwards": forwards.call_count, "loads": loads.call_count}


def second_runs(folder: Path, count: int, runs: int, small: bool) -> list[Row]:
    """Forward passes and seconds of second runs."""
    cache_vectors(folder, count)

    def run(name: str) -> dict[str, float]:
        return second_run(folder, name) if small else fresh_process(__file__, "--second", name, "--folder", str(folder))

    rows = []
    for name, where in (("inside", "images inside the data set"), ("files", "images as files")):
        found = [run(name) for _ in range(runs)]
        spent = [each["seconds"] for each in found]
        middle = statistics.median(spent)
        forwards = [each["forwards"] + each["loads"] for each in found]
        what = f"second run over {count:,} cached rows, {where}"
        note = f"a fresh process each; vectors of {WIDTH} numbers; imports and opening the data set not counted"
        rows += [
            Row(
                f"{what}: teachers loaded and forward passes",
                "zero",
                statistics.median(forwards),
                min(forwards),
                max(forwards),
                runs,
                "= 0",
                max(forwards) == 0,
                "a count, not a ratio",
            ),
            Row(f"{what}: start-up", "one second", middle, min(spent), max(spent), runs, "<= 1", middle <= 1, note),
        ]
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a tiny random teacher, few images")
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--second", choices=("inside", "files"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    if chosen.second:
        print(json.dumps(second_run(Path(chosen.folder), chosen.second)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_teacher(folder / "teacher", chosen.small)
        rows = encoding(folder / "teacher", BATCH_SIZE * 3 if chosen.small else BATCH_SIZE * 4, chosen.pairs)
        rows += second_runs(folder, 500 if chosen.small else 100_000, chosen.pairs, chosen.small)
    small = chosen.small
    command = f"python examples/benchmarks/teacher.py --pairs {chosen.pairs}" + (" --small" if small else "")
    Result("teacher_small" if small else "teacher", command, rows).save()


if __name__ == "__main__":
    main()
