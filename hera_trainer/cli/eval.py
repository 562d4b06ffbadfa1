"""`hera eval`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..common.files import write_atomically
from .parser import Parser

if TYPE_CHECKING:
    from ..evaluation.questions import Questions

RESULTS_FILE = "results.json"
# What questions may be asked with besides their own images.
OTHER_IMAGES = ("permuted", "blank")

_LIBRARIES = ("transformers", "torch", "peft", "datasets", "evaluate")

_EPILOG = """\
examples:
  hera eval run --dataset questions.jsonl --metric exact_match
  hera eval Qwen/Qwen2.5-VL-3B-Instruct --dataset pope.jsonl --answer-column label --metric pope --dtype bfloat16
  hera eval run --dataset coco.jsonl --answer-column image_id --metric chair \\
      --metric-arg 'annotations=["instances_val2014.json", "captions_val2014.json"]' --max-new-tokens 512
  hera eval run --dataset questions.jsonl --metric exact_match --images right permuted      does the model look?
  hera eval --predictions eval/predictions.jsonl --metric exact_match vqa_accuracy      scores again, without a model
  hera eval run --export lmms-eval --output benchmarks > benchmarks.sh                  commands for public benchmarks

MODEL is a name on the Hub, or a folder of a full model, of a PEFT adapter or of a merged one. A run that was stopped
goes on where it was when it is started again. Under `accelerate launch`, the processes share the questions.
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hera eval",
        description="Asks a model the questions of a data set, greedily and in batches, saves its answers as they "
        "come, and scores them.",
        epilog=_EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="model or PEFT adapter")
    parser.add_argument(
        "--metric",
        nargs="+",
        default=None,
        help="exact_match, vqa_accuracy, pope, chair, amber, hallusionbench, or what `evaluate.load` takes",
    )
    parser.add_argument(
        "--metric-arg",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of the metric, such as annotations=PATH; of several metrics METRIC.KEY=VALUE. Values are JSON, "
        "or text",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        choices=("right", *OTHER_IMAGES),
        default=["right"],
        help="ask also with the images of other questions, or with grey ones; shows what the right ones gain [right]",
    )
    parser.add_argument("--output", default=None, help="folder of predictions and results [eval]")
    parser.add_argument(
        "--restart", action="store_true", help="begin anew; old predictions are kept under another name"
    )
    parser.add_argument("--predictions", default=None, metavar="FILE", help="score these predictions, without a model")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset", default=None, help="name on the Hub, folder, or .json, .jsonl, .parquet or .csv file"
    )
    data.add_argument("--dataset-config", default=None, help="configuration (subset) of the data set")
    data.add_argument("--split", default=None, help="split, or a part such as test[:10%%]; files need none")
    data.add_argument("--limit", type=int, default=None, help="only the first rows")
    data.add_argument("--prompt-column", default=None, help="[messages, prompt, question, query or text]")
    data.add_argument(
        "--answer-column",
        default=None,
        help="what is right; several with commas for a dictionary [answer, answers, label, completion or messages]",
    )
    data.add_argument("--image-column", nargs="+", default=None, help="columns of images [image or images]")
    data.add_argument("--system", default=None, help="system turn before each question")
    data.add_argument("--suffix", default="", help=r"text behind each question; \n is a line break")
    model = parser.add_argument_group("model")
    model.add_argument("--revision", default=None, help="branch, tag or commit of MODEL")
    model.add_argument("--base-model", default=None, help="base model of an adapter, if not the one that it names")
    model.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="[auto]")
    model.add_argument(
        "--autocast",
        choices=("bfloat16", "float16"),
        default=None,
        help="compute in this type, as mixed precision trains",
    )
    model.add_argument("--load-in-4bit", action="store_true", help="quantize the model to 4 bit (NF4)")
    model.add_argument("--chat-template", default=None, metavar="FILE", help="Jinja template instead of the model's")
    model.add_argument("--batch-size", type=int, default=8, help="questions answered together [%(default)s]")
    model.add_argument("--max-new-tokens", type=int, default=64, help="length of an answer [%(default)s]")
    export = parser.add_argument_group("public benchmarks")
    export.add_argument(
        "--export", choices=("lmms-eval", "vlmevalkit"), default=None, help="print commands, run nothing"
    )
    export.add_argument(
        "--benchmarks",
        nargs="+",
        default=None,
        help="names or groups, such as vision mme [all but those of the group More]",
    )
    export.add_argument("--model-type", default=None, help="model type, such as qwen3_vl, where MODEL can't be read")
    return parser


def main(arguments: Sequence[str]) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.export is not None:
        if args.model is None:
            parser.error("--export needs MODEL")
        _check_heeded(parser, args, _EXPORTED, "with --export, which asks nothing itself")
        print(_export(args), end="")
        return
    if args.metric is None:
        parser.error("--metric is needed, such as exact_match")
    if args.predictions is None and (args.model is None or args.dataset is None):
        parser.error("MODEL and --dataset are needed, or --predictions")
    if args.predictions is not None and (args.model is not None or args.dataset is not None):
        parser.error("--predictions scores what it names: leave MODEL and --dataset out")
    if args.predictions is not None:
        _check_heeded(parser, args, _SCORED, "with --predictions, which asks nothing again")
    for name in ("batch_size", "max_new_tokens", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    from ..evaluation.answer_scores import check_metrics

    metric_arguments = _metric_arguments(args.metric_arg, args.metric)
    check_metrics(args.metric, metric_arguments)
    if args.predictions is not None:
        _score_file(args, metric_arguments)
    else:
        _evaluate(args, metric_arguments)


# What has a meaning where commands are written, and where answers that are there are scored.
_EXPORTED = ("model", "export", "benchmarks", "model_type", "output", "revision", "base_model", "dtype")
_SCORED = ("predictions", "metric", "metric_arg", "output", "limit")


def _check_heeded(parser: argparse.ArgumentParser, args: argparse.Namespace, heeded: Sequence[str], where: str) -> None:
    """Refuses options that would have no effect."""
    for name, value in vars(args).items():
        if name not in heeded and value != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no effect {where}: leave it out")


def _metric_arguments(given: Sequence[str], metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        key, equals, value = text.partition("=")
        metric, dot, name = key.rpartition(".")
        if not equals or not name or (dot and not metric):
            raise ValueError(f"`--metric-arg` takes KEY=VALUE, got {text!r}.")
        if not dot and len(metrics) > 1:
            raise ValueError(f"Say which metric the argument {key!r} is for: `--metric-arg {metrics[0]}.{text}`.")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        found.setdefault(metric or metrics[0], {})[name] = parsed
    return found


# --- Answers and scores ----------------------------------------------------------------------------------------------


def _evaluate(args: argparse.Namespace, metric_arguments: dict[str, dict[str, Any]]) -> None:
    import torch

    from ..common.processes import Team
    from ..evaluation.answer_scores import check_references
    from ..evaluation.generation import PREDICTIONS_FILE, SETTINGS_FILE, predict
    from ..evaluation.other_images import BlankQuestions, PermutedQuestions

    start = time.perf_counter()
    dataset, split = (args.dataset, args.split) if args.split else _without_splits(args.dataset)
    questions = _questions(args, dataset, split)
    team = Team(distributed=True)
    with team.together():
        if team.is_main:
            check_references(args.metric, questions.references(), metric_arguments)
    model, processor = _model(args)
    folder = Path(args.output or "eval")

    def entries_of(asked: Questions, part: Path, **settings: Any) -> list[dict[str, Any]]:
        return predict(
            model,
            processor,
            asked,
            part,
            settings={"dtype": args.dtype, "load_in_4bit": args.load_in_4bit, **settings},
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            autocast_dtype=None if args.autocast is None else getattr(torch, args.autocast),
            restart=args.restart,
        )

    entries = entries_of(questions, folder)
    others = {}
    for name in (name for name in OTHER_IMAGES if name in args.images):
        asked = PermutedQuestions(questions) if name == "permuted" else BlankQuestions(questions)
        others[name] = entries_of(asked, folder / name, images=name)
    if not team.is_main:
        return
    metrics = _scores(args.metric, entries, metric_arguments)
    results = {
        "metrics": metrics,
        "other_images": {
            name: _with_gain(metrics, entries, answers, _scores(args.metric, answers, metric_arguments))
            for name, answers in others.items()
        },
        "rows": len(entries),
        "model": args.model,
        "revision": args.revision,
        "dataset": dataset,
        "dataset_config": args.dataset_config,
        "split": split,
        "system": args.system,
        "suffix": args.suffix,
        "settings": json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")),
        "batch_size": args.batch_size,
        "seconds": round(time.perf_counter() - start, 1),
    }
    _report(results, metric_arguments, folder)
    print(f"\nWritten to {folder}: {PREDICTIONS_FILE}, {RESULTS_FILE}")


def _questions(args: argparse.Namespace, dataset: str, split: str) -> Questions:
    from ..evaluation.answer_scores import REFERENCE_COLUMNS
    from ..evaluation.questions import Questions
    from .rows import IMAGE_COLUMNS, load_rows

    rows = load_rows(
        dataset,
        config=args.dataset_config,
        split=split,
        limit=args.limit,
        image_columns=args.image_column or IMAGE_COLUMNS,
    )
    known = {REFERENCE_COLUMNS.get(metric) for metric in args.metric}
    if args.answer_column is None and len(known) > 1:
        raise ValueError(
            f"The metrics {', '.join(args.metric)} compare with different columns. Run them apart, each with an "
            "`--output` of its own, or name a column that all of them understand with `--answer-column`."
        )
    answer_column = args.answer_column or known.pop()
    suffix = args.suffix.replace("\\n", "\n")
    questions = Questions(rows, args.prompt_column, answer_column, args.image_column, args.system, suffix)
    if not questions.answer_columns:
        raise ValueError(
            f"The data has no right answers: none of its columns {', '.join(rows.column_names)} is known to hold them. "
            "Name the column with `--answer-column`."
        )
    if unseen := questions.unseen_images():
        raise ValueError(
            f"No question comes with an image. If {', '.join(unseen)} holds them, name the column with "
            "`--image-column`; if the questions are to be asked without, drop it."
        )
    return questions


def _model(args: argparse.Namespace) -> tuple[Any, Any]:
    from accelerate import PartialState

    from ..evaluation.generation import check_template
    from .loading import load_model

    state = PartialState()
    model, processor = load_model(
        args.model,
        revision=args.revision,
        dtype=args.dtype,
        load_in_4bit=args.load_in_4bit,
        device=state.device if state.num_processes > 1 else None,
        base_model=args.base_model,
    )
    if args.chat_template is not None:
        processor.chat_template = Path(args.chat_template).read_text(encoding="utf-8")
    check_template(processor)
    return model, processor


def _without_splits(dataset: str) -> tuple[str, str]:
    """Data without splits, such as the one data file of a folder, and what its rows are called as a split. Of data with
    splits nobody should score the training part by mistake."""
    from .paths import data_files, local_path

    path = Path(local_path(dataset))
    if path.is_file() or (path.is_dir() and (path / "state.json").is_file()):
        return dataset, "train"
    files = data_files(path) if path.is_dir() else []
    if len(files) == 1 and files[0].stem != "metadata":  # which names the images of a folder of images
        return str(files[0]), "train"
    named = f", or name one of its files: {', '.join(f'`--dataset {file}`' for file in files)}" if files else ""
    raise ValueError(f"Say which split of {dataset!r} to evaluate on, such as `--split test`{named}.")


def _score_file(args: argparse.Namespace, metric_arguments: dict[str, dict[str, Any]]) -> None:
    from ..evaluation.generation import read_predictions

    entries = read_predictions(args.predictions)[: args.limit]
    results = {
        "metrics": _scores(args.metric, entries, metric_arguments),
        "rows": len(entries),
        "predictions": args.predictions,
    }
    _report(results, metric_arguments, None if args.output is None else Path(args.output))
    if args.output is not None:
        print(f"\nWritten to {args.output}: {RESULTS_FILE}")


def _scores(
    metrics: Sequence[str], entries: Sequence[dict[str, Any]], arguments: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    from ..evaluation.answer_scores import score

    predictions = [entry["prediction"] for entry in entries]
    return score(metrics, predictions, [entry.get("reference") for entry in entries], arguments)


def _with_gain(
    right: dict[str, dict[str, Any]],
    entries: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
    scores: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Scores with other images, what the right ones gain, and how many questions had no others to be asked with."""
    gains = {
        metric: {name: right[metric][name] - value for name, value in values.items() if isinstance(value, (int, float))}
        for metric, values in scores.items()
    }
    same = sum(entry["digest"] == other["digest"] for entry, other in zip(entries, answers, strict=True))
    return {"metrics": scores, "image_gain": gains, "asked_as_they_are": same}


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _report(results: dict[str, Any], metric_arguments: dict[str, dict[str, Any]], folder: Path | None) -> None:
    """Prints the scores, and writes them with what they depend on."""
    others = results.get("other_images") or {}
    lines = [["metric", "score", "right", *(word for name in others for word in (name, "gain"))]] if others else []
    for metric, scores in results["metrics"].items():
        for name, value in scores.items():
            line = [metric, name, _shown(value)]
            for other in others.values():
                gain = other["image_gain"][metric].get(name)
                line += [_shown(other["metrics"][metric].get(name)), "" if gain is None else f"{gain:+.4f}"]
            lines.append(line)
    widths = [max(len(line[column]) for line in lines) + 2 for column in range(len(lines[0]))]
    print(f"\n{results['rows']} answers")
    for line in lines:
        print("".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
    for name, other in others.items():
        if other["asked_as_they_are"]:
            print(f"{other['asked_as_they_are']} questions have no {name} images and were asked as they are.")
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"hera_trainer": __version__, **{name: version(name) for name in _LIBRARIES}}
    from ..common.plain import as_plain

    content = {**results, "metric_arguments": metric_arguments, "versions": versions}
    text = json.dumps(content, indent=1, default=as_plain) + "\n"  # metrics of others return what they like
    write_atomically(folder / RESULTS_FILE, lambda path: path.write_text(text, encoding="utf-8"))


# --- Public benchmarks -----------------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> str:
    from ..evaluation.benchmarks import choose_benchmarks, export_commands
    from .loading import adapter_folder, base_of, model_config
    from .paths import local_path

    benchmarks = choose_benchmarks(args.benchmarks)
    path = local_path(args.model)
    try:
        # What is named a type and is not here is taken for a full model.
        adapter = adapter_folder(path, args.revision) if args.model_type is None or Path(path).is_dir() else None
        if args.model_type is None:
            base, revision = (path, args.revision) if adapter is None else base_of(adapter, args.base_model)
            args.model_type = model_config(base, revision).model_type
    except (OSError, ValueError) as error:
        raise ValueError(
            f"It can't be read what type of model {args.model!r} is ({error}). Name its type, such as "
            "`--model-type qwen3_vl`; a name on the Hub is then taken for a full model."
        ) from error
    merged, chosen = None, {"revision": args.revision, "base_model": args.base_model}
    options = [word for name, value in chosen.items() if value for word in (f"--{name.replace('_', '-')}", value)]
    options += [] if args.dtype == "auto" else ["--dtype", args.dtype]
    if adapter is not None:  # beside a folder; of a name on the Hub, in the current folder
        merged = f"{path.rstrip('/') if Path(path).is_dir() else path.replace('/', '-')}-merged"
    elif options:
        raise ValueError(
            f"The harness loads the full model {args.model!r} itself, without {options[0]}. Leave it out; to evaluate "
            "another revision or type of it, save that in a folder and name the folder."
        )
    output = args.output or "benchmarks"
    return export_commands(args.export, args.model, args.model_type, benchmarks, merged, output, options)
