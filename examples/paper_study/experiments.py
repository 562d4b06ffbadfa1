"""What is run: each experiment is a list of runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from maps import HeadMap
from train import Run

CONTROL = {"teacher_control": "permuted"}
SFT = {"alignment_weight": 0.0}
CENTERED = {"similarity": "centered_cosine"}


def pair(name: str, settings: dict[str, Any], **fields: Any) -> list[Run]:
    """An aligned run and its control, in which each image has another one's teacher vector."""
    return [
        Run(name, settings=settings, **fields),
        Run(f"{name} control", settings=settings | CONTROL, **fields),
    ]


# From a projector that has never seen an image.
SIGNATURE: dict[str, Any] = {"teacher": "dinov2", "images": "openmoji", "start": "random", "in_full": False}
COLD = {**CENTERED, "alignment_weight": 0.1, "temperature": 0.07}


def signature() -> list[Run]:
    """SFT, alignment and its control, three seeds."""
    runs = [Run("start", steps=0, **SIGNATURE)]
    for seed in range(3):
        runs.append(Run("SFT", settings=SFT, seed=seed, steps=40, every=20, **SIGNATURE))
        runs += pair("aligned", COLD, seed=seed, steps=40, every=20, **SIGNATURE)
    return runs


# The search: one seed, few steps. What is compared is a run with its control. Everything else is as in `HELD`, at the
# same pull, so that a temperature is not taken for a weight.
SEARCHED: dict[str, Any] = {**SIGNATURE, "steps": 20}
HELD: dict[str, Any] = {**CENTERED, "temperature": 0.3, "target_pull": 0.3, "alignment_weight": 0.5}
CKA: dict[str, Any] = {"alignment_objective": "cka", "temperature": None}
TOP = {"head_selection": "top"}
NOT_ITS_OWN = ("efficientnet",)  # a teacher that the model does not look through
BOTH = ("efficientnet", "dinov2")
TAUGHT: dict[str, Any] = {**SEARCHED, "teacher": "efficientnet"}


def references() -> list[Run]:
    """The model before training, and SFT."""
    return [Run("start", **{**SEARCHED, "steps": 0}), Run("SFT", settings=SFT, **SEARCHED)]


def stage1() -> list[Run]:
    """From the projector of stage 1 instead, with the drawings of five artists and keywords in their captions; then
    pulled harder, by the objective that moved heads furthest, and for longer."""
    brief: dict[str, Any] = {"steps": 20, "in_full": False}
    longer: dict[str, Any] = {**brief, "steps": 80}
    hard = HELD | {"target_pull": 1.0}
    return [
        *(Run("start", steps=0), Run("SFT", settings=SFT, **brief), *pair("temperature 0.3", HELD, **brief)),
        *(*pair("pull 1.0", hard, **brief), *pair("CKA", HELD | CKA, **brief)),
        *(Run("SFT, 80 steps", settings=SFT, **longer), *pair("pull 1.0, 80 steps", hard, **longer)),
    ]


def finished() -> list[Run]:
    """From the projector of stage 1, as users tune finished models: the pull and the length at which heads moved there,
    with fresh seeds and other concepts held out, measured in full."""
    place: dict[str, Any] = {"steps": 80, "draw": 1}
    runs = [Run("start", steps=0, draw=1)]
    for seed in range(1, 4):
        runs.append(Run("SFT", settings=SFT, seed=seed, **place))
        runs += pair("aligned", HELD | {"target_pull": 1.0}, seed=seed, **place)
    return runs


def searched(varied: Sequence[tuple[str, dict[str, Any]]], teachers: Sequence[str] = NOT_ITS_OWN) -> list[Run]:
    """Pairs, each with some settings varied."""
    return [
        run
        for name, settings in varied
        for teacher in teachers
        for run in pair(name, HELD | settings, **{**SEARCHED, "teacher": teacher})
    ]


def temperature() -> list[Run]:
    return searched([(f"temperature {t}", {"temperature": t}) for t in (0.3, 0.07, 1.0, 0.15, 0.6)], BOTH)


PAPER = {"similarity": "cosine", "temperature": 0.07, "target_pull": None, "alignment_weight": 0.01}


def pull() -> list[Run]:
    held = [(f"pull {p}", {"target_pull": p}) for p in (1.0, 0.1, 3.0, 0.03)]
    fixed = [("weight 0.01, cosine, temperature 0.07, as the paper", PAPER)]
    fixed.append(("weight 0.01, as by default", {"target_pull": None, "alignment_weight": 0.01}))
    return searched([*held, *fixed])


def similarity() -> list[Run]:
    return searched(
        [
            ("cosine, temperature 0.07", {"similarity": "cosine", "temperature": 0.07}),
            ("cosine, temperature 0.01", {"similarity": "cosine", "temperature": 0.01}),
            ("dot products", {"similarity": "dot", "temperature": None}),
            ("teacher centred", {"teacher_similarity": "centered_cosine"}),
            ("dot products, temperature 10", {"similarity": "dot", "temperature": 10.0}),
        ]
    )


def default() -> list[Run]:
    """The two best of the similarities, with fresh seeds."""
    cold = HELD | {"similarity": "cosine", "temperature": 0.01}
    runs: list[Run] = []
    for seed in range(1, 4):
        runs += pair("centred, temperature 0.3", HELD, seed=seed, **TAUGHT)
        runs += pair("cosine, temperature 0.01", cold, seed=seed, **TAUGHT)
    return runs


def leads() -> list[Run]:
    """Another objective and other heads, with the seeds of `default`."""
    runs: list[Run] = []
    for seed in range(1, 4):
        for name, settings in (("CKA", CKA), ("top 5", TOP)):
            runs += pair(name, HELD | settings, seed=seed, **TAUGHT)
    return runs


def neighbors() -> list[Run]:
    return searched([(f"{k} neighbours", {"num_neighbors": k}) for k in (5, 20)])


def micro_batches(size: int, **settings: Any) -> dict[str, Any]:
    """Steps of 64 or more in micro-batches, with two neighbours: more would leave nothing to tell apart in the
    smallest."""
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": max(1, 64 // size),
        "num_neighbors": 2,
        **settings,
    }


def pool() -> list[Run]:
    within: dict[str, Any] = {"contrast_scope": "micro_batch"}
    return searched(
        [
            ("64 in micro-batches of 4", micro_batches(4, **within)),
            ("64 in micro-batches of 16", micro_batches(16, **within)),
            ("64 as one", micro_batches(64)),
            ("64 and a queue of 192", micro_batches(64, queue_size=192)),
            ("64 in groups of neighbours", micro_batches(64, neighbor_group_size=4)),
            ("64 in micro-batches of 8", micro_batches(8, **within)),
            ("128 over micro-batches of 64", micro_batches(64, gradient_accumulation_steps=2)),
            ("256 over micro-batches of 64", micro_batches(64, gradient_accumulation_steps=4)),
        ]
    )


def heads() -> list[Run]:
    return searched(
        [
            ("top 5", TOP),
            ("random 5", {"head_selection": "random"}),
            ("worst 20", {"num_aligned_heads": 20}),
            ("feature", {"alignment_objective": "feature", "temperature": None}),
            ("CKA", CKA),
            ("worst 1", {"num_aligned_heads": 1}),
            ("worst 3", {"num_aligned_heads": 3}),
        ]
    )


def weights() -> list[Run]:
    """All weights of projector and language model, at a rate that they bear."""
    lower: dict[str, Any] = {"learning_rate": 1e-4}
    full: dict[str, Any] = {**TAUGHT, "adapter": "full"}
    return [Run("SFT", settings=SFT | lower, **full), *pair("all weights", HELD | lower, **full)]


FIRST: dict[str, Any] = {"max_steps": 40, "learning_rate": 2e-3}  # of the stage that trains the projector alone


def stages() -> list[Run]:
    """Alignment in the stage that trains the projector, in the one after it, and in both."""
    place: dict[str, Any] = {**TAUGHT, "in_full": True}
    control = HELD | CONTROL
    arms: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("neither", SFT, SFT),
        *(("stage 1", HELD, SFT), ("stage 1 control", control, SFT)),
        *(("stage 2", SFT, HELD), ("stage 2 control", SFT, control)),
        *(("both", HELD, HELD), ("both control", control, control)),
    ]
    runs = [Run("start", **{**place, "steps": 0})]
    for seed in range(3):
        runs += [Run(arm, seed, settings=second, before=FIRST | first, **place) for arm, first, second in arms]
    return runs


def stages_confirmed() -> list[Run]:
    """Alignment in the first stage again, with fresh seeds and another draw of held-out images."""
    place: dict[str, Any] = {**TAUGHT, "in_full": True, "draw": 1}
    arms = {"neither": SFT, "stage 1": HELD, "stage 1 control": HELD | CONTROL}
    runs = [Run("start", **{**place, "steps": 0})]
    for seed in range(3, 7):
        runs += [Run(arm, seed, settings=SFT, before=FIRST | settings, **place) for arm, settings in arms.items()]
    return runs


def concepts() -> list[Run]:
    """Alignment in the first stage on the drawings of five artists, with keywords in their captions and whole concepts
    held out, with fresh seeds; and a first stage of four times as many steps."""
    place: dict[str, Any] = {**TAUGHT, "images": "emoji", "in_full": True, "draw": 1}
    arms = {"neither": SFT, "stage 1": HELD, "stage 1 control": HELD | CONTROL}
    runs = [Run("start", **{**place, "steps": 0})]
    for seed in range(7, 12):
        runs += [Run(arm, seed, settings=SFT, before=FIRST | settings, **place) for arm, settings in arms.items()]
    for seed in range(7, 10):
        for arm, settings in arms.items():
            first = FIRST | settings | {"max_steps": 160}
            runs.append(Run(f"longer {arm}", seed, settings=SFT, before=first, **place))
    return runs


def longer() -> list[Run]:
    """Four times as many steps of stage 1: whether what alignment gives there is a head start alone."""
    place: dict[str, Any] = {**TAUGHT, "in_full": True}
    first = FIRST | {"max_steps": 160}
    arms = {"neither": SFT, "stage 1": HELD, "stage 1 control": HELD | CONTROL}
    runs = [Run("start", **{**place, "steps": 0})]
    for seed in range(3):
        runs += [Run(arm, seed, settings=SFT, before=first | settings, **place) for arm, settings in arms.items()]
    return runs


# The confirmation: a teacher that the model does not look through, at the temperature at which it was seen to teach, on
# other seeds and other held-out images, measured in full. Only these numbers are claims.
SEEDS = range(1, 6)
CONFIRMED: dict[str, Any] = {**SIGNATURE, "teacher": "efficientnet", "draw": 1, "steps": 40, "in_full": True}
WARM = {**CENTERED, "alignment_weight": 0.5, "temperature": 0.3}


def confirmation() -> list[Run]:
    runs = [Run("start", **{**CONFIRMED, "steps": 0})]
    for seed in SEEDS:
        runs.append(Run("SFT", settings=SFT, seed=seed, **CONFIRMED))
        runs += pair("aligned", WARM, seed=seed, **CONFIRMED)
    uniformity = {"alignment_objective": "uniformity", "temperature": None, "alignment_weight": 0.5}
    return runs + [Run("uniformity", settings=CENTERED | uniformity, seed=seed, **CONFIRMED) for seed in SEEDS]


def use() -> list[Run]:
    """Stage 1 with captions and questions mixed, so that the model can be asked something, too, with fresh seeds."""
    mixed: dict[str, Any] = {**CONFIRMED, "images": "mixed"}
    spread = HELD | {"alignment_objective": "uniformity", "temperature": None}
    arms = {"neither": SFT, "stage 1": HELD, "stage 1 control": HELD | CONTROL, "stage 1 uniformity": spread}
    runs = [Run("start", **{**mixed, "steps": 0})]
    for seed in range(1, 4):
        runs += [Run(arm, seed, settings=SFT, before=FIRST | first, **mixed) for arm, first in arms.items()]
    return runs


def head_map() -> list[HeadMap]:
    maps = [HeadMap("captions", seed, samples) for samples in (1000, 100, 300, 1900) for seed in range(3)]
    maps += [HeadMap("names alone", style="name"), HeadMap("clipped at the 95 % quantile", clip_quantile=0.95)]
    maps += [HeadMap("centred", center=True), HeadMap("with the token that begins a text", bos=True)]
    maps.append(HeadMap("EfficientNet as the teacher", teacher="efficientnet"))
    return maps + [
        HeadMap("Gemma 3 270M", seed, samples, model="gemma") for samples in (1000, 300) for seed in range(3)
    ]


EXPERIMENTS: dict[str, Callable[[], Sequence[Run | HeadMap]]] = {
    "signature": signature,
    "references": references,
    "stage1": stage1,
    "finished": finished,
    "temperature": temperature,
    "pull": pull,
    "similarity": similarity,
    "default": default,
    "neighbors": neighbors,
    "pool": pool,
    "heads": heads,
    "leads": leads,
    "weights": weights,
    "stages": stages,
    "stages_confirmed": stages_confirmed,
    "concepts": concepts,
    "longer": longer,
    "head_map": head_map,
    "confirmation": confirmation,
    "use": use,
}
