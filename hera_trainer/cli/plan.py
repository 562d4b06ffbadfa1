"""`hera plan`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..heads.head import GRANULARITIES
from .parser import Parser

if TYPE_CHECKING:
    from ..planning.plan import RunPlan
    from ..planning.settings import RunSettings

_EXAMPLES = """\
examples:
  hera plan Qwen/Qwen3-VL-4B-Instruct --load-in-4bit --batch-size 4 --gpu-memory 16
  hera plan HuggingFaceTB/SmolVLM-Instruct --image-size 800x600 --heads L3H4 L5H11
  hera plan ./my-model --full --optim paged_adamw_8bit --head-ranking head_ranking.json
  hera plan --config examples/configs/qwen3_vl_4b_16gb.yaml --gpu-memory 16 --json
"""

# Options that have another name than the setting of `RunSettings` that they set.
_SETTINGS = {
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "double_quant": "use_bnb_nested_quant",
    "scope": "contrast_scope",
    "granularity": "alignment_granularity",
    "heads": "aligned_heads",
    "head_ranking": "head_ranking_path",
    "m": "num_aligned_heads",
    "k": "num_neighbors",
}


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    try:
        size = int(width), int(height or width)
    except ValueError:
        size = 0, 0
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of an image; write 640x480 (width x height) or 448")
    return size


def _gib_of_gpu(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no memory of a GPU; write its GiB, such as 16")
    return size


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hera plan",
        description="Estimates memory, cost of head alignment and pools of a run from the model's configuration. No "
        "weights are read. Whatever is not given here or in --config has the default named.",
        epilog=_EXAMPLES,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="name on the Hub, or folder with a config.json")
    add("--config", metavar="FILE", help="YAML file of `hera sft`, read for the model and the settings of the run")
    add("--revision", help="branch, tag or commit of MODEL")
    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--batch-size", type=int, help="samples of a micro-batch and process (8)")
    add("--accumulation", type=int, help="micro-batches of an optimizer step (4)")
    add("--processes", type=int, help="processes, each with a GPU (1); each is planned as if it held the whole model")
    add("--image-size", type=_size, metavar="WxH", help="pixels of an image, one a sample (640x480)")
    add("--image-tokens", type=int, help="tokens of an image in the language model, instead of --image-size")
    add("--text-tokens", type=int, help="tokens of text in a sample (256)")
    add("--optim", help="adamw_torch_fused (default), adamw_torch, adamw_8bit, paged_adamw_8bit, paged_adamw_32bit")
    add("--no-checkpointing", action="store_true", help="keep all activations instead of computing them again")
    model = parser.add_argument_group("weights")
    add = model.add_argument
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="of the weights (bfloat16)")
    add("--load-in-4bit", action="store_true", default=None, help="nf4 of bitsandbytes for the linear layers")
    add("--double-quant", action="store_true", default=None, help="double quantization of the scales")
    add("--lora-r", type=int, help="rank of the adapters (16)")
    add(
        "--target-modules",
        nargs="+",
        help="where adapters go: all-linear (default), several names, or one regular expression",
    )
    add("--full", action="store_true", help="no adapter: train all weights")
    align = parser.add_argument_group("alignment")
    add = align.add_argument
    add("--granularity", choices=list(GRANULARITIES), help="what is aligned: heads (default) or whole layers")
    add("--heads", nargs="+", metavar="LxHy", help="aligned heads, such as L3H4 L5H11, or layers, such as L12")
    add("--head-ranking", metavar="FILE", help="ranking (JSON) of which the m worst heads are taken")
    add("--m", type=int, help="number of aligned heads or layers (5)")
    add("--k", type=int, help="number of neighbours (10)")
    add("--teacher-dim", type=int, help="width of the teacher's vectors (1024, DINOv2-large)")
    add("--scope", choices=["step", "micro_batch"], help="which samples are compared (step)")
    add("--image-feature-gib", type=float, help="image features kept between the two passes of a step (1)")
    add("--queue-size", type=int, help="past samples that join the pool (0)")
    out = parser.add_argument_group("output")
    out.add_argument(
        "--gpu-memory", type=_gib_of_gpu, metavar="GIB", help="say whether it fits, and the largest micro-batch"
    )
    out.add_argument("--json", action="store_true", help="print JSON instead of text, in bytes")
    return parser


def settings_of_config(path: str | Path) -> tuple[str | None, str | None, dict[str, Any]]:
    """Model, its revision, and the settings that a YAML file of `hera sft` has, TRL's defaults where it is silent.

    Raises:
        `ValueError`: If the file is no YAML, no mapping, or has a setting that cannot be planned for.
    """
    import yaml

    from ..planning.settings import RunSettings

    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is no YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is no YAML file of settings. Write `name: value` lines, as for `hera sft`.")
    found: dict[str, Any] = {"dtype": "float32", "use_peft": False, "lora_target_modules": None}
    found |= {name: value for name, value in content.items() if name in RunSettings.__dataclass_fields__}
    if content.get("load_in_8bit"):
        raise ValueError("8-bit weights cannot be planned for. Take `load_in_8bit` out of the file to plan without.")
    loaded = content.get("model_init_kwargs") or {}
    loaded = json.loads(loaded) if isinstance(loaded, str) else loaded
    found["dtype"] = loaded.get("dtype", found["dtype"]) or "auto"
    for name in ("image_feature_gib", "alignment_weight"):
        if isinstance(found.get(name), str):  # YAML takes 5e-1 for a text
            found[name] = _number(name, found[name])
    if content.get("activation_checkpointing") is not None:  # the new name goes before the old one
        found["gradient_checkpointing"] = content["activation_checkpointing"]
    # Words of one line are a list, as in `hera sft`.
    for name in ("lora_target_modules", "lora_modules_to_save", "aligned_heads"):
        if isinstance(found.get(name), str):
            found[name] = found[name].split()
    modules = found["lora_target_modules"]
    if isinstance(modules, list) and len(modules) == 1:  # as TRL does
        found["lora_target_modules"] = modules[0]
    return content.get("model_name_or_path"), loaded.get("revision", content.get("model_revision")), found


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"`{name}` must be a number, got {text!r}.") from None


def _settings(args: argparse.Namespace) -> tuple[str, str | None, dict[str, Any]]:
    """Model, its revision, and what of [`RunSettings`] is given."""
    from ..planning.settings import RunSettings

    name, revision, values = settings_of_config(args.config) if args.config else (None, None, {})
    given = {_SETTINGS.get(option, option): value for option, value in vars(args).items() if value is not None}
    values |= {name: value for name, value in given.items() if name in RunSettings.__dataclass_fields__}
    if args.m is not None and values.get("aligned_heads"):
        raise ValueError(
            "--m says how many heads are chosen, but they are named (--heads, `aligned_heads`). Leave one of them out."
        )
    if args.target_modules:
        values["lora_target_modules"] = args.target_modules if len(args.target_modules) > 1 else args.target_modules[0]
    if args.full:
        values["use_peft"] = False
    if args.no_checkpointing:
        values["gradient_checkpointing"] = False
    model = args.model or name
    if model is None:
        raise ValueError("Which model? Give its name or folder, or a --config file with `model_name_or_path`.")
    # A revision is one of the model that it was written for.
    return model, args.revision or (revision if args.model is None else None), values


def _stored_dtype(config: Any) -> str:
    """What `dtype: auto` loads: the type that the weights are stored in, as far as the configuration says."""
    stored = config.dtype or config.get_text_config().dtype or "bfloat16"
    return str(stored).removeprefix("torch.")


def _gib(size: float) -> str:
    from ..planning.plan import GIB

    return f"{size / GIB:8.3f} GiB"


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {value}" for name, value in rows]


def _model_lines(plan: RunPlan) -> list[str]:
    weights, settings = plan.weights, plan.settings
    total = sum(plan.parameters.values())
    rows = [(name.replace("_", " "), f"{count:>15,}") for name, count in plan.parameters.items()]
    rows.append(("all", f"{total:>15,}"))
    lines = ["", "parameters", *_table(rows), "", "weights"]
    lines += _table(
        [
            (settings.dtype, _gib(weights.as_loaded)),
            ("nf4", _gib(weights.nf4)),
            ("nf4, double quantization", _gib(weights.nf4_double)),
        ]
    )
    lines += [
        f"  4 bit takes {weights.quantized / total:.1%} of the parameters: linear layers, those of vision tower and "
        "projector too.",
        f"  {weights.not_quantized:,} stay {settings.dtype}: embeddings, LM head, norms, biases, convolutions.",
    ]
    return lines


def _memory_lines(plan: RunPlan) -> list[str]:
    settings = plan.settings
    names = {
        "weights": "weights, nf4" if settings.load_in_4bit else f"weights, {settings.dtype}",
        "unpacked_layer": "largest 4-bit layer, unpacked while it runs",
        "adapter": f"LoRA adapter, {plan.trained:,} parameters",
        "gradients": "gradients",
        "gradient_buckets": "gradients once more, in DDP's buckets",
        "optimizer": f"optimizer, {settings.optim}",
        "activations": "activations, " + ("layer inputs" if settings.gradient_checkpointing else "all"),
        "inputs": "pixels of all micro-batches of a step",
        "autocast_copies": "16-bit copies of trained weights",
        "largest_stage": "largest stage: a layer's backward, LM head, or a first pass",
    }
    sizes = {**plan.fixed, **plan.batch}
    rows = [(names[name], _gib(size)) for name, size in sizes.items() if size]
    rows.append(("head alignment", _gib(sum(plan.alignment.values()))))
    rows.append(("peak", _gib(plan.total)))
    image, text = plan.image, settings.text_tokens
    lines = [
        "",
        f"memory of a step, micro-batch of {settings.per_device_train_batch_size}, {image.tokens} image tokens "
        f"({image.vision_tokens} in the vision tower) + {text} text tokens a sample",
        *_table(rows),
    ]
    if plan.pageable:
        lines.append(f"  {_gib(plan.pageable).strip()} of the optimizer can be paged out to the host.")
    lines.append("  TRL's fused LM head holds logits in tiles, never all of them.")
    return lines


def _alignment_lines(plan: RunPlan) -> list[str]:
    settings = plan.settings
    if not settings.alignment_weight:
        return ["", "head alignment: none, `alignment_weight` is 0; batch and accumulation are free"]
    rows = [(name.replace("_", " "), _gib(size)) for name, size in plan.alignment.items() if size]
    heads = f"{settings.num_heads} {settings.alignment_granularity}s"
    lines = ["", f"head alignment, {heads}, pool of {plan.pool}", *_table(rows)]
    if plan.features.host:
        lines.append(f"  {_gib(plan.features.host).strip()} of image features wait in main memory.")
    if any(plan.first_pass.values()):
        lines.append("  the first pass adds to the operations of a step:")
        lines += [f"    {share:6.1%}  {name}" for name, share in plan.first_pass.items()]
    else:
        lines.append("  no first pass: one micro-batch a step, or `contrast_scope=micro_batch`.")
    return lines


def _pool_lines(settings: RunSettings) -> list[str]:
    batches, steps = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32)
    least = settings.least_pool
    made_of = "batch x accumulation x processes" if settings.contrast_scope == "step" else "batch x processes"
    needed = f"at least {least} samples"
    if settings.alignment_objective == "contrastive" and least == settings.num_neighbors + 2:
        needed = f"more than k + 1 = {least - 1} samples"
    lines = ["", f"pools: {made_of} + queue; `-` is refused, since {needed} are needed"]
    lines.append("  " + f"{'accumulation':>12}" + "".join(f"{step:>7}" for step in steps))
    for batch in batches:
        pools = [settings.pool_size(batch, step) for step in steps]
        cells = "".join(f"{pool if pool >= least else '-':>7}" for pool in pools)
        lines.append("  " + f"{f'batch {batch}':>12}" + cells)
    if settings.pool_size() < least:
        lines.append(f"  These settings have a pool of {settings.pool_size()}: training would refuse them.")
    return lines


def _gpu_lines(plan: RunPlan, gpu: float) -> list[str]:
    from ..planning.plan import GIB, usable_bytes

    usable, largest = usable_bytes(gpu), plan.largest_batch(gpu)
    fits = "fits" if plan.total <= usable else "does not fit"
    lines = ["", f"GPU of {gpu:g} GiB, {usable / GIB:.2f} of them counted on: {fits}"]
    if largest:
        lines.append(f"  largest micro-batch by this estimate: {largest}")
    else:
        lines.append("  no micro-batch fits. Try --load-in-4bit, --double-quant, an 8-bit --optim, smaller images.")
    return lines


def main(arguments: Sequence[str]) -> None:
    args = _parser().parse_args(arguments)
    from ..planning.model import read_config
    from ..planning.plan import plan_run
    from ..planning.settings import RunSettings
    from .paths import local_path

    name, revision, values = _settings(args)
    name = local_path(name)
    config = read_config(name, revision)
    if values.get("dtype") == "auto":
        values["dtype"] = _stored_dtype(config)
    settings = RunSettings(**values)
    plan = plan_run(config, settings)
    if args.json:
        content = {"model": name, **plan.to_dict()}
        if args.gpu_memory:
            content["largest_micro_batch"] = plan.largest_batch(args.gpu_memory)
        print(json.dumps(content, indent=2))
        return
    lines = [f"{name} ({plan.model_type})", "An estimate from the model's configuration; nothing was run or measured."]
    lines += _model_lines(plan) + _memory_lines(plan) + _alignment_lines(plan)
    if settings.alignment_weight:
        lines += _pool_lines(settings)
    if args.gpu_memory:
        lines += _gpu_lines(plan, args.gpu_memory)
    print("\n".join(lines))
