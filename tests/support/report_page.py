"""A page of the report, taken apart."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Tables by caption, texts, figures and the attributes of all elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self._open: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())
        self.figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1])

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "br"):
            self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag  # well-formed
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if {"script", "style"} & set(self._open):
            return
        self.words.append(data)
        if "caption" in self._open:
            self._caption += data.strip()
        elif {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data

    def tagged(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]
