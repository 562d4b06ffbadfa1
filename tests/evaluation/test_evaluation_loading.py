"""Metric modules as folders: found by name, loaded by path offline and without hera_trainer, fit for a Space."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pandas
import pytest
from huggingface_hub import SpaceCard

from hera_trainer.evaluation import METRICS, load_metric, metric_path

# One sample for each metric, and a score that it must give.
VECTORS = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]
QUESTION = {
    "category": "VD",
    "subcategory": "illusion",
    "visual_input": "1",
    "set_id": "0",
    "figure_id": "0",
    "question_id": "0",
    "gt_answer": "1",
}
SAMPLES = {
    "mutual_knn": ({"predictions": VECTORS, "references": VECTORS, "k": 1}, {"mutual_knn": 1.0}),
    "chair": ({"predictions": ["a cat and a dog"], "references": [["a kitten"]]}, {"chair_i": 0.5, "chair_s": 1.0}),
    "pope": ({"predictions": ["No."], "references": ["no"]}, {"accuracy": 1.0, "yes_ratio": 0.0}),
    "hallusionbench": ({"predictions": ["Yes."], "references": [QUESTION]}, {"qAcc": 1.0}),
    "amber": ({"predictions": ["Yes"], "references": [1005]}, {"accuracy": 1.0, "state_accuracy": 1.0}),
}


@pytest.fixture
def amber_data(tmp_path: Path) -> Path:
    path = tmp_path / "annotations.json"
    path.write_text('[{"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"}]')
    return path


def test_paths_are_folders_with_all_that_a_space_needs() -> None:
    for name in METRICS:
        folder = Path(metric_path(name))
        assert {path.name for path in folder.iterdir()} >= {f"{name}.py", "README.md", "app.py", "requirements.txt"}
        card = SpaceCard.load(folder / "README.md").data.to_dict()
        assert (card["sdk"], card["app_file"], card["license"]) == ("gradio", "app.py", "apache-2.0")
        assert card["tags"] == ["evaluate", "metric"]
        assert card["title"] and card["description"]


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no metric 'bleu'.*mutual_knn, chair, pope, amber, hallusionbench"):
        metric_path("bleu")
    with pytest.raises(ValueError, match="no metric"):
        load_metric("../secrets")


def test_importing_the_helpers_is_light() -> None:
    code = "import sys, hera_trainer.evaluation; print({'evaluate', 'datasets', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize("name", METRICS)
def test_info_says_what_the_metric_is(name: str) -> None:
    info = load_metric(name).info
    assert info.module_type == "metric"
    for text in (info.description, info.citation, info.inputs_description):
        assert text.strip()
    assert "Args:" in info.inputs_description and "Returns:" in info.inputs_description
    assert info.reference_urls[0].startswith("https://arxiv.org/abs/")
    assert info.codebase_urls[0].startswith("https://github.com/")


def test_evaluate_loads_each_by_path_offline_without_hera_trainer(tmp_path: Path, amber_data: Path) -> None:
    """A copy of the folder, as a Space has it, in a process that can't import this package, with empty caches."""
    for name in METRICS:
        shutil.copytree(metric_path(name), tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
import sys
sys.modules["hera_trainer"] = None
import evaluate
samples = {SAMPLES!r}
samples["amber"][0]["annotations"] = {str(amber_data)!r}
for name, (inputs, expected) in samples.items():
    scores = evaluate.load(name).compute(**inputs)
    assert expected.items() <= scores.items(), (name, scores)
    print(name)
"""
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == list(SAMPLES)
    assert (tmp_path / "home" / "modules" / "evaluate_modules" / "metrics" / "chair").is_dir()


@pytest.mark.parametrize("name", METRICS)
def test_page_of_the_space_computes_what_is_typed_in(
    name: str, amber_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page up to the first call of gradio, which is no dependency: its form is given the text of the cells."""
    shutil.copytree(metric_path(name), tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "space" / "data").mkdir()
    shutil.copy(amber_data, tmp_path / "space" / "data")
    shown = {}
    gradio = types.ModuleType("gradio")
    gradio.inputs = types.SimpleNamespace(Dataframe=lambda **kwargs: kwargs)
    gradio.outputs = types.SimpleNamespace(Textbox=lambda **kwargs: kwargs)
    gradio.Interface = lambda **kwargs: shown.update(kwargs) or types.SimpleNamespace(launch=lambda: None)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.syspath_prepend(str(tmp_path / "space"))
    code = compile((tmp_path / "space" / "app.py").read_text(), str(tmp_path / "space" / "app.py"), "exec")
    exec(code, {"__name__": "__main__", "__file__": str(tmp_path / "space" / "app.py")})

    inputs, expected = SAMPLES[name]
    if name == "mutual_knn":  # the form has no k, so 10 others must be there
        inputs = {key: [[float(i), float(i * i)] for i in range(12)] for key in ("predictions", "references")}
    cells = {}
    for key, kind in zip(("predictions", "references"), shown["inputs"]["datatype"], strict=True):
        cells[key] = [v if kind == "number" or isinstance(v, str) else json.dumps(v) for v in inputs[key]]
    assert expected.items() <= shown["fn"](pandas.DataFrame(cells)).items()
    assert shown["article"].strip().startswith("#")  # the card without its front matter
