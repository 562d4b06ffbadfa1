"""The vision teacher: how it encodes, preprocessing, and images of all kinds."""

from __future__ import annotations

import io
import random
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from tiny_teachers import IMAGES, SQUARE, VIT, noise_image, randomize, save_dinov2
from transformers import (
    AutoImageProcessor,
    AutoModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)
from transformers.integrations import deepspeed

from hera_trainer.teacher.encoder import TeacherOutputError, VisionTeacher, teacher_identity, to_rgb
from hera_trainer.teacher.vectors import add_teacher_features


@pytest.fixture
def dinov2(tmp_path) -> Path:
    return save_dinov2(tmp_path / "dinov2")


def test_plain_rgb_goes_through_the_image_processor_untouched(dinov2):
    teacher = VisionTeacher.from_pretrained(dinov2, device="cpu")
    seen = []
    teacher.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    teacher.encode(IMAGES)
    expected = AutoImageProcessor.from_pretrained(dinov2)(images=IMAGES, return_tensors="pt")
    assert seen[0].keys() == expected.keys()
    assert torch.equal(seen[0]["pixel_values"], expected["pixel_values"])


def test_teacher_is_frozen_and_in_eval_mode():
    model = randomize(ViTModel(ViTConfig(**VIT, hidden_dropout_prob=0.5))).train()
    teacher = VisionTeacher(model, ViTImageProcessor(size=SQUARE))
    expected = teacher.encode(IMAGES)
    assert torch.equal(teacher.encode(IMAGES), expected)
    teacher.model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # someone else's autocast must not reach it
        assert torch.equal(teacher.encode(IMAGES), expected)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


@pytest.mark.parametrize(
    ("rank", "device"), [(None, "cuda"), ("-1", "cuda"), ("", "cuda"), ("1", "cuda:1"), ("5", "cuda:1")]
)
def test_each_process_of_a_launcher_has_its_own_accelerator(dinov2, monkeypatch, rank, device):
    """Before anything has set it, and with two of them on this machine."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(VisionTeacher, "to", lambda self, device: device)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert VisionTeacher.from_pretrained(dinov2) == torch.device(device)
    assert VisionTeacher.from_pretrained(dinov2, device="cpu") == "cpu"


def test_a_teacher_that_is_named_runs_where_it_is_told(dinov2, tmp_path, monkeypatch):
    asked = []
    load = VisionTeacher.from_pretrained.__func__

    def watched(cls, name, device=None):
        asked.append(device)
        return load(cls, name)

    monkeypatch.setattr(VisionTeacher, "from_pretrained", classmethod(watched))
    rows = datasets.Dataset.from_dict({"image": IMAGES}, features=datasets.Features({"image": datasets.Image()}))
    add_teacher_features(rows, str(dinov2), cache_dir=tmp_path, device="cuda:1")
    assert asked == ["cuda:1"]


def test_dtype_device_and_batches(dinov2):
    teacher = VisionTeacher.from_pretrained(dinov2, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    vectors = teacher.encode(IMAGES)
    assert vectors.dtype == torch.float32 and torch.equal(vectors, vectors.bfloat16().float())
    assert teacher.identity == teacher_identity(dinov2, dtype=torch.bfloat16) != teacher_identity(dinov2)
    assert teacher.to("cpu") is teacher
    assert teacher.encode([]).shape == (0, 16)
    with pytest.raises(ValueError, match="batch_size"):
        teacher.encode(IMAGES, batch_size=0)
    with pytest.raises(ValueError, match="Item 1 is a str"):
        teacher.encode([IMAGES[0], "picture.png"])


def test_vector_that_is_not_finite_names_the_image(dinov2):
    teacher = VisionTeacher.from_pretrained(dinov2, device="cpu")
    calls = []

    def poison(module, args, outputs):
        calls.append(len(outputs.last_hidden_state))
        if len(calls) == 2:
            outputs.last_hidden_state[1, 0, 3] = float("nan")

    teacher.model.register_forward_hook(poison)
    with pytest.raises(ValueError, match="image 3 of the list") as caught:
        teacher.encode(IMAGES, batch_size=2)
    assert isinstance(caught.value, TeacherOutputError) and caught.value.index == 3


def test_loading_and_encoding_leave_random_states_alone(tmp_path):
    # this checkpoint has no pooling layer, so loading initialises one at random
    ViTForImageClassification(ViTConfig(**VIT)).save_pretrained(tmp_path)
    ViTImageProcessor(size=SQUARE).save_pretrained(tmp_path)
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    VisionTeacher.from_pretrained(tmp_path, device="cpu").encode(IMAGES)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


# Images of all kinds


def colours(image: PIL.Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def test_to_rgb_applies_exif_orientation():
    image = noise_image(0, (6, 4))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    turned = to_rgb(PIL.Image.open(file))
    assert turned.size == (4, 6)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(image), k=-1))
    assert np.array_equal(np.asarray(to_rgb(turned)), np.asarray(turned))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_to_rgb_scales_16_bit_greyscale(mode):
    levels = np.array([[0, 128, 257, 32768, 65535]])
    expected = np.round(levels * 255 / 65535)
    stored = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = PIL.Image.frombytes(mode, (5, 1), levels.astype(stored).tobytes())
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert np.array_equal(np.asarray(rgb), np.repeat(expected[..., None], 3, axis=2))


def test_to_rgb_16_bit_png_file():
    levels = np.array([[0, 32768, 65535]], dtype=np.uint16)
    file = io.BytesIO()
    PIL.Image.fromarray(levels).save(file, "PNG")
    assert np.asarray(to_rgb(PIL.Image.open(file)))[0, :, 0].tolist() == [0, 128, 255]


def test_to_rgb_composites_transparency_on_white():
    rgba = PIL.Image.new("RGBA", (3, 1))
    rgba.putdata([(200, 100, 0, 255), (200, 100, 0, 0), (200, 100, 0, 51)])
    # 20 % of the colour over 80 % of white
    assert colours(to_rgb(rgba)) == [(200, 100, 0), (255, 255, 255), (244, 224, 204)]

    grey = PIL.Image.new("LA", (2, 1))
    grey.putdata([(10, 255), (10, 0)])
    assert colours(to_rgb(grey)) == [(10, 10, 10), (255, 255, 255)]

    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 6, 5, 4])
    palette.putdata([0, 1])
    assert colours(to_rgb(palette)) == [(9, 8, 7), (6, 5, 4)]
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=1)
    assert colours(to_rgb(PIL.Image.open(file))) == [(9, 8, 7), (255, 255, 255)]


def test_to_rgb_other_modes_and_plain_rgb():
    cmyk = PIL.Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert colours(to_rgb(cmyk)) == [(255, 0, 0)]
    assert colours(to_rgb(PIL.Image.new("L", (1, 1), 77))) == [(77, 77, 77)]
    assert colours(to_rgb(PIL.Image.new("1", (1, 1), 1))) == [(255, 255, 255)]
    plain = noise_image(5)
    assert np.array_equal(np.asarray(to_rgb(plain)), np.asarray(plain))


def test_a_teacher_is_whole_where_deepspeed_divides_what_is_loaded(tmp_path, monkeypatch):
    """Under ZeRO-3, transformers would load it in parts, together with all other processes."""
    path, seen = save_dinov2(tmp_path / "teacher"), []
    load = AutoModel.from_pretrained

    def watched(*args, **kwargs):
        seen.append(deepspeed.is_deepspeed_zero3_enabled())
        return load(*args, **kwargs)

    class Config:
        def is_zero3(self):
            return True

    config = Config()
    monkeypatch.setattr(AutoModel, "from_pretrained", watched)
    deepspeed.set_hf_deepspeed_config(config)
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        teacher = VisionTeacher.from_pretrained(str(path))
        assert deepspeed.is_deepspeed_zero3_enabled()  # the language model is loaded as before
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert seen == [False] and all(parameter.numel() for parameter in teacher.model.parameters())
