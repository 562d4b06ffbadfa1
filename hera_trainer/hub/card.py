"""The model card of an aligned run: what was trained, which heads, what became of them, and how to load the result."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from torch import nn

from .. import __version__
from ..common.redaction import is_local, public_name, public_settings, public_text, shown_name
from ..heads.head import AlignedUnit, granularity_of
from ..heads.heat_map import plot_head_scores
from ..heads.ranking import HeadRanking
from ..heads.registry import unwrap_model
from ..objectives.contrastive import HeRALoss
from ..runs.record import CONTEXTS, RunRecord, public_ranking, read_if_whole, read_image_gains, read_rankings
from ..runs.record_callback import hub_names
from ..runs.report.groups import is_of_training
from ..runs.report.settings import measured_with, other_teacher
from ..runs.written_files import CARD_FILE, PLOTS_FOLDER, RUN_FILE
from .card_file import written_by_hand

if TYPE_CHECKING:
    from ..trainer import HeRATrainer

logger = get_logger(__name__)

_PAPER_POOLS = (128, 256)
# Which heat maps this process has drawn, by their files.
_DRAWN: dict[str, int] = {}
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def write_model_card(
    trainer: HeRATrainer,
    write_trl_card: Callable[[str | None, None, list[str]], None],
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    license: str | None = None,
) -> None:
    """Writes `README.md` and the heat maps that it shows into a trainer's `output_dir`.

    Args:
        trainer ([`HeRATrainer`]): The trainer.
        write_trl_card (`Callable`): `create_model_card` of TRL, whose metadata and links to trackers are taken over.
        model_name (`str`, *optional*): Name of the model.
        dataset_name (`str` or `list[str]`, *optional*): Data sets, by default those the training data was loaded from.
        tags (`str` or `list[str]`, *optional*): Further tags.
        license (`str`, *optional*): Licence, by default the one that is in the card already.
    """
    folder, objective = Path(str(trainer.args.output_dir)), trainer.criterion
    assert objective is not None
    path = folder / CARD_FILE
    kept = written_by_hand(path, license)
    adapter = trainer.model if isinstance(trainer.model, PeftModel) else None
    tags = [tags] if isinstance(tags, str) else list(tags or ())
    write_trl_card(model_name, None, tags)
    trl_card = ModelCard.load(path)
    names = [dataset_name] if isinstance(dataset_name, str) else dataset_name or hub_names(trainer.train_dataset)
    names = [shown_name(name) for name in names]
    base = shown_name(unwrap_model(trainer.model).config.name_or_path or "")
    own = {"hera", "trl", "sft", *(["peft"] if adapter is not None else [])}
    data = ModelCardData(
        base_model=base if _is_repo_id(base) and "/" in base else None,
        datasets=[name for name in names if _is_repo_id(name)] or None,
        library_name="transformers" if adapter is None else "peft",
        pipeline_tag="image-text-to-text",
        model_name=model_name,
        tags=[*sorted(own), *sorted({*(trl_card.data.tags or ()), *tags} - own)],
        **kept,
    )
    card = ModelCard.from_template(
        data,
        template_str=files(__package__).joinpath("templates/model_card.md").read_text(encoding="utf-8"),
        title=model_name or folder.absolute().name,
        adapter=None if adapter is None else _adapter(adapter),
        base=_base(base, adapter, on_hub=data.base_model is not None),
        datasets=", ".join(
            f"[{n}](https://huggingface.co/datasets/{n})" if _is_repo_id(n) else f"`{n}`" for n in names
        ),
        paper=trainer._paper,
        is_the_papers=isinstance(objective, HeRALoss),
        teaches=objective.uses_teacher,
        summary=objective.summary.replace("{unit}", trainer.args.alignment_granularity),
        control="" if trainer.args.teacher_control == "none" else trainer.args.teacher_control,
        badges=public_text("\n".join(line for line in trl_card.text.splitlines() if line.startswith("[<img"))),
        repo=trainer.hub_model_id or trainer.args.hub_model_id or folder.absolute().name,
        quantized=_quantization(trainer.model),
        settings=_table(["setting", "this run", "paper"], _settings(trainer)),
        training=_bullets(_training(trainer)),
        versions=_bullets(_versions(adapter is not None)),
        license=kept.get("license"),
        version=__version__,
        **_heads(trainer, folder),
    )
    card.text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in card.text.splitlines())) + "\n"
    card.save(path)


def _is_repo_id(name: str) -> bool:
    """Whether a string can be the name of a repository of the Hub, and is no folder here."""
    return _REPO_ID.fullmatch(name) is not None and not is_local(name) and not Path(name).is_dir()


def _adapter(model: PeftModel) -> dict[str, Any]:
    kind = _value(model.peft_config[model.active_adapter].peft_type)
    mergeable = hasattr(model.base_model, "merge_and_unload")
    # PEFT saves an adapter with a name in a folder of that name.
    place = "" if model.active_adapter == "default" else f', subfolder="{model.active_adapter}"'
    return {"name": "LoRA" if kind == "LORA" else kind, "mergeable": mergeable, "place": place}


def _base(name: str, adapter: PeftModel | None, on_hub: bool) -> dict[str, str]:
    if not on_hub:
        text = f"`{name}`, a model that is not on the Hub" if name else "a model that is not on the Hub"
        return {"text": text, "load": f'"{name or "base-model"}"', "comment": "  # the folder of the base model"}
    text, load = f"[{name}](https://huggingface.co/{name})", f'"{name}"'
    revision = None if adapter is None else adapter.peft_config[adapter.active_adapter].revision
    if revision is not None:
        text, load = f"{text} at `{revision}`", f'{load}, revision="{revision}"'
    return {"text": text, "load": load, "comment": ""}


def _quantization(model: Any) -> str | None:
    config = getattr(unwrap_model(model).config, "quantization_config", None)
    if config is None:
        return None
    values = config if isinstance(config, dict) else config.to_dict()
    if values.get("load_in_4bit"):
        return f"4 bit ({values.get('bnb_4bit_quant_type', 'bitsandbytes')})"
    return "8 bit" if values.get("load_in_8bit") else str(values.get("quant_method"))


# Heads

_UNITS = {"head": "attention head", "layer": "layer"}
_SELECTIONS = {
    "worst": "the least aligned",
    "top": "the most aligned",
    "random": "drawn at random",
    "middle": "the nearest to the middle of the depth",
}


def _heads(trainer: HeRATrainer, folder: Path) -> dict[str, Any]:
    """What the template says of the heads."""
    heads, ranking = trainer.aligned_heads, trainer.head_ranking
    args, kind = trainer.args, trainer.args.alignment_granularity
    if heads is None:
        return {"heads": [], "kind": kind, "aligned": f"a few {_UNITS[kind]}s of the language model were"}
    ranking, teacher = None if ranking is None else public_ranking(ranking), public_name(trainer.teacher_name)
    measured = read_rankings(folder).items()
    monitored = {context: steps for context, ranked in measured if (steps := _of_the_result(trainer, ranked))}
    run = RunRecord(folder, {}, [], ranking, monitored)
    changes = {context: pair for context in CONTEXTS if (pair := run.before_after(context)) is not None}
    plural, were = ("", "was") if len(heads) == 1 else ("s", "were")
    if args.aligned_heads is not None:
        chosen = f"The {kind}s below were named in the configuration."
    else:
        every = len(ranking.units(kind)) if ranking else ""
        which = _SELECTIONS[args.head_selection]
        chosen = f"Before training, {len(heads)} of all {every} {kind}s, {which}, {were} chosen."
    return {
        "kind": kind,
        "aligned": f"{len(heads)} {_UNITS[kind]}{plural} of the language model {were}",
        "heads": heads,
        "chosen": chosen,
        "scores": _scores(heads, ranking, changes),
        "score_notes": _score_notes(ranking, changes, monitored, teacher),
        "heat_maps": _heat_maps(folder, heads, ranking, changes, teacher),
    }


def _of_the_result(trainer: HeRATrainer, measured: dict[int, Any]) -> dict[int, Any]:
    """Measurements by step, without those of weights that were given up for better ones."""
    best = trainer.best_step
    return {step: value for step, value in measured.items() if best is None or step <= best}


def _scores(
    heads: Sequence[AlignedUnit], ranking: HeadRanking | None, changes: dict[str, tuple[HeadRanking, HeadRanking]]
) -> str:
    """Table of the aligned heads' scores, when they were chosen and before and after training in each context."""
    columns: list[tuple[str, HeadRanking]] = [] if ranking is None else [("when chosen", ranking)]
    for context, (before, after) in changes.items():
        columns += [(f"{CONTEXTS[context]}, before", before), (f"{CONTEXTS[context]}, after", after)]
    if not columns:
        return ", ".join(f"`{head}`" for head in heads)
    m, first, kind = len(heads), columns[0][1], granularity_of(heads)
    best = first.select("top", m, granularity=kind)  # those of the first column in all of them
    rows = [[f"`{head}`", *(_mean_score(ranked, [head]) for _, ranked in columns)] for head in heads]
    rows.append([f"mean of these {m}", *(_mean_score(ranked, heads) for _, ranked in columns)])
    rows.append([f"mean of the {m} best at first", *(_mean_score(ranked, best) for _, ranked in columns)])
    rows.append(["mean of all", *(_mean_score(ranked, ranked.units(kind)) for _, ranked in columns)])
    for name, field in (("unrelated spaces, 95th percentile", "null_p95"), ("ceiling", "ceiling")):
        values = [getattr(ranked, field) for _, ranked in columns]
        if any(value is not None for value in values):
            rows.append([name, *("-" if value is None else f"{value:.3f}" for value in values)])
    return _table([kind, *(name for name, _ in columns)], rows)


def _mean_score(ranking: HeadRanking, heads: Sequence[AlignedUnit]) -> str:
    return f"{sum(map(ranking.score, heads)) / len(heads):.3f}"


def _score_notes(
    ranking: HeadRanking | None,
    changes: dict[str, tuple[HeadRanking, HeadRanking]],
    monitored: dict[str, dict[int, HeadRanking]],
    teacher: str,
) -> str:
    notes = {} if ranking is None else {"When chosen": _measured_on(ranking, teacher)}
    for context, (before, _) in changes.items():
        steps = monitored[context]
        notes[CONTEXTS[context].capitalize()] = (
            f"{_measured_on(before, teacher)}; held out; before is step {min(steps)}, after is step {max(steps)}"
        )
    text = _bullets(notes)
    measured = [*([] if ranking is None else [ranking]), *(before for before, _ in changes.values())]
    if len({measured_with(each, teacher) for each in measured}) > 1:
        text += "\n\nScores that were measured otherwise cannot be compared: hold each against its own line above."
    if not changes and any(len(steps) > 1 for steps in monitored.values()):
        text += "\n\nBefore and after training were measured with different settings, and are not compared."
    elif not changes:
        text += (
            "\n\nWhat training changed was not measured. `AlignmentMonitorCallback` of hera-trainer measures it while "
            "training, `hera rank` of a finished model."
        )
    return text


def _measured_on(ranking: HeadRanking, teacher: str) -> str:
    settings = f"{ranking.num_samples:,} pairs, {CONTEXTS[ranking.context]}, k = {ranking.k}{ranking.spaces}"
    return "; ".join([settings + other_teacher(ranking, teacher), *ranking.references(digits=3)])


def _heat_maps(
    folder: Path,
    heads: Sequence[AlignedUnit],
    ranking: HeadRanking | None,
    changes: dict[str, tuple[HeadRanking, HeadRanking]],
    teacher: str,
) -> list[dict[str, str]]:
    """Draws the heat maps and says where they are; none without matplotlib."""
    drawn: dict[str, tuple[str, HeadRanking | dict[str, HeadRanking]]] = {}
    for context, (before, after) in changes.items():
        title = f"Agreement of attention heads with the teacher, {CONTEXTS[context]}{other_teacher(before, teacher)}"
        drawn[f"heads_{context}.png"] = (title, {"before training": before, "after training": after})
    if not drawn and ranking is not None:
        title = f"Agreement of attention heads with the teacher, before training{other_teacher(ranking, teacher)}"
        drawn["heads.png"] = (title, ranking)
    (folder / PLOTS_FOLDER).mkdir(parents=True, exist_ok=True)
    heat_maps = []
    for name, (title, rankings) in drawn.items():
        path = folder / PLOTS_FOLDER / name
        panels = rankings.values() if isinstance(rankings, dict) else [rankings]
        content = hash((tuple(heads), *(panel.scores.numpy().tobytes() for panel in panels)))
        try:
            if _DRAWN.get(str(path)) != content or not path.is_file():  # every checkpoint asks for it again
                plot_head_scores(rankings, path, heads, title, difference=isinstance(rankings, dict))
        except ImportError as error:
            logger.warning_once(f"The model card goes without its heat map. {error}")
            return []
        _DRAWN[str(path)] = content
        heat_maps.append(
            {"path": f"{PLOTS_FOLDER}/{name}", "alt": f"{title}; the aligned {granularity_of(heads)}s are outlined"}
        )
    return heat_maps


# Settings


def _settings(trainer: HeRATrainer) -> list[list[str]]:
    """Settings of the method with the paper's beside them: name, this run's (bold where it differs), the paper's."""
    args, ranking = trainer.args, trainer.head_ranking
    assert trainer.criterion is not None
    selection = "named" if args.aligned_heads is not None else args.head_selection
    m = len(args.aligned_heads) if args.aligned_heads is not None else args.num_aligned_heads
    kind = args.alignment_granularity
    paper_m = "5 (worst)" if kind == "head" else "5 heads (worst)"
    batch_size = trainer.micro_batch_size
    pool = args.pool_size(batch_size)
    parts = f"{batch_size} x {args.gradient_accumulation_steps} x {args.num_process_batches}"
    if args.contrast_scope == "micro_batch":
        parts = f"{batch_size} x {args.num_process_batches}"
    queue = f", and {args.queue_size} past ones" if args.queue_size else ""
    groups = f", in groups of {args.neighbor_group_size} neighbours" if args.neighbor_group_size else ""
    teacher = shown_name(trainer.teacher_name) or "vectors that came with the data"
    is_large_dinov2 = "dinov2" in teacher.lower() and "large" in teacher.lower() and "reg" not in teacher.lower()
    rows = [
        ("weight of the alignment loss, λ", *_weight(trainer)),
        ("neighbours, k", str(args.num_neighbors), "10", args.num_neighbors == 10),
        (f"aligned {kind}s, m", f"{m} ({selection})", paper_m, (m, selection, kind) == (5, "worst", "head")),
        *_objective_settings(trainer),
        (
            "samples compared",
            f"{pool} ({parts}{queue}{groups})",
            "batches of 256, then 128",
            pool in _PAPER_POOLS and not queue and not groups,
        ),
        ("teacher", teacher if trainer.criterion.uses_teacher else "none", "DINOv2 ViT-L", is_large_dinov2),
    ]
    if ranking is not None and args.aligned_heads is None:
        same = (ranking.num_samples, ranking.context) == (1000, "text")
        ranked = f"{ranking.num_samples:,} pairs, {CONTEXTS[ranking.context]}"
        rows.append(("heads ranked on", ranked, "1,000 pairs, text only", same))
    return [[name, value if same else f"**{value}**", paper] for name, value, paper, same in rows]


def _weight(trainer: HeRATrainer) -> tuple[str, str, bool]:
    """The weight, and where it follows a pull, the last one."""
    first = trainer.args.alignment_weight
    logged = [entry["alignment_weight"] for entry in trainer.state.log_history if "alignment_weight" in entry]
    last = f" at first, {logged[-1]:.3g} at the end" if logged else ""
    return f"{first:g}{last}", "0.01", first == 0.01 and not logged


def _objective_settings(trainer: HeRATrainer) -> list[tuple[str, str, str, bool]]:
    args = trainer.args
    rows = [("objective", args.alignment_objective, "contrastive", args.alignment_objective == "contrastive")]
    if args.target_pull is not None:
        rows.append(("pull that the weight follows", f"{args.target_pull:g}", "none: the weight is fixed", False))
    now = trainer.criterion.metrics().get("temperature") if trainer.criterion is not None else None
    if now is not None:
        learned = f"learned ({now:.4g} now)" if args.learn_temperature else "fixed"
        same = args.initial_temperature == 0.07 and args.learn_temperature
        rows.append(("temperature, τ", f"{args.initial_temperature:g}, {learned}", "0.07, learned", same))
        rows.append(("similarity of heads", args.similarity, "not centered", args.similarity != "centered_cosine"))
        rows.append(("similarity of teacher vectors", args.teacher_similarity, "not stated", True))
    return rows


def _training(trainer: HeRATrainer) -> dict[str, str]:
    """The rest of the configuration that others need to train alike."""
    args, state = trainer.args, trainer.state
    lines = {
        "Steps": f"{state.global_step} of {state.max_steps}" if state.max_steps > 0 else f"{state.global_step}",
        "Batch": f"{trainer.micro_batch_size} a device x {args.gradient_accumulation_steps} accumulated x "
        f"{args.world_size} device{'s' if args.world_size > 1 else ''}",
        "Learning rate": f"{args.learning_rate:g}, {_value(args.lr_scheduler_type)}, warm-up {args.warmup_steps:g}",
        "Optimizer": f"{_value(args.optim)}, weight decay {args.weight_decay:g}",
        "Precision": "bf16" if args.bf16 else "fp16" if args.fp16 else _dtypes(trainer.model),
        "Seed": str(args.seed),
    }
    record = read_if_whole(Path(str(args.output_dir), RUN_FILE)) or {}
    if before := {n: value for n, value in (record.get("earlier_config") or {}).items() if is_of_training(n)}:
        lines["Before it was resumed"] = ", ".join(f"`{name}` {value}" for name, value in before.items())
    if state.epoch:
        lines["Steps"] += f" ({state.epoch:.3g} epochs)"
    if trainer.best_step is not None:
        lines["Steps"] += f"; the weights are those of step {trainer.best_step}, the best in evaluation"
    losses = [entry["lm_loss"] for entry in state.log_history if "lm_loss" in entry]
    if losses:
        lines["Language-model loss"] = f"{losses[0]:.4g} when first logged, {losses[-1]:.4g} when last"
    for name, key in (("Pull at the aligned heads", "alignment_pull"), ("Spread of the heads", "alignment_spread")):
        values = [entry[key] for entry in state.log_history if key in entry]
        if values:
            lines[name] = f"{values[0]:.3g} when first logged, {values[-1]:.3g} when last"
    gains = _of_the_result(trainer, read_image_gains(str(args.output_dir)))
    if gains:
        shown = [f"{gain.gain:.3f} at step {step}" for step, gain in gains.items()]
        lines["Image gain"] = (
            f"{', '.join([shown[0], *shown[1:][-1:]])}: what the loss of {gains[max(gains)].rows:,} held-out rows "
            "rises by, in nats a token, when each gets the images of another one"
        )
    quantized = _quantization(trainer.model)
    if quantized is not None:
        lines["Base model in"] = quantized
    if isinstance(trainer.model, PeftModel):
        lines["Adapter"] = _adapter_summary(trainer.model)
    return lines


def _dtypes(model: nn.Module) -> str:
    """Data types of the weights that are trained, in which training computes where it does not cast."""
    found = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters() if weight.requires_grad}
    return ", ".join(sorted(found)) or "not known"


def _value(setting: Any) -> str:
    return str(getattr(setting, "value", setting))  # some are enumerations, some strings


def _adapter_summary(model: PeftModel) -> str:
    config = public_settings(model.peft_config[model.active_adapter].to_dict())
    parts = [_value(config["peft_type"])]
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"):
        if config.get(name):
            parts.append(f"{name} {config[name]:g}" if not isinstance(config[name], bool) else name)
    for name in ("target_modules", "modules_to_save"):
        value = config.get(name)
        if value:
            listed = [f"`{value}`"] if isinstance(value, str) else [f"`{item}`" for item in sorted(value)]
            more = f" and {len(listed) - 12} more" if len(listed) > 12 else ""
            parts.append(f"{name} {', '.join(listed[:12])}{more}")
    return ", ".join(parts)


def _versions(with_peft: bool) -> dict[str, str]:
    names = {"TRL": "trl", "PEFT": "peft", "Transformers": "transformers", "PyTorch": "torch"}
    names |= {"Datasets": "datasets", "Tokenizers": "tokenizers"}
    found = {title: version(name) for title, name in names.items() if with_peft or name != "peft"}
    return {"hera-trainer": __version__, **found}


# Markdown


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _bullets(lines: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())
