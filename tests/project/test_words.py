"""One word for one thing: words that the glossary has another word for are not used."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (".py", ".pyi", ".md", ".html", ".js")
# The rows of the page of performance come from stored results, which keep the words of the day they were measured.
GENERATED = re.compile(r"<!-- results: begin -->.*?<!-- results: end -->", re.DOTALL)


class Rule(NamedTuple):
    """`say`: the word to use. `instead_of`: what is not said. `seen`: texts in which the rule must find it."""

    say: str
    instead_of: str
    seen: tuple[str, ...]


RULES = [
    # `<picture>` is a tag of HTML
    Rule("image", r"(?<!<)(?<!</)picture", ("a picture", "_pictures(", "PictureSource", "with_pictures=1")),
    Rule(
        "teacher vector",
        r"\bfeature vector|\bteacher(?:'s)? (?:feature|embedding)s?\b|\bteacher_embedding",
        ("feature vectors", "the teacher's features", "teacher embeddings", "teacher_embeddings"),
    ),
    Rule(
        "micro-batch",
        r"\bmicro ?batch(?:es)?\b|\bmini-?batch(?:es)?\b|\bsub-?batch(?:es)?\b",
        ("a microbatch", "micro batches", "minibatches", "a sub-batch"),
    ),
    Rule(
        "optimizer step",
        r"\boptimi[sz]ation steps?\b|\boptimiser\b|\b(?:gradient|update) steps?\b",
        ("an optimization step", "the optimiser", "each update step"),
    ),
    Rule(
        "aligned heads",
        r"\b(?:chosen|selected|picked|trained) (?:attention )?heads\b|\b(?:chosen|selected)_heads\b",
        ("the chosen heads", "selected attention heads", "selected_heads"),
    ),
    Rule("pool", r"\b(?:global|contrast|contrastive) batch(?:es)?\b", ("the global batch", "contrastive batches")),
    Rule("step window", r"\baccumulation windows?\b|\bgradient windows?\b", ("an accumulation window",)),
    Rule("queue", r"\bmemory (?:bank|queue)s?\b|\breplay buffers?\b", ("a memory bank", "replay buffers")),
    Rule("completion", r"\b(?:on|upon|until|after) completion\b", ("upon completion",)),
]
# (file, line, why the word stays). Each must still be there.
ALLOWED = [
    (
        "hera_trainer/demo/data.py",
        'CAPTION_PROMPT = "What does this picture show?"',
        "a prompt that models were trained and measured with",
    ),
]


def texts() -> dict[str, str]:
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "examples").rglob("*.py")]
    for folder in ("hera_trainer", "docs"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    return {str(path.relative_to(ROOT)): GENERATED.sub("", path.read_text()) for path in files}


def found(rule: Rule, lines: dict[str, list[str]]) -> list[str]:
    allowed = {(name, line) for name, line, _ in ALLOWED}
    return [
        f"{name}: {line.strip()}"
        for name, of_file in lines.items()
        for line in of_file
        if re.search(rule.instead_of, line, re.IGNORECASE) and (name, line.strip()) not in allowed
    ]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.say}: {rule.instead_of[:20]}")
def test_one_word_for_one_thing(rule: Rule) -> None:
    lines = {name: text.splitlines() for name, text in texts().items()}
    assert found(rule, lines) == [], f"say {rule.say!r}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.say}: {rule.instead_of[:20]}")
def test_rules_find_what_they_are_for(rule: Rule) -> None:
    assert rule.seen and all(found(rule, {"page.md": [text]}) for text in rule.seen)
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    assert f"| **{rule.say}** |" in glossary and found(rule, {"docs/glossary.md": glossary.splitlines()}) == []


def test_allowed_words_are_still_there() -> None:
    for name, line, why in ALLOWED:
        assert why and line in [of_file.strip() for of_file in texts()[name].splitlines()], line


def names_in(source: str) -> set[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def test_past_samples_are_a_queue() -> None:
    """Memory is what a GPU has: no name in the code of past samples is called so."""
    paths = [*(ROOT / "hera_trainer" / "objectives").glob("*.py"), *(ROOT / "hera_trainer" / "alignment").glob("*.py")]
    paths.append(ROOT / "examples" / "own_objective.py")
    for path in paths:
        assert [name for name in names_in(path.read_text()) if "memory" in name.lower()] == [], path
    assert "memory" in names_in("def forward(heads, memory=None): ...")


def test_glossary_is_in_order_to_be_read() -> None:
    """One line each, and no word twice."""
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    rows = re.findall(r"^\| \*\*(.+?)\*\* \|([^|]*)\|(.+)\|$", glossary, re.MULTILINE)
    words = [word for word, _, _ in rows]
    assert len(words) == len(set(words)) >= 15
    assert all(len(meaning.strip()) < 140 for _, _, meaning in rows)
