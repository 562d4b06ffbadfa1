"""Runs to put side by side, as training leaves them: their numbers follow from `shift`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from report_runs import MEASURED, STEPS, ranking, record, write_json, write_run

from hera_trainer import HeadRanking

GROUPS = ("aligned", "top", "all")


def scores(shift: int, step: int, offset: int, **settings: Any) -> HeadRanking:
    """What a run measured at a step in the context of an offset (1 text, 2 image)."""
    measured = ranking(1000 * shift + step + offset, "text" if offset == 1 else "image")
    for name, value in settings.items():
        setattr(measured, name, value)
    return measured


def logged(shift: int, weight: float) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for step in range(0, STEPS + 1, 10):
        if step in MEASURED:
            values = {group: 0.05 + i / 50 + shift / 100 + step / 2000 for i, group in enumerate(GROUPS)}
            for prefix in ("alignment_mknn", "alignment_mknn_image"):
                entries.append({"step": step, **{f"{prefix}/{group}": value for group, value in values.items()}})
        if step and weight:
            of_alignment = {"alignment_loss": 3.0 - shift / 8, "alignment_pull": 0.1 + shift / 50, "temperature": 0.07}
            entries.append({"step": step, "loss": 9.0, "lm_loss": 2.5 - step / 60 + shift / 16, **of_alignment})
        elif step:
            entries.append({"step": step, "loss": 2.5 - step / 60 + shift / 16})
    return [*entries, {"step": STEPS, "eval_loss": 1.5 + shift / 16, "train_runtime": 100.0 + shift}]


def write(folder: Path, shift: int, k: int = 5, samples: int = 101, **config: Any) -> Path:
    """A run whose numbers are set by `shift`."""
    settings = {**record()["config"], "seed": 0, "teacher_control": "none", "output_dir": folder.name, **config}
    weight = settings["alignment_weight"]
    write_run(folder, config=settings, teacher="org/teacher" if weight else None)
    (folder / "hera_run.json").write_text(
        json.dumps({**json.loads((folder / "hera_run.json").read_text()), "started": None})
    )
    write_json(folder / "trainer_state.json", {"global_step": STEPS, "log_history": logged(shift, weight)})
    for step in MEASURED:
        for offset, context in ((1, "text"), (2, "image")):
            path = folder / "alignment_monitor" / f"step-{step:08d}-{context}.json"
            scores(shift, step, offset, k=k, num_samples=samples).save(path)
    return folder


def write_all(folder: Path) -> list[Path]:
    """An SFT run, three seeds of an aligned one, and the controls of two of them."""
    runs = [write(folder / "sft", 0, alignment_weight=0)]
    runs += [write(folder / f"aligned-{seed}", 1 + seed, seed=seed) for seed in range(3)]
    runs += [write(folder / f"control-{seed}", 5 + seed, seed=seed, teacher_control="permuted") for seed in range(2)]
    return runs
