"""The benchmarks of ranking, neighbours and the loss at small sizes: they run, and write down what they measured."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


def run_small(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """Rows that a script wrote, checked for what all of them have in common."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    importlib.import_module(name).main(["--small", "--pairs", "1", *options])

    (path,) = tmp_path.iterdir()
    written = json.loads(path.read_text())
    assert (path.name, written["name"]) == (f"{name}_small.json", f"{name}_small")
    assert written["command"].startswith(f"python examples/benchmarks/{name}.py --pairs 1 --small")
    assert written["environment"]["torch"] and written["environment"]["threads"] >= 1
    for row in written["rows"]:
        assert row["pairs"] == 1 and row["low"] == row["ratio"] == row["high"]
        assert row["ratio"] >= 0 and math.isfinite(row["ratio"])
        assert (row["met"] is None) == (row["bar"] == "")
        if row["bar"]:
            sign, bar = row["bar"].split()
            assert row["met"] == (row["ratio"] <= float(bar) if sign == "<=" else row["ratio"] >= float(bar))
    return written["rows"]


def test_ranking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (row,) = run_small("ranking", monkeypatch, tmp_path)
    assert row["what"].startswith("ranking 12 heads on 40 captions")
    assert row["bar"] == "<= 1.1"


def test_neighbors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scores, memory = run_small("neighbors", monkeypatch, tmp_path, "--without-faiss")
    assert scores["bar"] == ">= 20" and "2 heads" in scores["what"]
    assert memory["against"] == "the similarity matrix [N, N]"


def test_neighbors_and_faiss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    _, against_faiss, _ = run_small("neighbors", monkeypatch, tmp_path)
    assert against_faiss["bar"] == "<= 1.2" and "IndexFlatIP" in against_faiss["against"]


def test_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run_small("loss", monkeypatch, tmp_path)
    assert [row["against"].split()[0] for row in rows] == ["three", "three", "one"]
    assert "GFLOPS" in rows[0]["note"] and rows[0]["bar"] == ""  # the bar is for large pools
