"""Runs the authors' own scripts of POPE, AMBER, HallusionBench and CHAIR on answers that are made up here, and writes
inputs and outputs to `files/official`, which `tests/evaluation/test_official_scores.py` compares the metrics with.

    pip install nltk prettytable
    python tests/support/official_scores.py FOLDER

FOLDER holds checkouts of the repositories of `SOURCES`, each in a folder of its own name. Nothing of theirs is written:
the questions, annotations and lists of words are made up here as well. What a script needs that is large or asks a
service is stood in for, as the file says under `stand_ins`. lib2to3 needs Python 3.12 or older.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FILES = Path(__file__).parent / "files" / "official"
SOURCES = {
    "POPE": ("https://github.com/RUCAIBox/POPE", "3df3ba1b110ecce25696989577fad583b67d4239", "MIT"),
    "AMBER": ("https://github.com/junyangwang0410/AMBER", "534babf6bbfcce2e735c26289dedfb21cef3c939", "Apache-2.0"),
    "HallusionBench": (
        "https://github.com/tianyi-lab/HallusionBench",
        "744007c232c292942c7f80eb61edb2465482da31",
        "BSD-3-Clause",
    ),
    "Hallucination": (
        "https://github.com/LisaAnne/Hallucination",
        "6e4d33c4bedf6dfcd24c61bf527f40714717be47",
        "none given",
    ),
    "pattern": ("https://github.com/clips/pattern", "d25511f9ca7ed9356b801d8663b8b5168464e68f", "BSD-3-Clause"),
}


def run(script: Path, folder: Path, *arguments: str) -> str:
    """What a script prints, run in a folder of stand-ins that it imports."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def numbers(text: str, names: str) -> dict[str, float]:
    """The numbers behind names in what was printed, the first behind each."""
    return {name: float(re.search(rf"{re.escape(name)}:\s+([\d.]+)", text)[1]) for name in names.split(",")}  # type: ignore[index]


# --- POPE ------------------------------------------------------------------------------------------------------------

ANSWERS = (
    "Yes|yes|Yes.|Yes, there is a dog in the image.|yes there is|Sure, I can see one.|There is a dog.|YES|A dog|"
    "No|no|No.|No, there is no dog in the image.|no there is not|There is not a dog.|There are no dogs, but a cat.|NO|"
    "There is. No doubt.|I see a cat. It is not a dog.|Not really|Nothing like it|None|It isn't there|I cannot see one|"
    "Yes, not only one|not.sure|no,yes|No? Yes!|  No|knot"
).split("|")


def pope(folder: Path, checkout: Path) -> dict[str, Any]:
    rng = random.Random(0)
    answers = rng.choices(ANSWERS, k=300)
    labels = [rng.choice(["yes", "no"]) for _ in answers]
    for name, key, values in (("answers", "answer", answers), ("labels", "label", labels)):
        (folder / name).write_text("".join(json.dumps({key: value}) + "\n" for value in values))
    text = (checkout / "evaluate.py").read_text()
    text = text.replace("ans_file = ''", "ans_file = 'answers'").replace("label_file = ''", "label_file = 'labels'")
    (folder / "evaluate.py").write_text(text)
    printed = run(folder / "evaluate.py", folder)
    return {
        "stand_ins": "none",
        "answers": answers,
        "labels": labels,
        "output": numbers(printed, "Accuracy,Precision,Recall,F1 score,Yes ratio"),
    }


# --- AMBER -----------------------------------------------------------------------------------------------------------

RELATION = {
    "sky": [],
    "person": ["people", "man", "woman", "girl"],
    "man": ["person", "people"],
    "woman": ["person", "girl", "lady"],
    "dog": ["puppy"],
    "lake": ["water", "river"],
    "sea": ["water", "ocean"],
    "forest": ["tree", "leaf"],
    "tree": ["forest", "trees"],
    "road": ["path", "street", "roadside"],
    "house": ["building", "household"],
    "cloud": [],
    "boat": ["ship", "sailboat"],
    "sailor": ["person"],
    "sun": ["sunlight"],
    "table": ["desk", "tablecloth"],
}
OTHER_WORDS = "the a of with beside shines walks calm old red camera light line skyline reader moon cloudy".split()
TYPES = ("attribute-state", "attribute-number", "attribute-action", "hallucination", "relation")


def nouns_of(text: str) -> list[str]:
    """Stands in for NLTK's tagger and lemmatizer: every word, without the s of a plural."""
    return [word[:-1] if word.endswith("s") and len(word) > 3 else word for word in re.findall(r"[a-z]+", text.lower())]


def similarity(a: str, b: str) -> float:
    """Stands in for spaCy's vectors: the share of pairs of letters that two words have in common."""
    one, two = ({word[i : i + 2] for i in range(len(word) - 1)} for word in (a, b))
    return 2 * len(one & two) / max(1, len(one) + len(two))


_NLTK = """
from official_scores import nouns_of
word_tokenize = nouns_of
pos_tag = lambda words: [(word, "NN") for word in words]
"""
_STEM = "class WordNetLemmatizer:\n    lemmatize = staticmethod(lambda word: word)\n"
_SPACY = """
from official_scores import similarity
class Word(str):
    similarity = similarity
load = lambda name: Word
"""


def amber(folder: Path, checkout: Path) -> dict[str, Any]:
    rng = random.Random(1)
    annotations, responses = [], []
    words = sorted({word for object_, others in RELATION.items() for word in (object_, *others)})
    for i in range(1, 121):
        objects = rng.sample(sorted(RELATION), 9)
        annotations.append({"id": i, "type": "generative", "truth": objects[:5], "hallu": objects[5:]})
        said = rng.choices(words, k=rng.randint(0, 8)) + rng.choices(OTHER_WORDS, k=rng.randint(1, 6))
        rng.shuffle(said)
        plural = [f"{word}s" if rng.random() < 0.3 else word for word in said]
        responses.append({"id": i, "response": f"{' '.join(plural).capitalize()}."})
    for i in range(121, 421):
        kind, truth = f"discriminative-{rng.choice(TYPES)}", rng.choice(["yes", "no"])
        annotations.append({"id": i, "type": kind, "truth": truth})
        responses.append({"id": i, "response": truth.capitalize() if rng.random() < 0.7 else rng.choice(["Yes", "No"])})
    safe = ["light", "camera", "line"]
    for name, content in (("annotations", annotations), ("relation", RELATION), ("responses", responses)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "safe_words.txt").write_text("\n".join(safe))
    (folder / "nltk").mkdir()
    (folder / "nltk" / "__init__.py").write_text(_NLTK)
    (folder / "nltk" / "stem.py").write_text(_STEM)
    (folder / "spacy.py").write_text(_SPACY)
    arguments = ["--word_association", "relation.json", "--safe_words", "safe_words.txt", "--evaluation_type", "a"]
    arguments += ["--inference_data", "responses.json", "--annotation", "annotations.json"]
    printed = run(checkout / "inference.py", folder, *arguments, "--metrics", str(checkout / "data" / "metrics.txt"))
    titles = ("Descriminative Task", "Exsitence", "Attribute", "State", "Number", "Action", "Relation")
    parts = {title: printed.split(f"{title}:")[1] for title in titles}
    return {
        "stand_ins": "NLTK's tagger and lemmatizer by `nouns_of`, spaCy's vectors by `similarity`",
        "annotations": annotations,
        "relation": RELATION,
        "safe_words": safe,
        "responses": responses,
        "output": {
            "Generative Task": numbers(printed, "CHAIR,Cover,Hal,Cog"),
            **{title: numbers(part, "Accuracy,Precision,Recall,F1") for title, part in parts.items()},
        },
    }


# --- HallusionBench --------------------------------------------------------------------------------------------------

SAID = {
    "1": ["Yes.", "Yes", "Yes, it is.", "The answer is yes."],
    "0": ["No.", "No", "No, it does not.", "The answer is no."],
    "2": ["It is unclear.", "I cannot tell from the image.", "Yes and no."],
}


def hallusionbench(folder: Path, checkout: Path) -> dict[str, Any]:
    rng = random.Random(2)
    rows = []
    for category, subcategory in (("VD", "figure"), ("VD", "math"), ("VS", "chart"), ("VS", "map")):
        for set_id in range(6):
            for figure in range(rng.randint(2, 4)):
                visual = "0" if (category, figure) == ("VS", 0) else "1" if figure == 0 else rng.choice("12")
                for question in range(2):
                    place = {"category": category, "subcategory": subcategory, "visual_input": visual}
                    place |= {"set_id": str(set_id), "figure_id": str(figure), "question_id": str(question)}
                    right = rng.choice("01")
                    answer = right if rng.random() < 0.7 else rng.choice("012")
                    rows.append({**place, "gt_answer": right, "meant": answer, "answer": rng.choice(SAID[answer])})
    verdicts = ["2" if row["meant"] == "2" else str(int(row["meant"] == row["gt_answer"])) for row in rows]
    judged = [
        {**row, "model_prediction": row["answer"], "same": "1", "gpt4v_output_gpt_check": verdict}
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    (folder / "HallusionBench_result.json").write_text(json.dumps(rows))
    for category in ("VD", "VS"):
        path = folder / f"hallusion_output_{category.lower()}_model.json"
        path.write_text(json.dumps([row for row in judged if row["category"] == category]))
    (folder / "openai.py").write_text("")
    for name in ("utils.py", "evaluation.py"):
        shutil.copy(checkout / name, folder)
    printed = run(folder / "evaluation.py", folder)
    board = printed.split("Leaderboard Stats")[1]
    names = re.findall(r"\((\w+(?: aAcc)?)\)", board.splitlines()[2])
    values = re.findall(r"[\d.]+", board.splitlines()[4])
    return {
        "stand_ins": "GPT-4's judgements, in the cache that the script reads, by what each answer was made to say",
        "rows": rows,
        "output": dict(zip(names, map(float, values), strict=True)),
    }


# --- CHAIR -----------------------------------------------------------------------------------------------------------

_VERBS = """
class Verbs:
    def __init__(self, *arguments, **named): pass
    def __getattr__(self, name): return None
INFINITIVE = PRESENT = PAST = FUTURE = FIRST = SECOND = THIRD = SINGULAR = PLURAL = SG = PL = 0
PROGRESSIVE = PARTICIPLE = 0
"""
_CHAIR = """
import json, re, sys
import nltk
whole = nltk.word_tokenize
nltk.word_tokenize = lambda text: [w for s in re.split(r"(?<=[.!?]) ", text) for w in whole(s, preserve_line=True)]
from chair import CHAIR
captions = json.load(open("captions.json"))["imgToEval"]
evaluator = CHAIR({caption["image_id"] for caption in captions.values()}, ".")
evaluator.get_annotations()
output = evaluator.compute_chair("captions.json")
output["missed"] = {text: evaluator.caption_to_words(text)[1] for text in json.load(open("missed.json"))}
json.dump(output, open("output.json", "w"))
"""
SYNONYMS = {
    "person": ["man", "woman", "child", "boy", "girl", "player"],
    "bicycle": ["bike"],
    "car": ["van", "taxi"],
    "airplane": ["jet", "plane"],
    "train": ["tram"],
    "bird": ["duck", "owl", "magpie"],
    "boat": ["canoe"],
    "bus": ["minibus"],
    "cat": ["kitten"],
    "dog": ["puppy", "hound"],
    "sheep": ["lamb"],
    "bear": [],
    "bench": [],
    "tie": [],
    "wine glass": [],
    "knife": [],
    "hot dog": [],
    "chair": ["stool", "seat"],
    "couch": ["sofa"],
    "dining table": ["table", "desk"],
    "toilet": [],
    "teddy bear": [],
    "traffic light": ["street light", "stop light"],
    "baseball bat": [],
    "oven": ["stove"],
    "book": [],
}
# Words of which pattern makes a singular that is none, so that the script finds no object: apart from the captions.
MISSED = {"A bus.": "bus", "A minibus.": "bus", "Two canoes.": "boat", "Two magpies.": "bird", "Two ties.": "tie"}
PLURALS = {"man": "men", "woman": "women", "child": "children", "sheep": "sheep", "knife": "knives", "puppy": "puppies"}
PLURALS |= {"bench": "benches", "couch": "couches", "wine glass": "wine glasses"}
PHRASES = (
    "a baby elephant|an adult dog|a passenger train|a passenger jet|a toilet seat|the seat of the toilet|a bow tie|"
    "a category|a bookshelf|home plate|the train tracks|a baby bird|a bearded guest|a cat's tail|two dogs, three cats|"
    "a table; a chair"
).split("|")


def chair(folder: Path, checkout: Path, pattern: Path) -> dict[str, Any]:
    rng = random.Random(3)
    words = [word for object_, others in SYNONYMS.items() for word in (object_, *others)]
    words = [word for word in words if word not in ("bus", "minibus", "canoe", "magpie", "tie")]

    def thing() -> str:
        word, kind = rng.choice(words), rng.random()
        if kind < 0.2:
            return rng.choice(PHRASES)
        return f"two {PLURALS.get(word, word + 's')}" if kind < 0.5 else f"a {word}"

    def caption() -> str:
        first, second, third = thing(), thing(), thing()
        return rng.choice(
            [f"{first} and {second} near {third}.", f"There is {first}. Beside it, {second}!", f"{first} on {second}"]
        ).capitalize()

    images = list(range(100, 150))
    names = list(SYNONYMS)
    instances = [{"image_id": i, "category_id": rng.randrange(len(names))} for i in images for _ in range(8)]
    described = [{"image_id": i, "caption": caption()} for i in images]
    captions = [{"image_id": rng.choice(images), "caption": caption()} for _ in range(150)]
    captions += [{"image_id": i, "caption": "An empty field."} for i in images]  # each image has one, as it asks for
    head: dict[str, Any] = {"info": {}, "licenses": [], "images": [{"id": i} for i in images]}
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    for split, rows in (("val", (instances, described)), ("train", ([], []))):
        for kind, part in zip(("instances", "captions"), rows, strict=True):
            content = {**head, "categories": categories, "annotations": part}
            (folder / f"{kind}_{split}2014.json").write_text(json.dumps(content))
    scores = dict.fromkeys(("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "CIDEr", "SPICE", "ROUGE_L"), 0.0)
    generated = {str(i): {**row, **scores} for i, row in enumerate(captions)}
    (folder / "captions.json").write_text(json.dumps({"overall": scores, "imgToEval": generated}))
    (folder / "missed.json").write_text(json.dumps(list(MISSED)))
    (folder / "data").mkdir()
    lines = [", ".join((object_, *others)) for object_, others in SYNONYMS.items()]
    (folder / "data" / "synonyms.txt").write_text("\n".join(lines))
    shutil.copy(checkout / "utils" / "chair.py", folder)
    (folder / "misc.py").write_text("import os\n")
    python3 = [sys.executable, "-m", "lib2to3", "--write", "--nobackups", "chair.py"]
    subprocess.run(python3, cwd=folder, check=True, capture_output=True)
    for package, text in (("pattern", ""), ("pattern/text", _VERBS), ("pattern/text/en", "")):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(text)
    shutil.copy(pattern / "pattern" / "text" / "en" / "inflect.py", folder / "pattern" / "text" / "en")
    (folder / "pattern" / "en.py").write_text("from pattern.text.en.inflect import singularize\n")
    (folder / "run.py").write_text(_CHAIR)
    run(folder / "run.py", folder)
    output = json.loads((folder / "output.json").read_text())
    return {
        "stand_ins": "misc.py, by `import os`; NLTK's sentences, by blanks behind . ! ?; made Python 3 by lib2to3",
        "synonyms": lines,
        "categories": categories,
        "instances": instances,
        "described": described,
        "captions": captions,
        "output": {
            **{name: output["overall_metrics"][name] for name in ("CHAIRi", "CHAIRs")},
            "objects": [sentence["mscoco_generated_words"] for sentence in output["sentences"]],
            "missed": output["missed"],
            "hallucinated": [len(sentence["mscoco_hallucinated_words"]) for sentence in output["sentences"]],
        },
    }


def main(checkouts: Path) -> None:
    FILES.mkdir(parents=True, exist_ok=True)
    scripts = {
        "pope": (pope, ["POPE"], "evaluate.py"),
        "amber": (amber, ["AMBER"], "inference.py"),
        "hallusionbench": (hallusionbench, ["HallusionBench"], "evaluation.py"),
        "chair": (chair, ["Hallucination", "pattern"], "utils/chair.py"),
    }
    for name, (score, sources, script) in scripts.items():
        with tempfile.TemporaryDirectory() as folder:
            found = score(Path(folder), *(checkouts / source for source in sources))
        url, commit, licence = SOURCES[sources[0]]
        about = {"source": f"{url}, {script}, commit {commit}, licence: {licence}", **found}
        (FILES / f"{name}.json").write_text(json.dumps(about, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
