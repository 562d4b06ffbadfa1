"""Files that an earlier version wrote are read by this one, see `tests/support/files/before/README.md`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from files_of_before import LAST_STEP, SAVED_STEP, Kept, content, lora, settings
from tiny_teachers import vectors_of
from transformers import AutoModelForImageTextToText, AutoProcessor, BitImageProcessor, LlamaConfig

from hera_trainer import HeadRanking, HeRAConfig, HeRATrainer, VisionTeacher, add_teacher_features, read_run

FOLDER = Path(__file__).parents[1] / "support" / "files" / "before"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the cache of then, in its place. Nothing may be computed beside it: no teacher, no ranking."""
    shutil.copytree(FOLDER / "cache", tmp_path / "hera_trainer")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(BitImageProcessor, "to_dict", lambda self: {**EXPECTED["reported"]["image_processor"]})
    monkeypatch.setattr(LlamaConfig, "to_dict", lambda self: {**EXPECTED["reported"]["decoder"]})

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("It was computed again.")

    monkeypatch.setattr(VisionTeacher, "from_pretrained", refuse)
    monkeypatch.setattr(VisionTeacher, "forward_prepared", refuse)
    monkeypatch.setattr("hera_trainer.heads.ranking_cache.rank_samples", refuse)
    return tmp_path / "hera_trainer"


def rows() -> datasets.Dataset:
    return datasets.Dataset.from_parquet(str(FOLDER / "train.parquet"))


def trainer(output_dir: Path) -> tuple[HeRATrainer, Kept]:
    kept = Kept()
    kept.trainer = HeRATrainer(
        AutoModelForImageTextToText.from_pretrained(FOLDER / "model"),
        HeRAConfig(**settings(output_dir, teacher_model_name_or_path=str(FOLDER / "teacher"))),
        train_dataset=rows(),
        processing_class=AutoProcessor.from_pretrained(FOLDER / "model"),
        peft_config=lora(),
        callbacks=[kept],
    )
    return kept.trainer, kept


def test_a_checkpoint_goes_on(tmp_path, cache):
    """With its temperature, queue, heads and adapter, to what the run of then came to."""
    shutil.copytree(FOLDER / "run", tmp_path / "run")
    run, kept = trainer(tmp_path / "run")
    run.train(resume_from_checkpoint=True)
    assert kept.begun == EXPECTED["checkpoint"]
    now, then = (
        next(entry for entry in log if entry["step"] == LAST_STEP and "loss" in entry)
        for log in (run.state.log_history, EXPECTED["log_history"])
    )
    for name in ("loss", "lm_loss", "alignment_loss", "temperature", "alignment_pool", "grad_norm"):
        assert now[name] == pytest.approx(then[name], rel=1e-3), name


@pytest.mark.parametrize("name", ["run/head_ranking.json", f"run/checkpoint-{SAVED_STEP}/head_ranking.json"])
def test_a_ranking_is_read(name):
    assert content(HeadRanking.load(FOLDER / name)) == EXPECTED["ranking"]


def test_a_record_is_read():
    run = read_run(FOLDER / "run")
    assert run.record == EXPECTED["record"]
    assert run.log_history == EXPECTED["log_history"]
    assert [str(head) for head in run.aligned_heads] == EXPECTED["checkpoint"]["aligned_heads"]
    monitored = {name: {str(step): content(m) for step, m in steps.items()} for name, steps in run.monitored.items()}
    assert monitored == EXPECTED["monitored"]
    assert {name: list(steps) for name, steps in monitored.items()} == {c: ["0", "2", "3"] for c in ("image", "text")}


def test_cached_teacher_vectors_are_found(cache):
    found = vectors_of(add_teacher_features(rows(), str(FOLDER / "teacher")))
    assert [vector.tolist() for vector in found] == EXPECTED["teacher_vectors"]


def test_a_cached_ranking_is_found(tmp_path, cache):
    run, _ = trainer(tmp_path / "new")
    run.prepare_alignment()
    now = content(run.head_ranking)
    assert {**now, "model": EXPECTED["ranking"]["model"]} == EXPECTED["ranking"]
    assert now["model"] == str(FOLDER / "model")  # the name of this run's model


def test_other_files_are_not_taken_for_them(tmp_path, cache):
    """What the tests above find is found by its content: another image, another weight, and it is not."""
    changed = rows().map(lambda row: {"images": [row["images"][0].rotate(180)]})
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        add_teacher_features(changed, str(FOLDER / "teacher"))
    run, _ = trainer(tmp_path / "new")
    with torch.no_grad():
        run.alignment.accessor.projection(1).weight[0, 0] += 1
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        run.prepare_alignment()
