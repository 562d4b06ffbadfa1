"""Greedy answers of a model to many questions, saved as they come, and gone on with where a run stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from torch import nn
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from ..common.digest import weights_digest
from ..common.files import rename_with_number, write_atomically
from ..common.processes import Team
from ..heads.modes import evaluating
from .questions import Questions

PREDICTIONS_FILE = "predictions.jsonl"
SETTINGS_FILE = "eval_settings.json"


# --- Answers of one batch --------------------------------------------------------------------------------------------


def answer(
    model: nn.Module,
    processor: Any,
    conversations: Sequence[list[dict[str, Any]]],
    max_new_tokens: int = 64,
    autocast_dtype: torch.dtype | None = None,
) -> list[str]:
    """Answers conversations greedily, padded on the left to one length.

    Args:
        model (`nn.Module`): A model that generates, or a PEFT model of one. Its modes are left as they were.
        processor: Its processor, or the tokenizer of a language model, with a chat template.
        conversations (sequence of lists of messages):
            What is asked, each a list of messages whose images stand in their content. Either all of them or none
            should have images: some processors take no batch of both.
        max_new_tokens (`int`, *optional*, defaults to `64`): Length at which an answer is cut.
        autocast_dtype (`torch.dtype`, *optional*): Autocast to this dtype; the model's own arithmetic by default.

    Returns:
        `list[str]`: An answer for each, without special tokens and surrounding space.

    Raises:
        `ValueError`: If there is no chat template, no token to pad with, or images for a model that takes none.
    """
    check_template(processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, dtype=autocast_dtype) if autocast_dtype is not None else nullcontext()
    with _padded_left(tokenizer), evaluating(model), autocast:
        inputs = _inputs(processor, conversations).to(device)
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=False,
            **({"tokenizer": tokenizer} if model.generation_config.stop_strings else {}),
            # What many models say of sampling is of no use here, and would be warned about.
            **dict.fromkeys(("temperature", "top_p", "top_k"), None),
        )
        # What a decoder says of an encoder's prompt begins with its start token alone.
        prompt_length = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        new_tokens = tokens[:, prompt_length:]
        return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def _inputs(processor: Any, conversations: Sequence[list[dict[str, Any]]]) -> Any:
    padding: dict[str, Any] = {"padding": True}
    if isinstance(processor, ProcessorMixin):
        padding = {"processor_kwargs": {**padding, "padding_side": "left"}}
    else:
        conversations = [_text_only(conversation) for conversation in conversations]
    # The beginning-of-text token comes from the template, else from the tokenizer, as transformers has it.
    return processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **padding,
    )


def _text_only(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation for a language model, whose template knows no typed parts."""
    for turn in conversation:
        if any(part["type"] != "text" for part in turn["content"]):
            raise ValueError("The data has images, but the model is a language model without vision.")
    return [{**turn, "content": "".join(part["text"] for part in turn["content"])} for turn in conversation]


def check_template(processor: Any) -> None:
    """Raises a `ValueError` if a processor has no chat template to write prompts with."""
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            "The model's processor has no chat template, so it is not known how questions are put to it. Give one with "
            "`--chat-template FILE` (a Jinja template), such as the one that the model was trained with."
        )


@contextmanager
def _padded_left(tokenizer: Any) -> Iterator[None]:
    """The tokenizer pads on the left inside, with its end token if it has none for padding (which the attention mask
    hides in any case)."""
    pad_token, side = tokenizer.pad_token, tokenizer.padding_side
    if pad_token is None and tokenizer.eos_token is None:
        raise ValueError("The tokenizer has neither a padding nor an end token. Set its `pad_token` and save it again.")
    try:
        tokenizer.pad_token = pad_token or tokenizer.eos_token
        tokenizer.padding_side = "left"
        yield
    finally:
        tokenizer.pad_token, tokenizer.padding_side = pad_token, side


# --- Predictions on disk ---------------------------------------------------------------------------------------------


def read_predictions(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads saved predictions, in the order of the rows.

    A last line that a killed run wrote half is passed over.

    Args:
        path (`str` or `os.PathLike`):
            File of JSON lines, each with `prediction` and, for metrics, `reference`. Where lines have a `row`, they
            come in its order, and of several with the same one the last counts.

    Raises:
        `ValueError`: If a line is no JSON object with a text as `prediction`.
    """
    lines = Path(path).read_bytes().split(b"\n")
    # What follows the last line break was written half, or is nothing; a file of another program may lack the break.
    if lines[-1] and not _is_json(lines[-1]):
        lines.pop()
    entries: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(lines):
        if line.strip():
            entry = json.loads(line) if _is_json(line) else None
            if not isinstance(entry, dict) or not isinstance(entry.get("prediction"), str):
                raise ValueError(f"Line {number + 1} of {str(path)!r} is no JSON object with a text as `prediction`.")
            entries[entry.get("row", f"line {number}")] = entry
    found = list(entries.values())
    return sorted(found, key=lambda entry: entry["row"]) if all("row" in entry for entry in found) else found


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


class PredictionFile:
    """The predictions of a run in a folder: `predictions.jsonl`, a line a row, and beside it `eval_settings.json`, what
    they depend on. One process writes at a time.

    Args:
        folder (`str` or `os.PathLike`): The folder; it is created.
        settings (`Mapping[str, Any]`): What predictions depend on besides their row; only equal ones go together.
        restart (`bool`, *optional*, defaults to `False`):
            Begin anew. Predictions that are there are kept under another name.

    Raises:
        `ValueError`: If the predictions that are there were made with other settings, or another process is writing.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any], restart: bool = False) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / PREDICTIONS_FILE
        self._lock = FileLock(self.folder / f".{PREDICTIONS_FILE}.lock")
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(f"Another process is writing predictions to {str(folder)!r}. Wait for it.") from error
        try:
            self._prepare(json.loads(json.dumps(dict(settings))), restart)
        except BaseException:
            self._lock.release()
            raise

    def _prepare(self, settings: dict[str, Any], restart: bool) -> None:
        settings_path = self.folder / SETTINGS_FILE
        if restart and self.path.exists():
            rename_with_number(self.path)
        if self.path.exists():
            self._check(json.loads(settings_path.read_text()) if settings_path.is_file() else {}, settings)
            _drop_half_line(self.path)
        text = json.dumps(settings, indent=1) + "\n"
        write_atomically(settings_path, lambda path: path.write_text(text, encoding="utf-8"))

    def _check(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if changed:
            differences = ", ".join(f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in changed)
            raise ValueError(
                f"{str(self.path)!r} holds predictions that were made differently ({differences}). Use another "
                "`--output`, or `--restart` to begin anew (they are kept under another name)."
            )

    def done(self, questions: Questions) -> list[int]:
        """Numbers of the rows that are answered already.

        Raises:
            `ValueError`: If a row of the data set is not what it was when it was answered.
        """
        if not self.path.exists():
            return []
        rows = [entry for entry in read_predictions(self.path) if entry["row"] < len(questions)]
        for entry in rows:
            if questions.describe(entry["row"])["digest"] != entry["digest"]:
                raise ValueError(
                    f"Row {entry['row']} of the data set, or how it is asked, is not what it was when "
                    f"{str(self.path)!r} was written. Use another `--output`, or `--restart` to begin anew (the old "
                    "file is kept)."
                )
        return [entry["row"] for entry in rows]

    def append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Writes predictions to the disk, at once."""
        with self.path.open("ab") as file:
            file.write(b"".join(json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Lets other processes write."""
        self._lock.release()


def _drop_half_line(path: Path) -> None:
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


# --- All questions ---------------------------------------------------------------------------------------------------


def predict(
    model: nn.Module,
    processor: Any,
    questions: Questions,
    folder: str | os.PathLike,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    autocast_dtype: torch.dtype | None = None,
    restart: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Answers all questions greedily and saves the answers as they come.

    Called again with the same folder, it goes on where it stopped. Under a launcher of several processes all of them
    make this call; they share the batches, and the first one writes.

    Args:
        model (`nn.Module`): A model that generates.
        processor: Its processor.
        questions ([`Questions`]): What is asked.
        folder (`str` or `os.PathLike`): Folder of `predictions.jsonl`.
        settings (`Mapping[str, Any]`, *optional*):
            What the answers depend on besides the questions, the weights, the processor and `max_new_tokens`, which are
            looked at anyway.
        batch_size (`int`, *optional*, defaults to `8`): Questions answered together, in each process.
        max_new_tokens (`int`, *optional*, defaults to `64`): Length at which an answer is cut.
        autocast_dtype (`torch.dtype`, *optional*): Autocast to this dtype.
        restart (`bool`, *optional*, defaults to `False`): Begin anew.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Returns:
        `list[dict]`: Of each row `row`, `id` (where the data has one), `prompt`, `prediction`, `reference`, `digest`.

    Raises:
        `ValueError`: If the folder holds answers of another model, data set or setting.
    """
    check_template(processor)
    team, file = Team(distributed=True), None
    known = {
        "model_digest": weights_digest(model)[:16],
        "processor_digest": processor_digest(processor),
        "config_digest": config_digest(model, processor),
        "max_new_tokens": max_new_tokens,
        "autocast_dtype": str(autocast_dtype) if autocast_dtype is not None else None,
        **(settings or {}),
    }
    try:
        with team.together():
            file = PredictionFile(folder, known, restart) if team.is_main else None
            done = file.done(questions) if file is not None else []
        answered = set(gather_object(done))
        batches = _batches(questions, [row for row in range(len(questions)) if row not in answered], batch_size)
        with tqdm(total=len(questions), initial=len(answered), disable=not (progress and team.is_main)) as bar:
            for start in range(0, len(batches), team.count):
                mine = batches[start + team.index] if start + team.index < len(batches) else []
                with team.together():
                    entries = _answered(model, processor, questions, mine, max_new_tokens, autocast_dtype)
                entries = gather_object(entries)
                if file is not None:
                    file.append(entries)
                bar.update(len(entries))
        mine_read = read_predictions(file.path) if file is not None and file.path.exists() else []
    finally:
        if file is not None:
            file.close()
    return [entry for entry in gather_object(mine_read) if entry["row"] < len(questions)]


def _batches(questions: Questions, rows: list[int], batch_size: int) -> list[list[int]]:
    """Rows in batches; those with images are not mixed with those without, which some processors do not take."""
    batches = []
    groups: dict[bool, list[int]] = {True: [], False: []}
    for row in rows:
        groups[questions.has_images(row)].append(row)
    for group in groups.values():
        batches += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    return sorted(batches)


def _answered(
    model: nn.Module, processor: Any, questions: Questions, rows: list[int], max_new_tokens: int, autocast_dtype: Any
) -> list[dict[str, Any]]:
    if not rows:
        return []
    conversations = [questions.messages(row) for row in rows]
    answers = answer(model, processor, conversations, max_new_tokens, autocast_dtype)
    return [{**questions.describe(row), "prediction": text} for row, text in zip(rows, answers, strict=True)]


# What says where a configuration comes from, or how it is computed and not what.
_NOT_SAID = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "attn_implementation", "peft_version"}
_NOT_SAID |= {"padding", "truncation"}  # of a tokenizer, which each call sets
_NOT_SAID |= {"base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "_attn_implementation"}


def config_digest(model: nn.Module, processor: Any) -> str:
    """Digest of what answers depend on besides weights and templates: how the model is configured and its adapters are
    scaled, how it generates, and how its tokenizer reads."""
    adapters = getattr(model, "peft_config", None) or {}
    tokenizer = getattr(getattr(processor, "tokenizer", processor), "backend_tokenizer", None)
    generation = getattr(model, "generation_config", None)
    configs = [
        model.config,
        *([] if generation is None else [generation]),
        *(adapters[name] for name in sorted(adapters)),
    ]
    settings = [config.to_dict() for config in configs]
    settings += [] if tokenizer is None else [json.loads(tokenizer.to_str())]
    said = [{name: value for name, value in each.items() if name not in _NOT_SAID} for each in settings]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=_as_text).encode()).hexdigest()[:16]


def _as_text(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def processor_digest(processor: Any) -> str:
    """Digest of how a processor writes prompts and prepares images."""
    image_processor = getattr(processor, "image_processor", None)
    settings = [processor.chat_template, None if image_processor is None else image_processor.to_dict()]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
