"""Two processes answer together what one answers alone."""

from __future__ import annotations

import json

from tiny import build_vlm, image_dataset
from two_processes import launched_once

from hera_trainer.evaluation.generation import predict, read_predictions
from hera_trainer.evaluation.questions import Questions


def test_processes_share_the_questions(tmp_path, tmp_path_factory):
    folder = launched_once("generation_worker.py", tmp_path_factory)
    alone = predict(*build_vlm("llava"), Questions(image_dataset(9)), tmp_path, max_new_tokens=6, progress=False)
    assert read_predictions(folder / "predictions.jsonl") == alone
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 9
    for index in range(2):
        assert json.loads((folder / f"returned-{index}.json").read_text()) == alone
        assert "--restart" in (folder / f"error-{index}.txt").read_text()
