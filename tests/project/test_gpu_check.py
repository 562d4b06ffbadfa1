"""The check of a GPU: its form for the CPU, the model that it measures on a GPU, and what the page says."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import image_dataset
from transformers import AutoModelForImageTextToText

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "gpu"


@pytest.fixture(scope="module")
def check() -> Iterator[ModuleType]:
    path = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    yield import_module("check")
    sys.path[:] = path


def test_on_the_cpu(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [variant for variant in check.variants(True) if variant[0] in ("float32", "4 bit, LoRA")]
    assert len(some) == 2
    monkeypatch.setattr(check, "variants", lambda cpu: some)
    output = tmp_path / "results" / "cpu.json"
    assert check.main(["--cpu", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert 0 < results["checks"]["gradients"]["float32"]["deviation"] <= 1e-4
    assert all(entry["seconds"]["ours"] > 0 for entry in results["checks"]["cost"].values())
    assert "skipped" in results["checks"]["overflow"]["fp16"]


def test_a_wrong_gradient_is_told(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contrast within micro-batches is another gradient: the check must not pass. What fails is written down."""
    exact = {"gradient_checkpointing": False, "bf16": False, "contrast_scope": "micro_batch"}
    monkeypatch.setattr(check, "variants", lambda cpu: [("micro", "float32", {}, exact)])
    monkeypatch.setattr(check, "CUT", (6, 2))
    output = tmp_path / "cpu.json"
    assert check.main(["--cpu", "--checks", "gradients", "--output", str(output)]) == 1
    assert json.loads(output.read_text())["checks"]["gradients"]["micro"]["deviation"] > 0.1
    monkeypatch.setitem(check.CHECKS, "overflow", lambda cpu: {}["nothing"])
    assert check.main(["--cpu", "--checks", "overflow", "--output", str(output)]) == 1
    assert "KeyError" in json.loads(output.read_text())["checks"]["overflow"]["error"]["traceback"][-1]


def test_the_large_model_has_the_size_of_the_real_one(check: ModuleType) -> None:
    config, processor = check.large_config()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    # Qwen2.5-VL-3B has 3.75 billion parameters, its embeddings shared with the LM head.
    count = sum(parameter.numel() for parameter in model.parameters())
    embeddings = model.get_input_embeddings().weight.numel()
    assert 3.70e9 < count - (0 if config.tie_word_embeddings else embeddings) < 3.80e9
    row = image_dataset(n=1, image_size=check.IMAGE[0])[0]
    batch = processor(images=row["images"], text=["<|vision_start|><|image_pad|><|vision_end|>"], return_tensors="pt")
    assert int((batch["input_ids"] == config.image_token_id).sum()) == 256
    assert check.planned(config, 4, 8) > 2 * count


def test_page_says_what_was_measured(check: ModuleType) -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    shown = page.split(check.MARKERS[0])[1].split(check.MARKERS[1])[0].strip()
    assert shown == check.section(check.measured())
    readme = (ROOT / "README.md").read_text()
    assert ("Nothing has been run on a GPU yet" in readme) == (not check.measured())
    cost = {
        "seconds": {"ours": 1.1, "sft": 1.0},
        "ratio": 1.1,
        "peak GiB": {"sft": 9.5, "ours": 9.75},
        "planned GiB": 10.0,
    }
    entry = {"deviation": 0.0123, "at most": 0.05, "ok": True}
    versions = {"gpu": "A GPU", "torch": "1", "transformers": "2", "trl": "3"}
    result = {"environment": versions, "checks": {"gradients": {"bfloat16": entry}, "cost": {"4 x 8": cost}}}
    text = check.section([result])
    assert "| bfloat16 | 1e-02 | 0.05 |" in text
    assert "| 4 x 8 | 1.000 s | 1.100 s | 1.100 | 9.50 and 9.75 GiB | 10.00 GiB |" in text
    assert text.endswith("All checks passed.")
