"""Which files of a run go to the Hub: what the run writes for others, nothing of the machine that trained it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

import accelerate.utils
import yaml
from huggingface_hub import ModelCard
from transformers import trainer
from transformers import utils as names
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..alignment.alignment import OBJECTIVE_FILE, OBJECTIVE_FOLDER, QUEUE_FILE, STATE_FILE
from ..common.redaction import holds_secret, is_local, public_text, shown_name
from ..runs.checkpoints import MARKER_FILE
from ..runs.written_files import (
    ADAPTER_FILES,
    CARD_FILE,
    CONTROL_FILE,
    EARLIER_FOLDER,
    MODEL_FILES,
    MONITOR_FOLDER,
    PLOTS_FOLDER,
    RANKING_FILE,
    RUN_FILE,
    holds_adapter,
)

logger = logging.get_logger(__name__)

# All of these are patterns of paths: what is named by none of them stays.
_RECORD = (RUN_FILE, CONTROL_FILE, RANKING_FILE, trainer.TRAINER_STATE_NAME, f"{MONITOR_FOLDER}/step-*.json")
_OWN = (CARD_FILE, *_RECORD)
_HEAT_MAPS = f"{PLOTS_FOLDER}/heads*.png"

_PROCESSOR = (
    *(names.PROCESSOR_NAME, names.FEATURE_EXTRACTOR_NAME, names.VIDEO_PROCESSOR_NAME, names.AUDIO_TOKENIZER_NAME),
    *(names.CHAT_TEMPLATE_FILE, f"{names.CHAT_TEMPLATE_DIR}/*.jinja"),
    *(TOKENIZER_CONFIG_FILE, FULL_TOKENIZER_FILE, ADDED_TOKENS_FILE, SPECIAL_TOKENS_MAP_FILE),
)
# As a single process, DDP, FSDP and DeepSpeed write it.
_RESUMING = (
    *(RANKING_FILE, CONTROL_FILE, trainer.TRAINER_STATE_NAME, STATE_FILE, OBJECTIVE_FILE, QUEUE_FILE, MARKER_FILE),
    "rng_state*.pth",
    *(trainer.OPTIMIZER_NAME, trainer.OPTIMIZER_NAME_BIN, trainer.SCHEDULER_NAME, trainer.SCALER_NAME),
    f"{trainer.FSDP_MODEL_NAME}*.bin",
    *(f"{trainer.FSDP_MODEL_NAME}_*/{name}" for name in ("*.distcp", ".metadata")),
    *(f"{accelerate.utils.OPTIMIZER_NAME}_*/{name}" for name in ("*.distcp", ".metadata")),
    *("latest", "global_step*/*.pt"),
)
# Of a run as well, and not worth a word that it stays. The pickled arguments tell folders and `hub_token`.
_EXPECTED = (
    trainer.TRAINING_ARGS_NAME,
    CARD_FILE,
    _HEAT_MAPS,
    f"*/{CONTROL_FILE}",
    f"{OBJECTIVE_FOLDER}*",
    f"*{PREFIX_CHECKPOINT_DIR}-*",
    f"{EARLIER_FOLDER}*",
    "runs",
    ".*",
    "_*",
)

_STREAMED = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
_SETTINGS = ("*config.json", RUN_FILE, RANKING_FILE, trainer.TRAINER_STATE_NAME, STATE_FILE, "step-*.json")
_TEXTS = (".md", ".jinja", ".py")


def publishable_files(
    folder: str | os.PathLike, secrets: Sequence[str] = (), written: Iterable[str] | None = None
) -> dict[str, Path | bytes]:
    """What of a training run's folder goes to the Hub.

    Adapter or model, processor, model card, the plots that it shows, ranking, measurements and the run's record. What
    else lies in the folder is named in the log. In the files of settings, paths of this machine are reduced to their
    last part.

    Args:
        folder (`str` or `os.PathLike`): The run's `output_dir`, or a folder that `save_model` wrote.
        secrets (sequence of `str`, *optional*): Access tokens. A file that holds one stays here, with a warning.
        written (iterable of `str`, *optional*):
            What [`written_by`] names, by default what the run's record says of it, or what the folder looks like.

    Returns:
        `dict[str, Path | bytes]`: Path in the repository -> local file (weights), or content. The files of the folder
        are not changed.
    """
    folder = Path(folder).expanduser().resolve()
    patterns = [*_OWN, *_shown_maps(folder), *(_recorded(folder) if written is None else written)]
    return _chosen(folder, patterns, secrets)


def checkpoint_files(checkpoint: Path, secrets: Sequence[str], written: Iterable[str]) -> dict[str, Path | bytes]:
    """What of a checkpoint goes to the Hub, as `hub_strategy` asks for: the result, and what resuming needs."""
    return _chosen(checkpoint, [*_RESUMING, *written], secrets)


def _shown_maps(folder: Path) -> Iterator[str]:
    """The heat maps that the card shows: beside them may lie those of an earlier run."""
    card = folder / CARD_FILE
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    names = (path.relative_to(folder).as_posix() for path in folder.glob(_HEAT_MAPS))
    yield from (escape(name) for name in names if name in text)


def _recorded(folder: Path) -> Iterable[str]:
    """What the run's record says that the run writes. Without it: what a model or an adapter by itself consists of."""
    recorded = _read_json(folder / RUN_FILE).get("files")
    if recorded is not None:
        return [str(pattern) for pattern in recorded]
    tokenizer = tokenizer_class_from_name(str(_read_json(folder / TOKENIZER_CONFIG_FILE).get("tokenizer_class")))
    vocabulary = getattr(tokenizer, "vocab_files_names", {}).values()
    return [*(ADAPTER_FILES if holds_adapter(folder) else MODEL_FILES), *_PROCESSOR, *vocabulary]


def _code(folder: Path) -> Iterator[str]:
    """Modules that a class of the user's own was saved with."""
    for name in (names.CONFIG_NAME, TOKENIZER_CONFIG_FILE, names.PROCESSOR_NAME):
        for classes in (_read_json(folder / name).get("auto_map") or {}).values():
            for class_name in [classes] if isinstance(classes, str) else classes:
                module = folder / f"{str(class_name).split('.')[0]}.py"  # of another repository, there is no such file
                if module.parent == folder and module.is_file():
                    yield module.name
                    yield from (Path(path).name for path in get_relative_import_files(module))


def _chosen(folder: Path, patterns: Iterable[str], secrets: Sequence[str]) -> dict[str, Path | bytes]:
    inside = [pattern for pattern in (*patterns, *_code(folder)) if ".." not in Path(pattern).parts]
    paths = {path for pattern in inside for path in folder.glob(pattern) if path.is_file()}
    files = {path.relative_to(folder).as_posix(): path for path in sorted(paths)}
    left_out = [name for name in _entries(folder, files) if not any(fnmatch(name, pattern) for pattern in _EXPECTED)]
    if left_out:
        logger.warning_once(
            f"Not uploaded, as the run has not written it: {', '.join(left_out)} in {str(folder)!r}. What shall be in "
            "the repository besides the result, add with `huggingface_hub.upload_file`."
        )
    return _without_private(files, secrets)


def _entries(folder: Path, files: Iterable[str]) -> Iterator[str]:
    """What is in a folder besides `files`: folders as a whole if none of these is inside."""
    shared = {name.split("/")[0] for name in files if "/" in name}
    for path in sorted(folder.iterdir()):
        if path.name in shared:
            yield from (
                f"{path.name}/{item.name}" for item in sorted(path.iterdir()) if f"{path.name}/{item.name}" not in files
            )
        elif path.name not in files:
            yield path.name


def _without_private(files: dict[str, Path], secrets: Sequence[str]) -> dict[str, Path | bytes]:
    """Small files as their content, which later changes do not touch, without paths; none that holds a token."""
    found: dict[str, Path | bytes] = {}
    for name, path in files.items():
        if path.suffix in _STREAMED:
            found[name] = path
            continue
        content, is_settings = path.read_bytes(), any(fnmatch(path.name, pattern) for pattern in _SETTINGS)
        if is_settings:
            content = _cleaned(content)
        if path.name == CARD_FILE:
            content = _card_without_paths(content)
        # The other JSON files are vocabularies: their strings are pieces of words, which may look like anything.
        is_text = is_settings or path.suffix in _TEXTS
        unknown = is_text and holds_secret(content.decode(errors="replace"))
        if unknown or any(secret.encode() in content for secret in secrets):
            warnings.warn(f"{str(path)!r} holds an access token and is not uploaded. Remove it there.", stacklevel=4)
            continue
        found[name] = content
    return found


def _card_without_paths(content: bytes) -> bytes:
    """A model card whose metadata names no folder of this computer as the base model, as PEFT's form does."""
    try:
        card = ModelCard(content.decode(errors="replace"), ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError):  # written by hand: the Hub says what is wrong with it
        return content
    data: Any = card.data
    base, tags = data.get("base_model"), data.get("tags") or []
    kept = [tag for tag in tags if not is_local(str(tag).split(":")[-1])]
    if kept == tags and not (isinstance(base, str) and is_local(base)):
        return content
    data.base_model = None if isinstance(base, str) and is_local(base) else base
    data.tags = kept or None
    return str(card).encode()


def _cleaned(content: bytes) -> bytes:
    try:
        value = json.loads(content)
    except ValueError:  # no JSON after all: nothing of ours
        return content
    public = _without_paths(value)
    return content if public == value else json.dumps(public, indent=2, ensure_ascii=False).encode()


def _without_paths(value: Any) -> Any:
    """What was read from JSON, with paths reduced to their last part."""
    if isinstance(value, dict):
        return {
            _without_paths(name): item if name == "added_tokens_decoder" else _without_paths(item)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    return shown_name(value) if is_local(value) else public_text(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
