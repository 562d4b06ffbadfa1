"""Commands for other evaluation harnesses, against the names that these harnesses have."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from tiny import build_vlm, save_vlm

from hera_trainer.cli import main
from hera_trainer.evaluation import benchmarks
from hera_trainer.evaluation.benchmarks import (
    BENCHMARKS,
    HALLUCINATION,
    PAPER_GROUPS,
    averages,
    choose_benchmarks,
    export_commands,
)

DATA = Path(__file__).parents[1] / "support" / "files"


@pytest.fixture(scope="module")
def tasks():
    """Names that `lmms-eval tasks list` printed."""
    head, *names = (DATA / "lmms_eval_tasks.txt").read_text().splitlines()
    assert benchmarks.LMMS_EVAL_VERSION in head
    return set(names)


@pytest.fixture(scope="module")
def datasets():
    """VLMEvalKit's data sets, each with its class."""
    head, *lines = (DATA / "vlmevalkit_datasets.txt").read_text().splitlines()
    assert benchmarks.VLMEVALKIT_COMMIT in head
    return dict(line.split("\t") for line in lines)


# Appendix B of the paper.
APPENDIX = {
    "General": ["GQA", "POPE", "MME", "MMBench", "SEED-Bench"],
    "Knowledge": ["ScienceQA", "MMMU", "MathVista", "AI2D"],
    "OCR": ["ChartQA", "OCRBench", "TextVQA", "VizWiz"],
    "Vision": ["MMVP", "RealWorldQA", "BLINK", "VStar", "CV-Bench"],
    "Hallucination": ["CHAIR", "AMBER", "HallusionBench"],
}


def test_the_papers_benchmarks_in_its_groups():
    groups = {group: [b.name for b in BENCHMARKS if b.group == group] for group in (*PAPER_GROUPS, HALLUCINATION)}
    assert groups == APPENDIX and sum(len(groups[group]) for group in PAPER_GROUPS) == 18
    names = [benchmark.name.lower() for benchmark in BENCHMARKS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_names_are_those_of_the_harnesses(benchmark, tasks, datasets):
    """Each has a task in both, or a note that names the one without and says what to do."""
    if benchmark.lmms_eval:
        assert tasks.issuperset(benchmark.lmms_eval)
    else:
        assert "lmms-eval" in benchmark.note and "hera eval" in benchmark.note
    if benchmark.vlmevalkit:
        assert {datasets[name] for name in benchmark.vlmevalkit} == {benchmark.vlmevalkit_class}
    else:
        assert "VLMEvalKit" in benchmark.note and "hera eval" in benchmark.note


def commands(script: str) -> list[list[str]]:
    """The command lines of a script, without comments and the content of files that it writes."""
    script = re.sub(r"<<'JSON'\n.*?\nJSON", "", script, flags=re.DOTALL)
    return [shlex.split(line) for line in script.splitlines() if line and not line.startswith("#")]


def test_lmms_eval_runs_every_benchmark_on_the_merged_adapter():
    chosen = choose_benchmarks()
    script = export_commands("lmms-eval", "run", "qwen3_vl", chosen, merged="run-merged", output="out")
    _, merge, *runs = commands(script)
    assert merge == ["hera", "merge", "run", "run-merged"]
    found = []
    for run in runs:
        options = dict(zip(run[3::2], run[4::2], strict=False))
        assert run[:3] == ["python", "-m", "lmms_eval"]
        assert options["--model"] == "qwen3_vl"
        assert options["--model_args"] == "pretrained=run-merged,attn_implementation=sdpa"
        assert options["--output_path"] == "out"
        found += options["--tasks"].split(",")
    assert sorted(found) == sorted(task for benchmark in chosen for task in benchmark.lmms_eval)
    assert len(chosen) == 18 + 3 and {"cv_bench_2d", "cv_bench_3d", "vizwiz_vqa_val"} <= set(found)
    # What needs a judge is a command of its own, after the words on the key.
    judged = [task for benchmark in chosen if "lmms-eval" in benchmark.judged for task in benchmark.lmms_eval]
    assert script.index("OPENAI_API_KEY") < script.index(",".join(judged))


@pytest.mark.parametrize(
    ("model_type", "wrapper", "arguments"),
    [
        ("qwen2_5_vl", "qwen2_5_vl", "pretrained=merged,attn_implementation=sdpa"),
        ("llava", "llava_hf", "pretrained=merged"),
        ("idefics3", "vllm", "model=merged"),
        ("smolvlm", "vllm", "model=merged"),
    ],
)
def test_lmms_eval_wrappers(model_type, wrapper, arguments):
    script = export_commands("lmms-eval", "merged", model_type, choose_benchmarks(["MMVP"]))
    assert "hera merge" not in script
    assert f"--model {wrapper} --model_args {arguments} --tasks mmvp" in script


def test_vlmevalkit_config(datasets):
    chosen = choose_benchmarks()
    script = export_commands("vlmevalkit", "my model", "qwen3_vl", chosen)
    files = dict(re.findall(r"cat > (\S+) <<'JSON'\n(.*?)\nJSON", script, flags=re.DOTALL))
    runs = [command for command in commands(script) if command[0] == "python"]
    assert [run[run.index("--config") + 1] for run in runs] == list(files)
    found = {}
    for run, content in zip(runs, files.values(), strict=True):
        config = json.loads(content)
        assert config["model"]["merged"]["class"] == "Qwen3VLChat"
        assert config["model"]["merged"]["model_path"] == "my model"
        found.update(config["data"])
        judged = {"MathVista_MINI"} >= set(config["data"])
        assert ("--judge" in run) != judged
    assert found == {
        name: {"class": benchmark.vlmevalkit_class, "dataset": name}
        for benchmark in chosen
        for name in benchmark.vlmevalkit
    }
    assert "# CHAIR: VLMEvalKit has no CHAIR" in script


def test_vlmevalkit_asks_a_server_for_other_models():
    script = export_commands("vlmevalkit", "merged", "llava", choose_benchmarks(["vision"]))
    assert "vllm serve merged --served-model-name merged" in script
    run = next(command for command in commands(script) if command[0] == "python")
    assert run[run.index("--base-url") + 1] == "http://localhost:8000/v1"
    assert run[run.index("--data") + 1 : run.index("--judge")] == [
        *("MMVP", "RealWorldQA", "BLINK", "VStarBench", "CV-Bench-2D", "CV-Bench-3D")
    ]


def test_choice_of_benchmarks():
    assert [benchmark.name for benchmark in choose_benchmarks(["mme", "ocr"])] == [
        "MME",
        "ChartQA",
        "OCRBench",
        "TextVQA",
        "VizWiz",
    ]
    with pytest.raises(ValueError, match="no benchmark nothing"):
        choose_benchmarks(["nothing"])
    with pytest.raises(ValueError, match="vlmevalkit has none of CHAIR"):
        export_commands("vlmevalkit", "model", "llava", choose_benchmarks(["chair"]))


def test_averages_are_plain_means():
    """Of any scores, MME's points divided by 20 and OCRBench's by 10: in the paper's arithmetic, written out."""
    general = {"GQA": 64.0, "POPE": 86.0, "MME": 1500.0, "MMBench": 70.0, "SEED-Bench": 71.0}
    knowledge = {"ScienceQA": 75.0, "MMMU": 40.0, "MathVista": 30.0, "AI2D": 60.0}
    ocr = {"ChartQA": 20.0, "OCRBench": 400.0, "TextVQA": 60.0, "VizWiz": 50.0}
    vision = {"MMVP": 40.0, "RealWorldQA": 55.0, "BLINK": 45.0, "V*": 50.0, "CV-Bench": 65.0}
    vision["vstar"] = vision.pop("V*")
    means = {
        "General": (64 + 86 + 75 + 70 + 71) / 5,
        "Knowledge": (75 + 40 + 30 + 60) / 4,
        "OCR": (20 + 40 + 60 + 50) / 4,
        "Vision": (40 + 55 + 45 + 50 + 65) / 5,
    }
    found = averages(general | knowledge | ocr | vision)
    assert found == pytest.approx({**means, "All": (366 + 205 + 170 + 255) / 18})
    assert averages(general) == pytest.approx({"General": means["General"]})
    assert averages({**ocr, "GQA": 64.0}) == pytest.approx({"OCR": means["OCR"]})
    with pytest.raises(ValueError, match="'CHAIR' is none of the paper's benchmarks: GQA, POPE"):
        averages({"CHAIR": 10.0})
    with pytest.raises(ValueError, match="GQA can't be 640: it is between 0 and 100"):
        averages({"GQA": 640})
    with pytest.raises(ValueError, match="MME can't be 2100: it is between 0 and 2,000"):
        averages({"MME": 2100})


def test_command_line_reads_the_type_of_an_adapter(tmp_path, capsys):
    base = save_vlm("qwen2_5_vl", tmp_path / "base")
    model, _ = build_vlm("qwen2_5_vl")
    model.name_or_path = base
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "run"))
    assert main(["eval", str(tmp_path / "run"), "--export", "lmms-eval", "--benchmarks", "vision"]) == 0
    script = capsys.readouterr().out
    assert f"hera merge {tmp_path}/run {tmp_path}/run-merged" in script
    assert f"--model qwen2_5_vl --model_args pretrained={tmp_path}/run-merged," in script

    moved = ["--base-model", base, "--revision", "v2", "--dtype", "bfloat16"]
    assert main(["eval", str(tmp_path / "run"), "--export", "lmms-eval", *moved]) == 0
    wanted = f"--revision v2 --base-model {base} --dtype bfloat16"
    assert f"hera merge {tmp_path}/run {tmp_path}/run-merged {wanted}\n" in capsys.readouterr().out
    assert main(["eval", base, "--export", "lmms-eval", "--revision", "v2"]) == 1
    assert "loads the full model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", base, "--export", "lmms-eval", "--load-in-4bit"])
    assert "--load-in-4bit has no effect" in capsys.readouterr().err

    assert main(["eval", "someone/some-model", "--export", "lmms-eval", "--model-type", "llava"]) == 0
    assert "--model llava_hf --model_args pretrained=someone/some-model" in capsys.readouterr().out
    assert main(["eval", "someone/some-model", "--export", "lmms-eval"]) == 1
    assert "--model-type" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_documentation_has_the_same_names(benchmark):
    lines = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith(f"| {benchmark.group} | {benchmark.name} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    for harness, cell, names in zip(
        benchmarks.HARNESSES, cells[2:4], (benchmark.lmms_eval, benchmark.vlmevalkit), strict=True
    ):
        shown = ", ".join(f"`{name}`" for name in names)
        assert cell == (shown + " (judge)" * (harness in benchmark.judged) if names else "none")
    assert cells[4] == benchmark.metric
    assert not benchmark.note or f"- {benchmark.name}: {benchmark.note}" in lines
