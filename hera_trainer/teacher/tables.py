"""The table underneath a data set, whose rows may be chosen from it, or be in another order."""

from __future__ import annotations

import datasets
import numpy as np


def underlying(dataset: datasets.Dataset) -> datasets.Dataset:
    """All rows of the data set's table, in the order in which they lie there."""
    return datasets.Dataset(dataset.data, info=dataset.info.copy(), fingerprint=dataset._fingerprint)


def stored_rows(dataset: datasets.Dataset) -> np.ndarray:
    """Where in the table each row of the data set lies, `[n_rows]` integers: what is read of a column of
    `dataset.data` is in the order of the rows once it is indexed with them."""
    if dataset._indices is None:
        return np.arange(len(dataset))
    return dataset._indices.column(0).to_numpy()
