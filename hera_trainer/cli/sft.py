"""`hera sft`."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from ..config import HeRAConfig
from ..runs.checkpoints import checkpoints_in, is_complete
from .paths import local_path

_NEWEST = "newest"
# Variables that libraries read when they are imported: places of caches, and whether there is a network.
_READ_AT_IMPORT = re.compile(r"HF_HOME|HF_ENDPOINT|XDG_CACHE_HOME|(HF|TRANSFORMERS)_\w*(CACHE|OFFLINE)")

_EXAMPLES = """\
examples:
  QLoRA of a 3B model, on one GPU:
    hera sft --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset_name trl-lib/llava-instruct-mix \\
        --use_peft --lora_target_modules all-linear --load_in_4bit --dtype bfloat16 \\
        --per_device_train_batch_size 8 --gradient_accumulation_steps 4 --learning_rate 2e-4 --output_dir run

  The same from a file; what the command line says overrides the file:
    hera sft --config run.yaml --learning_rate 1e-4

  Own data with image paths in it, a part held out, heads that are known already:
    hera sft --config run.yaml --dataset_name data/train.jsonl --test_split_size 0.05 --eval_strategy epoch \\
        --head_ranking_path heads.json

  Two processes; after a crash, the same command goes on where it was:
    accelerate launch --num_processes 2 -m hera_trainer sft --config run.yaml --resume_from_checkpoint

  A file:
    model_name_or_path: Qwen/Qwen2.5-VL-3B-Instruct
    datasets:
      - path: data/train.jsonl
        fraction: 0.7
      - path: trl-lib/llava-instruct-mix
        fraction: 0.3
    use_peft: true
    lora_target_modules: all-linear
    alignment_weight: 0.01
    output_dir: run
"""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, and the examples keep their lines."""


class _Parser(TrlParser):
    """TRL's parser, with messages of one line, and help in sections that begins with what is of this package."""

    def __init__(self) -> None:
        dataclass_types: Any = (ScriptArguments, HeRAConfig, ModelConfig, DatasetMixtureConfig)
        super().__init__(
            dataclass_types,
            prog="hera sft",
            usage="hera sft [-h] [--config FILE.yaml] [--option value ...]",
            description="Fine-tunes a vision-language model with HeRATrainer: SFTTrainer, with a few attention heads "
            "aligned to a frozen vision teacher.\nEvery option below can also stand in a YAML file (--config). Options "
            "that are dictionaries are mappings there, and JSON here: --model_init_kwargs '{\"use_cache\": false}'.",
            epilog=_EXAMPLES,
            formatter_class=_HelpFormatter,
        )
        for action in self._actions:
            if action.dest == "resume_from_checkpoint":
                action.nargs, action.const = "?", _NEWEST
                action.help = (
                    "Folder of a checkpoint to go on from. Without a value: the newest complete one in `output_dir`, "
                    "or from the start if there is none."
                )
            elif action.dest == "test_split_size":
                action.help = (
                    "Share (or number) of the training rows to hold out for evaluation, drawn with `seed`: no image is "
                    "in both parts."
                )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (`{self.prog} --help` lists all options)\n")

    def parse_args_into_dataclasses(self, args: Any = None, *others: Any, **kwargs: Any) -> tuple[Any, ...]:
        options, unknown = self.parse_known_args(args)  # before the settings are checked against the hardware
        if unknown:
            close = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1, cutoff=0.75)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        check(options)
        return super().parse_args_into_dataclasses(args, *others, **kwargs)

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        known: set[str] = set()
        inherited = {*SFTConfig.__dataclass_fields__, *TrainingArguments.__dataclass_fields__}
        for title, names in (
            ("data", ScriptArguments.__dataclass_fields__),
            ("mixture of data sets", DatasetMixtureConfig.__dataclass_fields__),
            ("model, quantization and LoRA", ModelConfig.__dataclass_fields__),
            ("head-wise representation alignment", set(HeRAConfig.__dataclass_fields__) - inherited),
            ("supervised fine-tuning (SFTTrainer)", inherited - set(TrainingArguments.__dataclass_fields__)),
            ("training (Trainer)", inherited),
        ):
            formatter.start_section(title)
            formatter.add_arguments([a for a in self._actions if a.dest in names and a.dest not in known])
            formatter.end_section()
            known.update(names)
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        options = {action.dest: action for action in self._actions}
        for name, value in values.items():
            if name not in options:
                close = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
                hint = f"; did you mean `{close[0]}`?" if close else ". `hera sft --help` lists all options."
                raise ValueError(f"The file has the key `{name}`, which is no option{hint}")
            if isinstance(value, str) and options[name].nargs in ("+", "*"):
                values[name] = value.split()  # as on the command line
            elif value is False and name in ("eval_strategy", "save_strategy", "logging_strategy"):
                values[name] = "no"  # which YAML reads as false
            elif name == "resume_from_checkpoint" and isinstance(value, bool):
                values[name] = _NEWEST if value else None
        return super().set_defaults_with_config(**values)


def parse(arguments: Sequence[str]) -> tuple[ScriptArguments, HeRAConfig, ModelConfig, DatasetMixtureConfig]:
    """The options of the command line and of the file that `--config` names.

    Raises:
        `ValueError`: If a value or the file can't be used.
        `SystemExit`: With 2, after a message, for an option that does not exist or has the wrong type.
    """
    parser = _Parser()
    words = [word for argument in arguments for word in _split_config(argument)]
    if words[-1:] == ["--config"]:
        parser.error("argument --config: expected one argument")
    try:
        _check_environment(words)
        script_args, training_args, model_args, mixture = parser.parse_args_and_config(words)
    except yaml.YAMLError as error:
        raise ValueError(f"{words[words.index('--config') + 1]!r} is no YAML file: {error}") from error
    except TypeError as error:  # a key of `datasets` that does not exist, a list where a number belongs
        raise ValueError(f"An option has a value of the wrong kind: {error}.") from error
    return script_args, training_args, model_args, mixture


def _check_environment(words: Sequence[str]) -> None:
    """Refuses variables in `env` of the file that the libraries have read already, when they were imported."""
    if "--config" not in words:
        return
    content = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
    named = content.get("env") if isinstance(content, dict) else None
    for name, value in (named if isinstance(named, dict) else {}).items():
        values = {str(value).lower(), os.environ.get(str(name), "").lower()}
        is_set_alike = len(values) == 1 or values <= {"1", "true", "yes", "on"}
        if _READ_AT_IMPORT.fullmatch(str(name)) and not is_set_alike:
            raise ValueError(f"`env` sets {name} too late: it is read when hera starts. Set it in the shell.")


def _split_config(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def check(options: argparse.Namespace) -> None:
    """Refuses what can be known to fail before anything is loaded.

    Args:
        options (`argparse.Namespace`): All options, by name.

    Raises:
        `ValueError`: Naming the option.
    """
    if options.model_name_or_path is None:
        raise ValueError("Name the model: --model_name_or_path, a name on the Hub or a folder.")
    if bool(options.dataset_name) == bool(options.datasets):
        raise ValueError(
            "Name the data once: --dataset_name (a name on the Hub, a folder or a file), or `datasets` in the file of "
            "--config."
        )
    local_path(options.model_name_or_path)  # says so if there is no such folder
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(options, name) and not options.use_peft:
            raise ValueError(f"Quantized weights can't be trained: --{name} needs an adapter, --use_peft.")
    reporters = [options.report_to] if isinstance(options.report_to, str) else options.report_to or []
    for name in reporters:  # the Trainer says so only after the model was loaded
        if name in ("tensorboard", "trackio", "wandb") and name not in get_available_reporting_integrations():
            raise ValueError(f"--report_to {name} needs a library: `pip install {name}`, or leave it out.")


def load_data(
    script_args: ScriptArguments, mixture: DatasetMixtureConfig, evaluated: bool, seed: int, text_field: str = "text"
) -> tuple[Any, Any]:
    """The training data, and that to evaluate on (`None` unless `evaluated`).

    Raises:
        `OSError`, `ValueError`: If the data can't be found or read, or nothing is there to evaluate on.
    """
    from ..data.held_out import split_by_image
    from .rows import open_rows

    name = script_args.dataset_name or ""
    if mixture.datasets:
        train, streaming = _mixed(mixture, text_field), mixture.streaming
    else:
        streaming = script_args.dataset_streaming
        options: dict[str, Any] = {"config": script_args.dataset_config, "streaming": streaming}
        train = open_rows(name, split=script_args.dataset_train_split, **options)
    if mixture.test_split_size is not None:
        if streaming:
            raise ValueError("Nothing can be held out of a stream: leave --test_split_size, or do not stream.")
        train, held_out = split_by_image(train, mixture.test_split_size, seed)
        return train, held_out if evaluated else None
    if not evaluated:
        return train, None
    cure = "Hold some training rows out with --test_split_size 0.05, or leave --eval_strategy and --monitor_steps."
    if mixture.datasets:
        raise ValueError(f"`datasets` has no part to evaluate on. {cure}")
    try:
        return train, open_rows(name, split=script_args.dataset_test_split, **options)
    except ValueError as error:
        if "split" not in str(error):
            raise
        raise ValueError(
            f"There is nothing to evaluate on: {error} Name another with --dataset_test_split. {cure}"
        ) from error


def _mixed(mixture: DatasetMixtureConfig, text_field: str) -> Any:
    """All data sets of a mixture in one. Like [`~trl.get_dataset`], but of all that [`open_rows`] opens."""
    import datasets

    from .rows import open_rows

    parts: list[Any] = []
    for source in mixture.datasets:
        more = {key: value for key in ("data_dir", "data_files") if (value := getattr(source, key)) is not None}
        rows = open_rows(source.path, config=source.name, split=source.split, streaming=mixture.streaming, **more)
        parts.append(rows if source.columns is None else rows.select_columns(source.columns))
    _check_forms([source.path for source in mixture.datasets], parts, text_field)
    fractions = [source.fraction for source in mixture.datasets if source.fraction is not None]
    if fractions:
        if len(fractions) < len(parts) or mixture.streaming or min(fractions) < 0 or not sum(fractions):
            raise ValueError(
                "`fraction` must be set, and not negative, for all of `datasets` or none; not for streams."
            )
        shares = [fraction / sum(fractions) for fraction in fractions]
        # The most rows of which no part has to be repeated.
        total = min(len(rows) / share for rows, share in zip(parts, shares, strict=True) if share)
        parts = [rows.select(range(round(share * total))) for rows, share in zip(parts, shares, strict=True)]
    if len(parts) == 1:
        return parts[0]
    mixed = datasets.concatenate_datasets(parts)
    sources = [part.info.download_checksums or {} for part in parts]  # where they come from, which is lost otherwise
    mixed.info.download_checksums = {name: value for source in sources for name, value in source.items()}
    return mixed


def _check_forms(names: Sequence[str], parts: Sequence[Any], text_field: str) -> None:
    """Refuses data sets that keep what is trained on in other columns: in one table, rows of each would have none."""
    from ..data.stream_start import column_names
    from ..heads.text import TextColumns

    columns = TextColumns(text_field)
    # Most streams know their columns, and need not be opened for them.
    known = [rows.column_names or column_names(rows, name) for name, rows in zip(names, parts, strict=True)]
    forms = [columns.trained(found) for found in known]
    if len(set(filter(None, forms))) > 1:
        listed = ", ".join(f"{name} `{'` and `'.join(form)}`" for name, form in zip(names, forms, strict=True) if form)
        raise ValueError(
            f"`datasets` keep their texts in different columns ({listed}): rows of the mixture would have none. "
            "Bring them to one form, or choose columns that all have with `columns`."
        )


def _checkpoint(resume_from: str | None, output_dir: str | None, is_aligned: bool) -> str | bool | None:
    """What `train(resume_from_checkpoint=...)` is given. A run that was killed within its first checkpoint begins
    anew."""
    if resume_from is None or resume_from.lower() in ("false", "no"):
        return None
    if resume_from.lower() not in (_NEWEST, "true", "yes"):
        return os.path.expanduser(resume_from)
    found = checkpoints_in(output_dir or ".")
    # Without alignment, checkpoints are `SFTTrainer`'s, which marks none.
    if found and is_aligned and not any(map(is_complete, found)):
        names = ", ".join(sorted(path.name for path in found))
        message = f"Training begins anew: the writing of {names} was interrupted, and there is no other."
        warnings.warn(message, stacklevel=2)
        return None
    return True if found else None


@contextmanager
def _ended(trainer: Any) -> Iterator[None]:
    """Closes trackers and process groups, also after an error."""
    try:
        yield
    finally:
        trainer.end()


def run(
    script_args: ScriptArguments, training_args: HeRAConfig, model_args: ModelConfig, mixture: DatasetMixtureConfig
) -> Any:
    """Trains, saves and, if asked to, pushes.

    Returns:
        [`HeRATrainer`]: The trainer, after training.
    """
    from trl import get_peft_config, get_quantization_config

    from ..heads.head import granularity_of
    from ..trainer import HeRATrainer

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "auto",
        **cast(dict[str, Any], training_args.model_init_kwargs or {}),  # no longer JSON
    }
    training_args.teacher_model_name_or_path = os.path.expanduser(training_args.teacher_model_name_or_path)
    if training_args.head_ranking_path is not None:
        training_args.head_ranking_path = os.path.expanduser(training_args.head_ranking_path)
    evaluated = training_args.eval_strategy != "no" or bool(training_args.monitor_steps)
    with training_args.main_process_first(desc="the data sets"):  # the others find them in the cache
        field = training_args.dataset_text_field
        train, held_out = load_data(script_args, mixture, evaluated, training_args.seed, field)
    from ..teacher.column import TEACHER_COLUMN

    if training_args.alignment_weight > 0 and TEACHER_COLUMN not in (train.column_names or ()):
        local_path(training_args.teacher_model_name_or_path)  # before the model is loaded
    trainer = HeRATrainer(
        model=os.path.expanduser(model_args.model_name_or_path or ""),
        args=training_args,
        train_dataset=train,
        eval_dataset=held_out,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    output_dir, is_aligned = training_args.output_dir, training_args.alignment_weight > 0
    with _ended(trainer):
        checkpoint = _checkpoint(training_args.resume_from_checkpoint, output_dir, is_aligned)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(output_dir)
        units = trainer.aligned_heads or []
        aligned = f" Aligned {granularity_of(units)}s: {' '.join(map(str, units))}." if units else ""
        trainer.accelerator.print(f"Saved to {output_dir}.{aligned}")
        if training_args.push_to_hub:
            name = script_args.dataset_name
            public = None if name is None or os.path.exists(os.path.expanduser(name)) else name
            trainer.push_to_hub(dataset_name=public)
            trainer.accelerator.print(f"Pushed to https://huggingface.co/{trainer.hub_model_id}.")
    return trainer


def main(arguments: Sequence[str]) -> None:
    run(*parse(arguments))
