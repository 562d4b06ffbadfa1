"""The module `amber`: hand-worked descriptions and answers over a small copy of the form of AMBER's files."""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path

import pytest

from hera_trainer.evaluation import load_metric

RELATION = {
    "sky": [],
    "person": ["people", "man", "woman"],
    "man": ["person", "people"],
    "dog": [],
    "lake": ["water", "river"],
    "sea": ["water"],
    "cloud": [],
    "knife": [],
    "tape": [],
    "tap": [],
    "light": [],
    "television": ["TV"],
    "sunglasses": [],
}
ANNOTATIONS = [
    {"id": 1, "type": "generative", "truth": ["sky", "man", "lake"], "hallu": ["cloud", "dog"]},
    {"id": 2, "type": "generative", "truth": ["lake", "sea"], "hallu": ["person"]},
    {"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 1006, "type": "discriminative-attribute-number", "truth": "no"},
    {"id": 1007, "type": "discriminative-attribute-action", "truth": "no"},
    {"id": 1008, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 1009, "type": "discriminative-relation", "truth": "yes"},
    {"id": 1010, "type": "relation", "truth": "no"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "annotations.json").write_text(json.dumps(ANNOTATIONS))
    (tmp_path / "relation.json").write_text(json.dumps(RELATION))
    (tmp_path / "safe_words.txt").write_text("light\ncamera")
    return tmp_path


def test_hand_worked_descriptions(data: Path) -> None:
    # 1: named are people, dog, dogs, light and water; "skyline" and "river bank's edge" name a river and no sky.
    #    people is a word for man, so man is covered; water and river are words for lake; light is safe.
    #    dog, twice, is hallucinated and a likely hallucination: mentions 6, hallucinated 2, covered man and lake of 3,
    #    reached dog of 2.
    # 2: water stands for the lake, which comes first, and not for the sea as well; knives are hallucinated, and not
    #    likely: mentions 2, hallucinated 1, covered 1 of 2, reached 0 of 1.
    texts = [
        "People with a dog, more dogs and a light near the water; a skyline at the river bank's edge.",
        "Water! And knives.",
    ]
    scores = load_metric("amber").compute(predictions=texts, references=[1, 2], annotations=data, nouns="tokens")
    assert scores == pytest.approx({"chair": 3 / 8, "cover": 3 / 5, "hal_rate": 2 / 2, "cog": 1 / 3})


def test_hand_worked_answers(data: Path) -> None:
    # id:      1005  1006  1007             1008   1009            1010
    # right:   yes   no    no               no     yes             no
    answers = ["Yes", "No", "yes, he runs", "no.", "No, it isn't", "Maybe not"]
    # read:    yes   no    yes              no     no              neither
    # All: right 1005, 1006, 1008 = 3/6. Said no 3, of which 2 are right: precision 2/3. No is right 4 times, said twice
    # of them: recall 1/2, F1 = 2 * (2/3 * 1/2) / (2/3 + 1/2) = 4/7.
    scores = load_metric("amber").compute(predictions=answers, references=range(1005, 1011), annotations=data)
    expected = {
        "": (3 / 6, 2 / 3, 1 / 2, 4 / 7),
        "existence_": (1, 1, 1, 1),
        "attribute_": (2 / 3, 1, 1 / 2, 2 / 3),
        "state_": (1, 0, 0, 0),
        "number_": (1, 1, 1, 1),
        "action_": (0, 0, 0, 0),
        "relation_": (0, 0, 0, 0),
    }
    names = ("accuracy", "precision", "recall", "f1")
    assert scores == pytest.approx(
        {prefix + name: value for prefix, four in expected.items() for name, value in zip(names, four, strict=True)}
    )


def test_amber_score_is_of_both_tasks_and_the_order_is_free(data: Path) -> None:
    texts = {1: "A man and a cloud.", 2: "", 1005: "Yes", 1006: "No", 1007: "No", 1008: "Yes", 1010: "No"}
    metric = load_metric("amber")
    options = {"annotations": str(data / "annotations.json"), "nouns": "tokens"}
    scores = metric.compute(predictions=list(texts.values()), references=list(texts), **options)
    # One of two mentions is hallucinated; of 4 where no is right, it is said 3 times, never else: F1 = 2 * 3/4 / (7/4).
    assert (scores["chair"], scores["hal_rate"], scores["f1"]) == pytest.approx((1 / 2, 1 / 2, 6 / 7))
    assert scores["amber_score"] == pytest.approx((1 - 1 / 2 + 6 / 7) / 2)
    order = random.Random(0).sample(list(texts), len(texts))
    for query in order:
        metric.add_batch(predictions=[texts[query]], references=[query])
    assert metric.compute(**options) == scores


def test_nothing_named_is_no_division_by_zero(data: Path) -> None:
    scores = load_metric("amber").compute(predictions=[""], references=[1], annotations=data, nouns="tokens")
    assert scores == {"chair": 0.0, "cover": 0.0, "hal_rate": 0.0, "cog": 0.0}


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("Tapes, taps, knives; a man, two men", ["tape", "tap", "knife", "man", "man"]),
        ("tapestry, manly, dogmatic", []),  # nothing inside of words
        ("The TV and the tv", ["TV", "TV"]),  # AMBER's spelling
        ("sunglasses", ["sunglasses"]),
        ("The dog\u2019s light-blue lake", ["dog", "lake"]),
    ],
)
def test_tokens_are_the_words_of_ambers_vocabulary(text: str, nouns: list[str]) -> None:
    module = sys.modules[type(load_metric("amber")).__module__]
    vocabulary = {word for object_, words in RELATION.items() for word in (object_, *words)}
    assert module._token_nouns(vocabulary)(text) == nouns


def test_similar_words_cover_and_reach(data: Path) -> None:
    # "ocean" is no word of the vocabulary and is passed over. Alike, above 0.8, are dog and man, and knife and cloud.
    def similarity(a: str, b: str) -> float:
        return 0.9 if {a, b} in ({"dog", "man"}, {"knife", "cloud"}) else 0.8 if {a, b} == {"tap", "sky"} else 0.0

    text = "ocean dog knife tap"
    options = {"predictions": [text], "references": [1], "annotations": data, "nouns": str.split}
    # By AMBER's words alone: dog, knife and tap are hallucinated; dog is a likely one of two.
    assert load_metric("amber").compute(**options) == pytest.approx(
        {"chair": 1.0, "cover": 0.0, "hal_rate": 1.0, "cog": 1 / 2}
    )
    # With similarity: dog stands for man and yet reaches the likely dog; knife is hallucinated and reaches cloud; tap
    # is as similar to sky as the threshold and no more.
    assert load_metric("amber").compute(**options, similarity=similarity) == pytest.approx(
        {"chair": 2 / 3, "cover": 1 / 3, "hal_rate": 1.0, "cog": 1.0}
    )
    assert load_metric("amber").compute(**options, similarity=similarity, threshold=0.7)["chair"] == pytest.approx(
        1 / 3
    )


def test_nltk_and_spacy_are_used_as_the_official_program_does(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for both: nouns are what is tagged NN..., lemmatized; similarity is of two parsed words."""
    nltk = types.ModuleType("nltk")
    nltk.word_tokenize = str.split
    nltk.pos_tag = lambda words: [(word, "MD" if word == "can" else "NNS") for word in words]
    nltk.stem = types.SimpleNamespace(
        WordNetLemmatizer=lambda: types.SimpleNamespace(lemmatize=lambda word: word.removesuffix("s"))
    )
    spacy = types.ModuleType("spacy")
    spacy.Language = type("Language", (), {})  # `datasets` looks for it when it hashes
    spacy.load = lambda name: (
        lambda word: types.SimpleNamespace(
            word=word, similarity=lambda other: float(name == "vectors" and {word, other.word} == {"dog", "man"})
        )
    )
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    (data / "relation.json").write_text(json.dumps({**RELATION, "can": []}))
    inputs = {"predictions": ["dogs can knifes"], "references": [1], "annotations": data}
    assert load_metric("amber").compute(**inputs)["chair"] == 1.0  # of dog and knife: the can is a verb
    assert load_metric("amber").compute(**inputs, similarity="vectors")["chair"] == 0.5  # dog is like man


def test_what_is_not_installed_is_named_with_the_cure(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(**kwargs: object) -> None:
        metric = load_metric("amber", keep_in_memory=True)  # leaves no lock behind to wait for
        metric.compute(predictions=["A dog."], references=[1], annotations=data, **kwargs)

    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match=r'pip install nltk.*nouns="tokens"'):
        compute()
    with pytest.raises(ImportError, match=r"pip install spacy.*spacy download no_such_vectors"):
        compute(nouns="tokens", similarity="no_such_vectors")

    def no_data(text: str) -> None:
        raise LookupError("Resource punkt_tab not found.")

    nltk = types.ModuleType("nltk")
    nltk.word_tokenize = no_data
    nltk.pos_tag = lambda words: []
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    with pytest.raises(ValueError, match=r"nltk\.downloader punkt_tab averaged_perceptron_tagger_eng wordnet"):
        compute()


def test_wrong_input_is_refused(data: Path, tmp_path: Path) -> None:
    def compute(references: list[int], **kwargs: object) -> None:
        metric = load_metric("amber", keep_in_memory=True)  # leaves no lock behind to wait for
        metric.compute(predictions=["No"] * len(references), references=references, **kwargs)

    with pytest.raises(ValueError, match=r"folder `data`.*junyangwang0410/AMBER"):
        compute([1005])
    with pytest.raises(FileNotFoundError, match=r"annotations\.json is not at .*nowhere.*junyangwang0410/AMBER"):
        compute([1005], annotations=data / "nowhere")
    with pytest.raises(ValueError, match="no id 3"):
        compute([1005, 3], annotations=data)
    with pytest.raises(ValueError, match='`nouns` must be "nltk", "tokens" or a function'):
        compute([1], annotations=data, nouns="stanza")
    with pytest.raises(FileNotFoundError, match=r"safe_words\.txt is not at"):
        compute([1], annotations=data, nouns="tokens", safe_words=data / "none.txt")
    (data / "annotations.json").write_text(json.dumps([{"id": 1005, "type": "discriminative-colour", "truth": "no"}]))
    with pytest.raises(ValueError, match="unknown type 'discriminative-colour'"):
        compute([1005], annotations=data)
    (data / "annotations.json").write_text(json.dumps([{**ANNOTATIONS[0], "truth": ["unicorn"]}]))
    with pytest.raises(ValueError, match=r"relation\.json has no 'unicorn'"):
        compute([1], annotations=data, nouns="tokens")


@pytest.mark.parametrize("reference", [True, 1005.0, None, "x", [1005]])
def test_what_is_no_id_is_refused(reference: object) -> None:
    """`datasets` would take True for the id 1, and 1005.9 for 1005."""
    with pytest.raises(ValueError, match=r"must be AMBER's ids.*row 1 is"):
        load_metric("amber").compute(predictions=["No.", "No."], references=[1005, reference], annotations="nothing")
