"""Videos, lists of frames, through the whole trainer; and where they are refused."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Image, List, Value
from forms import ROWS, VISION, chat, check, hand_vector, of_rows, photos, run, turn, vision_collator
from tiny import save_tiny_dinov2
from tiny_teachers import noise_image

from hera_trainer.data.collator import ROW_PLACE
from hera_trainer.data.rows import collatable
from hera_trainer.data.streaming import row_images


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return save_tiny_dinov2(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def vector(teacher):
    return hand_vector(teacher)


def clips(number: int, frames: int, count: int = 1) -> list[list[PIL.Image.Image]]:
    return [[noise_image(100 * number + 10 * v + f, (32, 32)) for f in range(frames)] for v in range(count)]


def seen(clip: list[PIL.Image.Image]) -> list[PIL.Image.Image]:
    """Eight of twelve frames, as the documentation has it: at equal distances, with the first and the last."""
    return clip if len(clip) <= 8 else [clip[round(i * 11 / 7)] for i in range(8)]


VIDEO_PART = {"type": Value("string"), "text": Value("string"), "video": List(Image())}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava_onevision", "smolvlm"])
def test_videos_inside_of_messages(tmp_path, teacher, vector, family):
    rows, wanted = [], []
    for i in range(ROWS):
        clip = clips(i, 12)[0]
        parts = [{"type": "video", "video": clip}, {"type": "text", "text": f"what {i}"}]
        turns = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": f"red {i}"}]},
        ]
        rows.append({"images": [], "messages": turns})
        wanted.append(vector(*seen(clip)))
    message = List({"role": Value("string"), "content": List(VIDEO_PART)})
    trainer = run(tmp_path, teacher, of_rows(rows, messages=message), family)
    assert any(value.numel() for value in trainer.pixels.values())  # the model saw the videos, too
    tokenizer = trainer.processing_class.tokenizer
    pads = [
        token for token in ("<|video_pad|>", "<|image_pad|>", "<video>", "<image>") if token in tokenizer.get_vocab()
    ]
    found = {}
    for ids, value in trainer.samples.items():
        text = tokenizer.decode(ids)
        assert not any(pad in text for pad in pads)
        found[int(text.split("red ")[1][0])] = value
    for i, value in enumerate(wanted):
        torch.testing.assert_close(found[i], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["video", "videos"])
def test_columns_of_videos(tmp_path, teacher, vector, name):
    """With images beside them, and several questions in plain text."""
    rows, expected = [], {}
    for i in range(ROWS):
        own, videos = photos(i, i % 2), clips(i, 4, 1 if name == "video" else i % 3)
        turns = [*chat(i), {"role": "user", "content": "and where"}, {"role": "assistant", "content": "left"}]
        rows.append({"images": own, name: videos[0] if name == "video" else videos, "messages": turns})
        words = turn("user", VISION * (len(own) + len(videos)) + f"what {i}") + turn("assistant", f"red {i}")
        words += turn("user", "and where") + turn("assistant", "left")
        images = [*own, *(frame for video in videos for frame in video)]
        expected[words] = vector(*images) if images else None
    feature = List(Image()) if name == "video" else List(List(Image()))
    trainer = run(tmp_path, teacher, of_rows(rows, **{name: feature}))
    check(trainer, expected)
    assert trainer.pixels["pixel_values_videos"].numel()


@pytest.mark.parametrize("kind", ["path", "file", "array"])
@pytest.mark.parametrize("place", ["video", "videos", "messages"])
def test_videos_of_streams_that_are_no_lists_of_frames(place, kind):
    """No features say so before; neither may reach the model as something else, nor end in an error of Python's."""
    video = {"path": "clip.mp4", "file": {"bytes": b"", "path": "clip.mp4"}, "array": np.zeros((2, 8, 8, 3))}[kind]
    turns = [{"role": "user", "content": [{"type": "video", "video": video if place == "messages" else None}]}]
    row = {"images": [], "messages": turns, ROW_PLACE: "Row 5 of `train_dataset`"}
    if place != "messages":
        row[place] = video if place == "video" else [video]
    wanted = rf"a {type(video).__name__} as a video.*list of its frames.*datasets\.List\(datasets\.Image"
    with pytest.raises(ValueError, match=f"^Row 5 of `train_dataset`: A row has {wanted}"):
        row_images(row)
    with pytest.raises(ValueError, match=wanted):  # where rows bring vectors, the teacher's way never meets the video
        collatable(row, vision_collator())


def test_videos_that_cannot_reach_the_model(tmp_path, teacher):
    rows = [{"images": [], "video": clips(i, 2)[0], "messages": chat(i)} for i in range(ROWS)]
    with pytest.raises(ValueError, match=r"LlavaProcessor cannot process any.*Qwen2.5-VL"):
        run(tmp_path, teacher, of_rows(rows, video=List(Image())), "llava")
    collator = vision_collator()
    split = {"images": [], "videos": clips(0, 2), "prompt": chat(0)[:1], "completion": chat(0)[1:]}
    with pytest.raises(ValueError, match=r"`messages`.*assistant_only_loss=True"):
        collatable(split, collator)
    turns = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what"}]}]
    for videos in ([], clips(0, 2, 2)):
        with pytest.raises(ValueError, match=rf"has {len(videos)} videos, but 1 placeholders"):
            collatable({"images": [], "videos": videos, "messages": turns}, collator)
    with pytest.raises(ValueError, match="has 1 videos, but 0 placeholders"):
        collatable({"images": [], "videos": clips(0, 2), "messages": chat(0)[1:]}, collator)
    # what goes through stands where the placeholder is
    row = collatable({"images": [], "videos": clips(0, 2), "messages": turns}, collator)
    assert row["messages"][0]["content"][0]["video"] == clips(0, 2)[0]
    assert turns[0]["content"][0] == {"type": "video"}
