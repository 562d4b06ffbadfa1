"""Run folders as training leaves them, for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hera_trainer import AttentionHead, HeadRanking
from hera_trainer.evaluation.image_gain import ImageGain

LAYERS, HEADS = 6, 4
ALIGNED = [AttentionHead(3, 2), AttentionHead(0, 1)]
STEPS = 60
MEASURED = (0, 30, 60)


def ranking(seed: int, context: str = "text", layers: int = LAYERS, heads: int = HEADS, **settings: Any) -> HeadRanking:
    scores = torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed)) * 0.2
    scores[1] = torch.nan  # a layer without attention
    names = {"context": context, "model": "org/model", "teacher": "org/teacher"}
    facts = {"k": 5, "num_samples": 101, "null_mean": 0.0501, "null_p95": 0.06 + seed / 1e4}
    return HeadRanking(scores, scores.nanmean(1), **{**facts, **names, **settings})


def gain(step: int) -> ImageGain:
    return ImageGain(loss=2.0, permuted_loss=2.25 + step / 120, tokens=900, rows=96, left_out=4)


def log_entries(steps: int = STEPS) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step in MEASURED:
            entries.append({"step": step, "image_gain": gain(step).gain})
            values = {"aligned": 0.04 + step / 1000, "top": 0.15, "all": 0.08}
            for group in ("alignment_mknn", "alignment_mknn_image"):
                entries.append({"step": step, **{f"{group}/{name}": value for name, value in values.items()}})
        if step > 0:
            entries.append(
                {
                    "step": step,
                    "epoch": step / steps,
                    "loss": 3.0 - step / 50,
                    "lm_loss": 2.5 - step / 60,
                    "alignment_loss": 3.0 - step / 300,
                    "temperature": 0.07 - step / 1e5,
                    "alignment_pool": 16.0,
                    "alignment_skipped": float(step in (20, 40)),
                    "alignment_left_out": 1.0,
                    "alignment_not_finite": 0.0,
                }
            )
    entries.append({"step": steps, "eval_loss": 1.625, "eval_alignment_loss": 2.875})
    return entries


def record(**changes: Any) -> dict[str, Any]:
    return {
        "model": "org/model",
        "dataset": "org/data",
        "adapter": {"peft_type": "LORA", "r": 16},
        "aligned_heads": [str(head) for head in ALIGNED],
        "config": {
            "output_dir": "out",
            "num_neighbors": 5,
            "queue_size": 0,
            "alignment_weight": 0.01,
            "max_steps": STEPS,
            "hub_token": "<HUB_TOKEN>",
        },
        "versions": {"trl": "1.16.0"},
        "hardware": {"processes": 1, "accelerator": None},
        "started": "2026-03-02T09:00:12+00:00",
        "finished": "2026-03-02T10:14:40+00:00",
        "resumed_from": None,
        **changes,
    }


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_run(folder: Path, monitor: bool = True, **changes: Any) -> Path:
    """A finished run of 60 steps with both contexts measured at steps 0, 30 and 60."""
    ranking(0).save(folder / "head_ranking.json")
    write_json(folder / "trainer_state.json", {"global_step": STEPS, "log_history": log_entries()})
    write_json(folder / "hera_run.json", record(**changes))
    for step in MEASURED if monitor else ():
        for offset, context in ((1, "text"), (2, "image")):
            measured = ranking(step + offset, context)
            measured.save(folder / "alignment_monitor" / f"step-{step:08d}-{context}.json")
        gain(step).save(folder / "alignment_monitor" / f"step-{step:08d}-gain.json")
    return folder
