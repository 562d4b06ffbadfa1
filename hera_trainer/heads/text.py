"""The text of a row: which column is trained on, and the words that heads are ranked on."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..teacher.image_sources import turns


def answer_text(row: Mapping[str, Any], columns: TextColumns | None = None) -> str:
    """The answer or caption of a row, from the column that is trained on (see [`TextColumns`]): its `completion`, the
    assistant turns of its `messages`, or its plain text. Calls of tools are no words and are left out.

    Raises:
        `ValueError`: If the column holds neither text nor turns.
    """
    return "\n".join(answers(row, columns))


def answers(row: Mapping[str, Any], columns: TextColumns | None = None) -> list[str]:
    """The texts of which [`answer_text`] is made: one, or those of the assistant turns that have words."""
    present = {name: value for name, value in row.items() if value is not None}
    column = (columns or TextColumns()).ranked(present)
    if column is None:
        return []
    value = present[column]
    if column == "messages":
        value = turns(value)
    elif isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) and "role" in turn for turn in value):
        raise ValueError(f"Column `{column}` holds a {type(value).__name__}, neither a text nor turns with `role`.")
    texts = [_content_text(turn.get("content")) for turn in value if turn["role"] == "assistant"]
    return [text for text in texts if text]  # a turn that only calls tools has no words


def _content_text(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """Text of a message's content, which is a string or a list of typed parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """What finds the special tokens that are written in a text; `None` if the tokenizer has none."""
    try:
        added: Any = tokenizer.added_tokens_decoder
    except (AttributeError, NotImplementedError):  # of other libraries' tokenizers
        added = None
    special = [t.content for t in added.values() if t.special] if isinstance(added, Mapping) else []
    contents = sorted({*special, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, contents))) if contents else None


def words(text: str, special: re.Pattern[str] | None) -> str:
    """A text without the special tokens that are written in it, if any: the placeholder of an image, which plain
    captions have, is no word, and stands for what a text alone does not have."""
    if special is None or special.search(text) is None:
        return text
    return special.sub("", text).strip()


class TextTokens:
    """Makes tokens of the words of texts, without the special tokens that are written in them.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)

    def __call__(self, text: str) -> tuple[Tensor, Tensor]:
        """Token ids of a text's words with the special tokens that the tokenizer adds, and which of them are words.

        Returns:
            `tuple` of a `LongTensor` and a `BoolTensor`, both of shape `[T]`.
        """
        encoded = self._tokenizer(words(text, self._special), add_special_tokens=True, return_special_tokens_mask=True)
        special = torch.tensor(encoded["special_tokens_mask"], dtype=torch.bool)
        return torch.tensor(encoded["input_ids"], dtype=torch.long), ~special


CONVERSATIONS = ("messages", "prompt", "completion")


def from_llava(names: Container[str]) -> str:
    """What to say besides of rows in the form of LLaVA's data, where there is no text."""
    if "conversations" not in names:
        return ""
    return (
        " `conversations` is the form of LLaVA's data: make `messages` of it with `trl.maybe_convert_to_chatml`, and "
        "take `<image>` out of the texts (docs/data.md)."
    )


@dataclass(frozen=True)
class TextColumns:
    """SFTTrainer's rule which columns of vision data are trained on: `messages` before all others, and plain text only
    where there is no `prompt` with a `completion`, since `Trainer` takes its column out beside them.

    Args:
        field (`str`, *optional*, defaults to `"text"`): Column of plain text (`dataset_text_field`).
        keeps_unused (`bool`, *optional*, defaults to `False`):
            Whether `Trainer` takes no column out (`remove_unused_columns=False`): plain text then comes before
            `prompt` and `completion`, as in the collator.
        named (`str`, *optional*):
            Column of the texts that attention heads are ranked on, where the user names it.
    """

    field: str = "text"
    keeps_unused: bool = False
    named: str | None = None

    def trained(self, names: Container[str]) -> tuple[str, ...]:
        """The columns that make the text of a row with these columns; none if there is no text."""
        if "messages" in names:
            return ("messages",)
        has_pair = "prompt" in names and "completion" in names
        if self.field in names and not (has_pair and self._is_unused):
            return (self.field,)
        return ("prompt", "completion") if has_pair else ()

    def ranked(self, names: Container[str]) -> str | None:
        """The column of the answers or captions that attention heads are ranked on; `None` if there is no text."""
        if self.named is not None and self.named in names:
            return self.named
        trained = self.trained(names)
        if trained:
            return trained[-1]
        return "completion" if "completion" in names else None  # captions for a ranking alone

    def required(self, names: Collection[str]) -> str:
        """What [`~TextColumns.ranked`] returns.

        Raises:
            `ValueError`: If there is no text, or not the column that is named; with how to name the right one.
        """
        column = self.ranked(names)
        if column is None or self.named not in (None, column):
            wanted = f"`{self.named}`" if self.named else f"`messages`, `completion` or `{self.field}`"
            there = ", ".join(f"`{name}`" for name in sorted(names))
            raise ValueError(
                f"There is no text to rank attention heads on: the data has {there}, but no column {wanted}. Name the "
                "column of the answers or captions, whose text the labels cover, with `dataset_text_field` (of "
                "`rank_heads`: `text_column`), or choose heads with `aligned_heads` or `head_ranking_path`."
                f"{from_llava(names)}"
            )
        return column

    def without_unused(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row without a plain text that SFTTrainer would not let through to any collator."""
        if self.field not in row or not self._is_unused or self.field in self.trained(row):
            return row
        return {name: value for name, value in row.items() if name != self.field}

    @property
    def _is_unused(self) -> bool:
        return not self.keeps_unused and self.field not in CONVERSATIONS


def refuse_tools(tools: Any) -> None:
    """Refuses definitions of tools, which a row's column `tools` may hold.

    Raises:
        `ValueError`: With what to do instead.
    """
    if tools and tools not in ("[]", "null"):
        raise ValueError(
            "The data has a column `tools`, which SFTTrainer does not show to vision-language models. Write the "
            "definitions into a system turn of each row, as the chat template would, and remove the column with "
            "`dataset.remove_columns('tools')`."
        )
