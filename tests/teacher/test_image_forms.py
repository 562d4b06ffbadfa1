"""Images of every kind as the teacher sees them, against vectors that are computed without this library."""

from __future__ import annotations

import io
import weakref
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import transformers as tf
from datasets import Dataset, Features, Image, List, Value
from tiny_teachers import SQUARE, crop, encoded, noise_image, save_dinov2, save_vit, vectors_of
from transformers import AutoImageProcessor, AutoModel

from hera_trainer.data.collator import ROW_PLACE
from hera_trainer.data.streaming import row_images
from hera_trainer.teacher import image_sources
from hera_trainer.teacher import images as image_column
from hera_trainer.teacher.encoder import VisionTeacher
from hera_trainer.teacher.vectors import add_teacher_features


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_dinov2(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def by_hand(folder):
    """The vector of one RGB image."""
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def vector(rgb: PIL.Image.Image) -> np.ndarray:
        assert rgb.mode == "RGB"
        with torch.no_grad():
            return model(**processor(images=rgb, return_tensors="pt")).last_hidden_state[0, 0].numpy()

    return vector


def mean(vectors: list[np.ndarray]) -> np.ndarray:
    direction = np.mean([v / np.linalg.norm(v) for v in vectors], axis=0)
    return direction / np.linalg.norm(direction) * np.mean([np.linalg.norm(v) for v in vectors])


def close(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# What the model of the teacher is fed


def with_processor(folder: Path, processor: Any) -> Path:
    """The tiny DINOv2 with the image processor of another family."""
    save_dinov2(folder)
    processor.save_pretrained(folder)
    return folder


TEACHERS = {
    "DINOv2": save_dinov2,
    "ViT": save_vit,
    "CLIP": lambda folder: with_processor(folder, crop(tf.CLIPImageProcessor)),
    "SigLIP": lambda folder: with_processor(folder, tf.SiglipImageProcessor(size=SQUARE)),
    "DINOv3": lambda folder: with_processor(folder, tf.DINOv3ViTImageProcessor(size=SQUARE)),
    "ConvNeXt": lambda folder: with_processor(
        folder, tf.ConvNextImageProcessor(size={"shortest_edge": SQUARE["width"]})
    ),
}


@pytest.mark.parametrize("family", TEACHERS)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_pixels_are_those_of_the_image_processor_bit_for_bit(family, batch_size, tmp_path, monkeypatch):
    path = str(TEACHERS[family](tmp_path / "teacher"))
    fed: list[torch.Tensor] = []
    load = VisionTeacher.from_pretrained.__func__

    def watched(cls, *args, **kwargs):
        teacher = load(cls, *args, **kwargs)
        teacher.model.register_forward_pre_hook(
            lambda _, args, kwargs: fed.extend(kwargs["pixel_values"]), with_kwargs=True
        )
        return teacher

    monkeypatch.setattr(VisionTeacher, "from_pretrained", classmethod(watched))
    sizes = [(40, 30), (30, 40), (1, 1), (2, 3), (3, 1), (1, 90), (64, 33), (40, 30)]
    images = [noise_image(seed, size) for seed, size in enumerate(sizes)]
    add_teacher_features(Dataset.from_dict({"image": images}), path, batch_size=batch_size, cache_dir=tmp_path / "c")
    processor = AutoImageProcessor.from_pretrained(path)
    assert len(fed) == len(images)
    for pixels, image in zip(fed, images, strict=True):
        assert torch.equal(pixels, processor(images=image, return_tensors="pt")["pixel_values"][0])


# Kinds of files


def grey(mode: str) -> tuple[bytes, np.ndarray]:
    levels = np.random.default_rng(0).integers(0, 256, (30, 41), dtype=np.uint8)
    if mode == "1":
        levels = np.where(levels > 127, 255, 0).astype(np.uint8)
    image = PIL.Image.fromarray(levels).convert(mode) if mode != "I;16" else None
    image = image or PIL.Image.fromarray(levels.astype(np.uint16) * 257)
    return encoded(image), np.stack([levels] * 3, axis=-1)


def transparent(mode: str) -> tuple[bytes, np.ndarray]:
    """The left half is opaque, the right half is not there: a person sees white."""
    pixels = np.asarray(noise_image(1, (40, 30))).copy()
    image = PIL.Image.fromarray(pixels)
    if mode == "LA":
        pixels = np.stack([np.asarray(image.convert("L"))] * 3, axis=-1)
    alpha = np.where(np.arange(40) < 20, 255, 0)[None].repeat(30, 0).astype(np.uint8)
    seen = np.where(alpha[..., None] == 255, pixels, 255).astype(np.uint8)
    image = PIL.Image.fromarray(pixels).convert("L" if mode == "LA" else "RGB")
    image.putalpha(PIL.Image.fromarray(alpha))
    assert image.mode == mode
    return encoded(image), seen


def palette(hole: bool) -> tuple[bytes, np.ndarray]:
    colours = np.random.default_rng(2).integers(0, 256, (8, 3), dtype=np.uint8)
    indices = np.random.default_rng(3).integers(0, 8, (30, 40), dtype=np.uint8)
    image = PIL.Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", **({"transparency": 3} if hole else {}))
    assert PIL.Image.open(file).mode == "P"
    seen = colours[indices]
    return file.getvalue(), np.where((indices == 3)[..., None] & hole, 255, seen).astype(np.uint8)


def cmyk() -> tuple[bytes, np.ndarray]:
    levels = np.asarray(noise_image(4, (40, 30)))
    inks = np.concatenate([255 - levels, np.zeros((30, 40, 1), dtype=np.uint8)], axis=-1)  # no black ink
    return encoded(PIL.Image.fromarray(inks, "CMYK"), "TIFF"), levels


def turned(orientation: int) -> tuple[bytes, np.ndarray]:
    upright = np.asarray(noise_image(5, (40, 30)))
    stored = {3: upright[::-1, ::-1], 6: np.rot90(upright), 8: np.rot90(upright, -1), 2: upright[:, ::-1]}[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(stored)).save(file, "PNG", exif=exif)
    return file.getvalue(), upright


KINDS = {
    **{mode: lambda mode=mode: grey(mode) for mode in ("L", "1", "I;16")},
    **{mode: lambda mode=mode: transparent(mode) for mode in ("LA", "RGBA")},
    "palette": lambda: palette(hole=False),
    "palette with a transparent colour": lambda: palette(hole=True),
    "CMYK": cmyk,
    **{f"EXIF {n}": lambda n=n: turned(n) for n in (2, 3, 6, 8)},
}


@pytest.mark.parametrize("decode", [True, False])
def test_kinds_of_files(decode, folder, by_hand, tmp_path):
    files = {kind: make() for kind, make in KINDS.items()}
    paths = [str(tmp_path / f"{number}.image") for number in range(len(files))]
    for path, (data, _) in zip(paths, files.values(), strict=True):
        with open(path, "wb") as file:
            file.write(data)
    as_bytes = [{"bytes": data, "path": None} for data, _ in files.values()]
    as_paths = [{"bytes": None, "path": path} for path in paths]
    dataset = Dataset.from_dict({"image": as_bytes + as_paths}, features=Features({"image": Image(decode=decode)}))
    found = vectors_of(add_teacher_features(dataset, folder, cache_dir=tmp_path / "cache"))
    for number, (kind, (_, seen)) in enumerate(files.items()):
        np.testing.assert_allclose(
            found[number], by_hand(PIL.Image.fromarray(seen)), rtol=1e-5, atol=1e-5, err_msg=kind
        )
        assert np.array_equal(found[number], found[number + len(files)])


def test_one_file_in_two_modes(folder, by_hand, tmp_path):
    """The mode of a column's feature is part of what an image is."""
    data = encoded(noise_image(0, (40, 30)))
    features = Features({"image": Image(mode="L"), "video": List(Image())})
    dataset = Dataset.from_dict({"image": [data], "video": [[data]]}, features=features)
    grey_vector = by_hand(noise_image(0, (40, 30)).convert("L").convert("RGB"))
    found = vectors_of(add_teacher_features(dataset, folder, cache_dir=tmp_path))[0]
    close(found, mean([grey_vector, by_hand(noise_image(0, (40, 30)))]))


# Large images


def test_a_very_large_image(folder, by_hand, tmp_path):
    image = PIL.Image.new("RGB", (6000, 4000), "teal")
    image.paste("orange", (1000, 0, 3500, 4000))
    image.save(tmp_path / "large.bmp")  # the quickest to write
    dataset = Dataset.from_dict({"image": [str(tmp_path / "large.bmp")]}, features=Features({"image": Image()}))
    close(vectors_of(add_teacher_features(dataset, folder, cache_dir=tmp_path))[0], by_hand(image))


def test_memory_is_bounded(folder, by_hand, tmp_path, monkeypatch):
    """At most as many pixels at a time as allowed are given to the teacher, and as many are decoded meanwhile."""
    images = (
        [noise_image(seed, (100, 50)) for seed in range(12)]
        + [noise_image(99, (300, 200))]
        + [noise_image(50, (10, 10))] * 2
    )
    monkeypatch.setattr(image_column, "_PIXELS_AT_A_TIME", 15_000)
    alive: list[weakref.ref] = []
    most, given = [0], []
    convert, encode = image_column.to_rgb, VisionTeacher.encode

    def counted(image):
        alive.append(weakref.ref(rgb := convert(image)))
        decoded = [other for reference in list(alive) if (other := reference()) is not None]
        most[0] = max(most[0], sum(other.width * other.height for other in decoded))
        return rgb

    def encode_counted(self, images, batch_size=32):
        given.append(sum(image.width * image.height for image in images))
        return encode(self, images, batch_size)

    monkeypatch.setattr(image_column, "to_rgb", counted)
    monkeypatch.setattr(VisionTeacher, "encode", encode_counted)
    found = vectors_of(add_teacher_features(Dataset.from_dict({"image": images}), folder, cache_dir=tmp_path))
    for value, image in zip(found, images, strict=True):
        close(value, by_hand(image))
    assert given == [15_000] * 4 + [60_000, 100]  # the large one alone
    assert most[0] <= 60_000 + 15_000


# Where images lie


def test_paths(folder, by_hand, tmp_path, monkeypatch):
    noise_image(0).save(tmp_path / "here.png")
    monkeypatch.chdir(tmp_path)

    def vectors(path: str) -> list[np.ndarray]:
        dataset = Dataset.from_dict({"image": [path]}, features=Features({"image": Image(decode=False)}))
        return vectors_of(add_teacher_features(dataset, folder, cache_dir=tmp_path / "cache"))

    close(vectors("here.png")[0], by_hand(noise_image(0)))
    with pytest.raises(ValueError, match=rf"Row 0.*gone.png.*relative path, looked for in {tmp_path}"):
        vectors("gone.png")
    with pytest.raises(ValueError, match=r"Row 0.*https://a.b/c.png is a URL; download it"):
        vectors("https://a.b/c.png")


def messages_of(parts: list[dict[str, Any]], **features: Any) -> Dataset:
    part = {"type": Value("string"), "text": Value("string"), **features}
    message = {"role": Value("string"), "content": List(part)}
    return Dataset.from_dict(
        {"images": [[noise_image(7)]], "prompt": [[{"role": "user", "content": parts}]]},
        features=Features({"images": List(Image()), "prompt": List(message)}),
    )


def test_images_and_frames_everywhere_in_a_row(folder, by_hand, tmp_path):
    clip = [noise_image(seed) for seed in range(20)]
    parts = [
        {"type": "image", "image": noise_image(30)},
        {"type": "text", "text": "and"},
        {"type": "video", "video": [noise_image(31), None, noise_image(32)]},
        {"type": "image"},
    ]
    dataset = messages_of(parts, image=Image(), video=List(Image()))
    videos = Dataset.from_dict({"videos": [[clip, [], None]]}, features=Features({"videos": List(List(Image()))}))
    dataset = datasets.concatenate_datasets([dataset, videos], axis=1)
    sampled = [clip[i] for i in (0, 3, 5, 8, 11, 14, 16, 19)]
    expected = mean([by_hand(p) for p in (noise_image(7), *sampled, *(noise_image(seed) for seed in (30, 31, 32)))])
    close(vectors_of(add_teacher_features(dataset, folder, cache_dir=tmp_path))[0], expected)
    # the same of a row of a stream
    close(mean([by_hand(rgb) for rgb in row_images({**dataset[0], ROW_PLACE: "Row 0"})]), expected)


def test_number_of_frames_is_part_of_the_cache_key(folder, by_hand, tmp_path, monkeypatch):
    clip = [noise_image(seed) for seed in range(5)]
    Dataset.from_dict({"video": [clip]}, features=Features({"video": List(Image())})).save_to_disk(tmp_path / "data")
    for most, indices in ((8, range(5)), (3, (0, 2, 4)), (1, (0,)), (8, range(5))):
        monkeypatch.setattr(image_sources, "MAX_FRAMES", most)
        monkeypatch.setattr(image_column, "MAX_FRAMES", most)
        dataset = add_teacher_features(Dataset.load_from_disk(tmp_path / "data"), folder, cache_dir=tmp_path / "cache")
        vectors = [by_hand(clip[i]) for i in indices]
        close(vectors_of(dataset)[0], mean(vectors) if len(vectors) > 1 else vectors[0])


def test_selected_rows_with_frames(folder, by_hand, tmp_path):
    clips = [[noise_image(10 * n + f) for f in range(n)] or None for n in range(5)]
    dataset = Dataset.from_dict({"video": clips}, features=Features({"video": List(Image())})).select([4, 0, 2])
    found = vectors_of(add_teacher_features(dataset, folder, cache_dir=tmp_path, batch_size=2))
    close(found[0], mean([by_hand(frame) for frame in clips[4]]))
    assert found[1] is None
    close(found[2], mean([by_hand(frame) for frame in clips[2]]))


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("video", datasets.Video()),
        ("videos", List(datasets.Video())),
        ("videos", List(Image())),
        ("video", Value("string")),
        ("video", List(datasets.Array3D((2, 2, 3), "uint8"))),
    ],
)
def test_videos_that_are_no_lists_of_frames(name, feature, folder):
    with pytest.raises(ValueError, match=rf"`{name}` holds .*list of its frames.*decode video files.*datasets.List"):
        image_sources.find_sources(Features({name: feature}))


def test_messages_with_images_that_are_not_stored(folder, tmp_path):
    with pytest.raises(ValueError, match=r"`image` in the messages of column `prompt` holds .*datasets.Image"):
        add_teacher_features(messages_of([{"type": "image", "image": 3}], image=Value("int64")), folder)
    with pytest.raises(ValueError, match=r"`video` in the messages of column `prompt` holds .*list of its frames"):
        add_teacher_features(messages_of([{"type": "video", "video": "a.mp4"}], video=Value("string")), folder)
