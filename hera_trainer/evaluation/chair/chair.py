"""CHAIR, caption hallucination assessment with image relevance, as a module for the `evaluate` library."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import datasets
import evaluate

from .coco_objects import NAME, PAIRS, SYNONYMS

_DESCRIPTION = """
CHAIR counts the objects that captions name without their being in the image: CHAIR-i is the hallucinated share of all
objects named, CHAIR-s the share of captions with a hallucinated object. The objects are the 80 of COCO; what is in an
image is the union of COCO's instance annotations and of the objects that its reference captions name.
"""

_CITATION = """
@inproceedings{rohrbach2018object,
    title = {Object Hallucination in Image Captioning},
    author = {Rohrbach, Anna and Hendricks, Lisa Anne and Burns, Kaylee and Darrell, Trevor and Saenko, Kate},
    booktitle = {Empirical Methods in Natural Language Processing (EMNLP)},
    year = {2018}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `str`): Captions of the model.
    references (`list` of `list` of `str`, or of `int`): For each caption the texts that say what is in its image,
        names of objects or reference captions; or ids of COCO images, with `annotations`.
    annotations (`str` or `list` of `str`, *optional*): Path, or paths, of COCO's `instances_*.json` and
        `captions_*.json` (https://cocodataset.org/#download) that the ids in `references` are of.
    synonyms (`str`, *optional*): Path of a list of objects to use instead of the module's own: in each line an object
        and other words for it, separated by commas, as in `data/synonyms.txt` of
        https://github.com/LisaAnne/Hallucination.
Returns:
    chair_i (`float`): Hallucinated share of all objects named.
    chair_s (`float`): Share of captions with a hallucinated object.
    recall (`float`): Share of the objects in the images that are named.
    length (`float`): Mean number of words of a caption.
    captions, mentions, hallucinated_mentions (`int`): What the shares were counted from.
    vocabulary (`str`): Whose list of objects it was: the module's own, `"hera-coco-80"`, or the name of the file given.
Examples:
    >>> metric = evaluate.load("chair")
    >>> captions = ["A puppy on a couch.", "Two cats and a hot dog."]
    >>> results = metric.compute(predictions=captions, references=[["dog", "couch"], ["Two kittens play."]])
    >>> results["chair_i"], results["chair_s"]
    (0.25, 0.5)
"""

_SOURCE = "https://cocodataset.org/#download"

logger = evaluate.logging.get_logger(__name__)


def _words(text: str) -> list[str]:
    """Lower-case words without punctuation. Hyphens stay inside of words, and a possessive 's is cut off."""
    return [re.sub(r"['\u2019]s$", "", word) for word in re.findall(r"\w+(?:[-'\u2019]\w+)*", text.lower())]


def _plurals(word: str) -> list[str]:
    """What the plural of a noun may look like. A plural that does not exist is in no caption and does no harm."""
    plurals = [word + "s"]
    if word.endswith(("s", "x", "z", "ch", "sh", "o")):
        plurals.append(word + "es")
    if re.search("[^aeiou]y$", word):
        plurals.append(word[:-1] + "ies")
    if word.endswith("f"):
        plurals.append(word[:-1] + "ves")
    if word.endswith("fe"):
        plurals.append(word[:-2] + "ves")
    if word.endswith("man"):
        plurals.append(word[:-3] + "men")
    if word.endswith("child"):
        plurals.append(word + "ren")
    irregular = {"person": "people", "mouse": "mice", "goose": "geese", "ox": "oxen"}
    return [*plurals, irregular[word]] if word in irregular else plurals


class _Vocabulary:
    """Finds the objects that a text names.

    Matching is on whole words: nothing is found inside of a word, and of words that belong together (hot dog) the
    longest run counts, once.
    """

    def __init__(self, name: str, synonyms: Mapping[str, Iterable[str]]) -> None:
        self.name = name
        self.objects = set(synonyms)
        # Words -> the term they are a form of, and the object it stands for; no object where there is none of the list.
        self.forms: dict[tuple[str, ...], tuple[str, str | None]] = {}
        terms = {" ".join(_words(term)): object_ for object_, words in synonyms.items() for term in (object_, *words)}
        pairs = {pair: object_ for pair, object_ in PAIRS.items() if not object_ or object_ in self.objects}
        for pair, object_ in pairs.items():
            self._add(pair, object_, object_ or None)
        for term, object_ in terms.items():
            self._add(term, term, object_)
        # A word of the list itself goes before a plural that another one might have.
        self.forms |= {tuple(term.split()): (term, object_) for term, object_ in terms.items() if term not in pairs}
        self.longest = max(map(len, self.forms))

    def _add(self, words: str, term: str, object_: str | None) -> None:
        *first, last = words.split()
        for form in (last, *_plurals(last)):
            self.forms.setdefault((*first, form), (term, object_))

    def mentions(self, text: str) -> list[str]:
        """The objects that the text names, one for each time it does."""
        words = _words(text)
        found: list[tuple[str, str | None]] = []
        start = 0
        while start < len(words):
            runs = (tuple(words[start : start + length]) for length in range(self.longest, 0, -1))
            run = next((run for run in runs if run in self.forms), None)
            if run is not None:
                found.append(self.forms[run])
            start += len(run) if run is not None else 1
        # The seat of a toilet is no chair, also in "the seat of the toilet".
        if any(term == "toilet" for term, _ in found):
            found = [(term, object_) for term, object_ in found if term != "seat"]
        return [object_ for _, object_ in found if object_ is not None]


def _vocabulary(path: str | os.PathLike | None) -> _Vocabulary:
    if path is None:
        return _Vocabulary(NAME, {object_: words.split(", ") if words else [] for object_, words in SYNONYMS.items()})
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"There is no list of objects at `synonyms`, {path}. The official one is data/synonyms.txt of "
            "https://github.com/LisaAnne/Hallucination."
        )
    with open(path, encoding="utf-8") as file:
        lines = [[term.strip() for term in line.split(",") if term.strip()] for line in file]
    synonyms = {line[0]: line[1:] for line in lines if line}
    if not synonyms:
        raise ValueError(f"The list of objects at `synonyms`, {path}, is empty.")
    return _Vocabulary(os.path.basename(path), synonyms)


def _objects_of_images(ids: Sequence[int], paths: Any, vocabulary: _Vocabulary) -> list[set[str]]:
    """What COCO's annotations say is in the images."""
    if paths is None:
        raise ValueError(
            "Image ids in `references` need the paths of COCO's instances_*.json and captions_*.json in `annotations`. "
            f"Get them from {_SOURCE}, or give names of objects or reference captions in `references`."
        )
    objects: dict[int, set[str]] = {i: set() for i in ids}
    annotated: set[int] = set()
    kinds = set()
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"COCO's annotations are not at {path}. Get them from {_SOURCE}.")
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not isinstance(content, dict) or "annotations" not in content:
            raise ValueError(f"{path} is not one of COCO's annotation files: it has no `annotations`.")
        names = {category["id"]: category["name"] for category in content.get("categories", [])}
        kinds.add("instances" if names else "captions")
        unknown = [name for name in names.values() if not vocabulary.mentions(name)]
        if unknown:
            raise ValueError(f"{path} has the category {unknown[0]!r}, which the list of objects has not.")
        annotated |= {image["id"] for image in content.get("images", [])}
        for annotation in content["annotations"]:
            annotated.add(annotation["image_id"])
            if annotation["image_id"] in objects:
                text = names[annotation["category_id"]] if names else annotation["caption"]
                objects[annotation["image_id"]].update(vocabulary.mentions(text))
    missing = [i for i in ids if i not in annotated]
    if missing:
        raise ValueError(f"The image {missing[0]} in `references` is not in {paths}. Which split of COCO is it of?")
    if len(kinds) == 1:
        logger.warning(
            f"`annotations` has {kinds.pop()} only. CHAIR's ground truth is the union of instances and captions."
        )
    return [objects[i] for i in ids]


def _check(references: Sequence[Any]) -> None:
    """`datasets` would take True and 1.5 for the id 1, and a text or a record for a list of its letters or keys."""
    for index, reference in enumerate(references):
        is_id = isinstance(reference, Integral) and not isinstance(reference, bool)
        is_list = isinstance(reference, (list, tuple)) and all(isinstance(text, str) for text in reference)
        if not is_id and not is_list:
            raise ValueError(
                "`references` must be lists of texts, of names of objects or reference captions, or ids of COCO "
                f"images, which are whole numbers; row {index} is {reference!r}."
            )
        if is_id != isinstance(references[0], Integral):
            raise ValueError(f"`references` must be texts or ids, not both: {references[0]!r} and {reference!r}.")


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class CHAIR(evaluate.Metric):
    """Shares of hallucinated objects, and of captions with one."""

    def _info(self) -> evaluate.MetricInfo:
        text, number = datasets.Value("string"), datasets.Value("int64")
        forms = (datasets.Sequence(text), number)
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[datasets.Features({"predictions": text, "references": form}) for form in forms],
            codebase_urls=["https://github.com/LisaAnne/Hallucination"],
            reference_urls=["https://arxiv.org/abs/1809.02156"],
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
        references: Sequence[Any],
        annotations: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
        synonyms: str | os.PathLike | None = None,
    ) -> dict[str, Any]:
        vocabulary = _vocabulary(synonyms)
        if isinstance(references[0], int):
            present = _objects_of_images(references, annotations, vocabulary)
        else:
            present = [{object_ for text in texts for object_ in vocabulary.mentions(text)} for texts in references]
        named = [vocabulary.mentions(caption) for caption in predictions]
        hallucinated = [
            sum(object_ not in objects for object_ in mentions)
            for mentions, objects in zip(named, present, strict=True)
        ]
        mentions = sum(map(len, named))
        recalled = sum(len(objects.intersection(mentioned)) for mentioned, objects in zip(named, present, strict=True))
        return {
            "chair_i": _share(sum(hallucinated), mentions),
            "chair_s": sum(count > 0 for count in hallucinated) / len(named),
            "recall": _share(recalled, sum(map(len, present))),
            "length": sum(len(_words(caption)) for caption in predictions) / len(named),
            "captions": len(named),
            "mentions": mentions,
            "hallucinated_mentions": sum(hallucinated),
            "vocabulary": vocabulary.name,
        }
