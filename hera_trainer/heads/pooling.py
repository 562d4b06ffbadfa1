"""Which positions of a sample its head representations are pooled over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Names under which configs and processors keep the ids of tokens that stand for image or video features.
_PLACEHOLDER_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def placeholder_token_ids(config: Any, processing_class: Any = None) -> list[int]:
    """Ids of the tokens that stand for image or video features in a model's input."""
    ids = {getattr(owner, name, None) for owner in (config, processing_class) for name in _PLACEHOLDER_NAMES}
    return sorted(i for i in ids if isinstance(i, int))


def pooling_mask(labels: Tensor, input_ids: Tensor, placeholder_ids: Sequence[int]) -> Tensor:
    """Positions that head representations are pooled over: those with a label of their own (unshifted), without the
    image placeholders, which carry labels too in plain `messages` data.

    Args:
        labels (`LongTensor` of shape `[B, T]`): -100 where there is no loss.
        input_ids (`LongTensor` of shape `[B, T]`): Token ids.
        placeholder_ids (sequence of `int`): See [`placeholder_token_ids`].

    Returns:
        `BoolTensor` of shape `[B, T]`.
    """
    placeholders = torch.tensor(list(placeholder_ids), dtype=input_ids.dtype, device=input_ids.device)
    return (labels != -100) & ~torch.isin(input_ids, placeholders)
