"""The benchmark of training steps on tiny models: it runs, and what it writes down is complete."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script as a module that writes its results into `tmp_path`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness
    import training_step

    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    return training_step


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "parts"


def test_small_run_writes_all_rows_of_time(benchmark: Any, folder: Path, tmp_path: Path) -> None:
    benchmark.main(["--small", "--pairs", "1", "--parts", "time", "--folder", str(folder)])

    written = json.loads((tmp_path / "results" / "training_step_small_time.json").read_text())
    assert written["command"].startswith("python examples/benchmarks/training_step.py --pairs 1 --small")
    assert written["environment"]["torch"]
    rows = written["rows"]
    sft, share = "SFTTrainer", "a step of SFTTrainer"
    assert [row["against"] for row in rows] == [sft, "HeRATrainer", sft, sft, share, sft, share]
    for row in rows:
        assert row["pairs"] == 1 and row["low"] == row["ratio"] == row["high"]
        assert row["ratio"] > 0 and math.isfinite(row["ratio"])
        assert (row["met"] is None) == (row["bar"] == "")
    first_third, fixed, early_share, ranked, ranked_share = rows[2:]
    for row, share in ((first_third, early_share), (ranked, ranked_share)):
        bar = 1 + 1.1 * share["ratio"]
        assert row["bar"].startswith(f"<= {bar:.3f} ") and row["met"] == (row["ratio"] <= bar)
    assert fixed["ratio"] == first_third["ratio"] and fixed["met"] == (fixed["ratio"] <= 1.2)


def test_small_run_with_a_heavy_vision_tower(benchmark: Any, tmp_path: Path) -> None:
    import vision_tower

    vision_tower.main(["--small", "--pairs", "1"])

    written = json.loads((tmp_path / "results" / "vision_tower_small.json").read_text())
    assert written["command"] == "python examples/benchmarks/vision_tower.py --pairs 1 --small --device cpu"
    once, twice, weigh = written["rows"]
    assert (once["bar"], twice["bar"], weigh["bar"]) == ("<= 1.12", "", "")
    assert once["against"] == twice["against"] == "SFTTrainer"
    assert all(row["ratio"] > 0 and math.isfinite(row["ratio"]) for row in written["rows"])
    assert once["met"] == (once["ratio"] <= 1.12)


def test_peak_memory_of_each_trainer(benchmark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import training_step_parts as parts

    def run(script: str, text: str) -> dict[str, float]:
        """SFTTrainer in a process of its own; the others here, which is faster."""
        job = json.loads(text)
        jobs.append(job["kind"])
        if job["kind"] == "sft":
            return fresh_process(script, text)
        return parts.peak_memory(job["kind"], parts.Setting(**job["setting"]))

    jobs: list[str] = []
    fresh_process = benchmark.fresh_process
    monkeypatch.setattr(benchmark, "fresh_process", run)
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent.parent), prepend=os.pathsep)
    benchmark.build(folder, small=True)
    heads, _, _ = benchmark.aligned_heads(folder)

    ours, naive = benchmark.memory(benchmark.Setting(str(folder), heads, 8, 1, steps=1, num_neighbors=3), 1)

    assert jobs == ["sft", "ours", "naive"]
    assert (ours.against, naive.against) == ("SFTTrainer", "HeRATrainer")
    assert ours.bar == "<= 1.02" and naive.bar == ""
    assert ours.ratio > 0 and naive.ratio > 0
    assert "resident" in ours.note


def test_early_heads_lie_in_the_first_third(benchmark: Any, folder: Path) -> None:
    from hera_trainer import AttentionHead, HeadRanking

    benchmark.build(folder, small=True)
    ranked, early, layers = benchmark.aligned_heads(folder, count=3)

    ranking = HeadRanking.load(folder / "head_ranking.json")
    assert layers == 3
    assert ranked == [str(head) for head in ranking.select("worst", 3)]
    assert len(set(early)) == 3 and {AttentionHead.parse(head).layer for head in early} == {0}
