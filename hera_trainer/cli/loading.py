"""Models as they are named on the command line: by a name on the Hub or a folder, or as an adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
)
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import is_bitsandbytes_available
from transformers.utils.peft_utils import find_adapter_config_file

from ..runs.written_files import holds_adapter
from .paths import local_path

DTYPES = ("auto", "bfloat16", "float16", "float32")


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def check_device(device: str | torch.device | None) -> None:
    """Refuses a device that this machine does not have, in one line; torch has a page for it.

    Args:
        device (`str` or `torch.device`, *optional*): Such as `"cuda:1"`.

    Raises:
        `ValueError`: If there is no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator is not None else 0
    known = ["cpu", *(f"{accelerator}:{index}" for index in range(count))]
    bare = [] if accelerator is None else [str(accelerator)]
    if device is not None and str(device) not in (*known, *bare):
        raise ValueError(f"There is no device {str(device)!r} here (`--device`). There are {', '.join(known)}.")


def load_model(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    load_in_4bit: bool = False,
    device: str | torch.device | None = None,
    base_model: str | os.PathLike | None = None,
) -> tuple[nn.Module, Any]:
    """Loads a model, or a PEFT adapter on its base model, for inference.

    Args:
        path (`str` or `os.PathLike`): Name on the Hub or folder of a full model or of a PEFT adapter.
        revision (`str`, *optional*):
            Branch, tag or commit of `path`. That of an adapter's base model is what the adapter says.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Data type of the weights: `"auto"` (as they are stored), `"bfloat16"`, `"float16"` or `"float32"`.
        load_in_4bit (`bool`, *optional*, defaults to `False`): Quantize the (base) model to 4 bit, NF4, while loading.
        device (`str` or `torch.device`, *optional*): Where it goes. The accelerator if there is one, else the CPU.
        base_model (`str` or `os.PathLike`, *optional*):
            Base model of an adapter, instead of the one that the adapter names.

    Returns:
        `tuple`: The model in eval mode, a [`~peft.PeftModel`] for an adapter, and the processor (a tokenizer for a
        language model without vision): the one beside the adapter, else that of the base model.

    Raises:
        `OSError`: If there is no such folder or repository.
        `ValueError`: If `path` is no model, the adapter does not fit its base model, or there is no such device.
        `ImportError`: If `load_in_4bit` is set and bitsandbytes is not installed.
    """
    check_device(device)
    adapter, base, base_revision = _found(path, revision, base_model)
    if adapter is None:
        return _load_full(base, base_revision, dtype, load_in_4bit, device), load_processor(base, base_revision)
    whole = _trained_in_full(adapter)
    adapted = _put_adapter(_load_full(base, base_revision, dtype, load_in_4bit, device, whole), adapter)
    sees = type(adapted.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return adapted.eval(), _processor_of(adapter, base, base_revision, sees)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Says which model could not be loaded, which transformers leaves out when it is offline."""
    try:
        yield
    except OSError as error:
        raise OSError(f"The model {path!r} can't be loaded: {error}") from error


def adapter_folder(path: str, revision: str | None = None) -> str | None:
    """The folder of a PEFT adapter, downloaded if it lies on the Hub; `None` if `path` is no adapter."""
    with _named(path):
        if find_adapter_config_file(path, revision=revision) is None:
            return None
    if os.path.isdir(path):
        if not holds_adapter(Path(path)):  # transformers would put the adapter on the newer model
            raise ValueError(
                f"{path!r} holds a whole model and, of an earlier run, an adapter ({CONFIG_NAME}), which would be put "
                "on it. Remove the adapter's files."
            )
        return path
    return snapshot_download(path, revision=revision, ignore_patterns=["*/*", "*.pt", "*.pth"])


def base_of(adapter: str, base_model: str | os.PathLike | None = None) -> tuple[str, str | None]:
    """Name and revision of the base model of an adapter.

    Args:
        adapter (`str`): Folder of the adapter.
        base_model (`str` or `os.PathLike`, *optional*): The base model, if it is not what the adapter names.

    Raises:
        `ValueError`: If the adapter names none, or a folder that is not there.
    """
    if base_model is not None:
        return local_path(base_model), None
    config = PeftConfig.from_pretrained(adapter)
    name = config.base_model_name_or_path
    cure = "Name the base model (`--base-model`), or correct `base_model_name_or_path` in its adapter_config.json."
    if not name:
        raise ValueError(f"The adapter {adapter!r} does not say what its base model is. {cure}")
    try:
        return local_path(name), config.revision
    except FileNotFoundError as error:
        raise ValueError(f"The adapter {adapter!r} says that its base model is {name!r}. {error} {cure}") from error


def model_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    """Configuration of a full model."""
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"The folder {path!r} has neither config.json (a model) nor adapter_config.json (an adapter).")
    with _named(path):
        return AutoConfig.from_pretrained(path, revision=revision)


def check_model(
    path: str | os.PathLike, revision: str | None = None, base_model: str | os.PathLike | None = None
) -> None:
    """Looks whether a model, and the base model of an adapter, are there, without reading weights. Arguments and errors
    are those of [`load_model`]."""
    model_config(*_found(path, revision, base_model)[1:])


def _found(
    path: str | os.PathLike, revision: str | None, base_model: str | os.PathLike | None
) -> tuple[str | None, str, str | None]:
    """The folder of an adapter (`None` for a full model), and name and revision of the full model."""
    path = local_path(path)
    adapter = adapter_folder(path, revision)
    if adapter is not None:
        return adapter, *base_of(adapter, base_model)
    if base_model is not None:
        raise ValueError(f"{path!r} is no adapter (it has no adapter_config.json), so it takes no base model.")
    return None, path, revision


def _put_adapter(model: nn.Module, adapter: str) -> PeftModel:
    """The model with an adapter on it.

    Raises:
        `ValueError`: If the adapter does not fit the model.
    """
    try:
        return PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, KeyError) as error:  # weights of another shape
        raise ValueError(f"The adapter {adapter!r} does not fit the base model: {error}") from error


def load_processor(path: str, revision: str | None = None) -> Any:
    """Processor of a model, or its tokenizer if it has no processor."""
    with _named(path):
        return AutoProcessor.from_pretrained(path, revision=revision)


def _processor_of(adapter: str, base: str, base_revision: str | None, sees: bool) -> Any:
    """The processor beside an adapter, or its base model's; for a language model without vision, the tokenizer."""
    files = ("processor_config.json", "preprocessor_config.json") if sees else (TOKENIZER_CONFIG_FILE,)
    if not any(Path(adapter, name).is_file() for name in files):
        return load_processor(base, base_revision)
    return load_processor(adapter) if sees else AutoTokenizer.from_pretrained(adapter)


def _trained_in_full(adapter: str) -> list[str]:
    """Names of the modules of which an adapter holds whole copies."""
    return list(getattr(PeftConfig.from_pretrained(adapter), "modules_to_save", None) or [])


def _load_full(
    path: str,
    revision: str | None,
    dtype: str | torch.dtype,
    load_in_4bit: bool,
    device: str | torch.device | None,
    in_full: Sequence[str] = (),
) -> nn.Module:
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    config = model_config(path, revision)
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    model_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    quantization = _four_bit(config, dtype, _not_quantized(model_class, config, in_full)) if load_in_4bit else None
    with _named(path):
        model = model_class.from_pretrained(
            path,
            config=config,
            revision=revision,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device or default_device()},
        )
    return model.eval()


def _not_quantized(model_class: Any, config: PreTrainedConfig, in_full: Sequence[str]) -> list[str] | None:
    """Modules that stay as they are stored: those whose whole copies an adapter brings, and the output embeddings, as
    without any. `None` if there are none."""
    if not in_full:
        return None
    with torch.device("meta"):
        model = model_class.from_config(config)
    named = {id(module): name for name, module in model.named_modules()}
    output = model.get_output_embeddings()
    found = [name for name in named.values() if any(name == end or name.endswith(f".{end}") for end in in_full)]
    return found if output is None else [*found, named[id(output)]]


def _four_bit(config: PreTrainedConfig, dtype: str | torch.dtype, skipped: list[str] | None) -> BitsAndBytesConfig:
    if not is_bitsandbytes_available():
        raise ImportError('4-bit models need bitsandbytes. Install it with `pip install "hera-trainer[bitsandbytes]"`.')
    if dtype == "auto":
        dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        llm_int8_skip_modules=skipped,
    )
