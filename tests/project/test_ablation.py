"""Each file of examples/ablation/ is a row of the paper's table: what it aligns, with which objective."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from tiny import image_dataset, save_tiny_dinov2, save_vlm

from hera_trainer import read_run
from hera_trainer.cli.sft import main

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "ablation"
FILES = sorted(FOLDER.glob("*.yaml"))
LAYERS, HEADS = 6, 4


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a teacher and a data set."""
    folder = tmp_path_factory.mktemp("ablation")
    save_vlm("llava", folder / "model", num_hidden_layers=LAYERS)
    save_tiny_dinov2(folder / "teacher")
    image_dataset(n=24).save_to_disk(folder / "data")
    return folder


def test_the_table_has_every_file_with_the_settings_of_its_name() -> None:
    table = re.findall(r"\[`([\w-]+)`\]\(([\w-]+\.yaml)\)", (FOLDER / "README.md").read_text())
    assert len(FILES) == 10 and sorted(f"{name}.yaml" for name, _ in table) == [path.name for path in FILES]
    assert all(target == f"{name}.yaml" for name, target in table)
    names = ("alignment_objective", "alignment_granularity", "head_selection", "num_aligned_heads")
    for path in FILES:
        settings = yaml.safe_load(path.read_text())
        objective, granularity, selection, *count = path.stem.split("-")
        assert [settings[name] for name in names] == [objective, granularity, selection, int(*count or [1])]
        own = {name: value for name, value in settings.items() if name not in names}
        contrast = {"similarity": "cosine", "temperature": 0.07} if objective == "contrastive" else {}
        assert own == {
            "alignment_weight": 0.01,
            "num_neighbors": 10,
            "teacher_model_name_or_path": "facebook/dinov2-large",
            **contrast,
        }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_row_aligns_what_it_says(path: Path, parts: Path, tmp_path: Path) -> None:
    words = {"config": path, "model_name_or_path": parts / "model", "dataset_name": parts / "data"}
    words |= {"output_dir": tmp_path, "teacher_model_name_or_path": parts / "teacher", "num_neighbors": 3}
    words |= {"max_steps": 2, "logging_steps": 1, "save_steps": 2, "bf16": False, "use_cpu": True, "report_to": "none"}
    words |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "disable_tqdm": True, "seed": 3}
    main([word for name, value in words.items() for word in (f"--{name}", str(value))])
    run = read_run(tmp_path)
    ranking = run.head_ranking
    assert ranking is not None and ranking.scores.shape == (LAYERS, HEADS)
    objective, granularity, selection, *count = path.stem.split("-")
    m = int(*count or [1])
    scores = (ranking.scores if granularity == "head" else ranking.layer_scores).flatten().numpy()
    if selection == "middle":
        expected = [2]
    elif selection == "random":
        expected = np.random.default_rng(3).choice(LAYERS * HEADS, size=m, replace=False)
    else:
        expected = np.argsort(scores if selection == "worst" else -scores, kind="stable")[:m]
    units = [f"L{i // HEADS}H{i % HEADS}" if granularity == "head" else f"L{i}" for i in expected]
    assert list(map(str, run.aligned_heads)) == units
    assert len(run.curve("alignment_loss")[1]) == 2
    saved = load_file(tmp_path / "checkpoint-2" / "hera_objective.safetensors")
    if objective == "contrastive":
        assert {name.split(".")[0] for name in saved} == {"log_temperature"}  # and Adam's numbers
    else:
        assert saved["first_weight"].shape[0] == m and "log_temperature" not in saved
