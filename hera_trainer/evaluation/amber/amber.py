"""AMBER, an LLM-free multi-dimensional hallucination benchmark, as a module for the `evaluate` library."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from numbers import Integral
from pathlib import Path
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
AMBER scores descriptions of images by the objects they name (CHAIR: hallucinated ones; Cover: annotated ones that are
named; HalRate: descriptions with a hallucination; Cog: likely hallucinations that are named), and answers to yes/no
questions about existence, attributes and relations (accuracy; precision, recall and F1 of the answer no). No language
model is the judge.
"""

_CITATION = """
@article{wang2023amber,
    title = {AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation},
    author = {Wang, Junyang and Wang, Yuhang and Xu, Guohai and Zhang, Jing and Gu, Yukai and Jia, Haitao and Wang,
        Jiaqi and Xu, Haiyang and Yan, Ming and Zhang, Ji and Sang, Jitao},
    journal = {arXiv preprint arXiv:2311.07397},
    year = {2023}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `str`): The model's descriptions and answers. The first word of an answer decides: yes or no.
    references (`list` of `int`): AMBER's ids of the queries, 1 to 1004 for descriptions, 1005 to 15220 for questions.
    annotations (`str`): Path of the folder `data` of https://github.com/junyangwang0410/AMBER, or of its
        `annotations.json`.
    relation (`str`, *optional*): Path of `relation.json`, by default beside `annotations.json`.
    safe_words (`str`, *optional*): Path of `safe_words.txt`, by default beside `annotations.json`.
    nouns (`str` or function, *optional*, defaults to `"nltk"`): How nouns are found in descriptions. `"nltk"`: NLTK's
        tokenizer, part-of-speech tagger and WordNet lemmatizer, as AMBER has it. `"tokens"`: every word of AMBER's
        vocabulary, in the singular or plural, whatever its part of speech. A function from a text to a list of nouns.
    similarity (`str` or function, *optional*): Also takes nouns for an object that are similar to it: the name of a
        spaCy model with word vectors (`"en_core_web_lg"` in AMBER), or a function from two words to a number. By
        default, only the words that AMBER's files list.
    threshold (`float`, *optional*, defaults to `0.8`): Similarity above which two words are the same object.
Returns:
    chair (`float`): Hallucinated share of the objects named.
    cover (`float`): Share of the annotated objects that are named.
    hal_rate (`float`): Share of the descriptions with a hallucinated object.
    cog (`float`): Share of the annotated likely hallucinations that are named.
    accuracy, precision, recall, f1 (`float`): Of the answers; precision, recall and F1 of the answer no. Also for each
        dimension: existence_accuracy, attribute_accuracy (and, of it, state_, number_, action_), relation_accuracy, ...
    amber_score (`float`): (1 - chair + f1) / 2, where there are descriptions and answers.
Examples:
    >>> metric = evaluate.load("amber")
    >>> metric.compute(
    ...     predictions=["The sky over a lake.", "No."], references=[1, 1005], annotations="AMBER/data"
    ... )  # doctest: +SKIP
"""

_SOURCE = "https://github.com/junyangwang0410/AMBER/tree/master/data"
_DIMENSIONS = {
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation",),
    "relation": ("relation",),
}
_NLTK_DATA = ("punkt_tab", "averaged_perceptron_tagger_eng", "wordnet")


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _check(references: Sequence[Any]) -> None:
    """`datasets` would take True and 1.5 for the id 1."""
    for index, reference in enumerate(references):
        is_number = isinstance(reference, Integral) and not isinstance(reference, bool)
        if not is_number and not (isinstance(reference, str) and reference.isdecimal()):
            raise ValueError(f"`references` must be AMBER's ids, such as 1005; row {index} is {reference!r}.")


def _read(path: Path, what: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"AMBER's {what} is not at {path}. Get it from {_SOURCE}.")
    return path.read_text(encoding="utf-8")


def _nltk_nouns(text: str) -> list[str]:
    try:
        import nltk
    except ImportError as error:
        raise ImportError('`nouns="nltk"` needs NLTK: `pip install nltk`, or set `nouns="tokens"`.') from error
    try:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        lemmatize = nltk.stem.WordNetLemmatizer().lemmatize
        return [lemmatize(word) for word, tag in tagged if tag.startswith("NN")]
    except LookupError as error:
        raise ValueError(
            f'`nouns="nltk"` needs data of NLTK: `python -m nltk.downloader {" ".join(_NLTK_DATA)}`, or set '
            '`nouns="tokens"`.'
        ) from error


def _singulars(word: str) -> list[str]:
    """What the word may be the plural of. Only those in AMBER's vocabulary are looked at, so guesses do no harm."""
    guesses = [word]
    if word.endswith("men"):
        guesses.append(word[:-2] + "an")
    for plural, singular in (("s", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe")):
        if word.endswith(plural):
            guesses.append(word.removesuffix(plural) + singular)
    if re.search("(s|x|z|ch|sh|o)es$", word):
        guesses.append(word[:-2])
    irregular = {"children": "child", "mice": "mouse", "geese": "goose"}
    return [*guesses, irregular.get(word, word)]


def _token_nouns(vocabulary: set[str]) -> Callable[[str], list[str]]:
    spelling = {word.lower(): word for word in vocabulary}  # AMBER writes TV

    def find(text: str) -> list[str]:
        words = (re.sub(r"['\u2019]s$", "", word) for word in re.findall(r"\w+(?:[-'\u2019]\w+)*", text.lower()))
        known = ((spelling[form] for form in _singulars(word) if form in spelling) for word in words)
        return [noun for noun in (next(forms, None) for forms in known) if noun is not None]

    return find


def _similarity(measure: str | Callable[[str, str], float] | None) -> Callable[[str, str], float] | None:
    if not isinstance(measure, str):
        return measure
    try:
        import spacy

        model = spacy.load(measure)
    except (ImportError, OSError) as error:
        raise ImportError(
            f"`similarity={measure!r}` needs spaCy with that model: `pip install spacy` and `python -m spacy download "
            f"{measure}`, or give a function."
        ) from error
    parse = lru_cache(maxsize=None)(model)
    return lambda a, b: parse(a).similarity(parse(b))


class _Descriptions:
    """Counts over the descriptions of images."""

    def __init__(
        self,
        related: dict[str, list[str]],
        safe_words: set[str],
        nouns: str | Callable[[str], list[str]],
        alike: Callable[[str, str], bool] | None,
    ) -> None:
        self.related, self.safe_words, self.alike = related, safe_words, alike
        self.vocabulary = {word for object_, words in related.items() for word in (object_, *words)}
        if isinstance(nouns, str):
            nouns = _token_nouns(self.vocabulary) if nouns == "tokens" else _nltk_nouns
        self.nouns = nouns
        self.counts: Counter[str] = Counter()

    def candidates(self, objects: Sequence[str]) -> list[tuple[str, int]]:
        """Words that stand for an object, with the object's position. AMBER's code tries them in this order."""
        unknown = [word for word in objects if word not in self.related]
        if unknown:
            raise ValueError(f"AMBER's relation.json has no {unknown[0]!r}, which its annotations have.")
        others = [(word, i) for i, object_ in enumerate(objects) for word in self.related[object_]]
        return others + [(object_, i) for i, object_ in enumerate(objects)]

    def first(self, noun: str, candidates: list[tuple[str, int]]) -> int | None:
        """The object that the noun is listed for."""
        return next((i for word, i in candidates if word == noun), None)

    def first_alike(self, noun: str, candidates: list[tuple[str, int]]) -> int | None:
        """The object that the noun is similar to."""
        if self.alike is None:
            return None
        return next((i for word, i in candidates if self.alike(noun, word)), None)

    def add(self, text: str, truth: Sequence[str], likely: Sequence[str]) -> None:
        named = [noun for noun in self.nouns(text) if noun in self.vocabulary]
        true_words, likely_words = self.candidates(truth), self.candidates(likely)
        covered: set[int | None] = set()
        reached: set[int | None] = set()
        hallucinated = 0
        for noun in named:
            if noun in self.safe_words:
                continue
            true = self.first(noun, true_words)
            if true is None:
                # A noun that is similar to a true object may also reach a likely hallucination, as in AMBER's code.
                reached |= {self.first(noun, likely_words), self.first_alike(noun, likely_words)}
                true = self.first_alike(noun, true_words)
            covered.add(true)
            hallucinated += true is None
        self.counts.update(
            descriptions=1,
            named=len(named),
            hallucinated=hallucinated,
            descriptions_with_hallucination=hallucinated > 0,
            true=len(truth),
            covered=len(covered - {None}),
            likely=len(likely),
            reached=len(reached - {None}),
        )

    def scores(self) -> dict[str, float]:
        c = self.counts
        return {
            "chair": _share(c["hallucinated"], c["named"]),
            "cover": _share(c["covered"], c["true"]),
            "hal_rate": _share(c["descriptions_with_hallucination"], c["descriptions"]),
            "cog": _share(c["reached"], c["likely"]),
        }


def _answer_scores(answers: Sequence[tuple[str, str]], prefix: str = "") -> dict[str, float]:
    """Scores of pairs of what is right and what was said; the answer no counts as positive."""
    both = sum(right == said == "no" for right, said in answers)
    precision = _share(both, sum(said == "no" for _, said in answers))
    recall = _share(both, sum(right == "no" for right, _ in answers))
    return {
        prefix + "accuracy": _share(sum(right == said for right, said in answers), len(answers)),
        prefix + "precision": precision,
        prefix + "recall": recall,
        prefix + "f1": _share(2 * precision * recall, precision + recall),
    }


class AMBER(evaluate.Metric):
    """Scores of AMBER's generative and discriminative tasks."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("int64")}
            ),
            codebase_urls=["https://github.com/junyangwang0410/AMBER"],
            reference_urls=["https://arxiv.org/abs/2311.07397"],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds a batch of predictions and references."""
        _check(references if references is not None else ())
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Adds one prediction and reference."""
        _check([reference])
        super().add(prediction=prediction, reference=reference, **kwargs)

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[int],
        annotations: str | os.PathLike | None = None,
        relation: str | os.PathLike | None = None,
        safe_words: str | os.PathLike | None = None,
        nouns: str | Callable[[str], list[str]] = "nltk",
        similarity: str | Callable[[str, str], float] | None = None,
        threshold: float = 0.8,
    ) -> dict[str, float]:
        if annotations is None:
            raise ValueError(f"`annotations` must be the path of AMBER's folder `data`. Get it from {_SOURCE}.")
        if isinstance(nouns, str) and nouns not in ("nltk", "tokens"):
            raise ValueError(f'`nouns` must be "nltk", "tokens" or a function, got {nouns!r}.')
        path = Path(annotations)
        path = path / "annotations.json" if path.is_dir() else path
        queries = {query["id"]: query for query in json.loads(_read(path, "annotations.json"))}
        unknown = [i for i in references if i not in queries]
        if unknown:
            raise ValueError(f"{path} has no id {unknown[0]}, which is in `references`.")

        described: list[tuple[str, dict[str, Any]]] = []
        answers: dict[str, list[tuple[str, str]]] = {"": []}
        for text, query in zip(predictions, (queries[i] for i in references), strict=True):
            if query["type"] == "generative":
                described.append((text, query))
                continue
            if query["type"] not in _DIMENSIONS:
                raise ValueError(f"{path} has an unknown type {query['type']!r} at id {query['id']}.")
            first_word = re.search(r"\w+", text.lower())
            for dimension in ("", *(f"{name}_" for name in _DIMENSIONS[query["type"]])):
                answers.setdefault(dimension, []).append((query["truth"], first_word[0] if first_word else ""))

        scores: dict[str, float] = {}
        if described:
            related = json.loads(_read(Path(relation or path.parent / "relation.json"), "relation.json"))
            safe = _read(Path(safe_words or path.parent / "safe_words.txt"), "safe_words.txt").splitlines()
            measure = _similarity(similarity)
            alike = (lambda a, b: measure(a, b) > threshold) if measure is not None else None
            descriptions = _Descriptions(related, set(safe), nouns, alike)
            for text, query in described:
                descriptions.add(text, query["truth"], query["hallu"])
            scores |= descriptions.scores()
        if answers[""]:
            for dimension, pairs in answers.items():
                scores |= _answer_scores(pairs, dimension)
        if described and answers[""]:
            scores["amber_score"] = (1 - scores["chair"] + scores["f1"]) / 2
        return scores
