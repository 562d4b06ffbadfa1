"""Names and settings as they may be shown to others: without secrets, and without the folders of this computer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_HUB_CACHE = re.compile(r"(?:models|datasets)--([^/\\]+)[/\\]snapshots(?:[/\\]|$)")
_SECRET_NAME = re.compile(r"(^|_)(token|secret|password|api_key)$")
_SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,})")


def holds_secret(text: str) -> bool:
    """Whether something that looks like an access token stands in a text."""
    return _SECRET_VALUE.search(text) is not None


def public_name(name: str) -> str:
    """A name of a model, a data set or a folder: of a path that begins at the root, or in a home folder, its last part;
    of a folder of the Hub's cache, the name on the Hub.

    Args:
        name (`str`): A Hub name, a relative or an absolute path.
    """
    cached = _HUB_CACHE.search(name)
    if cached is not None:
        return cached[1].replace("--", "/")
    posix = PurePosixPath(name)
    if _WINDOWS_PATH.match(name):
        return PureWindowsPath(name).name
    if posix.is_absolute() or name.startswith("~") or ".." in posix.parts:
        return posix.name
    return name


def public_settings(value: Any, name: str = "") -> Any:
    """Settings as JSON can hold them, with secrets replaced by `"<hidden>"` and local paths by their last part.

    Args:
        value: A setting, or mappings and sequences of them.
        name (`str`, *optional*): Name of the setting; of those of tokens, secrets and passwords, no value is shown.
    """
    if isinstance(value, Mapping):
        return {str(key): public_settings(item, str(key)) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(public_settings(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [public_settings(item) for item in value]
    if isinstance(value, Enum):
        return public_settings(value.value, name)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = str(value)
    # `<HUB_TOKEN>` is what `TrainingArguments.to_dict` leaves of a token; `<|im_end|>` is the text of one.
    if _SECRET_VALUE.search(text) or (_SECRET_NAME.search(name.lower()) and not re.fullmatch(r"<.*>", text)):
        return "<hidden>"
    return public_name(text)
