"""Work beside a training run that must not change what the run draws at random."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """All random states are afterwards as they were; a data collator may draw from any of them."""
    devices = [] if device.type == "cpu" else [device]
    own, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type):
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numpys)
