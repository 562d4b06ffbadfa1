"""The documentation says what the package does: code, flags, messages, names and links of the pages are those of it."""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import re
import shlex
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
import yaml
from datasets import Dataset
from tiny import build_vlm, image_dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import hera_trainer
from hera_trainer.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *PAGES]
FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[tuple[Path, str]]:
    """Code of a language on all pages; what the pages include from files is tested where the files are."""
    found = []
    for path in TEXTS:
        for indent, name, code in FENCE.findall(path.read_text()):
            if name == language and "--8<--" not in code:
                found.append((path, re.sub(f"^{indent}", "", code, flags=re.MULTILINE)))
    return found


def name_of(case: tuple[Path, str]) -> str:
    return f"{case[0].stem}-{case[1].strip().splitlines()[0][:40]}"


# --- Code ------------------------------------------------------------------------------------------------------------


def keywords_of(target: Any) -> set[str] | None:
    """Names of the arguments that a public class or function takes; `None` if it takes any."""
    parameters = inspect.signature(target).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    if target is hera_trainer.HeRATrainer:
        return names | set(inspect.signature(SFTTrainer.__init__).parameters)
    return None if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters) else names


@pytest.mark.parametrize("case", blocks("python"), ids=name_of)
def test_python(case: tuple[Path, str]) -> None:
    """It compiles, and what it takes from the package is there, down to the names of arguments."""
    tree = ast.parse(case[1])
    targets = {name: getattr(hera_trainer, name) for name in hera_trainer.__all__}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hera_trainer":
            module = import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
            targets.update({alias.asname or alias.name: getattr(module, alias.name) for alias in node.names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and callable(targets.get(node.func.id)):
            known = keywords_of(targets[node.func.id])
            given = {keyword.arg for keyword in node.keywords if keyword.arg}
            assert known is None or given <= known, f"{node.func.id}() takes no {given - known}"


def test_own_loop_of_one_batch() -> None:
    """The short loop of the page runs as it stands, on a batch of a tiny model."""
    (code,) = (code for path, code in blocks("python") if path.stem == "custom_loop")
    model, processor = build_vlm("llava")
    dataset = image_dataset(n=16, with_features=8)
    batch = DataCollatorForVisionLanguageModeling(processor)(list(dataset.remove_columns("teacher_features")))
    batch["teacher_features"] = torch.tensor(dataset["teacher_features"][:])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    names: dict[str, Any] = {"dataset": dataset, "model": model, "processor": processor, "loader": [batch]}
    exec(compile(code, "custom_loop.md", "exec"), names)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert names["alignment"].criterion.temperature != pytest.approx(0.3, rel=1e-6)
    assert len(names["heads"]) == 5


def test_looking_at_the_teachers_neighbours(capsys: Any) -> None:
    (code,) = (code for path, code in blocks("python") if path.stem == "choosing")
    vectors = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    exec(code, {"dataset": Dataset.from_dict({"teacher_features": vectors.tolist()})})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all(line.startswith(f"{i} [") for i, line in enumerate(lines))


# --- Commands --------------------------------------------------------------------------------------------------------


def commands() -> list[tuple[Path, str]]:
    """Every call of `hera`, also under a launcher, on all pages."""
    found = []
    for path, code in blocks("bash"):
        for line in code.replace("\\\n", " ").splitlines():
            call = re.search(r"(?:^|-m )(?:hera|hera_trainer) (\w+.*)", line.strip())
            if call and call[1].split()[0] in COMMANDS:
                found.append((path, re.split(r" (?:\||>|&&) ", call[1])[0]))
    return found


class Parsed(Exception):
    pass


@pytest.mark.parametrize("case", commands(), ids=lambda case: f"{case[0].stem}-{case[1][:50]}")
def test_command(case: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """The command's own parser takes the flags."""
    name, *arguments = shlex.split(case[1], comments=True)
    parse = argparse.ArgumentParser.parse_known_args

    def only_parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        _, unknown = parse(self, *args, **kwargs)
        assert not unknown, unknown
        raise Parsed

    for flag, value in itertools.pairwise(arguments):
        if flag == "--config":  # read before the parser is called
            path = tmp_path / value
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text((ROOT / value).read_text() if (ROOT / value).is_file() else "{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", only_parse)
    try:
        with pytest.raises(Parsed):
            import_module(f"hera_trainer.cli.{name}").main(arguments)
    except SystemExit as stop:
        assert stop.code == 0 and "--help" in arguments, capsys.readouterr().err


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_scripts_that_pages_name_exist(path: Path) -> None:
    scripts = re.findall(r"\bexamples/[\w/]+\.(?:py|yaml|ipynb)\b", path.read_text())
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


# --- Messages --------------------------------------------------------------------------------------------------------


def text_of(node: ast.AST) -> str:
    """A string of the sources, with `…` for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    assert isinstance(node, ast.JoinedStr)
    known = {"TEACHER_COLUMN": "teacher_features", "MARKER_FILE": "hera_complete"}
    parts = []
    for part in node.values:
        if isinstance(part, ast.FormattedValue):
            parts.append(known.get(ast.unparse(part.value), "…"))
        else:
            parts.append(text_of(part))
    return "".join(parts)


def messages() -> list[str]:
    found = []
    for path in (ROOT / "hera_trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant):
                found.append(" ".join(text_of(node).split()))
    return found


def test_troubleshooting_quotes_the_program() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    cells = [line.split(" | ")[0].removeprefix("| ").strip() for line in page.splitlines() if line.startswith("| `")]
    quotes = [match[2].strip() for cell in cells if (match := re.fullmatch(r"(`+)(.+?)\1", cell))]
    assert len(quotes) > 40
    sources = messages()
    missing = []
    for quote in quotes:
        pattern = re.compile(".*?".join(re.escape(part) for part in quote.split("…")))
        if not any(pattern.search(source) for source in sources):
            missing.append(quote)
    assert missing == []


# --- Names and links -------------------------------------------------------------------------------------------------


def test_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    listed = re.findall(r"^::: hera_trainer\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(name for name in hera_trainer.__all__ if name != "__version__")


def test_every_setting_is_explained() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    explained = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    own = {field.name for field in fields(hera_trainer.HeRAConfig)} - {field.name for field in fields(SFTConfig)}
    assert sorted(own - set(explained)) == []
    assert [name for name in explained if not hasattr(hera_trainer.HeRAConfig, name)] == []


def nav_pages(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    parts = entries.values() if isinstance(entries, dict) else entries
    return [page for part in parts for page in nav_pages(part)]


def test_navigation_has_every_page() -> None:
    listed = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(page for page in listed if page.endswith(".md")) == sorted(path.name for path in PAGES)


def anchors_of(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(FENCE, "", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_links(path: Path) -> None:
    """Files and headings are there (of the pages, a strict build checks the same); other links are well formed."""
    text = re.sub(FENCE, "", path.read_text())
    for link in LINK.findall(text):
        if "://" in link:
            parts = urlparse(link)
            assert parts.scheme == "https" and "." in parts.netloc, link
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_file() and target.is_relative_to(ROOT), link
        if anchor.startswith("hera_trainer."):
            assert anchor.removeprefix("hera_trainer.").split(".")[0] in hera_trainer.__all__, link
        elif anchor and target.suffix == ".md":
            assert anchor in anchors_of(target), link


def test_links_hold_on_the_page_that_takes_a_text_in() -> None:
    """As the changelog, whose links are read from the folder of the pages there."""
    taken = [
        (page, name) for page in PAGES for name in re.findall(r'^--8<-- "(.+\.md)"$', page.read_text(), re.MULTILINE)
    ]
    assert ("changelog.md", "CHANGELOG.md") in [(page.name, name) for page, name in taken]
    for page, name in taken:
        for link in LINK.findall(re.sub(FENCE, "", (ROOT / name).read_text())):
            assert "://" in link or (page.parent / link.partition("#")[0]).is_file(), f"{name}: {link}"
