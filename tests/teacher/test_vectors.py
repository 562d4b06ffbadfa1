"""Teacher vectors as a column: the right vector on the right row, and errors that name a cure."""

from __future__ import annotations

import io
import random
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from tiny_teachers import WIDTH, assert_rows, count_work, encoded, noise_image, save_vit, vectors_of

from hera_trainer.teacher.encoder import VisionTeacher
from hera_trainer.teacher.vectors import TEACHER_COLUMN, add_teacher_features, check_teacher_features


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random ViT on disk."""
    return save_vit(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def teacher(folder) -> VisionTeacher:
    return VisionTeacher.from_pretrained(folder, device="cpu")


@pytest.fixture
def work(monkeypatch) -> dict[str, int]:
    return count_work(monkeypatch)


# The right vector on the right row


def test_single_images_and_null(teacher, tmp_path):
    images = [noise_image(0), None, noise_image(1, (30, 20)), noise_image(2), None]
    dataset = Dataset.from_dict(
        {"image": images, "text": list("abcde")}, features=Features({"image": Image(), "text": Value("string")})
    )
    result = add_teacher_features(dataset, teacher, cache_dir=tmp_path, batch_size=2)
    assert_rows(result, teacher, images)
    assert result.column_names == ["image", "text", TEACHER_COLUMN]
    assert result.features == {**dataset.features, TEACHER_COLUMN: List(Value("float32"))}
    assert result["text"][:] == list("abcde")
    assert isinstance(result[2]["image"], PIL.Image.Image) and result[2]["image"].size == (30, 20)
    assert check_teacher_features(result) == WIDTH
    assert result.cache_files == [{"filename": str(next(tmp_path.glob("*.arrow")))}]  # memory-mapped, not in RAM


def test_several_images_give_their_mean_direction_and_norm(teacher, tmp_path):
    a, b, c = noise_image(0), noise_image(1), noise_image(2)
    rows = [[a], [a, b, c], [], None, [None, b], [a, a]]
    dataset = Dataset.from_dict({"images": rows}, features=Features({"images": List(Image())}))
    result = vectors_of(add_teacher_features(dataset, teacher, cache_dir=tmp_path))
    va, vb, vc = teacher.encode([a, b, c]).double().numpy()
    close = {"rtol": 1e-5, "atol": 1e-6}
    norms = [np.sqrt((v * v).sum()) for v in (va, vb, vc)]
    mean = va / norms[0] + vb / norms[1] + vc / norms[2]
    np.testing.assert_allclose(result[0], va, **close)
    np.testing.assert_allclose(result[1], mean / np.sqrt((mean * mean).sum()) * sum(norms) / 3, **close)
    assert result[2] is None and result[3] is None
    np.testing.assert_allclose(result[4], vb, **close)
    np.testing.assert_allclose(result[5], va, **close)  # the same image twice is that image


def test_many_rows_cross_all_internal_batches(teacher, tmp_path):
    distinct = [noise_image(i, (4, 4)) for i in range(70)]
    order = np.random.default_rng(0).integers(0, 70, 2500)
    files = [encoded(image) for image in distinct]
    dataset = Dataset.from_dict(
        {"image": [None if i % 7 == 3 else files[n] for i, n in enumerate(order)]},
        features=Features({"image": Image()}),
    )
    result = vectors_of(add_teacher_features(dataset, teacher, cache_dir=tmp_path, batch_size=8, chunk_size=30))
    expected = teacher.encode(distinct).numpy()
    for i, n in enumerate(order):
        if i % 7 == 3:
            assert result[i] is None
        else:
            np.testing.assert_allclose(result[i], expected[n], rtol=1e-4, atol=1e-5)


def test_selection_and_shuffle_keep_rows_aligned_and_copy_nothing(teacher, tmp_path):
    images = [noise_image(i) for i in range(12)]
    table = Dataset.from_dict({"image": images, "n": list(range(12))})
    table.save_to_disk(tmp_path / "data")
    on_disk = Dataset.load_from_disk(tmp_path / "data")
    for number, dataset in enumerate((table, on_disk)):
        picked = dataset.shuffle(seed=1).select([7, 2, 2, 9, 0])
        written = set((tmp_path / "data").iterdir())
        result = add_teacher_features(picked, teacher, cache_dir=tmp_path / f"cache{number}")
        assert set((tmp_path / "data").iterdir()) == written  # the images were not written again
        assert result["n"][:] == picked["n"][:]
        assert_rows(result, teacher, [images[n] for n in picked["n"]])
        # and the result can be shuffled, selected and mapped on
        again = result.shuffle(seed=2).select([3, 1]).map(lambda row: {"m": row["n"]})
        assert_rows(again, teacher, [images[n] for n in again["m"]])
    assert on_disk.cache_files[0] in result.cache_files


def test_split_shares_the_cache_with_other_orders_of_the_same_rows(folder, work, tmp_path):
    dataset = Dataset.from_dict({"image": [noise_image(i) for i in range(6)]})
    add_teacher_features(dataset.shuffle(seed=1), str(folder), cache_dir=tmp_path)
    add_teacher_features(dataset.shuffle(seed=2), str(folder), cache_dir=tmp_path)
    assert work == {"loads": 1, "images": 6}


def test_formats_survive(teacher, tmp_path):
    images = [noise_image(i) for i in range(3)]
    dataset = Dataset.from_dict({"image": images, "n": [4, 5, 6]}).with_format("torch", columns=["n"])
    result = add_teacher_features(dataset, teacher, cache_dir=tmp_path)
    assert set(result[0]) == {"n", TEACHER_COLUMN}
    assert result[1]["n"].item() == 5
    torch.testing.assert_close(result[1][TEACHER_COLUMN], teacher.encode([images[1]])[0])


def test_same_image_is_encoded_once_and_gets_identical_vectors(folder, work, tmp_path):
    file = encoded(noise_image(0))
    path = tmp_path / "stored.png"
    path.write_bytes(file)
    rows = [{"bytes": file, "path": None}, {"bytes": encoded(noise_image(1)), "path": None}] * 3
    rows += [{"bytes": None, "path": str(path)}, {"bytes": file, "path": "named.png"}]
    dataset = Dataset.from_dict({"image": rows}, features=Features({"image": Image()}))
    result = vectors_of(add_teacher_features(dataset, str(folder), cache_dir=tmp_path / "cache", batch_size=1))
    assert work["images"] == 2
    assert all(np.array_equal(result[i], result[0]) for i in (2, 4, 6, 7))
    assert np.array_equal(result[1], result[5]) and not np.array_equal(result[0], result[1])


@pytest.mark.parametrize("kind", ["path string", "bytes", "large_string list", "struct"])
def test_images_stored_in_other_ways(kind, teacher, tmp_path):
    images = [noise_image(0), noise_image(1)]
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    files = [encoded(image) for image in images]
    name, values, feature = {
        "path string": ("image", paths, Value("string")),
        "bytes": ("image", files, Value("large_binary")),
        "large_string list": ("images", [[path] for path in paths], datasets.LargeList(Value("large_string"))),
        "struct": ("images", [[{"bytes": file, "path": None}] for file in files],
                   List({"bytes": Value("binary"), "path": Value("string")})),
    }[kind]  # fmt: skip
    dataset = Dataset.from_dict({name: values}, features=Features({name: feature}))
    assert_rows(add_teacher_features(dataset, teacher, cache_dir=tmp_path / "cache"), teacher, images)


def test_mode_of_the_image_feature_and_exif_are_honoured(teacher, tmp_path):
    image = noise_image(0)
    exif = PIL.Image.Exif()
    exif[0x0112] = 3
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    turned = image.rotate(180)
    for number, (mode, expected) in enumerate({None: turned, "L": turned.convert("L").convert("RGB")}.items()):
        dataset = Dataset.from_dict({"image": [file.getvalue()]}, features=Features({"image": Image(mode=mode)}))
        # one cache for both: the mode must be part of the key
        assert_rows(add_teacher_features(dataset, teacher, cache_dir=tmp_path), teacher, [expected])
        assert len(list(tmp_path.glob("*.arrow"))) == number + 1


def test_image_wins_over_images(teacher, tmp_path):
    # as in TRL's collator
    dataset = Dataset.from_dict({"images": [[noise_image(0)]], "image": [noise_image(1)]})
    assert_rows(add_teacher_features(dataset, teacher, cache_dir=tmp_path), teacher, [noise_image(1)])


def test_random_states_and_repeated_runs(folder, tmp_path):
    dataset = Dataset.from_dict({"image": [noise_image(i) for i in range(5)]})
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    results = [add_teacher_features(dataset, str(folder), cache_dir=tmp_path / str(i)) for i in range(2)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert results[0][TEACHER_COLUMN][:] == results[1][TEACHER_COLUMN][:]
    assert results[0]._fingerprint == results[1]._fingerprint != dataset._fingerprint


# A column that is there already


def with_column(values: list, feature: object = None) -> Dataset:
    features = Features({TEACHER_COLUMN: feature}) if feature else None
    return Dataset.from_dict({TEACHER_COLUMN: values}, features=features)


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "int64", "fixed", "large"])
def test_existing_column_is_returned_untouched_without_a_teacher(kind):
    feature = {"fixed": List(Value("float32"), length=2), "large": datasets.LargeList(Value("float32"))}.get(kind)
    dataset = with_column([[1, 2], None, [3, 4]], feature or List(Value(kind)))
    assert add_teacher_features(dataset, "nobody/nothing") is dataset
    assert check_teacher_features(dataset) == 2
    assert check_teacher_features(dataset.select([2, 1])) == 2


def test_existing_column_with_zeros_for_rows_without_an_image():
    """They would have neighbours by their place in the data."""
    rows = [[1.0, 0.0], None, *[[0.0, 1.0]] * 2000, [0.0, -0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match=r"vector of zeros in row 2002.*Set it to null"):
        check_teacher_features(with_column(rows, List(Value("float32"))))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None])
def test_existing_column_with_numbers_that_are_not_finite(bad):
    rows = [[1.0, 2.0]] * 3000
    rows[1] = None
    rows[2050] = [0.0, bad]
    rows[2900] = [bad, 0.0]
    with pytest.raises(ValueError, match="NaN, infinity or null inside the vector of row 2050"):
        add_teacher_features(with_column(rows), "nobody/nothing")
    # of a selection only the rows that are in it count, by their number in it
    with pytest.raises(ValueError, match="of row 1"):
        check_teacher_features(with_column(rows).select([0, 2900, 2050]))
    assert check_teacher_features(with_column(rows).select(range(2000))) == 2


def test_existing_column_of_different_widths():
    rows = [None, [1.0, 2.0], [1.0, 2.0]] + [[1.0, 2.0]] * 2000 + [[1.0]]
    with pytest.raises(ValueError, match="row 1 has 2 numbers, row 2003 has 1"):
        add_teacher_features(with_column(rows), "nobody/nothing")


@pytest.mark.parametrize(
    ("values", "feature", "message"),
    [
        ([None, None], List(Value("float32")), "No row has a vector.*alignment_weight=0"),
        ([None, None], None, "No row has a vector"),
        ([], List(Value("float32")), "No row has a vector"),
        ([[], []], List(Value("float32")), "empty vector in row 0"),
        (["a", "b"], None, "not a list of numbers"),
        ([1.0, 2.0], None, "not a list of numbers"),
        ([["a"], ["b"]], None, "not a list of numbers"),
    ],
)
def test_existing_column_that_is_no_use(values, feature, message):
    with pytest.raises(ValueError, match=message):
        add_teacher_features(with_column(values, feature), "nobody/nothing")


# Data that can't be used


@pytest.mark.parametrize("kind", ["text", "truncated", "missing file", "neither"])
def test_unusable_image_names_its_row(kind, teacher, tmp_path):
    good = encoded(noise_image(0))
    value = {
        "text": {"bytes": b"no image at all", "path": None},
        "truncated": {"bytes": encoded(noise_image(1, (60, 60)))[:3000], "path": None},
        "missing file": {"bytes": None, "path": str(tmp_path / "gone.png")},
        "neither": {"bytes": None, "path": None},
    }[kind]
    storage = pa.array([{"bytes": good, "path": None}, None, {"bytes": good, "path": None}, value, None], Image.pa_type)
    table = pa.table({"image": storage})
    dataset = Dataset(table, info=datasets.DatasetInfo(features=Features({"image": Image()})))
    stored = Dataset.from_parquet(_parquet(dataset, tmp_path), cache_dir=str(tmp_path / "hf"))
    for variant, row in ((dataset, 3), (dataset.select([2, 3, 0]), 1), (stored.select([3, 0]), 0)):
        with pytest.raises(ValueError, match=rf"Row {row} of the data set, column `image`") as caught:
            add_teacher_features(variant, teacher, cache_dir=tmp_path / "cache")
        assert kind == "neither" or caught.value.__cause__ is not None
    # rows that are not selected do not matter
    add_teacher_features(dataset.select([4, 0, 2]), teacher, cache_dir=tmp_path / "cache")


def _parquet(dataset: Dataset, folder: Path) -> str:
    import pyarrow.parquet

    pyarrow.parquet.write_table(dataset.data.table, folder / "data.parquet")
    return str(folder / "data.parquet")


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "NaN or infinity"), (0.0, "nothing but zeros")])
def test_what_the_teacher_cannot_tell_apart_names_the_row(teacher, tmp_path, value, words):
    with torch.no_grad():
        teacher.model.layernorm.weight.fill_(value)
        teacher.model.layernorm.bias.zero_()
    dataset = Dataset.from_dict({"image": [None, noise_image(0)]}, features=Features({"image": Image()}))
    with pytest.raises(ValueError, match=rf"Row 1 of the data set.*{words}.*`teacher_model_name_or_path`"):
        add_teacher_features(dataset, VisionTeacher(teacher.model, teacher.image_processor), cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "values", "feature"),
    [
        ("image", [None, None], Image()),
        ("images", [[], None, [None]], List(Image())),
        ("image", [None], None),
        ("images", [[], []], None),
    ],
)
def test_no_row_has_an_image(name, values, feature, teacher, tmp_path):
    dataset = Dataset.from_dict({name: values}, features=Features({name: feature}) if feature else None)
    with pytest.raises(ValueError, match=r"No row of the data set has an image.*alignment_weight=0"):
        add_teacher_features(dataset, teacher, cache_dir=tmp_path)


def test_no_image_column(teacher):
    with pytest.raises(ValueError, match=r"no image column.*alignment_weight=0"):
        add_teacher_features(Dataset.from_dict({"text": ["a"]}), teacher)


@pytest.mark.parametrize("values", [[1, 2], [[[0, 1], [2, 3]]]])
def test_image_column_without_images(values, teacher, tmp_path):
    with pytest.raises(ValueError, match=r"Column `image` holds .*cast_column"):
        add_teacher_features(Dataset.from_dict({"image": values}), teacher, cache_dir=tmp_path)


def test_streaming():
    dataset = Dataset.from_dict({"image": [noise_image(0)]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=f"Streaming.*`{TEACHER_COLUMN}`"):
        add_teacher_features(dataset, "nobody/nothing")
    ready = datasets.IterableDataset.from_generator(lambda: iter([{TEACHER_COLUMN: [1.0]}]))
    assert add_teacher_features(ready, "nobody/nothing") is ready


def test_custom_transform(teacher):
    dataset = Dataset.from_dict({"image": [noise_image(0)]}).with_transform(lambda rows: rows)
    with pytest.raises(ValueError, match="before `with_transform`"):
        add_teacher_features(dataset, teacher)


def test_other_arguments(teacher):
    dataset = Dataset.from_dict({"image": [noise_image(0)]})
    with pytest.raises(ValueError, match="each split"):
        add_teacher_features(datasets.DatasetDict(train=dataset), teacher)
    for name in ("batch_size", "chunk_size"):
        with pytest.raises(ValueError, match="must be at least 1"):
            add_teacher_features(dataset, teacher, **{name: 0})


def test_teacher_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"nobody/nothing[\s\S]*teacher_model_name_or_path"):
        add_teacher_features(Dataset.from_dict({"image": [noise_image(0)]}), "nobody/nothing", cache_dir=tmp_path)
