"""Control runs: every image has another image's teacher vector, and nothing else is changed."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from runs import logged, trainer
from tiny import image_dataset

from hera_trainer.hub.push import push_folder
from hera_trainer.runs.checkpoints import find_checkpoint
from hera_trainer.runs.control import read_control
from hera_trainer.teacher.column import TEACHER_COLUMN
from hera_trainer.teacher.control import permuted_vectors


def rows_of(numbers: list[int | None]) -> datasets.Dataset:
    """Rows whose vector is that of an image of the given number; `None` for rows without one."""
    vectors = [None if number is None else [float(number), 1.0 / (1 + number)] for number in numbers]
    content = {"row": list(range(len(numbers))), TEACHER_COLUMN: vectors}
    features = {"row": datasets.Value("int64"), TEACHER_COLUMN: datasets.List(datasets.Value("float32"))}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def numbers_of(dataset: datasets.Dataset) -> list[int | None]:
    return [None if vector is None else round(vector[0]) for vector in dataset[TEACHER_COLUMN]]


NUMBERS = [0, 1, 2, None, 1, 3, 0, 4, None, 2, 5]


@pytest.mark.parametrize("view", ["plain", "shuffled", "selected", "formatted"])
def test_each_distinct_image_has_another_ones_vector(view: str) -> None:
    rows = rows_of(NUMBERS)
    if view == "shuffled":
        rows = rows.shuffle(seed=3)
    if view == "selected":
        rows = rows.select([10, 1, 4, 3, 2])  # images 5, 1, 1, none, 2: the others are not of this data set
    if view == "formatted":
        rows = rows.with_format("numpy", columns=[TEACHER_COLUMN], output_all_columns=True)
    found = permuted_vectors(rows, seed=0)
    before, after = numbers_of(rows.with_format(None)), numbers_of(found.with_format(None))
    assert found.with_format(None)["row"] == rows.with_format(None)["row"]
    mapping = dict(zip(before, after, strict=True))
    assert all(mapping[a] == b for a, b in zip(before, after, strict=True))  # the same for all rows of an image
    assert mapping.pop(None, None) is None
    assert sorted(mapping) == sorted(mapping.values())  # each vector is given once
    assert all(a != b for a, b in mapping.items())


def test_the_seed_decides() -> None:
    rows = rows_of(list(range(40)))
    first, again, other = (numbers_of(permuted_vectors(rows, seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_the_order_of_the_rows_does_not_matter() -> None:
    """A resumed run may have its rows in another one."""
    rows = rows_of(NUMBERS)
    shuffled = rows.shuffle(seed=1)
    assert shuffled["row"][:] != rows["row"][:]
    mappings = [dict(zip(numbers_of(r), numbers_of(permuted_vectors(r, 0)), strict=True)) for r in (rows, shuffled)]
    assert mappings[0] == mappings[1]


def test_two_images_are_needed() -> None:
    assert numbers_of(permuted_vectors(rows_of([7, 8]), 0)) == [8, 7]
    with pytest.raises(ValueError, match=r"has only 1 distinct image\. Add rows"):
        permuted_vectors(rows_of([7, 7, None]), 0)


def test_training_alone_is_permuted(tmp_path, caplog):
    """Heads and evaluation are those of the aligned run, the alignment loss is not."""
    rows, held_out = image_dataset(n=24, with_features=8), image_dataset(n=12, with_features=8, seed=1)
    settings = {"dataset": rows, "eval_dataset": held_out, "max_steps": 1, "ranking_num_samples": 12}
    aligned = trainer(tmp_path / "aligned", **settings)
    control = trainer(tmp_path / "control", teacher_control="permuted", **settings)
    for run in (aligned, control):
        run.prepare_alignment()
    assert aligned.aligned_heads == control.aligned_heads
    assert np.array_equal(aligned.head_ranking.scores, control.head_ranking.scores, equal_nan=True)
    right, wrong = (np.asarray(run.train_dataset[TEACHER_COLUMN]) for run in (aligned, control))
    assert np.array_equal(right, np.asarray(rows[TEACHER_COLUMN]))
    assert not any(np.array_equal(a, b) for a, b in zip(right, wrong, strict=True))
    assert sorted(map(tuple, right)) == sorted(map(tuple, wrong))
    first, second = aligned.evaluate(), control.evaluate()
    assert first["eval_alignment_loss"] == second["eval_alignment_loss"]
    for run in (aligned, control):
        run.train()
    assert logged(aligned, "lm_loss") == logged(control, "lm_loss")  # of the first step
    assert logged(aligned, "alignment_loss") != logged(control, "alignment_loss")
    assert sum("Control run" in record.message for record in caplog.records) == 1


def test_the_card_and_the_report_say_so_first_and_nothing_is_published(tmp_path):
    settings = {"dataset": image_dataset(n=24, with_features=8), "max_steps": 1, "ranking_num_samples": 12}
    run = trainer(tmp_path, teacher_control="permuted", **settings)
    run.train()
    run.save_model()
    refusal = r"control run \(`teacher_control='permuted'`\).*publish_control=True"
    text = (tmp_path / "README.md").read_text()
    assert "> **A control run.**" in text.split("\n\n")[2]
    for push in (run.push_to_hub, lambda: push_folder(tmp_path, "user/model")):
        with pytest.raises(ValueError, match=refusal):
            push()
    with pytest.raises(ValueError, match="publish_control=True"):
        trainer(tmp_path / "other", teacher_control="permuted", push_to_hub=True, **settings)
    pytest.importorskip("plotly")
    from hera_trainer import write_report

    assert "control run</strong>, trained with other images" in write_report(tmp_path).read_text()


def test_whatever_a_control_run_saves_is_known_as_such(tmp_path):
    settings = {"dataset": image_dataset(n=24, with_features=8), "max_steps": 1, "aligned_heads": ["L0H1"]}
    run = trainer(tmp_path / "run", teacher_control="permuted", save_strategy="steps", save_steps=1, **settings)
    run.train()
    run.save_model(str(tmp_path / "final"))
    for saved in (tmp_path / "final", tmp_path / "run" / "checkpoint-1"):
        with pytest.raises(ValueError, match=r"control run \(`teacher_control='permuted'`\).*publish_control=True"):
            push_folder(saved, "user/model")
    assert find_checkpoint(str(tmp_path / "run" / "checkpoint-1"), str(tmp_path / "run")) is not None
    aligned = trainer(tmp_path / "run", **settings)
    aligned.save_model(str(tmp_path / "final"))  # the same folder, another run
    assert read_control(tmp_path / "final") == "none"


def test_streams_are_refused(tmp_path):
    stream = image_dataset(n=24, with_features=8).to_iterable_dataset()
    run = trainer(tmp_path, dataset=stream, teacher_control="permuted", max_steps=1, aligned_heads=["L0H1"])
    with pytest.raises(ValueError, match="`train_dataset` is a stream"):
        run.train()
