"""The cache of teacher vectors: never computed twice, never a wrong vector, whatever happens to its files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import datasets
import PIL.Image
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, Image, concatenate_datasets
from tiny_teachers import WIDTH, assert_rows, count_work, noise_image, save_vit

from hera_trainer.teacher.encoder import VisionTeacher
from hera_trainer.teacher.vectors import TEACHER_COLUMN, add_teacher_features, cache_root


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


def stored_dataset(path: Path, images: list[PIL.Image.Image]) -> Dataset:
    """A data set backed by a file, its images inside."""
    Dataset.from_dict({"image": images}).save_to_disk(path)
    return Dataset.load_from_disk(path)


def dataset_of_paths(path: Path, files: list[Path]) -> Dataset:
    """A data set backed by a file that holds only the paths of image files."""
    if not path.exists():
        storage = pa.array([{"bytes": None, "path": str(file)} for file in files], Image.pa_type)
        batch = pa.record_batch({"image": storage})
        with pa.ipc.new_stream(str(path), batch.schema) as stream:
            stream.write_batch(batch)
    return Dataset.from_file(str(path), info=datasets.DatasetInfo(features=Features({"image": Image()})))


@pytest.mark.parametrize("where", ["memory", "arrow file", "image files"])
def test_second_run_loads_and_encodes_nothing(where, folder, work, teacher, tmp_path):
    images = [noise_image(i) for i in range(4)]

    def make():
        if where == "memory":
            return Dataset.from_dict({"image": images})
        if where == "arrow file":
            return stored_dataset(tmp_path / "data", images)
        files = [tmp_path / f"{i}.png" for i in range(4)]
        for image, file in zip(images, files, strict=True):
            if not file.exists():
                image.save(file)
        return dataset_of_paths(tmp_path / "paths.arrow", files)

    work.update(loads=0, images=0)
    first = add_teacher_features(make(), str(folder), cache_dir=tmp_path / "cache")
    assert work == {"loads": 1, "images": 4}
    second = add_teacher_features(make(), folder, cache_dir=tmp_path / "cache")
    assert work == {"loads": 1, "images": 4}
    assert second[TEACHER_COLUMN][:] == first[TEACHER_COLUMN][:]
    assert_rows(second, teacher, images)


@pytest.mark.parametrize("inside", [True, False])
def test_fingerprint_spares_reading_the_images(inside, folder, tmp_path, monkeypatch):
    def make():
        return Dataset.load_from_disk(tmp_path / "data") if inside else dataset_of_paths(tmp_path / "a", [file])

    file = tmp_path / "a.png"
    noise_image(0).save(file)
    stored_dataset(tmp_path / "data", [noise_image(0), noise_image(1)])
    first = add_teacher_features(make(), str(folder), cache_dir=tmp_path / "cache")

    def refuse(self, desc):
        raise AssertionError("the images were read again")

    monkeypatch.setattr("hera_trainer.teacher.images.ImageColumn.scan", refuse)
    again = add_teacher_features(make(), str(folder), cache_dir=tmp_path / "cache")
    assert again[TEACHER_COLUMN][:] == first[TEACHER_COLUMN][:]


def test_changed_image_file_is_noticed(folder, teacher, tmp_path):
    path = tmp_path / "a.png"
    noise_image(0).save(path)
    fingerprints = set()
    for seed in (0, 1):
        noise_image(seed).save(path)
        os.utime(path, ns=(10**18, 10**18 + seed))
        dataset = dataset_of_paths(tmp_path / "data", [path])
        fingerprints.add(dataset._fingerprint)
        assert_rows(add_teacher_features(dataset, str(folder), cache_dir=tmp_path / "c"), teacher, [noise_image(seed)])
    assert len(fingerprints) == 1


def test_damaged_shortcut_is_ignored(folder, work, tmp_path):
    dataset = stored_dataset(tmp_path / "data", [noise_image(0)])
    add_teacher_features(dataset, str(folder), cache_dir=tmp_path / "cache")
    (shortcut,) = (tmp_path / "cache").glob("*.key")
    content = shortcut.read_bytes()
    for content_now in (b"", b"\xff\x00/../..", b"0" * 64):
        shortcut.write_bytes(content_now)
        add_teacher_features(dataset, str(folder), cache_dir=tmp_path / "cache")
        assert shortcut.read_bytes() == content
    assert work == {"loads": 1, "images": 1}


def test_equal_fingerprints_with_different_content_never_meet(folder, teacher, tmp_path):
    # A fingerprint comes from a function and its arguments; what the function reads elsewhere may change.
    for seed in (0, 1):
        dataset = Dataset.from_dict({"image": [noise_image(seed)]})
        dataset._fingerprint = "0123456789abcdef"
        assert_rows(add_teacher_features(dataset, str(folder), cache_dir=tmp_path), teacher, [noise_image(seed)])


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_in_memory_never_meet(axis, folder, teacher, tmp_path):
    """Rows or columns that a function made in memory, beside ones that lie in a file."""
    if axis == 0:
        stored, kept = stored_dataset(tmp_path / "data", [noise_image(7)]), [noise_image(7)]
    else:
        Dataset.from_dict({"number": [1]}).save_to_disk(tmp_path / "data")
        stored, kept = Dataset.load_from_disk(tmp_path / "data"), []
    for seed in (0, 1):
        made = Dataset.from_dict({"image": [noise_image(seed)]}, features=Features({"image": Image()}))
        dataset = concatenate_datasets([stored, made], axis=axis)
        dataset._fingerprint = "0123456789abcdef"
        with_vectors = add_teacher_features(dataset, str(folder), cache_dir=tmp_path / "cache")
        assert_rows(with_vectors, teacher, [*kept, noise_image(seed)])


def test_rows_chosen_in_memory_never_meet(folder, teacher, tmp_path):
    """The fingerprint of a filter comes from its function, too."""
    stored = stored_dataset(tmp_path / "data", [noise_image(0), noise_image(1), noise_image(2)])
    for rows in ([2, 0], [2, 1]):
        dataset = stored.select(rows)
        assert dataset._indices is not None
        dataset._fingerprint = "0123456789abcdef"
        with_vectors = add_teacher_features(dataset, str(folder), cache_dir=tmp_path / "cache")
        assert_rows(with_vectors, teacher, [noise_image(row) for row in rows])


def test_a_column_without_images_may_lie_in_memory(folder, tmp_path, monkeypatch):
    stored_dataset(tmp_path / "data", [noise_image(0), noise_image(1)])
    dataset = Dataset.load_from_disk(tmp_path / "data").add_column("number", [1, 2])
    first = add_teacher_features(dataset, str(folder), cache_dir=tmp_path / "cache")
    monkeypatch.setattr("hera_trainer.teacher.images.ImageColumn.scan", None)  # a call would fail
    again = add_teacher_features(dataset, str(folder), cache_dir=tmp_path / "cache")
    assert again[TEACHER_COLUMN][:] == first[TEACHER_COLUMN][:]


def test_a_changed_teacher_never_gets_the_vectors_of_before(folder, tmp_path):
    dataset = Dataset.from_dict({"image": [noise_image(0), noise_image(1)]})
    teacher = VisionTeacher.from_pretrained(folder, device="cpu")
    first = add_teacher_features(dataset, teacher, cache_dir=tmp_path / "cache")
    teacher.image_processor.do_rescale = False
    second = add_teacher_features(dataset, teacher, cache_dir=tmp_path / "cache")
    assert_rows(second, teacher, [noise_image(0), noise_image(1)])
    assert second[TEACHER_COLUMN][:] != first[TEACHER_COLUMN][:]


def test_same_images_in_other_places_never_meet(folder, teacher, tmp_path):
    a, b = noise_image(0), noise_image(1)
    for images in ([a, b, a], [a, b, b], [b, a, b]):  # the first two: as many rows, the same distinct images in order
        dataset = Dataset.from_dict({"image": images})
        assert_rows(add_teacher_features(dataset, str(folder), cache_dir=tmp_path), teacher, images)


def test_other_teacher_other_entry(folder, teacher, tmp_path):
    dataset = Dataset.from_dict({"image": [noise_image(0)]})
    add_teacher_features(dataset, str(folder), cache_dir=tmp_path)
    with torch.no_grad():
        teacher.model.layernorm.bias += 1
    changed = VisionTeacher(teacher.model, teacher.image_processor)
    assert_rows(add_teacher_features(dataset, changed, cache_dir=tmp_path), changed, [noise_image(0)])


def test_default_cache_lies_in_the_hugging_face_cache(folder):
    dataset = Dataset.from_dict({"image": [noise_image(4242)]})
    before = set((cache_root() / "teacher_features").glob("*.arrow"))
    add_teacher_features(dataset, str(folder))
    assert len(set((cache_root() / "teacher_features").glob("*.arrow")) - before) == 1
    assert cache_root() == Path(os.environ["HF_HOME"]) / "hera_trainer"


def test_teacher_by_name_is_freed_and_a_given_one_is_kept(folder, teacher, tmp_path, monkeypatch):
    alive = []
    load = VisionTeacher.from_pretrained.__func__

    def watched(cls, *args, **kwargs):
        loaded = load(cls, *args, **kwargs)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(VisionTeacher, "from_pretrained", classmethod(watched))
    dataset = Dataset.from_dict({"image": [noise_image(0)]})
    add_teacher_features(dataset, str(folder), cache_dir=tmp_path / "a")
    assert len(alive) == 1 and alive[0]() is None
    add_teacher_features(dataset, teacher, cache_dir=tmp_path / "b")
    assert len(alive) == 1 and teacher.encode([noise_image(0)]).shape == (1, WIDTH)


def damage(kind: str, path: Path, folder: Path) -> None:
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "no end":  # the last rows are missing
        table = pa.ipc.open_stream(content).read_all()
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table.slice(0, 3))
    elif kind == "garbage":
        path.write_bytes(b"nothing of value" * 100)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        Dataset.from_dict({TEACHER_COLUMN: [[1.0] * WIDTH] * 5}).save_to_disk(path.parent / "other")
        path.write_bytes(next((path.parent / "other").glob("*.arrow")).read_bytes())
    elif kind == "other entry":  # ours, same size, but of other images
        other = Dataset.from_dict({"image": [noise_image(i + 50) for i in range(5)]})
        add_teacher_features(
            other, VisionTeacher.from_pretrained(folder, device="cpu"), cache_dir=path.parent / "other"
        )
        path.write_bytes(next((path.parent / "other").glob("*.arrow")).read_bytes())
    else:  # one number fewer a vector, in a file that is otherwise ours
        table = pa.ipc.open_stream(content).read_all()
        narrow = pa.array([vector[1:] for vector in table[TEACHER_COLUMN].to_pylist()], pa.list_(pa.float32()))
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_batch(pa.record_batch([narrow], schema=table.schema))


@pytest.mark.parametrize(
    ("kind", "on_disk"),
    [
        ("truncated", True),
        ("no end", True),
        ("garbage", False),
        ("empty", False),
        ("foreign", True),
        ("width", False),
        ("other entry", True),
    ],
)
def test_damaged_entry_is_computed_again_with_one_warning(kind, on_disk, folder, teacher, work, tmp_path, recwarn):
    images = [noise_image(i) for i in range(5)]
    dataset = stored_dataset(tmp_path / "data", images) if on_disk else Dataset.from_dict({"image": images})
    add_teacher_features(dataset, str(folder), cache_dir=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").glob("*.arrow")
    damage(kind, entry, folder)
    work.update(loads=0, images=0)
    recwarn.clear()
    result = add_teacher_features(dataset, str(folder), cache_dir=tmp_path / "cache")
    assert [str(w.message) for w in recwarn if "not usable" in str(w.message)] == [str(recwarn[0].message)]
    assert work == {"loads": 1, "images": 5}
    assert_rows(result, teacher, images)
    recwarn.clear()
    add_teacher_features(dataset, str(folder), cache_dir=tmp_path / "cache")
    assert not recwarn.list


SCRIPT = """
import json, os, signal, sys
import numpy as np, PIL.Image
from datasets import Dataset
from hera_trainer.teacher.vectors import TEACHER_COLUMN, add_teacher_features
from hera_trainer.teacher.encoder import VisionTeacher

folder, cache, seeds, kill_at = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
encode, done = VisionTeacher.encode, [0, 0]

def counting(self, images, batch_size=32):
    done[0] += 1
    if done[0] == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    done[1] += len(images)
    return encode(self, images, batch_size)

VisionTeacher.encode = counting

def noise_image(seed, size=(12, 9)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)

dataset = Dataset.from_list([{"image": noise_image(seed)} for seed in seeds])
result = add_teacher_features(dataset, folder, cache_dir=cache, batch_size=2, chunk_size=4)
print(json.dumps({"encoded": done[1], "vectors": result[TEACHER_COLUMN][:]}))
"""


def start(folder: Path, cache: Path, seeds: list[int], kill_at: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(cache), json.dumps(seeds), str(kill_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_killed_run_resumes_with_at_most_one_chunk_lost(folder, teacher, work, tmp_path, recwarn):
    seeds = list(range(11))
    process = start(folder, tmp_path, seeds, kill_at=4)  # two batches of the first chunk, one of the second
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    chunks = sorted(path.name for path in tmp_path.iterdir())
    assert len(chunks) == 1 and chunks[0].endswith("-0-4.safetensors")  # nothing half-written lies about

    images = [noise_image(seed) for seed in seeds]
    dataset = Dataset.from_list([{"image": image} for image in images])
    result = add_teacher_features(dataset, str(folder), cache_dir=tmp_path, batch_size=2, chunk_size=4)
    assert work == {"loads": 1, "images": 7}
    assert_rows(result, teacher, images)
    assert [path.suffix for path in tmp_path.iterdir()] == [".arrow"]
    assert not [w for w in recwarn if "not usable" in str(w.message)]


def test_damaged_chunk_is_computed_again(folder, teacher, work, tmp_path, monkeypatch):
    images = [noise_image(i) for i in range(6)]
    dataset = Dataset.from_dict({"image": images})

    def fail(self, images, vectors):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr("hera_trainer.teacher.cache.Entry.save", fail)
        add_teacher_features(dataset, str(folder), cache_dir=tmp_path, chunk_size=2)
    first, second, _ = sorted(tmp_path.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-4])
    second.write_bytes(b"")
    work.update(loads=0, images=0)
    with pytest.warns(UserWarning, match="not usable"):
        result = add_teacher_features(dataset, str(folder), cache_dir=tmp_path, chunk_size=2)
    assert work == {"loads": 1, "images": 4}
    assert_rows(result, teacher, images)


def test_processes_share_the_cache_and_work_at_the_same_time(folder, teacher, work, tmp_path):
    seeds = list(range(9))
    one, two = (finish(process) for process in [start(folder, tmp_path, seeds), start(folder, tmp_path, seeds)])
    assert one["vectors"] == two["vectors"]
    assert [path.suffix for path in tmp_path.iterdir()] == [".arrow"]

    # equal content in a third process: a hit
    images = [noise_image(seed) for seed in seeds]
    result = add_teacher_features(Dataset.from_list([{"image": i} for i in images]), str(folder), cache_dir=tmp_path)
    assert work == {"loads": 0, "images": 0}
    assert result[TEACHER_COLUMN][:] == one["vectors"]
    assert_rows(result, teacher, images)

    # one other image, another order, one row less: never
    for other in ([*images[:-1], noise_image(99)], images[::-1], images[:-1]):
        dataset = Dataset.from_list([{"image": image} for image in other])
        work.update(loads=0, images=0)
        result = add_teacher_features(dataset, str(folder), cache_dir=tmp_path)
        assert work == {"loads": 1, "images": len(other)}
        assert_rows(result, teacher, other)
