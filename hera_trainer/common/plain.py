"""Values of others, as JSON can hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def as_plain(value: Any) -> Any:
    """What JSON does not know, as it does: numbers and lists of tensors and NumPy's values, of anything else the text.
    For `json.dumps(default=as_plain)`."""
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    return str(value)
