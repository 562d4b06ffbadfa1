"""What the tests of scripts share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module", autouse=True)
def scripts_are_forgotten() -> Iterator[None]:
    """Scripts import each other by bare names, some of which are those of other folders' scripts."""
    yield
    for name, module in list(sys.modules.items()):
        file = vars(module).get("__file__") if isinstance(module, ModuleType) else None
        if file and Path(file).is_relative_to(EXAMPLES):
            del sys.modules[name]
