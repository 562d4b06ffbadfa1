"""The map in CONTRIBUTING.md is the package: its rooms, the imports between them, and the way of a sample."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hera_trainer"
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def section(title: str) -> str:
    """The text under a heading, up to the next one."""
    return re.split(r"^#+ ", TEXT.split(f"# {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


class Room(NamedTuple):
    sentence: str
    arrows: set[str]


def read_map(drawing: str) -> dict[str, Room]:
    """Rooms in the order of the drawing: a line with name and sentence, then one with arrows."""
    rooms = {}
    lines = drawing.splitlines()
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        name, sentence = re.fullmatch(r"(\w+) +(.+)", first).groups()
        arrows = re.fullmatch(r" +->((?: \w+)*)", second)[1].split()
        assert len(arrows) == len(set(arrows)), name
        rooms[name] = Room(sentence, set(arrows))
    return rooms


MAP = read_map(re.search(r"```text\n(.*?)```", section("The map"), re.DOTALL)[1].rstrip("\n"))


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


@cache
def imports() -> dict[str, set[str]]:
    """From room to room, also within functions. What is imported for type checks alone is no import."""
    graph = grimp.build_graph(PACKAGE.name, exclude_type_checking_imports=True, cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in graph.modules:
        targets = {room_of(target) for target in graph.find_modules_directly_imported_by(module)}
        found.setdefault(room_of(module), set()).update(targets - {room_of(module), ""})
    return found


def test_rooms_are_the_folders() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert set(MAP) == folders | files
    assert all(len(room.sentence) > 20 for room in MAP.values())


def test_arrows_are_the_imports() -> None:
    assert {name: room.arrows for name, room in MAP.items()} == {name: imports()[name] for name in MAP}


def test_no_arrow_goes_upward() -> None:
    order = list(MAP)
    upward = [(name, to) for name, room in MAP.items() for to in room.arrows if order.index(to) <= order.index(name)]
    assert upward == []


def test_the_order_is_the_linters() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert [name for layer in layers for name in layer.split(" | ")] == list(MAP)


@pytest.mark.parametrize("name", [name for name in MAP if (PACKAGE / name).is_dir()])
def test_folders_say_what_they_use(name: str) -> None:
    """The docstring of a folder allows all of its imports: by name, or as lying below a room that it names."""
    docstring = import_module(f"hera_trainer.{name}").__doc__
    uses = re.search(r"\bUses\s(.+?)\.(?:\s|$)", docstring, re.DOTALL)[1]
    order = list(MAP)
    if uses == "all other folders":
        allowed = set(order) - {name}
    elif uses == "no other folder":
        allowed = set()
    else:
        named = re.findall(r"`(\w+)`", uses)
        assert set(named) <= set(order[order.index(name) + 1 :])  # rooms, further down
        assert set(named) <= imports()[name]
        below = order[max(map(order.index, named)) :] if "below" in uses else []
        allowed = {*named, *below}
    assert imports()[name] <= allowed


def resolved(dotted: str) -> Any:
    """A module of the package, or what is in it."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:count])
        if path.is_dir() or path.with_suffix(".py").is_file():
            found: Any = import_module(".".join(["hera_trainer", *parts[:count]]))
            for part in parts[count:]:
                found = getattr(found, part)
            return found
    raise AttributeError(dotted)


WAY = re.findall(r"^(\d+)\. (.+?)(?=^\d+\. |\Z)", section("The way of a sample"), re.DOTALL | re.MULTILINE)


def test_the_way_has_ten_lines() -> None:
    assert [int(number) for number, _ in WAY] == list(range(1, 11))


@pytest.mark.parametrize("line", [text for _, text in WAY], ids=[number for number, _ in WAY])
def test_what_the_way_names_exists(line: str) -> None:
    names = re.findall(r"`([a-z_]+\.[\w.]+)`", line)
    assert names and all(callable(resolved(name)) for name in names)


def test_a_name_that_is_gone_is_seen() -> None:
    for name in ("alignment.alignment.Alignment.gone", "alignment.gone.Alignment", "gone.gone"):
        with pytest.raises(AttributeError):
            resolved(name)


def test_places_for_something_new_exist() -> None:
    places = re.findall(r"[`(]((?:hera_trainer|tests|docs)/[\w/.]+)[`)]", section("Where something new goes"))
    assert len(places) >= 10 and [place for place in places if not (ROOT / place).exists()] == []
