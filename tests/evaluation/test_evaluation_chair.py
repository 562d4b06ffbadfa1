"""The module `chair`: hand-worked captions, the list of objects, COCO's files, and a second way of counting."""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path

import pytest

from hera_trainer.evaluation import load_metric


@pytest.fixture(scope="module")
def module() -> types.ModuleType:
    return sys.modules[type(load_metric("chair")).__module__]


@pytest.fixture(scope="module")
def vocabulary(module: types.ModuleType) -> object:
    return module._vocabulary(None)


def test_hand_worked() -> None:
    # caption                                         objects named            in the image      hallucinated
    # "A man walks two puppies past a bench."         person, dog, bench       person, dog       bench         1 of 3
    # "Cats and more cats, and a category of cats."   cat, cat, cat            cat               -             0 of 3
    # "A hot dog beside a teddy bear."                hot dog, teddy bear      hot dog, cup      teddy bear    1 of 2
    # "An empty room."                                -                        chair             -             0 of 0
    # ""                                              -                        -                 -             0 of 0
    captions = [
        "A man walks two puppies past a bench.",
        "Cats and more cats, and a category of cats.",
        "A hot dog beside a teddy bear.",
        "An empty room.",
        "",
    ]
    references = [["person", "A woman with her dog"], ["kitten"], ["hot dog", "cup"], ["a stool"], []]
    scores = load_metric("chair").compute(predictions=captions, references=references)
    # 2 of 8 mentions, 2 of 5 captions; of 2 + 1 + 2 + 1 objects 2 + 1 + 1 + 0 are named; 8 + 9 + 7 + 3 + 0 words
    assert scores == pytest.approx(
        {
            "chair_i": 2 / 8,
            "chair_s": 2 / 5,
            "recall": 4 / 6,
            "length": 27 / 5,
            "captions": 5,
            "mentions": 8,
            "hallucinated_mentions": 2,
            "vocabulary": "hera-coco-80",
        }
    )


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("A category of scattered educated dogmas", []),  # nothing inside of words
        ("two dogs, a dog and the dog's bone", ["dog", "dog", "dog"]),  # every mention counts
        ("Women, men and children", ["person"] * 3),
        ("policemen and grandmothers", ["person"] * 2),
        ("mice, geese, oxen, sheep and calves", ["mouse", "bird", "cow", "sheep", "cow"]),
        ("knives, buses, couches, benches and boxes", ["knife", "bus", "couch", "bench"]),
        ("hot dogs and hotdogs", ["hot dog", "hot dog"]),
        ("a hot, tired dog", ["dog"]),
        ("two teddy bears and a bear", ["teddy bear", "bear"]),
        ("Wine glasses", ["wine glass"]),
        ("a baby elephant with its mother, and a baby", ["elephant", "person", "person"]),
        ("adult giraffes and baby animals", ["giraffe"]),
        ("a passenger train on the train tracks", ["train"]),
        ("the train track", []),
        ("a passenger on a passenger jet", ["person", "airplane"]),
        ("he slides into home plate", []),
        ("a man wearing a bow tie", ["person", "tie"]),
        ("the toilet seat is up", ["toilet"]),
        ("the seat of the toilet", ["toilet"]),
        ("a seat in the train", ["chair", "train"]),
        ("stove top oven", ["oven"]),
        ("a fire hydrant beside a hydrant", ["fire hydrant", "fire hydrant"]),
        ("a pair of scissors", ["scissors"]),
        ("a T-shirt, a dog-eared book", ["book"]),  # a hyphen makes one word
        ("The DOG and the dog\u2019s bed", ["dog", "dog", "bed"]),
        ("...!?", []),
    ],
)
def test_objects_of_a_text(text: str, objects: list[str], vocabulary: types.SimpleNamespace) -> None:
    assert vocabulary.mentions(text) == objects


def test_every_object_and_every_word_is_found_alone_and_in_the_plural(
    module: types.ModuleType, vocabulary: types.SimpleNamespace
) -> None:
    assert len(module.SYNONYMS) == 80
    words = [(w, o) for o, others in module.SYNONYMS.items() for w in (o, *others.split(", ")) if w]
    assert len({w for w, _ in words}) == len(words)  # under one object, once
    for word, object_ in words:
        assert vocabulary.mentions(word) == [object_], word
        *first, last = word.split()
        for plural in module._plurals(last):
            assert vocabulary.mentions(" ".join([*first, plural])) == [object_], (word, plural)


def test_no_object_named_is_no_division_by_zero() -> None:
    scores = load_metric("chair").compute(predictions=["", "Nothing."], references=[[], []])
    assert [scores[key] for key in ("chair_i", "chair_s", "recall", "length", "mentions")] == [0.0, 0.0, 0.0, 0.5, 0]


def test_random_captions_in_any_batches_and_order() -> None:
    """Captions of nothing but simple objects, counted by hand of sets and lists."""
    rng = random.Random(0)
    simple = ["dog", "cat", "zebra", "giraffe", "kite", "bed", "vase", "clock"]
    said = [[rng.choice(simple) for _ in range(rng.randrange(5))] for _ in range(60)]
    there = [rng.sample(simple, rng.randrange(4)) for _ in said]
    captions = ["In it: " + " and the ".join(names) + "." for names in said]
    wrong = [[name for name in names if name not in objects] for names, objects in zip(said, there, strict=True)]
    metric = load_metric("chair")
    scores = metric.compute(predictions=captions, references=there)
    assert scores["chair_i"] == pytest.approx(sum(map(len, wrong)) / sum(map(len, said)))
    assert scores["chair_s"] == pytest.approx(sum(map(bool, wrong)) / 60)
    named = sum(len(set(names) & set(objects)) for names, objects in zip(said, there, strict=True))
    assert scores["recall"] == pytest.approx(named / sum(map(len, there)))
    for start in range(0, 60, 13):
        metric.add_batch(predictions=captions[start : start + 13], references=there[start : start + 13])
    assert metric.compute() == scores
    order = rng.sample(range(60), 60)
    assert metric.compute(predictions=[captions[i] for i in order], references=[there[i] for i in order]) == scores


# --- COCO's files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path: Path) -> list[str]:
    instances = {
        "images": [{"id": 7}, {"id": 8}, {"id": 9}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 67, "name": "dining table"}],
        "annotations": [
            {"image_id": 7, "category_id": 18},
            {"image_id": 7, "category_id": 18},
            {"image_id": 8, "category_id": 67},
        ],
    }
    captions = {
        "images": [{"id": 7}, {"id": 8}, {"id": 9}],
        "annotations": [{"image_id": 7, "caption": "A puppy chases a cat."}, {"image_id": 8, "caption": "A desk."}],
    }
    paths = [tmp_path / "instances_val2014.json", tmp_path / "captions_val2014.json"]
    for path, content in zip(paths, (instances, captions), strict=True):
        path.write_text(json.dumps(content))
    return list(map(str, paths))


def test_ground_truth_is_the_union_of_cocos_instances_and_captions(coco: list[str]) -> None:
    # In image 7: dog by its instances, cat by its caption. In 8: a table. In 9: nothing, it has no annotation.
    captions = ["A dog, a cat and a table.", "A coffee table.", "A dog."]
    scores = load_metric("chair").compute(predictions=captions, references=[7, 8, 9], annotations=coco)
    assert (scores["mentions"], scores["hallucinated_mentions"]) == (5, 2)
    assert (scores["chair_i"], scores["chair_s"], scores["recall"]) == pytest.approx((2 / 5, 2 / 3, 1.0))


def test_one_kind_of_annotations_is_said(
    coco: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evaluate

    monkeypatch.setattr(evaluate.logging.get_logger("evaluate"), "propagate", True)
    scores = load_metric("chair").compute(predictions=["A dog and a cat."], references=[7], annotations=coco[0])
    assert scores["chair_i"] == 0.5  # the cat is in the caption only
    assert "`annotations` has instances only" in caplog.text


def test_wrong_annotations_are_refused(coco: list[str], tmp_path: Path) -> None:
    def compute(image: int = 7, **kwargs: object) -> None:
        metric = load_metric("chair", keep_in_memory=True)  # leaves no lock behind to wait for
        metric.compute(predictions=["A dog."], references=[image], **kwargs)

    with pytest.raises(ValueError, match=r"instances_\*\.json and captions_\*\.json.*cocodataset\.org"):
        compute()
    with pytest.raises(FileNotFoundError, match=r"missing\.json.*cocodataset\.org"):
        compute(annotations=[*coco, str(tmp_path / "missing.json")])
    with pytest.raises(ValueError, match=r"image 10 .* is not in"):
        compute(10, annotations=coco)
    other = tmp_path / "other.json"
    other.write_text("[]")
    with pytest.raises(ValueError, match="not one of COCO's annotation files"):
        compute(annotations=other)
    other.write_text('{"categories": [{"id": 1, "name": "unicorn"}], "annotations": []}')
    with pytest.raises(ValueError, match="category 'unicorn', which the list of objects has not"):
        compute(annotations=other)


# --- another list ----------------------------------------------------------------------------------------------------


def test_another_list_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text("dog, hound , Rover\nunicorn,  magic horse\n\n")
    scores = load_metric("chair").compute(
        predictions=["Two magic horses, a horse, rover and a baby dog."], references=[["hound"]], synonyms=str(path)
    )
    assert (scores["mentions"], scores["hallucinated_mentions"]) == (3, 1)  # no horse and no baby in that list
    assert scores["vocabulary"] == "synonyms.txt"


def test_a_missing_or_empty_list_is_refused(tmp_path: Path) -> None:
    def compute(path: Path) -> None:
        load_metric("chair").compute(predictions=["A dog."], references=[["dog"]], synonyms=path)

    with pytest.raises(FileNotFoundError, match="LisaAnne/Hallucination"):
        compute(tmp_path / "missing.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        compute(empty)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (["a cat"], "row 0 is 'a cat'"),
        ([["a cat"], "a dog"], "row 1 is 'a dog'"),
        ([{"a": "cat"}], "row 0 is {'a': 'cat'}"),
        ([["cat", None]], r"row 0 is \['cat', None\]"),
        ([True], "row 0 is True"),
        ([1.5], r"row 0 is 1\.5"),
        ([["cat"], 17], r"texts or ids, not both: \['cat'\] and 17"),
    ],
)
def test_what_is_no_list_of_texts_and_no_id_is_refused(references: list, message: str) -> None:
    """`datasets` would take a text for a list of its letters, which name no object, and True for the id 1."""
    with pytest.raises(ValueError, match=message):
        load_metric("chair").compute(predictions=["a cat"] * len(references), references=references)
