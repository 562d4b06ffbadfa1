"""What the page is made of: tables, plots with their text alternatives, and notes on what is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Plotly needs a height in pixels; the width is that of the column.
CURVE_HEIGHT = 250


@dataclass
class Table:
    """A table; the first cell of a row is its header.

    Args:
        caption (`str`): What it shows.
        columns (sequence of `str`): Column headers.
        rows (sequence of sequences of `str`): Cells, one row a sequence.
        numeric (`bool`, *optional*, defaults to `False`): Whether all cells but the first are numbers, set flush right.
        footer (sequence of sequences of `str`, *optional*): Summary rows.
        wide (`bool`, *optional*, defaults to `False`): Whether it takes the whole width of the page, as numbers do.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = False
    footer: Sequence[Sequence[str]] = ()
    wide: bool = False


@dataclass
class Plot:
    """A plot and what stands for it where it cannot be seen.

    Args:
        name (`str`): Its id on the page and the name of its image file.
        title (`str`): Heading.
        full_title (`str`): The heading as it is understood without what stands around it.
        figure (`dict`): `data` and `layout` of a plotly figure without colours, which the page sets.
        height (`int`): Height in pixels.
        label (`str`): One or two sentences that say what is to be seen.
        table (`Table`): The values.
        note (`str`, *optional*): Sentence below the plot.
    """

    name: str
    title: str
    full_title: str
    figure: Mapping[str, Any]
    height: int
    label: str
    table: Table
    note: str = ""


@dataclass
class Missing:
    """Something that the run did not leave, and how to get it.

    Args:
        what (`str`): What is missing.
        cure (`str`): How to get it next time.
        code (`str`, *optional*): Code that does so.
    """

    what: str
    cure: str
    code: str = ""


@dataclass
class Section:
    """A section of the page.

    Args:
        name (`str`): Its id.
        title (`str`): Heading.
        plots (`dict[str, list[Plot]]`): Plots by subheading; no subheading is shown for the name `""`.
        tables (list of `Table`): Tables that are shown.
        folded (list of `Table`): Tables that open on request.
        missing (list of `Missing`): What the run did not leave.
        notes (list of `str`): Introductory sentences.
    """

    name: str
    title: str
    plots: dict[str, list[Plot]] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def score_text(score: float | None) -> str:
    """A mutual k-NN score, `"-"` where there is none."""
    return "-" if score is None or math.isnan(score) else f"{score:.4f}"


def change_text(before: float | None, after: float | None) -> str:
    """The change of a score, with its sign."""
    if before is None or after is None or math.isnan(before) or math.isnan(after):
        return "-"
    return f"{after - before:+.4f}"


def number_text(value: Any) -> str:
    """A logged number in four significant digits, whole numbers whole."""
    if not isinstance(value, (int, float)):
        return "-"
    if math.isfinite(value) and float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}"


def summary_text(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    """The one value, or of several their mean, and below it the least and the greatest where they differ, how many
    there are where some have none, and how many are not finite: then there is no mean, and the range is of the others.

    Args:
        values (sequence of `float`): A value each, `None` where there is none.
        text (`Callable`): How one is written.
    """
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    if len(values) == 1:
        return text(found[0])
    finite = sorted(value for value in found if math.isfinite(value))
    mean = math.fsum(found) / len(found) if len(finite) == len(found) else math.nan
    ends = dict.fromkeys(text(value) for value in (*finite[:1], *finite[-1:]))
    notes = [" to ".join(ends)] if len(ends) > 1 else []
    if len(finite) < len(found):
        notes.append(f"{len(found) - len(finite)} of {len(found)} not finite")
    if len(found) < len(values):
        notes.append(f"n = {len(found)}")
    return f"{text(mean)}\n({', '.join(notes)})" if notes else text(mean)


def plain_figure(data: Sequence[Any], **layout: Any) -> dict[str, Any]:
    """A plotly figure as JSON-ready `data` and `layout`, checked by plotly, without its default template.

    Args:
        data (sequence of plotly traces): The traces.
        **layout: The layout.
    """
    import plotly.graph_objects as go

    # Through plotly's own JSON: it writes NaN as null, which browsers can parse.
    return json.loads(go.Figure(data, go.Layout(template="none", **layout)).to_json())


def spread(count: int, most: int) -> list[int]:
    """Indices of at most `most` of `count` things, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
