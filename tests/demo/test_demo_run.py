"""The demo's flow, on tiny parts in the place of the real ones: both runs, their table and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny import build_vlm, image_dataset, save_tiny_dinov2
from transformers import AutoModelForImageTextToText

from hera_trainer import HeadRanking, read_run
from hera_trainer.demo import job, run, table

STEPS, BATCH_SIZE = 5, 16  # four of stage 1, one of stage 2
SAMPLES = STEPS * BATCH_SIZE


def captions(seed: int = 0) -> Dataset:
    """Names of 40 things; by their names alone, some are reserved for held-out images."""
    rows = image_dataset(n=40)
    return rows.add_column("caption", [f"Thing {i}." for i in range(40)])


def questions(split: str, n: int, seed: int = 0) -> Dataset:
    rows = image_dataset(n=n, seed=1 if split == "train" else 2)
    rows = rows.add_column("question", [f"what is it {i % 2}" for i in range(n)])
    return rows.add_column("answer", [row["completion"][0]["content"] for row in rows])


def read_data(out: Path) -> job.DemoData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "emoji_captions", captions)
        patch.setattr(job, "easy_vqa", questions)
        patch.setattr(job, "HELD_OUT_CAPTIONS", 14)
        patch.setattr(job, "QUESTIONS", 8)
        return job.load_data(out, SAMPLES, job.SEED)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out / "cache"))
        patch.setattr(run, "build_llava", lambda size: build_vlm("llava"))
        patch.setattr(run, "save_teacher", save_tiny_dinov2)
        patch.setattr(job, "emoji_captions", captions)
        patch.setattr(job, "easy_vqa", questions)
        for module in (run, job):
            patch.setattr(module, "quantization", lambda: None)
            patch.setattr(module, "BATCH_SIZE", BATCH_SIZE)
        patch.setattr(job, "HELD_OUT_CAPTIONS", 14)
        patch.setattr(job, "QUESTIONS", 8)
        results = run.run_demo(str(out), steps=STEPS)
    return out, results


def test_both_runs_have_the_same_start_and_the_same_samples(demo: tuple[Path, dict[str, Any]]) -> None:
    out, results = demo
    sft, hera = ([read_run(job.folder_of(out, arm, stage)) for stage in job.STAGES] for arm in job.ARMS)
    # Nothing is trained yet in the first step, whose language-model loss is that of the samples alone.
    assert sft[0].curve("loss")[1][0] == pytest.approx(hera[0].curve("lm_loss")[1][0], rel=1e-6)
    for context in ("text", "image"):
        assert sft[0].monitored[context][0].scores.equal(hera[0].monitored[context][0].scores)
        for first, second in (sft, hera):  # what stage 1 leaves is what stage 2 begins with
            torch.testing.assert_close(first.before_after(context)[1].scores, second.before_after(context)[0].scores)
    heads = HeadRanking.load(out / "head_ranking.json").select("worst", 5)
    assert results["settings"]["heads"] == list(map(str, heads))
    for (without, aligned), steps in zip(zip(sft, hera, strict=True), (4, 1), strict=True):
        assert not without.curve("alignment_loss")[1] and len(aligned.curve("alignment_loss")[1]) == steps
        assert aligned.aligned_heads == heads


def test_scoring_labels_alone_gives_the_same_run(
    demo: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss of the demo's own run equals that of one in which TRL scores all positions."""
    out, _ = demo
    monkeypatch.setattr(job, "BATCH_SIZE", BATCH_SIZE)
    monkeypatch.setattr(job, "quantization", lambda: None)
    for name in ("model", "head_ranking.json", "teacher"):
        (tmp_path / name).symlink_to(out / name)
    data = read_data(out)
    for arm in job.ARMS:
        trainer = job.make_trainer(tmp_path, data, arm, 1, STEPS, job.SEED)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses == pytest.approx(read_run(job.folder_of(out, arm, 1)).curve("loss")[1], rel=1e-5)


def test_stage_1_trains_the_projector_alone(demo: tuple[Path, dict[str, Any]]) -> None:
    out, _ = demo
    for arm in job.ARMS:
        before, after = (
            AutoModelForImageTextToText.from_pretrained(path).state_dict()
            for path in (out / "model", job.folder_of(out, arm, 1))
        )
        changed = {name for name, value in before.items() if not value.equal(after[name])}
        assert changed and changed == {name for name in before if "multi_modal_projector" in name}


def test_the_table_says_what_was_measured(demo: tuple[Path, dict[str, Any]]) -> None:
    out, results = demo
    assert json.loads((out / "results.json").read_text()) == results
    heads = HeadRanking.load(out / "head_ranking.json").select("worst", 5)
    for arm, column, stage, step in (("SFT", "before", 1, 0), ("SFT", "SFT", 2, 1), ("HeRA", "HeRA", 2, 1)):
        found = read_run(job.folder_of(out, arm, stage))
        after = found.monitored["image"][step]
        score = sum(map(after.score, heads)) / len(heads)
        assert results["mknn"]["image in context"]["aligned"][column] == pytest.approx(score)
        assert results["held_out_loss"][column] == found.image_gains[step].loss
        assert results["image_gain"][column] == found.image_gains[step].gain
    text = table.closing_table(results)
    line = next(line for line in text.splitlines() if "five aligned heads" in line)
    values = results["mknn"]["image in context"]["aligned"]
    assert line.split()[-3:] == [f"{values[column]:.3f}" for column in table.COLUMNS]
    pull = next(line for line in text.splitlines() if "alignment pull" in line)
    assert len(pull.split()) == 3 and float(pull.split()[-1]) > 0


def test_what_is_held_out_is_not_trained_on(demo: tuple[Path, dict[str, Any]]) -> None:
    out, _ = demo
    data = read_data(out)
    shown, held_out = set(data.captions["caption"]), set(data.held_out["caption"])
    assert shown and held_out and not shown & held_out
    # Whatever the seed, they are the last ones: the study chose the demo's settings on the first.
    reserved = [name for name in captions()["caption"] if job.is_reserved(job.concept(name.removesuffix(".")))]
    assert len(reserved) > 14 and list(data.held_out["caption"]) == reserved[-14:]
    said = [row[0]["content"] for row in data.train["completion"]]
    assert len(said) == min(SAMPLES * 3 // 4, len(shown)) + min(SAMPLES * 3 // 4, len(shown)) // 3


def test_each_adapter_loads_with_peft_alone(demo: tuple[Path, dict[str, Any]]) -> None:
    out, _ = demo
    for arm in job.ARMS:
        model = AutoModelForImageTextToText.from_pretrained(job.folder_of(out, arm, 1))
        PeftModel.from_pretrained(model, out / arm.lower() / "adapter")
    for name in ("comparison.html", "heads.png"):
        assert (out / name).stat().st_size > 1000
