"""Images in every form that transformers loads: the model and the teacher are shown the same, or a row is refused."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from forms import ROWS, VISION, chat, check, hand_vector, of_rows, photos, run, turn, vision_collator
from runs import NoStep
from streams import build
from tiny import build_vlm, save_tiny_dinov2, sft_args
from tiny_teachers import encoded, vectors_of
from trl import SFTConfig, SFTTrainer

from hera_trainer import VisionTeacher, add_teacher_features
from hera_trainer.data.collator import ROW_PLACE, TEACHER_COLUMN
from hera_trainer.data.rows import collatable
from hera_trainer.data.streaming import row_images

STRING = Value("string")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return save_tiny_dinov2(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def vector(teacher):
    return hand_vector(teacher)


def in_base64(number: int) -> str:
    return base64.b64encode(encoded(photos(number)[0])).decode()


def data_uri(number: int) -> str:
    return f"data:image/png;base64,{in_base64(number)}"


def file(folder: Path, number: int) -> str:
    path = folder / f"{number}.png"
    path.write_bytes(encoded(photos(number)[0]))
    return str(path)


def parts_of_all_forms(folder: Path) -> list[dict[str, Any]]:
    return [
        {"type": "image_url", "image_url": {"url": data_uri(0)}},
        {"type": "image_url", "image_url": {"url": file(folder, 1)}},
        {"type": "image", "url": file(folder, 2)},
        {"type": "image", "path": file(folder, 3)},
        {"type": "image", "base64": in_base64(4)},
        {"type": "image", "image": data_uri(5)},
    ]


PART = {
    "type": STRING, "text": STRING, "image_url": {"url": STRING, "detail": STRING},
    "url": STRING, "path": STRING, "base64": STRING, "image": STRING,
}  # fmt: skip


def asked(part: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """A chat; its last part would be an image if only keys were looked at."""
    words = {"type": "text", "text": f"what {number}", "path": "of no image"}
    return [
        {"role": "user", "content": [part, words]},
        {"role": "assistant", "content": [{"type": "text", "text": f"red {number}"}]},
    ]


# Forms


@pytest.mark.parametrize("columns", ["messages", "prompt and completion", "messages in JSON"])
@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "stream"])
def test_every_form_that_templates_load(tmp_path, teacher, vector, columns, streamed):
    rows, expected = [], {}
    for i, part in enumerate(parts_of_all_forms(tmp_path)):
        turns = asked(part, i)
        texts: dict[str, Any] = {"messages": turns}
        pooled = turn("user", VISION + f"what {i}") + turn("assistant", f"red {i}")
        if columns == "prompt and completion":
            texts = {"prompt": turns[:1], "completion": turns[1:]}
            pooled = pooled.partition("assistant\n")[2]
        elif columns == "messages in JSON":
            texts = {"messages": json.dumps(turns)}
        rows.append({"images": [], **texts})
        expected[pooled] = vector(*photos(i))
    message = STRING if columns == "messages in JSON" else List({"role": STRING, "content": List(PART)})
    dataset = of_rows(rows, messages=message, prompt=message, completion=message)
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    trainer = run(tmp_path, teacher, dataset, train_sampling_strategy="sequential")
    check(trainer, expected)
    # The model sees the pixels that it sees of decoded images in a column.
    plain = of_rows([{"images": photos(i), "messages": chat(i)} for i in range(ROWS)])
    decoded = run(tmp_path, teacher, plain, train_sampling_strategy="sequential")
    for name, value in decoded.pixels.items():
        assert torch.equal(trainer.pixels[name], value)


def test_an_image_url_that_is_a_text(tmp_path, teacher, vector):
    """As it is a string, and beside decoded ones."""
    part = {"type": STRING, "text": STRING, "image_url": STRING, "image": Image()}
    rows = [{"images": [], "messages": asked({"type": "image_url", "image_url": data_uri(0)}, 0)}]
    rows.append({"images": [], "messages": asked({"type": "image", "image": photos(1)[0]}, 1)})
    for row in rows:
        del row["messages"][0]["content"][1]["path"]
    dataset = of_rows(rows, messages=List({"role": STRING, "content": List(part)}))
    found = vectors_of(add_teacher_features(dataset, teacher, cache_dir=tmp_path))
    for i in range(2):
        np.testing.assert_allclose(found[i], vector(*photos(i)), rtol=1e-5, atol=1e-5)
        shown = collatable(dataset[i], vision_collator())["messages"][0]["content"][0]
        assert np.array_equal(np.asarray(shown["image"]), np.asarray(photos(i)[0]))


def test_the_first_of_several_keys_counts(tmp_path, teacher, vector):
    part = {"type": "image", "path": file(tmp_path, 1), "url": file(tmp_path, 0), "base64": in_base64(2)}
    row = {"images": [], "messages": asked(part, 0)}
    dataset = of_rows([row], messages=List({"role": STRING, "content": List(PART)}))
    found = vectors_of(add_teacher_features(dataset, teacher, cache_dir=tmp_path))[0]
    np.testing.assert_allclose(found, vector(*photos(0)), rtol=1e-5, atol=1e-5)
    [image] = row_images({**dataset[0], ROW_PLACE: "Row 0"})
    assert np.array_equal(np.asarray(image), np.asarray(photos(0)[0]))
    shown = collatable(dataset[0], vision_collator())["messages"][0]["content"][0]
    assert list(shown) == ["type", "image"]
    assert np.array_equal(np.asarray(shown["image"]), np.asarray(photos(0)[0]))


@pytest.mark.parametrize("stored", ["base64", "data URI", "wrapped", "path"])
@pytest.mark.parametrize("name", ["image", "images"])
@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "stream"])
def test_columns_of_text(tmp_path, teacher, vector, name, stored, streamed):
    make = {
        "base64": in_base64,
        "data URI": data_uri,
        "wrapped": lambda i: base64.encodebytes(encoded(photos(i)[0])).decode(),
        "path": lambda i: file(tmp_path, i),
    }[stored]
    values = [make(i) for i in range(ROWS)]
    rows = [{name: value if name == "image" else [value], "messages": chat(i)} for i, value in enumerate(values)]
    dataset: Any = of_rows(rows, image=STRING, images=List(STRING))
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    trainer = run(tmp_path, teacher, dataset, train_sampling_strategy="sequential")
    check(
        trainer,
        {turn("user", VISION + f"what {i}") + turn("assistant", f"red {i}"): vector(*photos(i)) for i in range(ROWS)},
    )
    # The same batch as SFTTrainer's, to the last bit.
    model, processor = build_vlm("qwen2_5_vl")
    args = sft_args(tmp_path, per_device_train_batch_size=ROWS, max_steps=2, train_sampling_strategy="sequential")
    sft = SFTTrainer(model, SFTConfig(**args), train_dataset=dataset, processing_class=processor)
    batch = next(iter(sft.get_train_dataloader()))
    assert torch.equal(batch["pixel_values"], trainer.pixels["pixel_values"])


def test_transparency_in_text(tmp_path, teacher):
    """The model's processor drops it, as it does for SFTTrainer; the teacher sees white."""
    image = photos(0)[0].copy()
    image.putalpha(0)
    row = {"images": [base64.b64encode(encoded(image)).decode()], "messages": chat(0)}
    [shown] = collatable(row, vision_collator())["images"]
    assert shown.mode == "RGB" and np.array_equal(np.asarray(shown), np.asarray(photos(0)[0]))
    [seen] = row_images({**row, ROW_PLACE: "Row 0"})
    assert (np.asarray(seen) == 255).all()


def test_written_images_are_found_in_the_cache(tmp_path, teacher, monkeypatch):
    rows = [{"images": [in_base64(i)], "messages": chat(i)} for i in range(3)]
    of_rows(rows, images=List(STRING)).save_to_disk(tmp_path / "data")
    first = add_teacher_features(Dataset.load_from_disk(tmp_path / "data"), teacher, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(VisionTeacher, "from_pretrained", None)
    monkeypatch.setattr("hera_trainer.teacher.images.ImageColumn.scan", None)  # found without decoding a text again
    again = add_teacher_features(Dataset.load_from_disk(tmp_path / "data"), teacher, cache_dir=tmp_path / "cache")
    assert again[TEACHER_COLUMN][:] == first[TEACHER_COLUMN][:]


# Refusals


def places_of(value: str) -> dict[str, Dataset]:
    """Three rows, the last of which has the value."""
    good = [data_uri(0), data_uri(1), value]
    message = List({"role": STRING, "content": List(PART)})
    return {
        "column": of_rows(
            [{"images": [v], "messages": chat(i)} for i, v in enumerate(good)], images=List(STRING)
        ),
        "messages": of_rows(
            [
                {"images": [], "messages": asked({"type": "image_url", "image_url": {"url": v}}, i)}
                for i, v in enumerate(good)
            ],
            messages=message,
        ),
        "JSON": of_rows(
            [
                {"images": [], "messages": json.dumps(asked({"type": "image", "url": v}, i))}
                for i, v in enumerate(good)
            ],
            messages=STRING,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("place", ["column", "messages", "JSON"])
def test_urls_are_refused_before_training(tmp_path, teacher, place, monkeypatch):
    monkeypatch.setattr("httpx.get", None)  # a call would fail in another way
    dataset = places_of("https://a.b/c.png?signature=" + "x" * 500)[place]
    for rows in (dataset, dataset.to_iterable_dataset()):
        trainer = build(tmp_path, rows, teacher=teacher, callbacks=[NoStep()], ranking_num_samples=12)
        with pytest.raises(ValueError, match=r"Row 2 of .*https://a.b/c.png.*\.\.\. is a URL; download it") as caught:
            trainer.train()
        assert "x" * 200 not in str(caught.value)


@pytest.mark.parametrize("broken", ["", "data:image/png;base64,"])
@pytest.mark.parametrize("place", ["column", "messages", "JSON"])
def test_no_message_repeats_an_image(tmp_path, teacher, place, broken):
    payload = base64.b64encode(np.random.default_rng(0).bytes(3000)).decode()
    dataset = places_of(broken + payload)[place]
    for rows in (dataset, dataset.to_iterable_dataset()):
        trainer = build(tmp_path, rows, teacher=teacher, callbacks=[NoStep()], ranking_num_samples=12)
        with pytest.raises(ValueError, match=r"Row 2 of .*names no file and is no image in base64") as caught:
            trainer.train()
        error: BaseException | None = caught.value
        while error is not None:  # nor does what Python prints above it
            assert payload[100:200] not in str(error)
            error = error.__cause__ or error.__context__
    dataset.save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"Row 2 of .*no image in base64"):
        add_teacher_features(Dataset.load_from_disk(tmp_path / "data"), teacher, cache_dir=tmp_path / "cache")
    brought = dataset.add_column(TEACHER_COLUMN, [[1.0, 2.0]] * 3)
    with pytest.raises(ValueError, match=r"An image can't be used: .*no image in base64"):
        collatable(brought[2], vision_collator())


def test_rows_of_a_stream_that_cannot_be_read(tmp_path, teacher):
    """Here `datasets` reads the image, and its error has all of the text."""
    payload = in_base64(2)
    rows = [{"images": [{"bytes": encoded(photos(i)[0]), "path": None}], "messages": chat(i)} for i in range(3)]
    rows[2]["images"] = [{"bytes": None, "path": payload}]
    features = Features({**of_rows([{"images": [], "messages": chat(0)}]).features})
    stream = IterableDataset.from_generator(lambda: iter(rows), features=features)
    trainer = build(tmp_path, stream, teacher=teacher, callbacks=[NoStep()], ranking_num_samples=12)
    with pytest.raises(ValueError, match=r"Row 2 of `train_dataset` can't be read.*characters\)") as caught:
        trainer.train()
    assert payload[100:200] not in str(caught.value)


def test_video_files_in_messages(teacher, tmp_path):
    """transformers would show them to the model."""
    turns = asked({"type": "video", "path": "clip.mp4"}, 0)
    dataset = of_rows([{"images": [], "messages": turns}], messages=List({"role": STRING, "content": List(PART)}))
    with pytest.raises(ValueError, match=r"Row 0 of the data set.*list of its frames"):
        add_teacher_features(dataset, teacher, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"Row 0: A row has a video under `path`.*list of its frames"):
        row_images({**dataset[0], ROW_PLACE: "Row 0"})
    with pytest.raises(ValueError, match="A row has a video under `path`"):
        collatable(dataset[0], vision_collator())


# An image that is there twice


@pytest.mark.parametrize("columns", ["messages", "prompt and completion"])
@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "stream"])
def test_an_image_in_both_places_counts_once(tmp_path, teacher, vector, columns, streamed):
    """The column repeats what stands in the messages; one more of it fills the placeholder behind."""
    rows, expected = [], {}
    for i in range(ROWS):
        first, second = photos(i, 2)
        turns = asked({"type": "image", "image": first}, i)
        del turns[0]["content"][1]["path"]
        images = [first]
        if i % 2:
            turns[0]["content"].append({"type": "image"})
            images = [first, second]
        texts = {"messages": turns}
        pooled = turn("user", VISION + f"what {i}" + VISION * (i % 2)) + turn("assistant", f"red {i}")
        if columns == "prompt and completion":
            texts = {"prompt": turns[:1], "completion": turns[1:]}
            pooled = pooled.partition("assistant\n")[2]
        rows.append({"images": images, **texts})
        expected[pooled] = vector(*images)
    message = List({"role": STRING, "content": List({"type": STRING, "text": STRING, "image": Image()})})
    dataset = of_rows(rows, messages=message, prompt=message, completion=message)
    trainer = run(tmp_path, teacher, dataset.to_iterable_dataset() if streamed else dataset)
    check(trainer, expected)
    assert len(trainer.pixels["pixel_values"]) > 0


def test_two_images_of_a_column_stay_two(tmp_path, teacher, vector):
    """Only what the messages repeat is one: the model sees both of these."""
    a, b = photos(0)[0], photos(1)[0]
    dataset = of_rows([{"images": [a, a, b], "messages": chat(0)}])
    found = vectors_of(add_teacher_features(dataset, teacher, cache_dir=tmp_path))[0]
    np.testing.assert_allclose(found, vector(a, a, b), rtol=1e-5, atol=1e-5)
    assert len(row_images({**dataset[0], ROW_PLACE: "Row 0"})) == 3
    assert len(collatable(dataset[0], vision_collator())["images"]) == 3


def test_images_behind_plain_text_of_a_user():
    """SFTTrainer writes the placeholder of the column's image before that text, and keeps the other where it stands."""
    a, b = photos(0)[0], photos(1)[0]
    turns = [{"role": "user", "content": "first"}, *asked({"type": "image", "image": b}, 0)]
    del turns[1]["content"][1]["path"]
    collator = vision_collator()
    for images in ([a], [b]):
        row = {"images": images, "messages": turns}
        expected = collator([{"images": list(images), "messages": copy.deepcopy(turns)}])
        batch = collator([collatable(row, collator)])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
        assert len(batch["image_grid_thw"]) == 2


def test_no_form_is_changed_in_place():
    """The next epoch sees it again."""
    row = {"images": [photos(0)[0]], "messages": asked({"type": "image", "image": data_uri(0)}, 0)}
    before = json.dumps(row["messages"])
    collatable(row, vision_collator())
    assert json.dumps(row["messages"]) == before
