"""What is checked on the first rows of a stream, what heads are ranked on, and faults that come later."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, List, Value
from runs import NoStep
from streams import HEADS, build, count_images
from tiny import build_vlm, image_dataset, save_tiny_dinov2, sft_args
from tiny_teachers import encoded, noise_image
from torch.utils.data import IterableDataset as TorchIterableDataset

from hera_trainer import HeRAConfig, HeRATrainer, VisionTeacher, add_teacher_features, rank_heads
from hera_trainer.data.collator import ROW_PLACE, TEACHER_COLUMN
from hera_trainer.data.streaming import NumberedStream


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_dinov2(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("teacher.vectors", "heads.ranking_cache"):
        monkeypatch.setattr(f"hera_trainer.{module}.cache_root", lambda: tmp_path / "cache")


def bytes_of(row: dict[str, Any]) -> bytes:
    return encoded(row["images"][0])


def stored(damaged: int | None = None, n: int = 24) -> Dataset:
    """Rows whose images are stored as files, one of which is damaged."""
    rows = image_dataset(n=n)
    files = [[{"bytes": bytes_of(row), "path": None}] for row in rows]
    if damaged is not None:
        files[damaged] = [{"bytes": files[damaged][0]["bytes"][:60], "path": None}]
    columns = {"images": files, "prompt": rows["prompt"][:], "completion": rows["completion"][:]}
    return Dataset.from_dict(columns, features=rows.features)


def with_vectors(values: list[Any]) -> Dataset:
    return image_dataset(n=len(values)).add_column(TEACHER_COLUMN, values, feature=List(Value("float32")))


VECTORS = np.random.default_rng(0).standard_normal((24, 8)).tolist()


def endless(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for number in itertools.count():
        yield {**rows[number % len(rows)]}


# --- Ranking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("brought", [True, False], ids=["vectors brought", "on the fly"])
def test_heads_are_ranked_on_the_first_samples(tmp_path, teacher, brought):
    """Those with an image of their own and an answer: rows 0, 1, 3, 4, ...; the stream never ends."""
    rows = image_dataset(n=30).to_list()
    for row, original in zip(rows, image_dataset(n=30), strict=True):
        row["images"] = original["images"]
    rows[2] = {**rows[2], "images": rows[1]["images"], "completion": rows[2]["completion"]}
    rows[5] = {**rows[5], "completion": [{"role": "assistant", "content": ""}]}
    rows[7] = {**rows[7], "images": []}
    usable = [rows[i] for i in range(18) if i not in (2, 5, 7)]
    features = image_dataset(n=1).features
    chosen = add_teacher_features(Dataset.from_list(usable, features=features), teacher, batch_size=4)
    if brought:
        column = add_teacher_features(Dataset.from_list(rows, features=features), teacher)[:][TEACHER_COLUMN]
        rows = [{**row, TEACHER_COLUMN: vector} for row, vector in zip(rows, column, strict=True)]
    stream = IterableDataset.from_generator(partial(endless, rows))
    settings = {"teacher": teacher, "ranking_num_samples": 15, "teacher_batch_size": 4, "max_steps": 1}
    run = build(tmp_path, stream, **settings)
    run.train()
    model, processor = build_vlm("llava")
    expected = rank_heads(model, processor, chosen, k=2, num_samples=15, batch_size=8)
    assert torch.equal(run.head_ranking.scores, expected.scores)
    assert run.head_ranking.num_samples == 15
    assert run.aligned_heads == expected.select("worst", 3)


def test_ranking_is_found_again_and_only_for_the_same_samples(tmp_path, teacher, monkeypatch):
    def prepared(folder: str, rows: Dataset) -> HeRATrainer:
        run = build(tmp_path / folder, rows.to_iterable_dataset(), teacher=teacher, ranking_num_samples=12)
        run.prepare_alignment()
        return run

    first = prepared("a", image_dataset(n=24))
    other = prepared("b", image_dataset(n=24).shuffle(seed=1))
    assert not torch.equal(other.head_ranking.scores, first.head_ranking.scores)
    assert other.head_ranking.dataset_fingerprint != first.head_ranking.dataset_fingerprint
    monkeypatch.setattr("hera_trainer.heads.ranking_cache.rank_samples", None)  # a call would fail
    again = prepared("c", image_dataset(n=24).select(range(12)))
    assert torch.equal(again.head_ranking.scores, first.head_ranking.scores)
    assert again.head_ranking.dataset_fingerprint == first.head_ranking.dataset_fingerprint


def test_a_stream_with_few_usable_rows(tmp_path, teacher):
    rows = list(image_dataset(n=6))
    stream = IterableDataset.from_generator(partial(endless, rows))
    run = build(tmp_path, stream, teacher=teacher, ranking_num_samples=10)
    with pytest.warns(UserWarning, match="Only 6 of the first 200 rows of `train_dataset` have an image of their own"):
        run.prepare_alignment()
    few = build(tmp_path, stream.take(3), teacher=teacher)
    with pytest.raises(ValueError, match="Heads can be ranked on 3 samples"):
        few.prepare_alignment()
    mute = stream.take(6).map(lambda row: {"completion": [{"role": "assistant", "content": ""}]})
    with pytest.raises(ValueError, match=r"None of the first 6 rows.*an answer text \(`completion`.*`aligned_heads`"):
        build(tmp_path, mute, teacher=teacher).prepare_alignment()


def test_ready_heads_read_no_more_than_the_first_rows(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr("hera_trainer.data.teacher_vectors._ROWS_OF_A_STREAM", 8)
    passes, seen = count_images(monkeypatch), []

    def note(row: dict[str, Any]) -> dict[str, Any]:
        seen.append(1)
        return row

    rows = image_dataset(n=24)
    stream = rows.to_iterable_dataset().map(note, features=rows.features)
    run = build(tmp_path, stream, aligned_heads=HEADS, teacher=teacher)
    seen.clear()
    run.prepare_alignment()
    assert len(seen) <= 8 + 6 and passes == [1]


def test_ranking_by_hand_asks_for_rows():
    model, processor = build_vlm("llava")
    stream = image_dataset(n=12, with_features=4).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"`dataset` is a IterableDataset.*stream.take\(1000\)"):
        rank_heads(model, processor, stream, k=2)
    rows = Dataset.from_list(list(stream.take(1000)), features=stream.features)
    assert rank_heads(model, processor, rows, k=2).num_samples == 12


def test_the_users_stream_is_left_as_it_was(tmp_path, teacher):
    stream = image_dataset(n=12).to_iterable_dataset()
    before, columns = dict(vars(stream)), set(next(iter(stream)))
    run = build(tmp_path, stream, eval_dataset=stream, aligned_heads=HEADS, teacher=teacher)
    run.prepare_alignment()
    assert vars(stream).keys() == before.keys() and type(stream) is IterableDataset
    assert set(next(iter(stream))) == columns
    assert (run.train_dataset.name, run.eval_dataset.name) == ("`train_dataset`", "`eval_dataset`")


def test_a_numbered_stream_goes_to_other_processes():
    rows = image_dataset(n=6, with_features=2)
    stream = NumberedStream.of(rows.to_iterable_dataset(num_shards=3), "`rows`", has_vectors=True)
    twin = pickle.loads(pickle.dumps(stream))
    assert isinstance(twin, NumberedStream) and isinstance(twin, TorchIterableDataset)
    assert [row[ROW_PLACE] for row in twin] == [f"Row {i} of `rows`" for i in range(6)]
    part = twin.shard(num_shards=3, index=1)
    assert [row[ROW_PLACE] for row in part] == [f"Row {i} of part 1 of 3 of `rows`" for i in range(2)]
    assert [row[TEACHER_COLUMN] for row in part] == rows[2:4][TEACHER_COLUMN]


# --- Before the first step -------------------------------------------------------------------------------------------


def test_max_steps_is_asked_for_before_the_model_is_loaded(tmp_path):
    args = HeRAConfig(**sft_args(tmp_path))
    with pytest.raises(ValueError, match="`max_steps` must be set: `train_dataset` is a stream"):
        HeRATrainer("no/such-model", args, train_dataset=image_dataset(n=12).to_iterable_dataset())


def test_columns_of_a_stream(tmp_path):
    text = image_dataset(n=12, fmt="text")
    known = text.to_iterable_dataset()
    unknown = IterableDataset.from_generator(partial(endless, list(text)))
    for stream in (known, unknown):
        with pytest.raises(ValueError, match=r"`train_dataset` has no column `image`.*alignment_weight=0"):
            build(tmp_path, stream)
    with pytest.raises(ValueError, match="`train_dataset` is a stream without any row"):
        build(tmp_path, unknown.take(0))
    run = build(tmp_path, image_dataset(n=12, with_features=4).to_iterable_dataset(), eval_dataset=known)
    with pytest.raises(ValueError, match="`eval_dataset` has no column `image`"):
        run.train()


def test_streams_of_another_library(tmp_path):
    class Stream(TorchIterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield from image_dataset(n=12)

    with pytest.raises(ValueError, match=r"`train_dataset` is a Stream, but .*`datasets.IterableDataset`"):
        build(tmp_path, Stream())


def test_no_row_has_an_image(tmp_path, teacher):
    row = {**image_dataset(n=1)[0], "images": []}
    stream = IterableDataset.from_generator(partial(endless, [row]))
    for settings in ({}, {"aligned_heads": HEADS}):
        with pytest.raises(ValueError, match=r"first 1,000 of `train_dataset` has an image.*alignment_weight=0"):
            build(tmp_path, stream, teacher=teacher, callbacks=[NoStep()], **settings).train()
    nothing = with_vectors([None] * 12).to_iterable_dataset()
    with pytest.raises(ValueError, match="has a vector in column `teacher_features`"):
        build(tmp_path, nothing, callbacks=[NoStep()]).train()


def test_widths_of_training_and_evaluation_differ(tmp_path, teacher):
    evaluation = image_dataset(n=12).to_iterable_dataset()
    train = image_dataset(n=12, with_features=5).to_iterable_dataset()
    run = build(tmp_path, train, eval_dataset={"a": evaluation}, teacher=teacher, callbacks=[NoStep()])
    with pytest.raises(ValueError, match=r"`eval_dataset\['a'\]` have 16 dimensions, those of `train_dataset` 5"):
        run.train()


def test_collator_that_loses_samples(tmp_path, teacher):
    def collator(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(1, 4).long(), "labels": torch.zeros(1, 4).long()}

    stream = image_dataset(n=12).to_iterable_dataset()
    run = build(tmp_path, stream, teacher=teacher, data_collator=collator, callbacks=[NoStep()])
    with pytest.raises(ValueError, match="cannot ride through this `data_collator`"):
        run.train()


def test_image_processor_that_returns_no_tensors(tmp_path, teacher):
    class Counting:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, **kwargs: Any) -> dict[str, Any]:
            return {**self.inner(**kwargs), "num_patches": [4]}

    odd = VisionTeacher.from_pretrained(teacher)
    odd.image_processor = Counting(odd.image_processor)
    run = build(tmp_path, image_dataset(n=12).to_iterable_dataset(), teacher=odd, callbacks=[NoStep()])
    with pytest.raises(ValueError, match=r"returns a list as 'num_patches'.*`teacher_model_name_or_path`.*streaming"):
        run.train()


def test_rows_that_hold_no_images(tmp_path, teacher):
    stream = image_dataset(n=12).to_iterable_dataset().with_format("torch")
    run = build(tmp_path, stream, teacher=teacher, callbacks=[NoStep()])
    with pytest.raises(ValueError, match=r"Row 0 of `train_dataset`: a Tensor is no image.*with_format\(None\)"):
        run.train()


# --- Faults that come later ------------------------------------------------------------------------------------------


@pytest.fixture
def six_rows_first(monkeypatch):
    """Before training, only so many rows are read to see how many have an image."""
    monkeypatch.setattr("hera_trainer.data.teacher_vectors._ROWS_OF_A_STREAM", 6)


def test_a_fault_in_the_first_rows_is_said_before_training(tmp_path, teacher):
    run = build(
        tmp_path,
        stored(damaged=19).to_iterable_dataset(),
        aligned_heads=HEADS,
        teacher=teacher,
        callbacks=[NoStep()],
    )
    with pytest.raises(ValueError, match="Row 19 of `train_dataset` can't be read: "):
        run.train()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", [1, 2])
def test_an_image_that_cannot_be_read_names_the_row(tmp_path, teacher, workers, shards, six_rows_first):
    stream = stored(damaged=19).to_iterable_dataset(num_shards=shards)
    settings = {"aligned_heads": HEADS, "teacher": teacher, "dataloader_num_workers": workers}
    place = "Row 19 of `train_dataset`"
    if workers and shards == 2:  # rows 12 to 23 are the second worker's
        place = "Row 7 of those rows of `train_dataset` that data loader worker 1 reads"
    run = build(tmp_path, stream, **settings)
    with pytest.raises(ValueError, match=f"{place} can't be read: "):
        run.train()
    assert run.state.global_step < 3


def test_a_damaged_image_among_the_first_rows(tmp_path, teacher):
    with pytest.raises(ValueError, match="Row 0 of `train_dataset` can't be read"):
        build(tmp_path, stored(damaged=0).to_iterable_dataset(), teacher=teacher)
    for stream, message in (
        (stored(damaged=7).to_iterable_dataset(), "can't be read"),
        (stored(damaged=7).to_iterable_dataset().decode(False), "the image can't be used"),
    ):
        run = build(tmp_path, stream, teacher=teacher, callbacks=[NoStep()])
        with pytest.raises(ValueError, match=f"Row 7 of `train_dataset`:? {message}"):
            run.train()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0] * 3, "has 3 numbers, the training data has 8"),
        ([*VECTORS[0][:7], float("nan")], "has NaN or infinity"),
        ([*VECTORS[0][:7], float("inf")], "has NaN or infinity"),
        ([0.0] * 8, "is zero, which has no neighbours"),
        ([], "holds no list of numbers"),
    ],
)
def test_a_faulty_vector_names_the_row(tmp_path, value, message, six_rows_first):
    vectors = [*VECTORS]
    vectors[17] = value
    run = build(tmp_path, with_vectors(vectors).to_iterable_dataset(), aligned_heads=HEADS)
    with pytest.raises(ValueError, match=f"Row 17 of `train_dataset`.*{message}"):
        run.train()
    assert run.state.global_step > 0  # `Dataset` is checked whole before, a stream as it comes
    ranked = build(tmp_path, with_vectors(vectors).to_iterable_dataset(), callbacks=[NoStep()])
    with pytest.raises(ValueError, match=f"Row 17 of `train_dataset`.*{message}"):
        ranked.train()


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "NaN or infinity"), (0.0, "nothing but zeros")])
def test_a_teacher_that_returns_no_vector_names_the_row(tmp_path, teacher, monkeypatch, value, words):
    forward = VisionTeacher.forward_prepared
    calls = []

    def poisoned(self: VisionTeacher, prepared: Any) -> torch.Tensor:
        vectors = forward(self, prepared)
        calls.append(len(vectors))
        if sum(calls) > 1 + 8:  # the width, the first step
            vectors[3] = value
        return vectors

    monkeypatch.setattr(VisionTeacher, "forward_prepared", poisoned)
    run = build(tmp_path, image_dataset(n=24).to_iterable_dataset(), aligned_heads=HEADS, teacher=teacher)
    with pytest.raises(ValueError, match=f"Row 11 of `train_dataset`: the vision teacher returned {words}"):
        run.train()
    assert run.state.global_step == 1


def test_an_image_the_processor_cannot_prepare_names_the_row(tmp_path, teacher):
    rows = list(image_dataset(n=24))
    strange = VisionTeacher.from_pretrained(teacher)
    inner = strange.image_processor

    def processor(images: list[Any], return_tensors: str) -> Any:
        if images[0].size == (3, 500):
            raise ZeroDivisionError("no pixel left")
        return inner(images=images, return_tensors=return_tensors)

    strange.image_processor = processor
    rows[6] = {**rows[6], "images": [noise_image(0, (3, 500))]}
    stream = IterableDataset.from_generator(lambda: iter(rows))
    run = build(tmp_path, stream, aligned_heads=HEADS, teacher=strange)
    message = r"Row 6 of `train_dataset`.*can't prepare an image of \(3, 500\): no pixel left"
    with pytest.raises(ValueError, match=message):
        run.train()
