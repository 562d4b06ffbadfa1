"""The metrics against what the authors' own scripts print of the same answers.

The files say which script of which commit gave the output, and what was stood in for. What made them is
`tests/support/official_scores.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from official_scores import FILES, MISSED, SOURCES, nouns_of, similarity

from hera_trainer.evaluation import load_metric


def official(name: str) -> dict[str, Any]:
    found = json.loads((FILES / f"{name}.json").read_text())
    assert any(f"{url}, " in found["source"] and commit in found["source"] for url, commit, _ in SOURCES.values())
    return found


def test_pope():
    """Digit for digit."""
    given = official("pope")
    scores = load_metric("pope").compute(predictions=given["answers"], references=given["labels"])
    names = {
        "accuracy": "Accuracy",
        "precision": "Precision",
        "recall": "Recall",
        "f1": "F1 score",
        "yes_ratio": "Yes ratio",
    }
    assert scores == pytest.approx({name: given["output"][theirs] for name, theirs in names.items()}, rel=1e-12)
    assert len(set(given["answers"])) == 30


def test_amber(tmp_path: Path):
    """To the one digit that is printed. The script adds 0.001 to what it divides by, and to sums below F1."""
    given = official("amber")
    for name in ("annotations", "relation"):
        (tmp_path / f"{name}.json").write_text(json.dumps(given[name]))
    (tmp_path / "safe_words.txt").write_text("\n".join(given["safe_words"]))
    scores = load_metric("amber").compute(
        predictions=[response["response"] for response in given["responses"]],
        references=[response["id"] for response in given["responses"]],
        annotations=tmp_path,
        nouns=nouns_of,
        similarity=similarity,
    )
    generative = given["output"]["Generative Task"]
    names = {"chair": "CHAIR", "cover": "Cover", "hal_rate": "Hal", "cog": "Cog"}
    found = {name: 100 * scores[name] for name in names}
    assert found == pytest.approx({name: generative[theirs] for name, theirs in names.items()}, abs=0.051)
    titles = ("Descriminative Task", "Exsitence", "Attribute", "State", "Number", "Action", "Relation")
    prefixes = ("", "existence_", "attribute_", "state_", "number_", "action_", "relation_")
    for prefix, title in zip(prefixes, titles, strict=True):
        for name, theirs in (("accuracy", "Accuracy"), ("precision", "Precision"), ("recall", "Recall"), ("f1", "F1")):
            room = 0.16 if name == "f1" else 0.053
            assert 100 * scores[prefix + name] == pytest.approx(given["output"][title][theirs], abs=room), prefix + name


def test_hallusionbench():
    """To the four digits that are printed."""
    given = official("hallusionbench")
    rows = given["rows"]
    scores = load_metric("hallusionbench").compute(predictions=[row["answer"] for row in rows], references=rows)
    theirs = {name.replace(" ", "_"): value for name, value in given["output"].items()}
    assert {name: round(100 * score, 4) for name, score in scores.items()} == theirs
    assert {"qAcc", "easy_aAcc", "hard_aAcc"} < theirs.keys() and len(set(theirs.values())) == 5


@pytest.fixture
def chair(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    given = official("chair")
    images = [{"id": i} for i in {row["image_id"] for row in given["described"]}]
    instances = {"images": images, "categories": given["categories"], "annotations": given["instances"]}
    (tmp_path / "instances_val2014.json").write_text(json.dumps(instances))
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": given["described"]}))
    (tmp_path / "synonyms.txt").write_text("\n".join(given["synonyms"]))
    return given, tmp_path


def test_chair(chair: tuple[dict[str, Any], Path]):
    given, folder = chair
    scores = load_metric("chair").compute(
        predictions=[row["caption"] for row in given["captions"]],
        references=[row["image_id"] for row in given["captions"]],
        annotations=[str(folder / f"{kind}_val2014.json") for kind in ("instances", "captions")],
        synonyms=str(folder / "synonyms.txt"),
    )
    output = given["output"]
    assert (scores["chair_i"], scores["chair_s"]) == pytest.approx((output["CHAIRi"], output["CHAIRs"]), rel=1e-12)
    assert scores["mentions"] == sum(map(len, output["objects"]))
    assert scores["hallucinated_mentions"] == sum(output["hallucinated"]) > 100


def test_words_that_the_script_misses(chair: tuple[dict[str, Any], Path]):
    """For its library, the singular of bus is bu, and that of ties ty: the README names them."""
    given, folder = chair
    module = sys.modules[type(load_metric("chair")).__module__]
    vocabulary = module._vocabulary(folder / "synonyms.txt")
    assert given["output"]["missed"] == {text: [] for text in MISSED}
    assert {text: vocabulary.mentions(text) for text in MISSED} == {text: [object_] for text, object_ in MISSED.items()}


def test_objects_of_each_caption(chair: tuple[dict[str, Any], Path]):
    given, folder = chair
    module = sys.modules[type(load_metric("chair")).__module__]
    vocabulary = module._vocabulary(folder / "synonyms.txt")
    captions = [row["caption"] for row in given["captions"]]
    differ = [
        (caption, theirs, vocabulary.mentions(caption))
        for caption, theirs in zip(captions, given["output"]["objects"], strict=True)
        if vocabulary.mentions(caption) != theirs
    ]
    assert not differ
