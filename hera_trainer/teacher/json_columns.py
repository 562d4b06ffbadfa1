"""Columns of `datasets.Json`, the type that `datasets` gives to values of different forms, as turns of a chat read from
a file often are. They are stored as texts."""

from __future__ import annotations

import json
from typing import Any

import datasets


def is_list(feature: Any) -> bool:
    """Whether a feature is that of a list."""
    return isinstance(feature, (datasets.List, datasets.LargeList))


def decoded_json(value: Any, feature: Any) -> Any:
    """A value as it is stored, with what texts of the type stand for in their places.

    Args:
        value: The value, as Arrow has it.
        feature: Its feature.
    """
    if isinstance(feature, datasets.Json):
        return json.loads(value) if isinstance(value, str) else value
    if is_list(feature) and value is not None:
        return [decoded_json(item, feature.feature) for item in value]
    if isinstance(feature, dict) and value is not None:
        return {name: decoded_json(item, feature.get(name)) for name, item in value.items()}
    return value


def may_hold_turns(feature: Any) -> bool:
    """Whether a column may hold the turns of a conversation: lists of dictionaries with `role`, or anything."""
    turn = feature.feature if is_list(feature) else None
    has_role = isinstance(turn, dict) and "role" in turn
    return has_role or isinstance(feature, datasets.Json) or isinstance(turn, datasets.Json)


def has_parts_in_json(feature: Any) -> bool:
    """Whether the typed parts of a column of turns are stored as texts."""
    turn = feature.feature if is_list(feature) else feature
    content: Any = turn.get("content") if isinstance(turn, dict) else turn
    part = content.feature if is_list(content) else content
    return isinstance(part, datasets.Json)
