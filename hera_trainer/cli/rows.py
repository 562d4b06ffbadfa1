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
        is_folder = os.path.isdir(path) and config is None and not builder
        if os.path.isfile(path):
            path, builder = _of_file(Path(path), "train", builder)
        elif is_folder:
            path, builder = _of_folder(Path(path), split)
        options = {"name": config, "split": split, "streaming": streaming}
        try:
            rows = datasets.load_dataset(path, **options, **builder)
            is_train = re.fullmatch(r"train(\[.*\])?", split) is not None
            if is_folder and is_train and (file := _file_of_images(rows, folder, image_columns)) is not None:
                path, builder = _of_file(file, "train", {})
                rows = datasets.load_dataset(path, **options, **builder)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"The data set {os.fspath(dataset)!r} can't be read: {_root_cause(error)}") from error
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
    """The same of a folder: of its file for the split, if there is one. Where images lie beside it, `datasets` would
    take the folder for one of images alone."""
    if part := re.fullmatch(r"(\w+)(\[.*\])?", split):
        files = [file for file in data_files(folder) if file.stem == part[1]]
        if len(files) == 1:
            return _of_file(files[0], part[1], {})
    if glob.has_magic(str(folder)):
        raise ValueError(
            f"{str(folder)!r} has a sign in its path that stands for others (`[`, `]`, `*`, `?`), which `datasets` "
            "cannot read a folder by. Rename it, or name one data file in it."
        )
    return str(folder), {}


def _file_of_images(rows: Any, folder: Path, image_columns: Sequence[str]) -> Path | None:
    """The data file whose columns name the images beside it, where `datasets` has taken a folder for one of images.

    Raises:
        `ValueError`: If there are several.
    """
    if rows.info.builder_name != "imagefolder" or set(rows.column_names or ()) != {"image"}:
        return None
    files = [file for file in data_files(folder) if _has_column(file, image_columns)]
    if len(files) > 1:
        names = ", ".join(f"`{file.name}`" for file in files)
        raise ValueError(
            f"{str(folder)!r} has images and several data files that name them: {names}. Name one of these."
        )
    return files[0] if files else None


def _has_column(file: Path, names: Sequence[str]) -> bool:
    """Whether a file of text seems to have one of these columns: other files may lie in a folder of images, too."""
    with file.open(errors="replace") as lines:
        head = lines.read(1 << 16)
    if file.suffix == ".csv":
        return not set(names).isdisjoint(re.split(r"[\s,;\"]+", head.split("\n", 1)[0]))
    return FILE_FORMATS[file.suffix] == "json" and any(f'"{name}"' in head for name in names)


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
