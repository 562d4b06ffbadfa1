"""Models and data as they are named on the command line: by a name on the Hub, a folder or a file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, IterableDataset
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
from ..teacher.image_sources import IMAGE_COLUMNS

DTYPES = ("auto", "bfloat16", "float16", "float32")

# Endings of data files, and the builders of `datasets` that read them.
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


# --- Models ----------------------------------------------------------------------------------------------------------


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


def local_path(path: str | os.PathLike) -> str:
    """A path as it is opened, or a name on the Hub as it is.

    Raises:
        `FileNotFoundError`: If it can only be a path, and nothing is there.
    """
    text = os.path.expanduser(os.fspath(path))
    looks_local = text.startswith((".", os.sep)) or text.count("/") > 1 or Path(text).suffix in FILE_FORMATS
    if looks_local and not os.path.exists(text):
        raise FileNotFoundError(f"There is no file or folder {text!r} (looked for in {os.getcwd()}).")
    return text


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


# --- Data ------------------------------------------------------------------------------------------------------------


def load_rows(
    dataset: str | os.PathLike,
    *,
    config: str | None = None,
    split: str = "train",
    limit: int | None = None,
    image_columns: Sequence[str] = IMAGE_COLUMNS,
) -> Dataset:
    """Loads a split of a data set.

    Args:
        dataset (`str` or `os.PathLike`):
            Name on the Hub; a folder that `save_to_disk` wrote, of images, or of data files; or a `.json`, `.jsonl`,
            `.parquet`, `.csv` or `.arrow` file. In files, image columns may hold paths (one, or a list), which are
            relative to the file's folder.
        config (`str`, *optional*): Configuration (subset) of a data set on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split, also a part of one such as `"train[:10%]"`. Data without splits is `"train"`.
        limit (`int`, *optional*): Only the first rows.
        image_columns (sequence of `str`, *optional*, defaults to `("image", "images")`):
            Columns whose paths become images.

    Returns:
        [`~datasets.Dataset`].

    Raises:
        `OSError`: If there is no such file, folder or repository.
        `ValueError`: If it has no such split, no rows, or can't be read.
    """
    rows = open_rows(dataset, config=config, split=split, image_columns=image_columns)
    assert isinstance(rows, Dataset)
    if limit is not None and limit < len(rows):
        rows = rows.select(range(limit))
    if not len(rows):
        raise ValueError(f"The data set {os.fspath(dataset)!r} has no rows in {split!r}.")
    return rows


def open_rows(
    dataset: str | os.PathLike,
    *,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    image_columns: Sequence[str] = IMAGE_COLUMNS,
    **builder: Any,
) -> Dataset | IterableDataset:
    """As [`load_rows`], but also as a stream, and with more arguments of [`~datasets.load_dataset`].

    Args:
        dataset, config, split, image_columns: See [`load_rows`].
        streaming (`bool`, *optional*, defaults to `False`): Return a [`~datasets.IterableDataset`].
        **builder: More for [`~datasets.load_dataset`], such as `data_dir` or `data_files`.
    """
    path = local_path(dataset)
    folder = Path(path) if os.path.isdir(path) else Path(path).parent if os.path.isfile(path) else Path()
    rows: Any
    if any(Path(path, name).is_file() for name in ("dataset_dict.json", "state.json")):  # of `save_to_disk`
        rows = _part(datasets.load_from_disk(path), split)
        rows = rows.to_iterable_dataset() if streaming else rows
    else:
        if os.path.isfile(path):
            if not os.path.getsize(path):
                raise ValueError(f"The data file {path!r} is empty.")
            builder["data_files"] = path
            path = _format_of(path)
        elif (name := re.fullmatch(r"(\w+)(\[.*\])?", split)) and config is None and not builder:
            # Where its images lie beside `test.jsonl`, `datasets` would take the folder for one of images alone.
            files = [file.name for file in Path(path).glob(f"{name[1]}.*") if file.suffix in FILE_FORMATS]
            builder = {"data_files": {name[1]: files[0]}} if len(files) == 1 else {}
        try:
            rows = datasets.load_dataset(path, name=config, split=split, streaming=streaming, **builder)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"The data set {os.fspath(dataset)!r} can't be read: {_root_cause(error)}") from error
    return with_images(rows, folder, image_columns)


def _format_of(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in FILE_FORMATS:
        raise ValueError(f"Data files end in one of {', '.join(FILE_FORMATS)}, not in {suffix!r}: {path!r}.")
    return FILE_FORMATS[suffix]


def _part(stored: Dataset | datasets.DatasetDict, split: str) -> Dataset:
    """What `split` (`"train"`, `"train[:10%]"`, `"train+test"`) means of data that `save_to_disk` wrote."""
    splits = stored if isinstance(stored, datasets.DatasetDict) else {"train": stored}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    if len(parts) == 1 and (parts[0].from_, parts[0].to) == (0, len(splits[parts[0].splitname])):
        return splits[parts[0].splitname]  # untouched, so that its fingerprint stays
    return datasets.concatenate_datasets([splits[p.splitname].select(range(p.from_, p.to)) for p in parts])


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def with_images(rows: Any, folder: Path, columns: Sequence[str] = IMAGE_COLUMNS) -> Any:
    """Columns of paths, or of dictionaries of bytes and path, become columns of images.

    Args:
        rows ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The data.
        folder (`Path`): What relative paths are relative to.
        columns (sequence of `str`): The columns.

    Raises:
        `FileNotFoundError`: If the first image of a column is not there.
    """
    features = rows.features
    if features is None:  # of a stream whose source does not say
        features = Dataset.from_list(list(rows.take(8))).features
    cast = dict(features)
    for name in columns:
        feature = features.get(name)
        is_list = isinstance(feature, (datasets.List, datasets.LargeList))
        inner = feature.feature if is_list else feature
        is_text = isinstance(inner, datasets.Value) and inner.dtype in ("string", "large_string")
        if not is_text and not (isinstance(inner, dict) and set(inner) == {"bytes", "path"}):
            continue
        if is_text:
            _check_first(rows, name, folder)
            absolute = partial(_absolute_paths, name=name, folder=os.path.abspath(folder))
            rows = rows.map(absolute, batched=True, input_columns=[name])
        cast[name] = datasets.List(datasets.Image()) if is_list else datasets.Image()
    return rows if cast == dict(features) else rows.cast(datasets.Features(cast))


def _absolute_paths(values: list[Any], name: str, folder: str) -> dict[str, list[Any]]:
    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(item) for item in value]
        return value if not value or "://" in value else os.path.join(folder, value)

    return {name: [absolute(value) or None for value in values]}


def _check_first(rows: Any, name: str, folder: Path) -> None:
    for row in islice(rows.select_columns([name]), 100):
        for path in row[name] if isinstance(row[name], list) else [row[name]]:
            if path and "://" not in path:
                if not os.path.exists(os.path.join(folder, path)):
                    raise FileNotFoundError(
                        f"Column `{name}` names the image {path!r}, which is not in {os.path.abspath(folder)}. Paths "
                        "of images are absolute, or relative to the folder of the data file."
                    )
                return
