"""Tiny random vision teachers, images for them, and what the tests of teachers and of their vectors share."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTImageProcessor, ViTModel

from hera_trainer.teacher.encoder import VisionTeacher
from hera_trainer.teacher.vectors import TEACHER_COLUMN

WIDTH = 16
SIZE, PATCH = 28, 7
TOWER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": PATCH,
}
VIT = {**TOWER, "image_size": SIZE}
SQUARE = {"height": SIZE, "width": SIZE}
TEXT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 20,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def crop(cls):
    return cls(size={"shortest_edge": 32}, crop_size=SQUARE, do_center_crop=True)


def randomize(model: torch.nn.Module, scale: float = 0.2) -> torch.nn.Module:
    """Large random weights everywhere: fresh models have zero class tokens and biases, which hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def noise_image(seed: int, size: tuple[int, int] = (12, 9)) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def encoded(image: PIL.Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


IMAGES = [noise_image(seed, size) for seed, size in enumerate([(40, 30), (28, 50), (64, 33), (40, 30), (40, 30)])]


def save_dinov2(folder: Path) -> Path:
    """Writes a DINOv2 and its image processor to `folder`, which is returned."""
    randomize(Dinov2Model(Dinov2Config(**VIT))).save_pretrained(folder)
    crop(BitImageProcessor).save_pretrained(folder)
    return folder


def save_vit(folder: Path) -> Path:
    """Writes a ViT even smaller, for the tests that encode many images, and returns the folder."""
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    randomize(ViTModel(config), scale=0.3).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def count_work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts teachers loaded and images encoded from now on."""
    count = {"loads": 0, "images": 0}
    load, encode = VisionTeacher.from_pretrained.__func__, VisionTeacher.encode

    def counting_load(cls, *args, **kwargs):
        count["loads"] += 1
        return load(cls, *args, **kwargs)

    def counting_encode(self, images, batch_size=32):
        count["images"] += len(images)
        return encode(self, images, batch_size)

    monkeypatch.setattr(VisionTeacher, "from_pretrained", classmethod(counting_load))
    monkeypatch.setattr(VisionTeacher, "encode", counting_encode)
    return count


def vectors_of(dataset: Dataset) -> list[np.ndarray | None]:
    rows = dataset.select_columns([TEACHER_COLUMN]).with_format(None)[:][TEACHER_COLUMN]
    return [None if row is None else np.array(row, dtype=np.float32) for row in rows]


def assert_rows(dataset: Dataset, teacher: VisionTeacher, images: list[PIL.Image.Image | None]) -> None:
    """Every row has the vector of the image that stands at its place in `images`."""
    rows = vectors_of(dataset)
    assert len(rows) == len(images)
    for row, image in zip(rows, images, strict=True):
        if image is None:
            assert row is None
        else:
            np.testing.assert_allclose(row, teacher.encode([image])[0].numpy(), rtol=1e-5, atol=1e-5)
