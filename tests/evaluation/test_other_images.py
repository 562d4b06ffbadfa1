"""Questions with the images of others, or with blank ones."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, Features, List, concatenate_datasets
from datasets import Image as ImageFeature
from tiny import image_dataset

from hera_trainer.evaluation.other_images import BlankQuestions, PermutedQuestions
from hera_trainer.evaluation.questions import Questions


def mixed() -> Dataset:
    """Four questions about one image each, two of them about the same one; two about two images; one about none, and
    the only one about three."""
    images = [row["images"][0] for row in image_dataset(11, seed=3)]
    shown = [images[:1], images[1:2], images[2:3], images[:1], images[3:5], images[5:7], [], images[7:10]]
    rows = image_dataset(len(shown)).remove_columns("images")
    column = Dataset.from_dict({"images": shown}, features=Features({"images": List(ImageFeature())}))
    return concatenate_datasets([rows, column], axis=1)


def shown(questions, index):
    parts = [part for turn in questions.messages(index) for part in turn["content"] if part["type"] == "image"]
    return [part["image"] for part in parts]


def pixels(questions, index):
    return tuple(image.tobytes() for image in shown(questions, index))


def test_permuted():
    own = Questions(mixed())
    other = PermutedQuestions(own)
    right, permuted = ([pixels(questions, index) for index in range(8)] for questions in (own, other))
    for index in range(6):
        assert permuted[index] != right[index] and permuted[index] in right
        assert len(permuted[index]) == len(right[index])
    assert permuted[0] == permuted[3] and set(permuted[:3]) == set(right[:3])
    assert permuted[6:] == right[6:]
    for index in range(8):
        before, after = own.describe(index), other.describe(index)
        assert (before.pop("digest") == after.pop("digest")) is (index >= 6)
        assert before == after
    assert [pixels(PermutedQuestions(own), index) for index in range(8)] == permuted
    more = Questions(concatenate_datasets([mixed(), image_dataset(8, seed=4)]))
    orders = [[pixels(PermutedQuestions(more, seed), index) for index in range(16)] for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_blank():
    own = Questions(mixed())
    other = BlankQuestions(own)
    for index in range(8):
        images = shown(other, index)
        assert [image.size for image in images] == [image.size for image in shown(own, index)]
        assert all((np.asarray(image) == 128).all() and image.mode == "RGB" for image in images)
        assert (own.describe(index)["digest"] == other.describe(index)["digest"]) is (index == 6)
    assert other.describe(0) == BlankQuestions(Questions(mixed())).describe(0)
