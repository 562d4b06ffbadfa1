"""Rows that are held out of the training data."""

from __future__ import annotations

import random

import datasets
import numpy as np
import PIL.Image
import pytest

from hera_trainer.data.held_out import split_by_image


def image(number: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.full((4, 4, 3), number, np.uint8))


def rows_of(shown: list[list[int]]) -> datasets.Dataset:
    features = datasets.Features(
        {"id": datasets.Value("int64"), "images": datasets.List(datasets.Image()), "text": datasets.Value("string")}
    )
    rows = [
        {"id": i, "images": [image(number) for number in numbers], "text": str(i)} for i, numbers in enumerate(shown)
    ]
    return datasets.Dataset.from_list(rows, features=features)


def test_no_image_is_in_both_parts():
    draw = random.Random(0)
    shown = [[draw.randrange(60)] for _ in range(150)] + [[100, 101], [101, 102], [102, 103]] + [[]] * 7
    rows = rows_of(shown)
    for seed in range(5):
        train, held_out = split_by_image(rows, 0.2, seed)
        kept, out = train["id"][:], held_out["id"][:]
        assert sorted(kept + out) == list(range(len(shown))) and kept == sorted(kept) and out == sorted(out)
        assert 25 <= len(out) <= 32  # a fifth of 160, as far as whole groups of rows allow
        assert not {n for i in kept for n in shown[i]} & {n for i in out for n in shown[i]}
        assert len({150, 151, 152} & set(out)) in (0, 3)  # the first and the last have no image in common themselves
    again, _ = split_by_image(rows, 0.2, 4)
    assert again["id"][:] == kept and split_by_image(rows, 0.2, 5)[0]["id"][:] != kept


def test_rows_without_images():
    for rows in (rows_of([[]] * 20), datasets.Dataset.from_dict({"id": range(20), "text": ["a"] * 20})):
        train, held_out = split_by_image(rows, 6, 0)
        assert len(held_out) == 6 and sorted(train["id"][:] + held_out["id"][:]) == list(range(20))


def test_images_are_read_once(tmp_path, monkeypatch):
    """Other processes, and later starts, find what was read."""
    monkeypatch.setattr("hera_trainer.data.held_out.cache_root", lambda: tmp_path / "cache")
    rows_of([[i // 2] for i in range(20)]).save_to_disk(tmp_path / "rows")
    rows = datasets.load_from_disk(tmp_path / "rows")
    first = [part["id"][:] for part in split_by_image(rows, 0.3, 0)]
    monkeypatch.setattr("hera_trainer.teacher.images.ImageColumn.scan", None)
    assert [part["id"][:] for part in split_by_image(rows, 0.3, 0)] == first
    assert all((i in first[1]) == (i ^ 1 in first[1]) for i in range(20))


def test_images_that_cannot_be_read_here(caplog):
    """A run without alignment may fetch them, or have its own collator for them."""
    rows = datasets.Dataset.from_dict({"id": range(10), "image": [f"https://example.org/{i}.png" for i in range(10)]})
    train, held_out = split_by_image(rows, 3, 0)
    assert (len(train), len(held_out)) == (7, 3) and "images may be in both parts" in caplog.text


def test_refused():
    with pytest.raises(ValueError, match=r"`test_split_size` \(20\) would hold out 20 of 20 rows"):
        split_by_image(rows_of([[]] * 20), 20, 0)
    with pytest.raises(ValueError, match=r"at least 10 rows show the same ones, and `test_split_size`.* allows for 2"):
        split_by_image(rows_of([[0], [1]] * 10), 0.1, 0)
