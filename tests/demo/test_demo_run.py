"""The demo's flow, on tiny parts in the place of the real ones: both runs, their table and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import PeftModel
from tiny import build_vlm, image_dataset, save_tiny_dinov2
from transformers import AutoModelForImageTextToText

from hera_trainer import HeadRanking, read_run
from hera_trainer.demo import job, run, table

STEPS = 3


def captions(seed: int = 0) -> Dataset:
    """Names of 40 things; by their names alone, some are reserved for held-out images."""
    rows = image_dataset(n=40)
    return rows.add_column("caption", [f"Thing {i}." for i in range(40)])


def questions(split: str, n: int, seed: int = 0) -> Dataset:
    rows = image_dataset(n=n, seed=1 if split == "train" else 2)
    rows = rows.add_column("question", [f"what is it {i % 2}" for i in range(n)])
    return rows.add_column("answer", [row["completion"][0]["content"] for row in rows])


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
        patch.setattr(job, "BATCH_SIZE", 16)
        patch.setattr(job, "HELD_OUT_CAPTIONS", 14)
        patch.setattr(job, "QUESTIONS", 8)
        results = run.run_demo(str(out), steps=STEPS)
    return out, results


def test_both_runs_have_the_same_start_and_the_same_samples(demo: tuple[Path, dict[str, Any]]) -> None:
    out, results = demo
    runs = {arm: read_run(out / arm.lower()) for arm in job.ARMS}
    # Nothing is trained yet in the first step, whose language-model loss is that of the samples alone.
    assert runs["SFT"].curve("loss")[1][0] == pytest.approx(runs["HeRA"].curve("lm_loss")[1][0], rel=1e-6)
    for context in ("text", "image"):
        first = [found.monitored[context][0].scores for found in runs.values()]
        assert first[0].equal(first[1])
    assert not runs["SFT"].curve("alignment_loss")[1] and len(runs["HeRA"].curve("alignment_loss")[1]) == STEPS
    heads = HeadRanking.load(out / "head_ranking.json").select("worst", 5)
    assert runs["HeRA"].aligned_heads == heads
    assert results["settings"]["heads"] == list(map(str, heads))


def test_the_table_says_what_was_measured(demo: tuple[Path, dict[str, Any]]) -> None:
    out, results = demo
    assert json.loads((out / "results.json").read_text()) == results
    heads = HeadRanking.load(out / "head_ranking.json").select("worst", 5)
    for arm, column in (("SFT", "before"), ("SFT", "SFT"), ("HeRA", "HeRA")):
        found = read_run(out / arm.lower())
        step = 0 if column == "before" else STEPS
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "emoji_captions", captions)
        patch.setattr(job, "easy_vqa", questions)
        data = job.load_data(out, 48, seed=0)
    shown, held_out = set(data.captions["caption"]), set(data.held_out["caption"])
    assert shown and held_out and not shown & held_out
    said = [row[0]["content"] for row in data.train["completion"]]
    assert len(said) == min(36, len(shown)) + min(36, len(shown)) // 3


def test_each_adapter_loads_with_peft_alone(demo: tuple[Path, dict[str, Any]]) -> None:
    out, _ = demo
    for arm in job.ARMS:
        model = AutoModelForImageTextToText.from_pretrained(out / "model")
        PeftModel.from_pretrained(model, out / arm.lower() / "adapter")
    for name in ("comparison.html", "heads.png"):
        assert (out / name).stat().st_size > 1000
