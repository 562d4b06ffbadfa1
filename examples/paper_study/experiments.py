"""What is run: each experiment is a list of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def signature() -> list[Run]:
    """SFT, alignment and its control, three seeds, from a projector that has never seen an image."""
    settings = {**CENTERED, "alignment_weight": 0.1, "temperature": 0.07}
    common: dict[str, Any] = {"teacher": "dinov2", "images": "openmoji", "start": "random", "in_full": False}
    runs = [Run("start", steps=0, **common)]
    for seed in range(3):
        runs.append(Run("SFT", settings=SFT, seed=seed, steps=40, every=20, **common))
        runs += pair("aligned", settings, seed=seed, steps=40, every=20, **common)
    return runs


# The search: one seed, one draw of held-out concepts, few steps. What is compared is a run with its control. Everything
# else is as in `HELD`, at the same pull, so that a temperature is not taken for a weight.
SEARCHED = {"steps": 30, "seed": 0, "draw": 0}
HELD: dict[str, Any] = {**CENTERED, "temperature": 0.3, "target_pull": 0.3, "alignment_weight": 0.5}
TEACHERS = ("efficientnet", "dinov2")


def references() -> list[Run]:
    """The model before training, and SFT."""
    return [Run("start", steps=0), Run("SFT", settings=SFT, **SEARCHED)]


def searched(varied: Sequence[tuple[str, dict[str, Any]]]) -> list[Run]:
    """Pairs with both teachers, each with some settings varied."""
    return [
        run
        for name, settings in varied
        for teacher in TEACHERS
        for run in pair(name, HELD | settings, teacher=teacher, **SEARCHED)
    ]


def temperature() -> list[Run]:
    return searched([(f"temperature {t}", {"temperature": t}) for t in (0.3, 0.07, 1.0, 0.15, 0.6)])


def pull() -> list[Run]:
    return searched([(f"pull {p}", {"target_pull": p}) for p in (1.0, 0.1, 3.0, 0.03)])


def similarity() -> list[Run]:
    return searched(
        [
            ("cosine, temperature 0.07", {"similarity": "cosine", "temperature": 0.07}),
            ("cosine, temperature 0.01", {"similarity": "cosine", "temperature": 0.01}),
            ("dot products", {"similarity": "dot", "temperature": None}),
            ("teacher centred", {"teacher_similarity": "centered_cosine"}),
        ]
    )


def pool() -> list[Run]:
    half = {"per_device_train_batch_size": 32, "num_neighbors": 5}
    return searched(
        [
            ("queue of 192", {"queue_size": 192}),
            ("groups of neighbours", {"neighbor_group_size": 12}),
            ("pool of 128", {"gradient_accumulation_steps": 2}),
            ("pool of 32, k = 5", half),
            ("k = 5", {"num_neighbors": 5}),
            ("k = 20", {"num_neighbors": 20}),
        ]
    )


def heads() -> list[Run]:
    return searched(
        [
            ("top 5", {"head_selection": "top"}),
            ("random 5", {"head_selection": "random"}),
            ("worst 20", {"num_aligned_heads": 20}),
            ("feature", {"alignment_objective": "feature", "temperature": None}),
            ("CKA", {"alignment_objective": "cka", "temperature": None}),
        ]
    )


EXPERIMENTS = {
    "signature": signature,
    "references": references,
    "temperature": temperature,
    "pull": pull,
    "similarity": similarity,
    "pool": pool,
    "heads": heads,
}
