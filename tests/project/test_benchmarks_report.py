"""The benchmarks of teacher, import time and growth run, and the page is what the results make of it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a script of the benchmarks by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def results(script, monkeypatch, tmp_path) -> Path:
    """An empty folder for results, in place of that of the repository."""
    monkeypatch.setattr(script("harness"), "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def run(script: Any, name: str, results: Path, *arguments: str) -> dict[str, Any]:
    script(name).main(["--small", "--pairs", "1", *arguments])
    return json.loads((results / f"{name}_small.json").read_text())


def test_teacher(script, results):
    rows = run(script, "teacher", results)["rows"]
    assert [row["bar"] for row in rows] == [">= 0.85", *["= 0", "<= 1"] * 2]
    assert [row["ratio"] for row in rows if row["bar"] == "= 0"] == [0, 0]


def test_work_of_a_second_run_is_counted(script, tmp_path):
    teacher = script("teacher")
    teacher.save_teacher(tmp_path / "teacher", small=True)
    teacher.cache_vectors(tmp_path, 40)
    found = teacher.second_run(tmp_path, "files")
    assert (found["loads"], found["forwards"]) == (0, 0)
    for entry in (tmp_path / "cache").glob("*.arrow"):
        entry.unlink()
    found = teacher.second_run(tmp_path, "files")
    assert (found["loads"], found["forwards"]) == (1, 2)  # 40 images are two batches


def test_import_time(script, results):
    (row,) = run(script, "import_time", results)["rows"]
    assert row["against"] == "`import trl`" and row["ratio"] > 0
    with pytest.raises(AssertionError, match="no class"):
        script("import_time").timed("from json import dumps")


def test_scaling(script, results, tmp_path):
    found = run(script, "scaling", results, "--figure", str(tmp_path / "curves.svg"))
    assert len(found["curves"]) == len(found["rows"]) == 11
    assert all(len(curve["x"]) == len(curve["y"]) for curve in found["curves"].values())
    assert (tmp_path / "curves.svg").stat().st_size > 1000


@pytest.mark.parametrize(("exponent", "is_bound", "met"), [(2, False, True), (1, False, False), (1, True, True)])
def test_exponents(exponent, is_bound, met, script):
    curve = script("scaling").Curve("c", "x", "y", 2, [10, 20, 40], is_bound)
    curve.runs = [[factor * x**exponent for x in curve.x] for factor in (1.0, 3.0, 2.0)]
    np.testing.assert_allclose(curve.exponents, exponent)
    row = curve.row()
    assert row.met is met and row.pairs == 3
    assert curve.y == [2.0 * x**exponent for x in curve.x]


ROW = {"what": "a | b", "against": "c", "ratio": 1.23456, "low": 1.1, "high": 12345.6, "pairs": 7, "note": "n"}
PLACE = {"cpu": "C", "cores": 2, "threads": 2, "torch": "1"}


def result(name: str, met: bool | None, gpu: str | None = None) -> dict[str, Any]:
    row = {**ROW, "bar": "<= 1", "met": met}
    return {"name": name, "command": f"python {name}.py", "rows": [row], "environment": {**PLACE, "gpu": gpu}}


def test_report_of_some_results(script, tmp_path):
    report = script("report")
    (tmp_path / "results").mkdir()
    for name, met in (("loss", False), ("teacher", True), ("loss_small", True), ("another", None)):
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(result(name, met)))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    call = ["--page", str(page), "--results", str(tmp_path / "results")]
    report.main(call)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "1 of 2 bars are met." in text and "- a | b: 1.23, bar <= 1" in text
    assert "| a \\| b | c | <= 1 | 1.23 | 1.1 to 12,346 | 7 | **missed** |" in text
    assert text.index("### Teacher vectors") < text.index("### Alignment loss") < text.index("### another")
    assert "- Training step: not measured yet." in text and "Teacher vectors: not measured" not in text
    assert "- On a GPU: not measured." in text and "small" not in text
    assert "- `teacher`, `loss`, `another`: C, 2 cores, 2 threads of PyTorch, no GPU; torch 1." in text
    report.main(call)
    assert page.read_text() == text

    (tmp_path / "results" / "training_step_cuda.json").write_text(json.dumps(result("cuda", True, "H")))
    report.main(call)
    assert "On a GPU: not measured" not in page.read_text() and "### Training step on a GPU" in page.read_text()


@pytest.mark.parametrize("page", ["no marker", "{0}{0}{1}", "{1}{0}", "{0}{1}{1}"])
def test_page_without_its_markers(page, script):
    report = script("report")
    with pytest.raises(ValueError, match="markers"):
        report.rewritten(page.format(report.BEGIN, report.END), "text")


def test_committed_page_is_that_of_the_committed_results(script):
    report = script("report")
    page = report.PAGE.read_text(encoding="utf-8")
    picture = (report.PAGE.parent / "assets" / "scaling.svg").exists()
    assert report.rewritten(page, report.generated(report.read_results(BENCHMARKS / "results"), picture)) == page
