"""Which files of a run go to the Hub: the result and how it came about, nothing of the machine that trained it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath
from typing import Any

from transformers.trainer import TRAINING_ARGS_NAME

from .alignment import STATE_FILE
from .redaction import holds_secret, public_name
from .run_record import MONITOR_FOLDER

CARD_FILE = "README.md"
PLOTS_FOLDER = "hera"

_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
# Patterns of paths, matched part by part. Everything else stays: logs, teacher vectors, the state of the optimizer.
_PUBLISHED = (
    *_WEIGHTS,
    *("*.json", "*.md", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*"),
    *(
        f"{PLOTS_FOLDER}/*.png",
        f"{PLOTS_FOLDER}/*.svg",
        f"{MONITOR_FOLDER}/*.json",
        "additional_chat_templates/*.jinja",
    ),
    *("*/adapter_config.json", "*/adapter_model*.safetensors"),  # PEFT saves further adapters in folders of their own
)
# Pickled arguments tell folders and `hub_token`.
_KEPT_BACK = (TRAINING_ARGS_NAME, STATE_FILE)
_FOLDERS_KEPT_BACK = ("checkpoint-*", "replaced-checkpoint-*", "_*", ".*")
# Their strings are pieces of words, which may look like anything.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")


def is_local(name: str) -> bool:
    """Whether a string is the path of a file or folder of this machine."""
    if not name or "\n" in name or len(name) > 4096:
        return False
    if public_name(name) != name:
        depth = len(PureWindowsPath(name).parts)
        return depth > 2 or (depth == 2 and os.path.exists(name))  # "/" and "/x" may be plain text
    return "/" in name and os.path.exists(name)


def shown_name(name: str) -> str:
    """What others may know of the name of a model or a data set.

    Args:
        name (`str`): Name on the Hub, or path.

    Returns:
        `str`: A name on the Hub, also for a folder of the Hub's cache; of any other path, its last part.
    """
    if not is_local(name):
        return name
    public = public_name(name)
    return public if public != name else name.rstrip("/").rsplit("/", 1)[-1]


def publishable_files(folder: str | os.PathLike, secrets: Sequence[str] = ()) -> dict[str, Path | bytes]:
    """What of a training run's folder goes to the Hub.

    Adapter or model, processor, model card, plots, ranking, measurements and the run's record. Not: checkpoints, the
    state of the optimizer, pickled arguments, logs, and what else lies in the folder. In JSON files, paths of this
    machine are reduced to their last part.

    Args:
        folder (`str` or `os.PathLike`): The run's `output_dir`, or a folder that `save_model` wrote.
        secrets (sequence of `str`, *optional*): Access tokens. A file that holds one stays here, with a warning.

    Returns:
        `dict[str, Path | bytes]`: Path in the repository -> local file (weights), or content. The files of the folder
        are not changed.
    """
    folder = Path(folder).expanduser().resolve()
    found = {}
    for path in sorted(folder.glob("*")) + sorted(folder.glob("*/*")):
        parts = path.relative_to(folder).parts
        hidden = any(fnmatch(parts[0], pattern) for pattern in _FOLDERS_KEPT_BACK) or parts[-1] in _KEPT_BACK
        if path.is_file() and not hidden and any(_matches(parts, pattern) for pattern in _PUBLISHED):
            found["/".join(parts)] = path
    return _without_private(found, folder, secrets)


def _matches(parts: Sequence[str], pattern: str) -> bool:
    patterns = pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def checkpoint_files(checkpoint: Path, secrets: Sequence[str]) -> dict[str, Path | bytes]:
    """All of a checkpoint, as `hub_strategy` asks for, but the pickled arguments and the card that PEFT writes."""
    files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    for name in (TRAINING_ARGS_NAME, CARD_FILE):
        files.pop(name, None)
    return _without_private(files, checkpoint.parent, secrets)


def _without_private(files: dict[str, Path], folder: Path, secrets: Sequence[str]) -> dict[str, Path | bytes]:
    """Small files as their content, which later changes do not touch, without paths; none that holds a token."""
    known = {str(folder), os.getcwd(), str(Path.home())}
    folders = sorted((path for path in known if len(path) > 1), key=len, reverse=True)
    found: dict[str, Path | bytes] = {}
    for name, path in files.items():
        if any(fnmatch(path.name, pattern) for pattern in (*_WEIGHTS, "*.pt", "*.pth", "*.distcp")):
            found[name] = path
            continue
        content = path.read_bytes()
        if path.suffix == ".json" and path.name not in _VOCABULARIES:
            content = _cleaned(content, folders)
        unknown = path.name not in _VOCABULARIES and holds_secret(content.decode(errors="replace"))
        if unknown or any(secret.encode() in content for secret in secrets):
            warnings.warn(f"{str(path)!r} holds an access token and is not uploaded. Remove it there.", stacklevel=4)
            continue
        found[name] = content
    return found


def _cleaned(content: bytes, folders: Sequence[str]) -> bytes:
    try:
        value = json.loads(content)
    except ValueError:  # no JSON after all: nothing of ours
        return content
    public = _without_paths(value, folders)
    return content if public == value else json.dumps(public, indent=2, ensure_ascii=False).encode()


def _without_paths(value: Any, folders: Sequence[str]) -> Any:
    """What was read from JSON, with paths reduced to their last part and `folders` cut out of other strings."""
    if isinstance(value, dict):
        return {_without_paths(name, folders): _without_paths(item, folders) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item, folders) for item in value]
    if not isinstance(value, str):
        return value
    if is_local(value):
        return shown_name(value)
    for folder in folders:
        value = value.replace(folder, "...")
    return value
