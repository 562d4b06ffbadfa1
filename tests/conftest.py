"""Settings that must be in place before any library is imported: offline, quiet, few threads, caches of its own."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# The libraries below fix these paths when they are imported, so a fixture would come too late to set them.
CACHE_ROOT = Path(tempfile.mkdtemp(prefix="hera-tests-"))

os.environ.update(
    HF_HOME=str(CACHE_ROOT / "huggingface"),
    HF_DATASETS_CACHE=str(CACHE_ROOT / "huggingface" / "datasets"),
    XDG_CACHE_HOME=str(CACHE_ROOT),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("HERA_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import datasets  # noqa: E402
import huggingface_hub  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_no_garbage() -> None:
    """Each training collects garbage, and looking through all that the libraries hold takes a third of a second. Once
    a module, since some of them are imported late."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _offline() -> Iterator[None]:
    """No test leaves the network on for those that come after it, which would wait for a Hub that is not there."""
    yield
    assert huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.fixture(scope="session")
def cache_root() -> Path:
    """The folder that holds every cache of this test run."""
    return CACHE_ROOT


def pytest_unconfigure() -> None:
    """Remove the caches, also after a run that collected nothing."""
    shutil.rmtree(CACHE_ROOT, ignore_errors=True)
