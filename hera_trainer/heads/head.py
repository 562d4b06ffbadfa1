"""The names of what is aligned: attention heads, or whole decoder layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

GRANULARITIES = ("head", "layer")
SELECTIONS = ("worst", "top", "random", "middle")  # the last of layers alone


class AttentionHead(NamedTuple):
    """One attention head of the language model: zero-based decoder layer and zero-based query head.

    Example:

    ```python
    >>> str(AttentionHead(3, 4))
    'L3H4'
    >>> AttentionHead.parse("L3H4")
    AttentionHead(layer=3, head=4)
    ```
    """

    layer: int
    head: int

    @property
    def granularity(self) -> str:
        """As `alignment_granularity` names it."""
        return "head"

    @property
    def kind(self) -> str:
        """What it is called in messages."""
        return "attention head"

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, text: str) -> AttentionHead:
        """Reads `"L3H4"`.

        Raises:
            `ValueError`: If `text` has another form.
        """
        match = re.fullmatch(r"L(\d+)H(\d+)", text.strip()) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"{text!r} is not an attention head. Write it as layer and head, both from 0: 'L3H4'.")
        return cls(int(match[1]), int(match[2]))


class DecoderLayer(NamedTuple):
    """One whole decoder layer of the language model, from 0, as `alignment_granularity="layer"` aligns them: what is
    read is the residual stream that leaves it.

    Example:

    ```python
    >>> str(DecoderLayer(12))
    'L12'
    >>> DecoderLayer.parse("L12")
    DecoderLayer(layer=12)
    ```
    """

    layer: int

    @property
    def granularity(self) -> str:
        """As `alignment_granularity` names it."""
        return "layer"

    @property
    def kind(self) -> str:
        """What it is called in messages."""
        return "decoder layer"

    def __str__(self) -> str:
        return f"L{self.layer}"

    @classmethod
    def parse(cls, text: str) -> DecoderLayer:
        """Reads `"L12"`.

        Raises:
            `ValueError`: If `text` has another form.
        """
        match = re.fullmatch(r"L(\d+)", text.strip()) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"{text!r} is not a decoder layer. Write its number, from 0: 'L12'.")
        return cls(int(match[1]))


AlignedUnit = AttentionHead | DecoderLayer
_KINDS: dict[str, type[AttentionHead] | type[DecoderLayer]] = {"head": AttentionHead, "layer": DecoderLayer}


def parse_unit(name: object, granularity: str = "head") -> AlignedUnit:
    """Reads the name of a head or of a layer.

    Args:
        name (`str`, [`AttentionHead`] or [`DecoderLayer`]): The name.
        granularity (`str`, *optional*, defaults to `"head"`): What is expected, for the message.

    Raises:
        `ValueError`: If it is neither.
    """
    for kind in _KINDS.values():
        with suppress(ValueError):
            return kind.parse(str(name))
    return _KINDS[granularity].parse(str(name))


def parse_units(names: Iterable[object], granularity: str) -> list[AlignedUnit]:
    """Reads the names that `aligned_heads` has.

    Args:
        names (iterable of `str`, [`AttentionHead`] or [`DecoderLayer`]): The names.
        granularity (`str`): What they must name: `"head"` or `"layer"`.

    Raises:
        `ValueError`: If one names nothing, or the other kind.
    """
    units = [parse_unit(name, granularity) for name in names]
    for unit in units:
        if unit.granularity != granularity:
            raise ValueError(
                f"`aligned_heads` names the {unit.kind} {str(unit)!r}, but `alignment_granularity` is {granularity!r}. "
                f"Set `alignment_granularity={unit.granularity!r}`, or write "
                + ("layers alone: 'L3'." if granularity == "layer" else "layer and head: 'L3H4'.")
            )
    return units


def granularity_of(units: Sequence[AlignedUnit]) -> str:
    """What units are, `"head"` or `"layer"`; `"head"` if there are none."""
    return units[0].granularity if units else "head"
