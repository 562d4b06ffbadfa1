"""Data as it is named on the command line: by a name on the Hub, a folder or a file."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from ..teacher.image_sources import IMAGE_COLUMNS, written_image
from .paths import FILE_FORMATS, data_files, local_path

# In the names of files that are no training data, as `datasets` reads them.
_OTHER_SPLITS = re.compile(r"(?<![a-z])(test|testing|eval|evaluation|val|valid|validation|dev)(?![a-z])", re.I)


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
    path = name = local_path(dataset)
    folder = Path(path) if os.path.isdir(path) else Path(path).parent if os.path.isfile(path) else Path()
    rows: Any
    if any(Path(path, name).is_file() for name in ("dataset_dict.json", "state.json")):  # of `save_to_disk`
        rows = _part(datasets.load_from_disk(path), split)
        rows = rows.to_iterable_dataset() if streaming else rows
    else:
        if os.path.isfile(path):
            path, builder = _of_file(Path(path), "train", builder)
        elif os.path.isdir(path) and config is None and not builder:
            path, builder = _of_folder(Path(path), split)
        try:
            rows = datasets.load_dataset(path, name=config, split=split, streaming=streaming, **builder)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"The data set {os.fspath(dataset)!r} can't be read: {_root_cause(error)}") from error
        if os.path.isdir(name):
            _check_not_images_alone(rows, folder)
    if os.path.exists(name):  # by which the record of a run calls it; `datasets` says "json"
        rows.info.dataset_name = Path(name).absolute().name
    return with_images(rows, folder, image_columns)


def _of_file(file: Path, split: str, builder: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What to ask `datasets.load_dataset` for, to read a file as a split."""
    if not file.stat().st_size:
        raise ValueError(f"The data file {str(file)!r} is empty.")
    suffix = file.suffix.lower()
    if suffix not in FILE_FORMATS:
        raise ValueError(f"Data files end in one of {', '.join(FILE_FORMATS)}, not in {suffix!r}: {str(file)!r}.")
    pattern = glob.escape(str(file.absolute()))  # it would take another file where the name has brackets
    return FILE_FORMATS[suffix], {**builder, "data_files": {split: pattern}}


def _of_folder(folder: Path, split: str) -> tuple[str, dict[str, Any]]:
    """The same of a folder: of its file for the split, or of its only one. Where images lie beside it, `datasets` would
    take the folder for one of images alone."""
    if part := re.fullmatch(r"(\w+)(\[.*\])?", split):
        files = [file for file in data_files(folder) if file.stem == part[1]]
        if not files and part[1] == "train":
            files = [file for file in data_files(folder) if not _OTHER_SPLITS.search(file.stem)]
            files = [] if any(data_files(inner) for inner in folder.iterdir() if inner.is_dir()) else files
        if len(files) == 1:
            return _of_file(files[0], part[1], {})
    if glob.has_magic(str(folder)):
        raise ValueError(
            f"{str(folder)!r} has a sign in its path that stands for others (`[`, `]`, `*`, `?`), which `datasets` "
            "cannot read a folder by. Rename it, or name one data file in it."
        )
    return str(folder), {}


def _check_not_images_alone(rows: Any, folder: Path) -> None:
    """Refuses the images of a folder without the data files that lie beside them."""
    files = data_files(folder) if rows.info.builder_name == "imagefolder" else []
    if files and not any(folder.rglob("metadata.*")):
        names = ", ".join(f"`{file.name}`" for file in files)
        raise ValueError(
            f"{str(folder)!r} has images and beside them {names}. Name the data file, in whose columns `image` or "
            "`images` are paths, or call it `metadata`, with the images' names in its column `file_name`."
        )


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
    """Columns of paths, of images in text (data URIs, base64), or of dictionaries of bytes and path, become columns of
    images.

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
            stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
            # Of a stream, which would take rows whose features are known for decoded ones, they are not given.
            is_table = isinstance(rows, Dataset)
            known = datasets.Features({**rows.features, name: [stored] if is_list else stored}) if is_table else None
            images = partial(_stored_images, name=name, folder=os.path.abspath(folder))
            rows = rows.map(images, batched=True, input_columns=[name], features=known)
        cast[name] = datasets.List(datasets.Image()) if is_list else datasets.Image()
    return rows if cast == dict(features) else rows.cast(datasets.Features(cast))


def _stored_images(values: list[Any], name: str, folder: str) -> dict[str, list[Any]]:
    """Images in text, or their absolute paths, as `datasets.Image` stores them."""

    def stored(value: Any) -> Any:
        if isinstance(value, list):
            return [stored(item) for item in value]
        if not value:
            return None
        written = written_image(value)
        path = None if written is not None else value if "://" in value else os.path.join(folder, value)
        return {"bytes": written, "path": path}

    return {name: [stored(value) or None for value in values]}


def _check_first(rows: Any, name: str, folder: Path) -> None:
    for row in islice(rows.select_columns([name]), 100):
        for path in row[name] if isinstance(row[name], list) else [row[name]]:
            if path and "://" not in path and written_image(path) is None:
                if not os.path.exists(os.path.join(folder, path)):
                    raise FileNotFoundError(
                        f"Column `{name}` names the image {path!r}, which is not in {os.path.abspath(folder)}. Paths "
                        "of images are absolute, or relative to the folder of the data file."
                    )
                return
