"""The comparison of SFT, alignment and its control: what is run, what is kept, and the table."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import build_vlm, image_dataset, save_tiny_dinov2

from hera_trainer import AttentionHead

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "signature" / "run.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("signature_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arms_on_a_tiny_model(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, results = tmp_path / "parts", tmp_path / "results.jsonl"
    model, processor = build_vlm("llava")
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    save_tiny_dinov2(folder / "teacher")
    rows = image_dataset(n=48, with_features=6)
    heads = [AttentionHead(0, 1), AttentionHead(1, 2)]
    monkeypatch.setattr(script, "parts", lambda _: (rows.select(range(32)), rows.select(range(32, 48)), heads))
    monkeypatch.setattr(script, "BATCH_SIZE", 16)
    monkeypatch.setattr(script, "LINEAR_LAYERS", "all-linear")
    arguments = ["--output_dir", str(folder), "--results", str(results), "--seeds", "0", "--steps", "2", "--every", "1"]
    script.main(arguments)
    found: dict[str, dict[str, Any]] = {}
    for line in results.read_text().splitlines():
        found[json.loads(line)["arm"]] = json.loads(line)
    assert list(found) == ["sft", "aligned", "control"]
    starts = {arm: result["mknn"]["aligned"]["0"] for arm, result in found.items()}
    assert len(set(starts.values())) == 1  # the same model, the same held-out rows
    assert all(set(result["mknn"]["all"]) == {"0", "1", "2"} for result in found.values())
    assert "alignment_loss" not in found["sft"]["log"]
    first = {arm: found[arm]["log"]["alignment_loss"][0] for arm in ("aligned", "control")}
    assert first["aligned"] != first["control"]  # only the vectors differ
    assert found["aligned"]["log"]["lm_loss"][0] == pytest.approx(found["control"]["log"]["lm_loss"][0], rel=1e-6)
    # What is there is not run again.
    monkeypatch.setattr(script, "train_arm", None)
    script.main(arguments)
    assert len(results.read_text().splitlines()) == 3
    lines = script.table(list(found.values())).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {arm}, seeds 0" for arm in found]
    assert f"{found['aligned']['mknn']['aligned']['2']:.3f}" in lines[3]
