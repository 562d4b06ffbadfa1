"""`hera env`."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__
from ..common.redaction import public_settings
from .parser import Parser

REQUIRED = """
    torch torchvision transformers trl peft accelerate datasets evaluate huggingface_hub safetensors tokenizers numpy
    pillow pyarrow
""".split()
OPTIONAL = """
    bitsandbytes deepspeed flash_attn liger_kernel kernels timm torchao hqq unsloth xformers matplotlib plotly
    tensorboard trackio wandb lmms_eval
""".split()


def _parser() -> argparse.ArgumentParser:
    return Parser(
        prog="hera env",
        description="Prints the versions of all libraries that matter, and the hardware, as a list to paste into a bug "
        "report. Tokens, and the names of your home folder and your computer, are not in it.",
        epilog="example:\n  hera env > env.md",
    )


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _abbreviated(path: str | os.PathLike) -> str:
    """A path below the home folder from `~` on, and the last part only of any other: neither tells who you are."""
    path = Path(path)
    if path.is_relative_to(Path.home()):
        return str(Path("~", path.relative_to(Path.home())))
    return f".../{path.name}"


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:  # Windows
        return "unknown"
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {usable} cores usable"


def _accelerators() -> list[str]:
    import torch

    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            capability = f"compute capability {device.major}.{device.minor}"
            found.append(f"{device.name}, {device.total_memory / 2**30:.1f} GiB, {capability}")
        return found
    other = torch.accelerator.current_accelerator(check_available=True)
    return ["none"] if other is None else [f"{torch.accelerator.device_count()} x {other.type}"]


def _accelerate_config() -> str:
    from accelerate.commands.config import default_config_file, load_config_from_file

    if not os.path.isfile(default_config_file):
        return "none"
    settings = public_settings(load_config_from_file(default_config_file).to_dict())  # some name files and servers
    private = ("main_process_ip", "tpu_name", "tpu_zone", "rdzv")
    shown = {
        key: value for key, value in settings.items() if value not in (None, {}, []) and not key.startswith(private)
    }
    return "".join(f"\n  - {key}: {value}" for key, value in shown.items())


def environment() -> dict[str, str]:
    """Versions and hardware, by name, as [`hera env`] prints them."""
    import datasets
    import torch

    from ..heads.registry import unknown_model_types

    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    accelerators = {f"accelerator {index}": name for index, name in enumerate(_accelerators())}
    return {
        "hera-trainer": __version__,
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "CPU": _processor(),
        "RAM": _memory(),
        **accelerators,
        "CUDA of torch": f"{torch.version.cuda or torch.version.hip or 'none'}" + (f", cuDNN {cudnn}" if cudnn else ""),
        **{name: _installed(name) for name in (*REQUIRED, *OPTIONAL)},
        "model types of transformers that this release does not know": ", ".join(unknown_model_types()) or "none",
        "Hugging Face cache": _abbreviated(datasets.config.HF_CACHE_HOME),
        "offline": str(bool(datasets.config.HF_HUB_OFFLINE)).lower(),
        "accelerate config": _accelerate_config(),
    }


def main(arguments: Sequence[str]) -> None:
    _parser().parse_args(arguments)
    for name, value in environment().items():
        print(f"- {name}:{'' if value.startswith(chr(10)) else ' '}{value}")
