"""What happens to a card that is there already: who wrote it, and what of it is kept."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..runs.written_files import CARD_FILE, PLOTS_FOLDER, RECORDS, RUN_FILE

# What a user writes into the card by hand.
_KEPT = ("license", "license_name", "license_link", "language")


class CardKeeper:
    """Writes the card into a folder where a model is saved, and keeps one that was written by hand. To be made before
    the model is saved, since PEFT rewrites what it finds.

    Args:
        output_dir (`str`): The run's folder, where cards are made.
        folder (`str`): Where the model is saved.
    """

    def __init__(self, output_dir: str | os.PathLike | None, folder: str | os.PathLike | None) -> None:
        self._here, self._there = Path(str(output_dir)), Path(str(folder))
        card = self._here / CARD_FILE
        self._kept = _own_text(self._there / CARD_FILE)
        self._own = _own_text(card)

    def write(self, create: Callable[[], None]) -> None:
        """
        Args:
            create (`Callable`): Makes the card in `output_dir`.
        """
        if self._kept is not None:
            if is_own_text(self._there / CARD_FILE):  # and a push has written none in its place
                (self._there / CARD_FILE).write_bytes(self._kept)  # without what PEFT has added
            return
        card = self._here / CARD_FILE
        try:
            create()
            if self._here.resolve() != self._there.resolve():
                shutil.copy(card, self._there / CARD_FILE)
                if (self._here / PLOTS_FOLDER).is_dir():
                    shutil.copytree(self._here / PLOTS_FOLDER, self._there / PLOTS_FOLDER, dirs_exist_ok=True)
        finally:
            if self._own is not None:
                card.write_bytes(self._own)


# Of trainers (PEFT takes the tag away when it saves beside a card), of PEFT's form, and of this library's card.
_GENERATED = (
    "generated_from_trainer",
    "It has been trained using [TRL]",
    "[More Information Needed]",
    "It was trained with hera-trainer, which is not needed",
)


def is_own_text(path: Path) -> bool:
    """Whether there is a card at `path` whose text neither a trainer nor PEFT wrote."""
    if not path.is_file():
        return False
    card = path.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"\A---\n.*?^---\s*$", "", card, count=1, flags=re.DOTALL | re.MULTILINE)
    return bool(text.strip()) and not any(mark in card for mark in _GENERATED)


def _own_text(path: Path) -> bytes | None:
    return path.read_bytes() if is_own_text(path) else None


def recorded_files(folder: str) -> list[str]:
    """Names of what an earlier run in `output_dir` has recorded, with the card and plots that it wrote: one that keeps
    no record must not pass for it.

    Args:
        folder (`str`): The run's `output_dir`.
    """
    if not Path(folder, RUN_FILE).is_file():
        return []
    card = [] if is_own_text(Path(folder, CARD_FILE)) else [CARD_FILE]
    return [*RECORDS, PLOTS_FOLDER, *card]


@contextmanager
def licensed(folder: str | os.PathLike, license: str | None, writes: bool) -> Iterator[None]:
    """Puts a licence, or what a card of before says of it by hand, into the card that is written inside.

    Args:
        folder (`str` or `os.PathLike`): Where the card is.
        license (`str`, *optional*): Licence, by default the one that is in the card already.
        writes (`bool`): Whether this process writes it.
    """
    path = Path(folder, CARD_FILE)
    kept = written_by_hand(path, license) if writes else {}
    yield
    if kept:
        card = ModelCard.load(path)
        for name, value in kept.items():
            setattr(card.data, name, value)
        card.save(path)


def written_by_hand(path: Path, license: str | None) -> dict[str, Any]:
    """What a card that is there already says of licence and language; a licence that is given goes before."""
    data: dict[str, Any] = {}
    # One that cannot be read is replaced by the new card, as by TRL's.
    with suppress(ValueError, yaml.YAMLError):
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}
    kept = {name: data[name] for name in _KEPT if data.get(name) is not None}
    if license is None:
        return kept
    return {"license": license, **{name: value for name, value in kept.items() if not name.startswith("license")}}
