"""What this library does on a GPU, in one command and without a network: gradients, time, memory, overflow.

    python examples/gpu/check.py                  # a few minutes on one GPU of 24 GB or more
    python examples/gpu/check.py --cpu            # the same on tiny models, without what needs a GPU
    python examples/gpu/check.py --page           # writes what was measured into docs/performance.md

From a checkout of the repository: models are random ones of the test suite. Each part writes what it found, or the
error it ended with, to `results/<name of the GPU>.json`. The exit status says whether gradients and overflow are as
they should be and all parts ran; time, memory and plan have no bar, and are for the reader to judge.

- gradients: the alignment gradient of a step, cut into micro-batches, against that of one large batch, by precision,
  attention implementation, checkpointing, 4 bit and `torch.compile`
- cost: time and peak memory of an optimizer step against SFTTrainer's, in turns, on a model of Qwen2.5-VL-3B's size
- plan: what `hera plan` estimates for that run, beside what was measured
- overflow: fp16 with a loss scale that overflows in the first step
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
from harness import environment
from peft import LoraConfig, get_peft_model
from tiny import build_vlm, image_dataset, save_vlm, sft_args
from torch.utils.data import SequentialSampler
from training_step import Turns
from training_step_parts import Setting, Steps
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TrainerCallback
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available
from trl import SFTConfig, SFTTrainer

from hera_trainer import HeRAConfig, HeRATrainer
from hera_trainer.planning.plan import GIB, RunSettings, plan_run

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "performance.md"
MARKERS = ("<!-- gpu: begin -->", "<!-- gpu: end -->")
FAMILY = "qwen2_5_vl"
# A model wide enough for 4-bit blocks and flash attention, small enough to be built in a second.
SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = ["L2H3", "L0H1", "L1H0"]
SAMPLES, CUT = 12, (2, 6)
# Sums in another order, and batches padded to another length, differ by the precision's rounding.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}

# The language model and the tower of Qwen2.5-VL-3B, by its configuration on the Hub.
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
}
LARGE_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
VOCABULARY = 151936
IMAGE = (448, 448)


def lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


# Gradients


class _Keep(TrainerCallback):
    """Keeps the gradients of the last optimizer step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = getattr(model, "module", model).named_parameters()
        self.gradients = {name: p.grad.double().cpu() for name, p in named if p.grad is not None}


def gradients(folder: str, cut: tuple[int, int], weight: float, model: dict, settings: dict) -> dict[str, Any]:
    """Gradients of the first optimizer step over the same samples, whatever the cut."""
    keep, rows = _Keep(), image_dataset(n=SAMPLES, with_features=8)
    args = HeRAConfig(
        **sft_args(
            f"{folder}/out",
            per_device_train_batch_size=cut[0],
            gradient_accumulation_steps=cut[1],
            alignment_weight=weight,
            aligned_heads=HEADS,
            num_neighbors=3,
            max_steps=1,
            max_grad_norm=0.0,
            learning_rate=1e-9,
            model_init_kwargs={"dtype": "float32", **model.get("init", {})},
            **settings,
        )
    )
    trainer = HeRATrainer(
        f"{folder}/model",
        args,
        train_dataset=rows,
        callbacks=[keep],
        peft_config=lora() if model.get("lora") else None,
        quantization_config=model.get("quantization"),
    )
    trainer._get_train_sampler = lambda *_: SequentialSampler(rows)
    trainer.train()
    return keep.gradients


def deviation(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, over all parameters."""
    difference = sum((found[name] - value).square().sum() for name, value in expected.items())
    return float((difference / sum(value.square().sum() for value in expected.values())).sqrt())


def variants(cpu: bool) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Name, precision, what the model is and what the trainer is told."""
    plain: dict[str, Any] = {"gradient_checkpointing": False}
    exact, half = {**plain, "bf16": False}, {**plain, "bf16": True}
    yield "float32", "float32", {}, exact
    yield "bfloat16", "bfloat16", {}, half
    yield "bfloat16, eager attention", "bfloat16", {"init": {"attn_implementation": "eager"}}, half
    if not cpu and is_flash_attn_2_available():
        init = {"attn_implementation": "flash_attention_2", "dtype": "bfloat16"}
        yield "bfloat16, flash attention 2", "bfloat16", {"init": init, "lora": True}, half
    for reentrant in (False, True):
        name = f"bfloat16, {'reentrant' if reentrant else 'non-reentrant'} checkpointing"
        kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        yield name, "bfloat16", {"lora": True}, {**half, **kwargs}
    if is_bitsandbytes_available():
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        yield "4 bit, LoRA", "bfloat16", {"quantization": quantization, "lora": True}, half
    if not cpu:
        yield "torch.compile", "bfloat16", {"lora": True}, {**half, "torch_compile": True}


def check_gradients(cpu: bool) -> dict[str, Any]:
    """Deviation of the cut step's alignment gradient from that of one batch, for each variant."""
    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        save_vlm(FAMILY, f"{folder}/model", **SMALL)
        for name, precision, model, settings in variants(cpu):
            settings = {**settings, "use_cpu": cpu}
            total, plain = (
                [gradients(folder, cut, weight, model, settings) for cut in ((SAMPLES, 1), CUT)]
                for weight in (5.0, 0.0)
            )
            # The language model's own gradient depends on the cut for this type, so it is taken away.
            whole, cut = (
                {key: value - without.get(key, 0.0) for key, value in run.items()}
                for run, without in zip(total, plain, strict=True)
            )
            value = deviation(cut, whole)
            found[name] = {"deviation": value, "at most": TOLERANCES[precision], "ok": value <= TOLERANCES[precision]}
            print(f"  {name}: {value:.1e}", flush=True)
    return found


# Cost


def large_config() -> tuple[Any, Any]:
    """Configuration of Qwen2.5-VL-3B's shape, and a processor that makes 256 tokens of an image."""
    model, processor = build_vlm(FAMILY, **SMALL)
    parts = model.config.to_dict()
    text, vision = parts["text_config"], parts["vision_config"]
    del text["layer_types"]
    text |= {**LARGE, "vocab_size": VOCABULARY}
    text["rope_parameters"]["mrope_section"] = [16, 24, 24]
    vision |= {**LARGE_VISION, "patch_size": 14, "window_size": 112, "out_hidden_size": LARGE["hidden_size"]}
    config = type(model.config).from_dict(parts)
    images = processor.image_processor
    images.patch_size, images.size = 14, {"shortest_edge": IMAGE[0] * IMAGE[1], "longest_edge": IMAGE[0] * IMAGE[1]}
    return config, processor


def cost_model(cpu: bool) -> tuple[Any, Any]:
    """A random model of that shape in bfloat16 (on a CPU the small one), and its processor."""
    if cpu:
        return build_vlm(FAMILY, **SMALL)
    config, processor = large_config()
    with torch.device("cuda"):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16), processor


@contextmanager
def trainers(cpu: bool, batch_size: int, accumulation: int, layers: int) -> Iterator[tuple[dict[str, Steps], Any]]:
    """Steps of HeRATrainer and of SFTTrainer, which share one model and its adapter."""
    model, processor = cost_model(cpu)
    peft_model = get_peft_model(model, lora())
    rows = image_dataset(n=batch_size * accumulation, with_features=1024, image_size=24 if cpu else IMAGE[0])
    deepest = max(0, layers // 3 - 1)
    heads = [f"L{layer}H{head}" for layer, head in ((0, 1), (0, 3), (deepest // 2, 0), (deepest, 1), (deepest, 2))]
    with TemporaryDirectory() as folder:
        shared = sft_args(
            folder,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1000,
            bf16=True,
            use_cpu=cpu,
        )
        ours = HeRATrainer(
            peft_model,
            HeRAConfig(**shared, aligned_heads=list(dict.fromkeys(heads)), num_neighbors=5),
            train_dataset=rows,
            processing_class=processor,
        )
        ours.prepare_alignment()
        plain = rows.remove_columns("teacher_features")
        theirs = SFTTrainer(peft_model, SFTConfig(**shared), train_dataset=plain, processing_class=processor)
        setting = Setting(folder, heads, batch_size, accumulation, 1, 5, "cpu" if cpu else "cuda")
        steps = {"ours": Steps(ours, setting), "sft": Steps(theirs, setting)}
        try:
            yield steps, model.config
        finally:
            for each in steps.values():
                each.hooks.close()


def peak(run: Callable[[], Any]) -> int:
    """Bytes that torch allocated on the GPU at most while `run` ran."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def check_cost(cpu: bool) -> dict[str, Any]:
    """Time and peak memory of steps against SFTTrainer's, and the plan's estimate."""
    layers = (SMALL if cpu else LARGE)["num_hidden_layers"]
    found: dict[str, Any] = {}
    for batch_size, accumulation in ((8, 1), (4, 8)) if not cpu else ((8, 1), (2, 4)):
        with trainers(cpu, batch_size, accumulation, layers) as (steps, config):
            turns = Turns.of(dict(steps), 2 if cpu else 5)
            ratios = turns.pairs("ours", "sft").ratios
            entry: dict[str, Any] = {
                "seconds": {name: statistics.median(values) for name, values in turns.seconds.items()},
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
            if not cpu:
                entry["peak GiB"] = {name: peak(run) / GIB for name, run in steps.items()}
                entry["planned GiB"] = planned(config, batch_size, accumulation) / GIB
        del steps
        gc.collect()
        name = f"{batch_size} x {accumulation}"
        found[name] = {**entry, "ok": True}
        print(f"  {name}: {entry['ratio']:.3f} times SFTTrainer's time", flush=True)
    return found


def planned(config: Any, batch_size: int, accumulation: int) -> int:
    """Bytes that `hera plan` estimates for such a run."""
    settings = RunSettings(
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_neighbors=5,
        image_size=IMAGE,
        text_tokens=24,
    )
    return plan_run(config, settings).total


# Overflow


class _Scales(TrainerCallback):
    """The loss scale after each step, and whether the weights are finite."""

    def __init__(self) -> None:
        self.scales: list[float] = []
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scales.append(self.trainer.accelerator.scaler.get_scale())


def check_overflow(cpu: bool) -> dict[str, Any]:
    """Steps in fp16 from a loss scale of 2^40 on: the first ones overflow, are left out, and halve the scale."""
    if cpu:
        return {"fp16": {"skipped": "accelerate has no fp16 on a CPU"}}
    model, processor = build_vlm(FAMILY, **SMALL)
    scales = _Scales()
    with TemporaryDirectory() as folder:
        args = HeRAConfig(
            **sft_args(
                folder,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=3,
                aligned_heads=HEADS,
                num_neighbors=3,
                max_steps=40,
                fp16=True,
                use_cpu=False,
                gradient_checkpointing=False,
            )
        )
        rows = image_dataset(n=24, with_features=8)
        trainer = HeRATrainer(
            model, args, train_dataset=rows, processing_class=processor, callbacks=[scales], peft_config=lora()
        )
        scales.trainer = trainer
        trainer.accelerator.scaler._init_scale = 2.0**40
        trainer.train()
    finite = all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    temperature = [entry["temperature"] for entry in trainer.state.log_history if "temperature" in entry]
    overflown, settled = scales.scales[0] < 2.0**40, scales.scales[-1] == scales.scales[-2]
    ok = finite and overflown and settled and all(value > 0 for value in temperature)
    return {"fp16": {"scales": scales.scales, "finite": finite, "ok": ok}}


# The command

CHECKS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "gradients": check_gradients,
    "cost": check_cost,
    "overflow": check_overflow,
}


def run_checks(names: Sequence[str], cpu: bool) -> dict[str, Any]:
    """What each check found. One that fails does not keep the others from running; its error is what it found."""
    results: dict[str, Any] = {"environment": environment(), "checks": {}, "seconds": {}}
    for name in names:
        print(name, flush=True)
        begin = time.perf_counter()
        try:
            results["checks"][name] = CHECKS[name](cpu)
        except Exception:
            error = traceback.format_exc()
            print(error, file=sys.stderr, flush=True)
            results["checks"][name] = {"error": {"ok": False, "traceback": error.splitlines()[-12:]}}
        results["seconds"][name] = round(time.perf_counter() - begin, 1)
    return results


def failed(results: dict[str, Any]) -> list[str]:
    """Names of what is not as it should be."""
    return [
        f"{name}: {what}"
        for name, found in results["checks"].items()
        for what, entry in found.items()
        if entry.get("ok") is False
    ]


def section(results: Sequence[dict[str, Any]]) -> str:
    """What the page says of the GPUs that were measured."""
    if not results:
        return "Not measured yet. `python examples/gpu/check.py` measures it on one GPU."
    lines: list[str] = []
    for result in results:
        versions = ", ".join(f"{name} {result['environment'][name]}" for name in ("torch", "transformers", "trl"))
        lines += [f"`python examples/gpu/check.py` on {result['environment']['gpu']} ({versions}):", ""]
        lines += ["| alignment gradient, 2 x 6 against 12 x 1 | deviation | at most |", "| --- | --- | --- |"]
        for name, entry in result["checks"].get("gradients", {}).items():
            shown = f"{entry['deviation']:.0e}" if "deviation" in entry else "failed"
            lines.append(f"| {name} | {shown} | {entry.get('at most', '')} |")
        lines += [
            "",
            "| step of a 3B model, LoRA | SFTTrainer | HeRATrainer | ratio | peak | planned |",
            "|" + " --- |" * 6,
        ]
        for name, entry in result["checks"].get("cost", {}).items():
            if "seconds" not in entry:
                continue
            memory = entry.get("peak GiB", {})
            peaks = " and ".join(f"{memory[kind]:.2f}" for kind in ("sft", "ours") if kind in memory)
            times = f"{entry['seconds']['sft']:.3f} s | {entry['seconds']['ours']:.3f} s | {entry['ratio']:.3f}"
            lines.append(f"| {name} | {times} | {peaks} GiB | {entry.get('planned GiB', 0):.2f} GiB |")
        wrong = failed(result)
        lines += ["", f"Not as it should be: {', '.join(wrong)}." if wrong else "All checks passed.", ""]
    return "\n".join(lines).rstrip()


def measured(folder: Path = HERE / "results") -> list[dict[str, Any]]:
    """Results of GPUs."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [result for result in found if result["environment"]["gpu"]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="tiny models, without what needs a GPU")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--output", type=Path, help="file of the results; named after the GPU by default")
    parser.add_argument("--page", action="store_true", help="write what is in the results into docs/performance.md")
    args = parser.parse_args(arguments)
    if args.page:
        before, rest = PAGE.read_text().split(MARKERS[0])
        PAGE.write_text(f"{before}{MARKERS[0]}\n\n{section(measured())}\n\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")
        return 0
    if not args.cpu and not torch.cuda.is_available():
        parser.error("No GPU is found. With --cpu, what does not need one is checked on tiny models.")
    results = run_checks(args.checks, args.cpu)
    name = "cpu" if args.cpu else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    output = args.output or HERE / "results" / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    wrong = failed(results)
    print(f"{output}: " + ("not as it should be: " + ", ".join(wrong) if wrong else "all as it should be"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
