"""Names and settings as they may be shown to others: without secrets, and without the folders of this computer."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

HIDDEN = "<hidden>"

_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_HUB_CACHE = re.compile(r"(?:models|datasets)--([^/\\]+)[/\\]snapshots(?:[/\\]|$)")
_HOMES = ("home", "Users")

_SECRET_WORDS = r"(?:token|secret|passw(?:or)?d|passphrase|key|credentials?|auth(?:orization)?|signature|sig)"
_SECRET_NAME = re.compile(rf"(?:{_SECRET_WORDS}|secrets|keys|passwords)$", re.IGNORECASE)
_ASSIGNED = re.compile(rf"""{_SECRET_WORDS}["']?\s*[:=]\s*(?:["'](?P<quoted>[\w+/=.-]{{16,}})["'])?""", re.IGNORECASE)
# As issuers document them: Hugging Face, OpenAI and its likes, GitHub, GitLab, AWS, Google, Slack, W&B, npm, PyPI; and
# JSON web tokens, private keys.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|xox[a-z]-[\w-]{10,}|wandb_v1_\w{16,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|-----BEGIN [A-Z ]*PRIVATE KEY-----)"
)
_PASSWORD = re.compile(r"""://[^\s/:@"'<>]*:[^\s"'<>]*@""")  # of AWS, may hold a slash
_USER = re.compile(rf"""{_PASSWORD.pattern}|://[^\s/"'<>]*@""")
_PARAMETER = re.compile(r"([?&;#])([^?&;#]*)")
_OTHER_URL = re.compile(r"(?<!\bhf)(?<!\bhttps)://|https://(?!huggingface\.co/)")
# In longer texts: addresses, and paths behind what may precede one. `a/b`, `</s>` and `/x` are none.
_PLACE = re.compile(
    r"""(?P<url>\b(?!file:)[A-Za-z][\w+.-]*://[^\s"'<>)]*)"""
    r"""|(?P<windows>(?<!\w)[A-Za-z]:[\\/](?!/)[^"'<>|\n]*|\\\\[\w.$-]+\\[^"'<>|\n]*)"""
    r"""|(?:^|(?<=[\s=:,;|"'(\[{])|(?=/(?:home|Users|root)/))(?:file://\w*)?(?:~[\w.-]*|/[\w.@+~-]+)(?:/[\w.@+~-]+)+/?"""
)
# Letters, digits, punctuation and escapes of regular expressions; neither `@` nor other backslashes.
_PUNCTUATED = re.compile(r"(?:[\w\s.,:;+*?()\[\]{}|^$<>=!&#%~\"'/-]|\\[^\w\\]|\\[bdsw]\b)*")


def holds_secret(text: str) -> bool:
    """Whether something that looks like an access token, or an address with a password, stands in a text."""
    quoted = (match["quoted"] for match in _ASSIGNED.finditer(text))
    return (
        _TOKEN.search(text) is not None
        or _PASSWORD.search(text) is not None
        or any(value is not None and not _is_plain(value) for value in quoted)
    )


def is_secret(name: str, value: str) -> bool:
    """Whether the value of something, such as an environment variable, is a secret by its name and its looks."""
    return _SECRET_NAME.search(name) is not None and len(value) >= 16 and not _is_plain(value)


def public_text(text: str) -> str:
    """A text without the folders, users, passwords and signatures that the paths and addresses in it tell."""
    return _PLACE.sub(_public_place, text)


def public_name(name: str) -> str:
    """A name of a model, a data set or a folder: of a path that begins at the root, or in a home folder, its last part;
    of a folder of the Hub's cache, the name on the Hub.

    Args:
        name (`str`): A Hub name, a relative or an absolute path.
    """
    cached = _HUB_CACHE.search(name)
    posix = PurePosixPath(name)
    if cached is not None:
        name = cached[1].replace("--", "/")
    elif _WINDOWS_PATH.match(name):
        name = _last_part(PureWindowsPath(name))
    elif posix.is_absolute() or name.startswith("~") or ".." in posix.parts:
        name = _last_part(posix)
    return _TOKEN.sub(HIDDEN, public_text(name))


def public_settings(value: Any, name: str = "") -> Any:
    """Settings as JSON can hold them. Numbers, and texts made of words, such as names and choices, are shown, of local
    paths the last part; whatever else a text holds, and what is named like a secret, becomes `"<hidden>"`.

    Args:
        value: A setting, or mappings and sequences of them.
        name (`str`, *optional*): Name of the setting.
    """
    if isinstance(value, Mapping):
        return {_public_string(str(key)): public_settings(item, str(key)) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(public_settings(item, name) for item in value)
    if isinstance(value, (list, tuple)):
        return [public_settings(item, name) for item in value]
    if isinstance(value, Enum):
        return public_settings(value.value, name)
    if value is None or isinstance(value, bool):
        return value
    # `<HUB_TOKEN>` is what `TrainingArguments.to_dict` leaves of a token; `<|im_end|>` is the text of one.
    if _SECRET_NAME.search(name) and not re.fullmatch(r"<.*>", str(value)):
        return HIDDEN
    if isinstance(value, (int, float)):
        return value
    if name.endswith("revision") and re.fullmatch(r"[0-9a-f]{40}", str(value)):
        return value
    return _public_string(str(value))


def _public_string(text: str) -> str:
    shown = public_name(text)
    private = holds_secret(text) or _ASSIGNED.search(text) or _OTHER_URL.search(shown) or not _is_plain(shown)
    return HIDDEN if private else shown


def _is_plain(text: str) -> bool:
    """Whether a text consists of words, as names, choices and regular expressions do, and keys and passwords do not."""
    if not _PUNCTUATED.fullmatch(text):
        return False
    for word in re.findall(r"[^\W_]+", text):
        parts = re.findall(r"[A-Z]+[a-z]*|[a-z]+|\d+|.", word)  # of `LlavaForConditionalGeneration`, four
        if len(word) > 12 and (len(word) < 3 * len(parts) or (len(word) > 24 and not word.isalpha())):
            return False
    return True


def _last_part(path: PurePath) -> str:
    is_home = path.name.startswith("~") or (len(path.parts) == 3 and path.parent.name in _HOMES)
    return "~" if is_home else path.name


def _public_place(match: re.Match[str]) -> str:
    place = match[0]
    if match["url"] is not None:
        return _PARAMETER.sub(_public_parameter, _USER.sub(f"://{HIDDEN}@", place))
    cached = _HUB_CACHE.search(place)
    if cached is not None:
        return cached[1].replace("--", "/")
    return f".../{_last_part((PurePosixPath if match['windows'] is None else PureWindowsPath)(place))}"


def _public_parameter(match: re.Match[str]) -> str:
    name, equals, _ = match[2].rpartition("=")
    if _is_plain(match[2]) and not (equals and _SECRET_NAME.search(name)):
        return match[0]
    return f"{match[1]}{name}{equals}"


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
    public = public_name(name)
    return public.rstrip("/").rsplit("/", 1)[-1] if public == name and is_local(name) else public
