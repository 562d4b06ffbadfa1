"""Streamed data: a run on a stream is the run on the same rows in memory."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from runs import logged
from streams import HEADS, assert_same_run, build, count_images, logs, rows_of_all_kinds, watched_vectors
from tiny import build_vlm, image_dataset, save_tiny_dinov2, sft_args
from tiny_teachers import PATCH, TOWER, randomize
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from hera_trainer import HeRAConfig, HeRATrainer, VisionTeacher, add_teacher_features
from hera_trainer.data.collator import TEACHER_COLUMN


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_dinov2(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("teacher.vectors", "heads.ranking_cache"):
        monkeypatch.setattr(f"hera_trainer.{module}.cache_root", lambda: tmp_path / "cache")


def assert_vectors(actual: list[torch.Tensor], column: list[list[float] | None]) -> None:
    for vector, expected in zip(torch.cat(actual), column, strict=True):
        if expected is None:
            assert vector.isnan().all()
        else:
            np.testing.assert_allclose(vector.numpy(), np.float32(expected), rtol=1e-6, atol=1e-6)


# --- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["step", "micro_batch"])
@pytest.mark.parametrize("brought", [True, False], ids=["vectors brought", "on the fly"])
def test_training_equals_that_on_rows_in_memory(tmp_path, teacher, scope, brought):
    rows = image_dataset(n=24, with_features=8 if brought else None)
    settings = {"contrast_scope": scope, "aligned_heads": HEADS, "teacher": teacher}
    expected = build(tmp_path / "a", rows, **settings)
    expected.train()
    streamed = build(tmp_path / "b", rows.to_iterable_dataset(), **settings)
    streamed.train()
    assert_same_run(streamed, expected)
    assert (streamed.teacher_vectors._stream_teacher is None) == brought


@pytest.mark.parametrize("workers", [0, 2])
def test_vectors_are_those_of_the_column(tmp_path, teacher, workers):
    """Rows without an image, with one and with several."""
    rows = rows_of_all_kinds()
    settings = {"aligned_heads": HEADS, "teacher": teacher, "dataloader_num_workers": workers}
    streamed = build(tmp_path / "a", rows.to_iterable_dataset(), "idefics3", **settings)
    vectors = watched_vectors(streamed)
    streamed.train()
    assert_vectors(vectors, add_teacher_features(rows, teacher).with_format(None)[:][TEACHER_COLUMN])
    expected = build(tmp_path / "b", rows, "idefics3", **settings)
    expected.train()
    assert_same_run(streamed, expected)


def test_an_image_is_encoded_once_a_step(tmp_path, teacher, monkeypatch):
    """24 images in 24 rows, two of the first step twice; two passes over each micro-batch; six images at a time."""
    passes = count_images(monkeypatch)
    settings = {"aligned_heads": HEADS, "teacher": teacher, "teacher_batch_size": 6, "gradient_accumulation_steps": 4}
    run = build(tmp_path, rows_of_all_kinds().to_iterable_dataset(), "idefics3", max_steps=1, **settings)
    run.prepare_alignment()
    assert passes == [1]  # to see the width
    run.train()
    # Rows 0 to 15: 14 have an image of their own, but 11 and a second one of 4 and two of 6 are others' again.
    assert passes == [1, 6, 6, 1]


def test_the_teacher_draws_no_random_numbers(tmp_path, teacher):
    rows = image_dataset(n=16)
    brought = add_teacher_features(rows, teacher).to_iterable_dataset()
    runs = []
    for name, dataset in (("a", brought), ("b", rows.to_iterable_dataset())):
        lora = LoraConfig(target_modules="all-linear", lora_dropout=0.3)
        run = build(tmp_path / name, dataset, teacher=teacher, max_steps=2, peft_config=lora)
        run.train()
        runs.append(run)
    assert runs[0].aligned_heads == runs[1].aligned_heads
    assert_same_run(*runs)


def test_what_is_left_at_the_end_of_an_epoch_is_no_step(tmp_path, caplog):
    """Steps of a stream of 20 rows are those of its first 16, epoch after epoch."""
    rows = image_dataset(n=20, with_features=8)
    settings = {"aligned_heads": HEADS, "max_steps": 5}
    streamed = build(tmp_path / "a", rows.to_iterable_dataset(), **settings)
    streamed.train()
    said = [record.getMessage() for record in caplog.records if "are left out in each epoch" in record.getMessage()]
    assert len(said) == 1
    assert said[0].endswith(
        "The last 1 micro-batches of the stream are fewer than an optimizer step, and are left out in each epoch."
    )
    whole = build(tmp_path / "b", rows.select(range(16)).to_iterable_dataset(), **settings)
    whole.train()
    assert streamed.state.global_step == 5
    assert_same_run(streamed, whole)


def test_a_stream_of_less_than_a_step_is_refused(tmp_path):
    rows = image_dataset(n=8, with_features=8)
    run = build(tmp_path, rows.to_iterable_dataset(), gradient_accumulation_steps=3, aligned_heads=HEADS)
    with pytest.raises(ValueError, match="2 micro-batches an epoch, fewer than the 3 of an optimizer step"):
        run.train()


@pytest.mark.parametrize("kind", ["generator of unknown columns", "stored files"])
def test_other_streams(tmp_path, teacher, kind):
    rows = image_dataset(n=24, fmt="image")
    if kind == "stored files":
        stream = rows.to_iterable_dataset().decode(False)
        assert isinstance(next(iter(stream))["image"], dict)
    else:
        stream = IterableDataset.from_generator(partial(iter, list(rows)))
        assert stream.column_names is None
    settings = {"aligned_heads": HEADS, "teacher": teacher}
    streamed, expected = build(tmp_path / "a", stream, **settings), build(tmp_path / "b", rows, **settings)
    streamed.train()
    expected.train()
    assert_same_run(streamed, expected)


@pytest.mark.parametrize("kind", ["several tensors", "sizes that vary"])
def test_teachers_with_other_image_processors(tmp_path, kind):
    if kind == "several tensors":
        config = Siglip2VisionConfig(**TOWER, num_patches=16)
        teacher = VisionTeacher(
            randomize(Siglip2VisionModel(config)), Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=16)
        )
    else:  # images of a data set in several sizes and shapes, as large as they are
        processor = BitImageProcessor(do_resize=False, do_center_crop=False)
        teacher = VisionTeacher(randomize(Dinov2Model(Dinov2Config(**TOWER, image_size=28))), processor)
    rows = image_dataset(n=8)
    run = build(tmp_path, rows.to_iterable_dataset(), aligned_heads=HEADS, teacher=teacher, max_steps=1)
    vectors = watched_vectors(run)
    run.train()
    assert_vectors(vectors, [teacher.encode([row["images"][0]])[0].tolist() for row in rows])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_teacher_on_a_gpu(tmp_path, teacher, workers):
    """Its images are prepared in workers, which could not use it."""
    rows = rows_of_all_kinds()
    settings = {"aligned_heads": HEADS, "teacher": teacher, "dataloader_num_workers": workers, "use_cpu": False}
    run = build(tmp_path, rows.to_iterable_dataset(), "idefics3", **settings)
    vectors = watched_vectors(run)
    run.train()
    assert run.teacher_vectors._stream_teacher.teacher.model.device.type == "cuda"
    column = add_teacher_features(rows, VisionTeacher.from_pretrained(teacher, device="cpu"))[:][TEACHER_COLUMN]
    for vector, expected in zip(torch.cat(vectors).cpu(), column, strict=True):
        assert vector.isnan().all() if expected is None else torch.allclose(vector, torch.tensor(expected), atol=1e-3)


# --- Without alignment -----------------------------------------------------------------------------------------------


def test_without_alignment_is_sft_trainer_bit_for_bit(tmp_path):
    runs = []
    for trainer_class, config_class, own in (
        (SFTTrainer, SFTConfig, {}),
        (HeRATrainer, HeRAConfig, {"alignment_weight": 0.0}),
    ):
        model, processor = build_vlm("llava")
        args = sft_args(tmp_path / trainer_class.__name__, max_steps=3, per_device_train_batch_size=2, eval_steps=2)
        run = trainer_class(
            model,
            config_class(**args, gradient_accumulation_steps=2, eval_strategy="steps", **own),
            train_dataset=image_dataset(n=12).to_iterable_dataset().shuffle(seed=1, buffer_size=5),
            eval_dataset=image_dataset(n=6, seed=1).to_iterable_dataset(),
            processing_class=processor,
        )
        run.train()
        runs.append(run)
    names = ("loss", "grad_norm")
    assert logs(runs[0], *names) == logs(runs[1], *names) != []
    evaluated = [[entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry] for run in runs]
    assert evaluated[0] == evaluated[1] != []
    others = dict(runs[1].model.named_parameters())
    assert all(torch.equal(p, others[n]) for n, p in runs[0].model.named_parameters())


# --- Evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained_on", ["stream", "rows in memory"])
def test_evaluation_equals_that_on_rows_in_memory(tmp_path, teacher, trained_on):
    """Of one data set, several, and one that is passed; 20 rows are two pools of 8 and a remainder."""
    train, evaluation = image_dataset(n=16), image_dataset(n=20, seed=5)
    settings = {"aligned_heads": HEADS, "teacher": teacher, "per_device_eval_batch_size": 4}
    expected = build(tmp_path / "a", train, eval_dataset=evaluation, **settings).evaluate()
    assert expected["eval_alignment_loss"] > 0 and expected["eval_alignment_left_out"] == 4

    stream, mixed = evaluation.to_iterable_dataset(), {"a": evaluation.to_iterable_dataset(), "b": evaluation}
    if trained_on == "stream":
        train = train.to_iterable_dataset()
    run = build(tmp_path / "b", train, eval_dataset=stream, **settings)
    found = [("eval", run.evaluate()), ("eval", run.evaluate(evaluation.to_iterable_dataset()))]
    several = build(tmp_path / "c", train, eval_dataset=mixed, **settings).evaluate()
    for prefix, metrics in [*found, ("eval_a", several), ("eval_b", several)]:
        for name in ("loss", "alignment_loss", "alignment_left_out"):
            assert metrics[f"{prefix}_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-6)
    plain = build(tmp_path / "d", image_dataset(n=16), alignment_weight=0.0, per_device_eval_batch_size=4)
    predicted = run.predict(evaluation.to_iterable_dataset()).metrics
    assert predicted["test_loss"] == plain.predict(evaluation).metrics["test_loss"]


# --- Resuming --------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_in_the_pass_through_its_stream_where_it_was(tmp_path):
    """24 rows, shuffled anew in each pass, are three steps: the sixth is the last of the second pass, the seventh the
    first of the third. A run that has come to its end can be made longer."""

    def run(folder: str, resume: str | None = None, max_steps: int = 8) -> HeRATrainer:
        stream = image_dataset(n=24, with_features=8).to_iterable_dataset().shuffle(seed=3, buffer_size=10)
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": max_steps, "lr_scheduler_type": "constant"}
        result = build(tmp_path / folder, stream, aligned_heads=HEADS, **settings)
        result.train(resume_from_checkpoint=resume and str(tmp_path / "whole" / resume))
        return result

    whole = run("whole")
    for step in (2, 5, 6, 7):
        resumed = run(f"from {step}", f"checkpoint-{step}")
        assert_same_run(resumed, whole)
        assert logged(resumed, "epoch") == logged(whole, "epoch")
    short = run("short", max_steps=2)
    shutil.copytree(tmp_path / "short" / "checkpoint-2", tmp_path / "whole" / "of the short one")
    resumed = run("long", "of the short one")
    assert_same_run(resumed, whole)
    assert short.state.epoch == 1.0


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_run_equals_uninterrupted_run(tmp_path, teacher, workers, monkeypatch):
    """And what is skipped does not go through the teacher again."""

    class StopAtThree(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    def run(folder: str, callbacks: list[TrainerCallback], resume: bool | None = None) -> HeRATrainer:
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "dataloader_num_workers": workers}
        stream = image_dataset(n=50).to_iterable_dataset().shuffle(seed=3, buffer_size=10)
        lora = LoraConfig(target_modules="all-linear", lora_dropout=0.1)
        result = build(tmp_path / folder, stream, teacher=teacher, callbacks=callbacks, peft_config=lora, **settings)
        result.train(resume_from_checkpoint=resume)
        return result

    whole = run("whole", [])
    assert run("half", [StopAtThree()]).state.global_step == 3
    passes = count_images(monkeypatch)
    resumed = run("half", [], resume=True)
    assert resumed.aligned_heads == whole.aligned_heads
    assert_same_run(resumed, whole)
    assert len(logs(whole)) == 6
    assert passes == [1, 8, 8, 8]  # the width, and three steps of 8 samples
