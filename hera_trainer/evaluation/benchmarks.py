"""The paper's benchmarks, the averages of its tables, and the commands that run them in lmms-eval and VLMEvalKit."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# What the names and arguments below were checked against. The tests have the lists of names.
LMMS_EVAL_VERSION = "0.7.3"
VLMEVALKIT_URL = "https://github.com/open-compass/VLMEvalKit"
VLMEVALKIT_COMMIT = "e8e78f05f3080fe28154f2130321f17951c3be94"

HARNESSES = ("lmms-eval", "vlmevalkit")
PAPER_GROUPS = ("General", "Knowledge", "OCR", "Vision")
HALLUCINATION = "Hallucination"
MORE = "More"


class Benchmark(NamedTuple):
    """A benchmark, and what the two evaluation harnesses call it.

    Args:
        name: Its name, with which `--benchmarks` chooses it.
        group: Group of the paper's tables, or `"Hallucination"`, or `"More"`.
        lmms_eval: Its tasks in lmms-eval, none if it has none.
        vlmevalkit: Its data sets in VLMEvalKit, none if it has none.
        vlmevalkit_class: Class of these data sets.
        metric: What is reported.
        judged: Harnesses in which a language model behind an API judges the answers.
        note: What to know; where there is no task, why not and what to do instead.
        divisor: What is reported, divided by this, is the per cent that averages are made of.
    """

    name: str
    group: str
    lmms_eval: tuple[str, ...]
    vlmevalkit: tuple[str, ...]
    vlmevalkit_class: str
    metric: str
    judged: tuple[str, ...] = ()
    note: str = ""
    divisor: int = 1


_MCQ, _YORN, _VQA = "ImageMCQDataset", "ImageYORNDataset", "ImageVQADataset"

BENCHMARKS = (
    Benchmark("GQA", "General", ("gqa",), ("GQA_TestDev_Balanced",), _VQA, "exact match"),
    Benchmark("POPE", "General", ("pope",), ("POPE",), _YORN, "accuracy; F1, yes ratio"),
    Benchmark("MME", "General", ("mme",), ("MME",), _YORN, "perception score (of 2,000), divided by 20", divisor=20),
    Benchmark(
        "MMBench",
        "General",
        ("mmbench_en_dev_static",),
        ("MMBench_DEV_EN",),
        _MCQ,
        "circular accuracy",
        note="lmms-eval's mmbench_en_dev asks a language model to find the option; the static task does not.",
    ),
    Benchmark(
        "SEED-Bench",
        "General",
        ("seedbench",),
        ("SEEDBench_IMG",),
        _MCQ,
        "accuracy on images",
        note="lmms-eval runs images and videos: report seed_image.",
    ),
    Benchmark(
        "ScienceQA", "Knowledge", ("scienceqa_img",), ("ScienceQA_TEST",), _MCQ, "accuracy on questions with an image"
    ),
    Benchmark("MMMU", "Knowledge", ("mmmu_val",), ("MMMU_DEV_VAL",), "MMMUDataset", "accuracy on the validation split"),
    Benchmark(
        "MathVista",
        "Knowledge",
        ("mathvista_testmini_format",),
        ("MathVista_MINI",),
        "MathVista",
        "accuracy on testmini",
        judged=HARNESSES,
    ),
    Benchmark("AI2D", "Knowledge", ("ai2d",), ("AI2D_TEST",), _MCQ, "accuracy"),
    Benchmark("ChartQA", "OCR", ("chartqa",), ("ChartQA_TEST",), _VQA, "relaxed accuracy"),
    Benchmark(
        "OCRBench", "OCR", ("ocrbench",), ("OCRBench",), "OCRBench", "score (of 1,000), divided by 10", divisor=10
    ),
    Benchmark("TextVQA", "OCR", ("textvqa_val",), ("TextVQA_VAL",), _VQA, "VQA accuracy"),
    Benchmark("VizWiz", "OCR", ("vizwiz_vqa_val",), ("VizWiz",), "VizWiz", "VQA accuracy"),
    Benchmark(
        "MMVP",
        "Vision",
        ("mmvp",),
        ("MMVP",),
        _MCQ,
        "accuracy of pairs",
        note="lmms-eval's copy has two pairs of answers corrected.",
    ),
    Benchmark("RealWorldQA", "Vision", ("realworldqa",), ("RealWorldQA",), _MCQ, "accuracy"),
    Benchmark("BLINK", "Vision", ("blink",), ("BLINK",), _MCQ, "accuracy"),
    Benchmark("VStar", "Vision", ("vstar_bench",), ("VStarBench",), _MCQ, "accuracy"),
    Benchmark(
        "CV-Bench",
        "Vision",
        ("cv_bench_2d", "cv_bench_3d"),
        ("CV-Bench-2D", "CV-Bench-3D"),
        "CVBench",
        "mean of 2D (itself the mean of ADE20K and COCO) and 3D",
    ),
    Benchmark(
        "CHAIR",
        HALLUCINATION,
        ("coco_cap_chair",),
        (),
        "",
        "CHAIR-i, CHAIR-s",
        note="VLMEvalKit has no CHAIR (COCO_VAL scores captions by their wording): use hera eval --metric chair.",
    ),
    Benchmark(
        "AMBER",
        HALLUCINATION,
        ("amber_g",),
        ("AMBER",),
        _YORN,
        "CHAIR, Cover, Hal, Cog; accuracy, F1",
        note="lmms-eval has the generative part, VLMEvalKit the discriminative one; hera eval --metric amber has both.",
    ),
    Benchmark(
        "HallusionBench",
        HALLUCINATION,
        ("hallusion_bench_image",),
        ("HallusionBench",),
        _YORN,
        "qAcc, easy, hard",
        judged=("lmms-eval",),
        note="lmms-eval asks a language model to judge; hera eval --metric hallusionbench needs none.",
    ),
    Benchmark("MMStar", MORE, ("mmstar",), ("MMStar",), _MCQ, "average accuracy"),
    Benchmark("DocVQA", MORE, ("docvqa_val",), ("DocVQA_VAL",), _VQA, "ANLS"),
    Benchmark("InfoVQA", MORE, ("infovqa_val",), ("InfoVQA_VAL",), _VQA, "ANLS"),
    Benchmark(
        "MMBench-CN",
        MORE,
        ("mmbench_cn_dev",),
        ("MMBench_DEV_CN",),
        _MCQ,
        "circular accuracy",
        judged=("lmms-eval",),
    ),
    Benchmark("Q-Bench", MORE, ("qbench_dev",), ("Q-Bench1_VAL",), _MCQ, "accuracy"),
)

# Model types whose wrapper in lmms-eval loads a merged model, and its arguments. Any other goes through vLLM: the
# wrapper `huggingface` loads models without their language-model head.
LMMS_EVAL_MODELS = {
    "qwen2_vl": ("qwen2_vl", "pretrained={model},attn_implementation=sdpa"),
    "qwen2_5_vl": ("qwen2_5_vl", "pretrained={model},attn_implementation=sdpa"),
    "qwen3_vl": ("qwen3_vl", "pretrained={model},attn_implementation=sdpa"),
    "llava": ("llava_hf", "pretrained={model}"),
    "llava_next": ("llava_hf", "pretrained={model}"),
    "llava_onevision": ("llava_hf", "pretrained={model}"),
    "idefics2": ("idefics2", "pretrained={model},attn_implementation=sdpa"),
}
LMMS_EVAL_OTHER = ("vllm", "model={model}")

# Classes of VLMEvalKit that load a merged model whatever its folder is called, and their settings for greedy decoding.
# Any other goes through a server: those classes choose prompt or model by the official name.
VLMEVALKIT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VLChat", {"use_custom_prompt": False, "do_sample": False}),
    "qwen2_5_vl": ("Qwen2VLChat", {"use_custom_prompt": False, "do_sample": False}),
    "qwen3_vl": ("Qwen3VLChat", {"use_custom_prompt": False, "temperature": 0, "max_new_tokens": 2048}),
}


def choose_benchmarks(names: Sequence[str] | None = None) -> list[Benchmark]:
    """Benchmarks by name or group, in the order of the list.

    Args:
        names (sequence of `str`, *optional*):
            Names or groups, in any case. By default all but those of the group More.

    Raises:
        `ValueError`: If there is no such benchmark or group.
    """
    if names is None:
        return [benchmark for benchmark in BENCHMARKS if benchmark.group != MORE]
    wanted = {name.lower() for name in names}
    known = {text.lower() for benchmark in BENCHMARKS for text in (benchmark.name, benchmark.group)}
    unknown = sorted(wanted - known)
    if unknown:
        groups = ", ".join((*PAPER_GROUPS, HALLUCINATION, MORE))
        raise ValueError(
            f"There is no benchmark {', '.join(unknown)}. There are {', '.join(b.name for b in BENCHMARKS)}, and the "
            f"groups {groups}."
        )
    return [b for b in BENCHMARKS if b.name.lower() in wanted or b.group.lower() in wanted]


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """The averages of the paper's tables: the plain mean of each group, and `"All"`, that of the 18 benchmarks.

    Args:
        scores (`Mapping[str, float]`):
            Of benchmarks by name, in any case, what the documentation's table says is reported: per cent, but for MME
            and OCRBench, whose points are divided here.

    Returns:
        `dict[str, float]`: The groups of which every benchmark has a score; `"All"` where all of them have.

    Raises:
        `ValueError`: If a name is not one of the 18, or a score is more than all of it.
    """
    paper = {benchmark.name.lower(): benchmark for benchmark in BENCHMARKS if benchmark.group in PAPER_GROUPS}
    shares: dict[str, float] = {}
    for name, score in scores.items():
        benchmark = paper.get(name.lower())
        if benchmark is None:
            raise ValueError(
                f"{name!r} is none of the paper's benchmarks: {', '.join(b.name for b in paper.values())}."
            )
        shares[benchmark.name] = score / benchmark.divisor
        if not 0 <= shares[benchmark.name] <= 100:
            raise ValueError(f"{benchmark.name} can't be {score}: it is between 0 and {100 * benchmark.divisor:,}.")
    groups = {group: [b.name for b in paper.values() if b.group == group] for group in PAPER_GROUPS}
    groups["All"] = [benchmark.name for benchmark in paper.values()]
    return {
        group: sum(shares[name] for name in names) / len(names)
        for group, names in groups.items()
        if shares.keys() >= set(names)
    }


def export_commands(
    harness: str,
    model: str,
    model_type: str,
    benchmarks: Sequence[Benchmark],
    merged: str | None = None,
    output: str = "benchmarks",
    merge_options: Sequence[str] = (),
) -> str:
    """A shell script that runs benchmarks in another evaluation harness.

    Args:
        harness (`str`): `"lmms-eval"` or `"vlmevalkit"`.
        model (`str`): Model or adapter.
        model_type (`str`): Its `model_type`, such as `"qwen3_vl"`.
        benchmarks (sequence of [`Benchmark`]): What to run.
        merged (`str`, *optional*): For an adapter, the folder that it is merged into; `None` for a full model.
        output (`str`, *optional*, defaults to `"benchmarks"`): Folder of the results.
        merge_options (sequence of `str`, *optional*): Options of `hera merge`, such as `["--revision", "v2"]`.

    Returns:
        `str`: The script.

    Raises:
        `ValueError`: If there is no such harness, or it has none of the benchmarks.
    """
    if harness not in HARNESSES:
        raise ValueError(f"Commands can be written for {' and '.join(HARNESSES)}, not for {harness!r}.")
    runnable = [benchmark for benchmark in benchmarks if _tasks(benchmark, harness)]
    if not runnable:
        raise ValueError(f"{harness} has none of {', '.join(b.name for b in benchmarks)}.")
    target = merged or model
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", ""]
    if merged is not None:
        lines += [
            "# Most models of the harness take no adapter. A second time, add --overwrite.",
            shlex.join(["hera", "merge", model, merged, *merge_options]),
            "",
        ]
    write = _lmms_eval if harness == "lmms-eval" else _vlmevalkit
    lines += write(target, model_type, runnable, output)
    notes = [f"# {b.name}: {b.note}" for b in benchmarks if b.note and _concerns(b, harness)]
    return "\n".join([*lines, *notes]) + "\n"


def _concerns(benchmark: Benchmark, harness: str) -> bool:
    """Whether the note of a benchmark says something of a harness, not only of the other one."""
    names = {"lmms-eval": "lmms-eval", "vlmevalkit": "VLMEvalKit"}
    own = names.pop(harness)
    return own in benchmark.note or not any(other in benchmark.note for other in names.values())


def _tasks(benchmark: Benchmark, harness: str) -> tuple[str, ...]:
    return benchmark.lmms_eval if harness == "lmms-eval" else benchmark.vlmevalkit


def _split_by_judge(benchmarks: Sequence[Benchmark], harness: str) -> list[tuple[bool, list[Benchmark]]]:
    parts = [(judged, [b for b in benchmarks if (harness in b.judged) == judged]) for judged in (False, True)]
    return [(judged, part) for judged, part in parts if part]


def _lmms_eval(model: str, model_type: str, benchmarks: Sequence[Benchmark], output: str) -> list[str]:
    wrapper, pattern = LMMS_EVAL_MODELS.get(model_type, LMMS_EVAL_OTHER)
    packages = f"lmms-eval=={LMMS_EVAL_VERSION} decord" + (" vllm" if wrapper == "vllm" else "")
    lines = [
        f"# pip install {packages}",
        "# On several GPUs: accelerate launch --num_processes N -m lmms_eval instead of python -m lmms_eval.",
    ]
    for judged, part in _split_by_judge(benchmarks, "lmms-eval"):
        if judged:
            lines.append("# A language model judges these answers: export OPENAI_API_KEY first.")
        arguments = ["--model", wrapper, "--model_args", pattern.format(model=model)]
        arguments += ["--tasks", ",".join(task for benchmark in part for task in benchmark.lmms_eval)]
        arguments += ["--batch_size", "1", "--output_path", output, "--log_samples"]
        lines += [shlex.join(["python", "-m", "lmms_eval", *arguments]), ""]
    return lines


def _vlmevalkit(model: str, model_type: str, benchmarks: Sequence[Benchmark], output: str) -> list[str]:
    lines = [
        f"# git clone {VLMEVALKIT_URL} && git -C VLMEvalKit checkout {VLMEVALKIT_COMMIT[:10]}",
        "# pip install -e VLMEvalKit",
    ]
    known = VLMEVALKIT_MODELS.get(model_type)
    if known is None:
        lines += [
            f"# VLMEvalKit has no class for a {model_type} model of one's own, so it asks a server. In another shell:",
            f"# pip install vllm && {shlex.join(['vllm', 'serve', model, '--served-model-name', 'merged'])}",
        ]
    for judged, part in _split_by_judge(benchmarks, "vlmevalkit"):
        if judged:
            lines.append("# A language model judges these answers: export OPENAI_API_KEY first.")
        judge = [] if judged else ["--judge", "exact_matching"]
        if known is None:
            names = [name for benchmark in part for name in benchmark.vlmevalkit]
            chosen = ["--model", "merged", "--base-url", "http://localhost:8000/v1", "--temperature", "0"]
            chosen += ["--data", *names]
        else:
            path = "vlmevalkit-judged.json" if judged else "vlmevalkit.json"
            lines += [f"cat > {path} <<'JSON'", _vlmevalkit_config(model, *known, part), "JSON"]
            chosen = ["--config", path]
        lines += [shlex.join(["python", "VLMEvalKit/run.py", *chosen, *judge, "--work-dir", output]), ""]
    return lines


def _vlmevalkit_config(model: str, model_class: str, settings: dict, benchmarks: Sequence[Benchmark]) -> str:
    data = {name: {"class": b.vlmevalkit_class, "dataset": name} for b in benchmarks for name in b.vlmevalkit}
    return json.dumps(
        {"model": {"merged": {"class": model_class, "model_path": model, **settings}}, "data": data}, indent=1
    )
