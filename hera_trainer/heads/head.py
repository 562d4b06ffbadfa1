"""The name of one attention head."""

from __future__ import annotations

import re
from typing import NamedTuple


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
