"""How samples' vectors are compared, by name."""

from __future__ import annotations

from typing import TypedDict

SIMILARITIES = ("dot", "cosine", "centered_cosine")


class Comparison(TypedDict):
    """The same as [`nearest_neighbors`] and [`rank_heads`] take it."""

    normalize: bool
    center: bool


def comparison(similarity: str) -> Comparison:
    """What a similarity does to vectors before their dot products are taken."""
    return {"normalize": similarity != "dot", "center": similarity == "centered_cosine"}
