"""Short answers to questions about images, and how many of them are right."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from ..evaluation import generation
from ..evaluation.answer_scores import exact_match


def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    batch_size: int = 32,
    max_new_tokens: int = 8,
    autocast_dtype: torch.dtype | None = None,
) -> list[str]:
    """Answers each row's prompt greedily.

    The model may be trained afterwards: its modes, and the layout of 4-bit weights, are left as they were.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A vision-language model.
        processor (`ProcessorMixin`): Its processor, with a chat template.
        dataset (`Dataset`): Columns `images` (list of PIL images) and `prompt` (conversational); others are ignored.
        batch_size (`int`, defaults to `32`): Prompts generated together, padded on the left.
        max_new_tokens (`int`, defaults to `8`): Length at which an answer is cut.
        autocast_dtype (`torch.dtype`, *optional*): Autocast to this dtype; the model's own arithmetic by default.

    Returns:
        `list[str]`: One answer a row, without special tokens and surrounding space.
    """
    answers: list[str] = []
    for start in range(0, len(dataset), batch_size):
        rows = dataset.select(range(start, min(start + batch_size, len(dataset))))
        conversations = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in rows]
        answers += generation.answer(model, processor, conversations, max_new_tokens, autocast_dtype)
    return answers


def accuracy(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Share of predictions that equal the answer (see [`~evaluation.answer_scores.exact_match`]).

    Args:
        predictions (`Sequence[str]`): What the model said.
        answers (`Sequence[str]`): What is right, in the same order.

    Raises:
        ValueError: Different lengths, or nothing to compare.
    """
    _check_lengths(predictions=predictions, answers=answers)
    return exact_match(predictions, answers)["exact_match"]


def majority_accuracy(
    train_answers: Sequence[str],
    test_answers: Sequence[str],
    train_types: Sequence[str] | None = None,
    test_types: Sequence[str] | None = None,
) -> float:
    """Accuracy of always giving the most frequent answer of the training set, never looking at an image.

    Args:
        train_answers (`Sequence[str]`): Answers to count.
        test_answers (`Sequence[str]`): Answers to hit.
        train_types, test_types (`Sequence[str]`, *optional*):
            The type of each question, for example its `question_type`: then the most frequent answer of each type is
            given, the stronger baseline. A type that does not occur in training gets the most frequent answer of all.

    Raises:
        ValueError: Only one of the two types given, different lengths, or an empty set.
    """
    if (train_types is None) != (test_types is None):
        raise ValueError("Give both `train_types` and `test_types`, or neither.")
    train_types = train_types if train_types is not None else [""] * len(train_answers)
    test_types = test_types if test_types is not None else [""] * len(test_answers)
    _check_lengths(train_answers=train_answers, train_types=train_types)
    _check_lengths(test_answers=test_answers, test_types=test_types)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, given in zip(train_types, train_answers, strict=True):
        counts[kind][given] += 1
    overall = Counter(train_answers)
    guesses = [(counts.get(kind) or overall).most_common(1)[0][0] for kind in test_types]
    return accuracy(guesses, test_answers)


def _check_lengths(**columns: Sequence[str]) -> None:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"Expected the same number, above zero, of {' and '.join(columns)}, got {lengths}.")
