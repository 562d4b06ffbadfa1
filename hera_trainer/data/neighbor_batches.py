"""Batches of neighbours: an order of the training data in which each pool holds groups of samples that are near each
other in the teacher's space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler

from ..config import HeRAConfig
from .neighbor_table import NeighborTable, neighbor_table

# Neighbours known of an image, for each sample of a group: the nearest ones may be used already. Longer lists find no
# more true neighbours (20,000 vectors about 400 centres, groups of 16: 2.7, 3.2, 3.3, 3.2 and 3.2 of the nearest ten in
# a pool of 128 with 1, 2, 4, 8 and 16 a sample; 0.06 at random).
LISTED_NEIGHBORS = 4


def check_neighbor_groups(args: HeRAConfig, dataset: Any) -> None:
    """Refuses settings and data under which groups of neighbours can't be put into pools.

    Args:
        args ([`HeRAConfig`]): The settings.
        dataset: The training data.

    Raises:
        `ValueError`: Naming the setting.
    """
    if not args.neighbor_group_size:
        return
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"`neighbor_group_size` ({args.neighbor_group_size}) needs all rows at hand, to look for neighbours among "
            "them, but `train_dataset` is a stream. Set `neighbor_group_size=0`, or load the data without streaming."
        )
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"`neighbor_group_size` ({args.neighbor_group_size}) and `train_sampling_strategy` "
            f"({args.train_sampling_strategy!r}) both want to order the samples. Set `neighbor_group_size=0`, or "
            "`train_sampling_strategy='random'`."
        )
    loading: Any = args.accelerator_config  # an `AcceleratorConfig`, whatever it was given as
    if loading.split_batches:
        raise ValueError(
            "`split_batches=True` of `accelerator_config` gives pools of another size than groups of neighbours are "
            "made for. Set it to `False` and divide `per_device_train_batch_size` by the number of processes, or set "
            "`neighbor_group_size=0`."
        )


def neighbor_sampler(args: HeRAConfig, dataset: Dataset, micro_batch_size: int) -> NeighborGroupSampler:
    """The sampler of a run. To be called by all processes alike.

    Args:
        args ([`HeRAConfig`]): The settings.
        dataset ([`~datasets.Dataset`]): The training data, with a column `teacher_features`.
        micro_batch_size (`int`): Samples that a device takes at a time.
    """
    size = args.neighbor_group_size
    table = neighbor_table(dataset, LISTED_NEIGHBORS * size, args.teacher_similarity, args.device)
    seed = args.seed if args.data_seed is None else args.data_seed
    return NeighborGroupSampler(table, args.pool_size(micro_batch_size), size, seed)


class NeighborGroupSampler(Sampler[int]):
    """Yields every row exactly once an epoch, in groups of neighbours that lie in one pool each.

    `Trainer` and accelerate take `pool_size` indices after the other for each optimizer step, whatever the number of
    micro-batches and processes (for each micro-batch of all processes, with `contrast_scope="micro_batch"`), so a
    group is in one pool if it does not cross a multiple of `pool_size`.

    A group is a random row that is not used yet, and rows of its nearest images that have some left, one row an image.
    Where the list of its neighbours is used up, the group goes on with another random row and the neighbours of that
    one. Images get rare at the end of this pass, so groups are made in random order: no pool, and no part of an epoch,
    has more of the arbitrary ones than others. Where `pool_size` is no multiple of `group_size`, and where rows without
    an image have taken places, the last group of a pool is smaller. These rows lie at random places.

    An order depends on the table, the sizes, the seed and the epoch alone, not on random states. It is made at once:
    for 665,000 rows, in about ten seconds with groups of 16 and in thirty with groups of 4.

    Args:
        table ([`~data.neighbor_table.NeighborTable`]): Images and their neighbours.
        pool_size (`int`): Samples that are compared with each other.
        group_size (`int`): Samples of a group, at least 2.
        seed (`int`, *optional*, defaults to `0`): The same in all processes.

    Example:

    ```python
    >>> table = neighbor_table(dataset, k=64, similarity="cosine", device=torch.device("cpu"))
    >>> sampler = NeighborGroupSampler(table, pool_size=128, group_size=16)
    >>> loader = DataLoader(dataset, batch_size=128, sampler=sampler)
    >>> for epoch in range(3):
    ...     sampler.set_epoch(epoch)
    ...     for batch in loader:
    ...         ...
    ```
    """

    def __init__(self, table: NeighborTable, pool_size: int, group_size: int, seed: int = 0) -> None:
        self.table = table
        self.pool_size = pool_size
        self.group_size = group_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, each of which has an order of its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.table.image_of)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = np.empty(len(self), dtype=np.int64)
        places = rng.permutation(len(self))
        without = rng.permutation(np.flatnonzero(self.table.image_of < 0))
        order[places[: len(without)]] = without
        groups = self._places_of_groups(np.sort(places[len(without) :]))
        unused = UnusedRows(self.table, rng)
        for number in rng.permutation(len(groups)):
            order[groups[number]] = unused.take_group(len(groups[number]))
        return iter(order.tolist())

    def _places_of_groups(self, places: np.ndarray) -> list[np.ndarray]:
        """Ascending places of an epoch, divided into those of each group."""
        pools = np.split(places, np.searchsorted(places, range(self.pool_size, len(self), self.pool_size)))
        size = self.group_size
        return [pool[start : start + size] for pool in pools for start in range(0, len(pool), size)]


class UnusedRows:
    """The rows that an epoch has not used yet, image by image, in random order.

    Args:
        table ([`~data.neighbor_table.NeighborTable`]): Images and their neighbours.
        rng (`np.random.Generator`): Gives the order.
    """

    def __init__(self, table: NeighborTable, rng: np.random.Generator) -> None:
        rows = rng.permutation(np.flatnonzero(table.image_of >= 0))
        images = table.image_of[rows]
        self._neighbors = table.neighbors
        self._seeds = iter(images.tolist())  # an image comes as often as it has rows, so that none is left at the end
        self._rows = rows[np.argsort(images, kind="stable")]
        self._left = np.bincount(images)  # rows of each image
        self._begin = np.cumsum(self._left) - self._left  # where they lie in `_rows`

    def take_group(self, size: int) -> np.ndarray:
        """Takes rows: a random one and those of its nearest images that have some left, and so on until there are
        enough.

        Args:
            size (`int`): How many, not more than are left.

        Returns:
            `np.ndarray` of shape `[size]`: Their numbers, the random one first and its nearest next.
        """
        group = np.empty(0, dtype=np.int64)  # images
        taken = np.empty(size, dtype=np.int64)
        while len(group) < size:
            seed = next(self._seeds)
            if not self._left[seed]:
                continue
            near = self._neighbors[seed]
            near = near[self._left[near] > 0]
            if len(group):
                near = near[np.isin(near, group, invert=True)]
            near = np.concatenate([[seed], near])[: size - len(group)]
            self._left[near] -= 1
            taken[len(group) : len(group) + len(near)] = self._rows[self._begin[near] + self._left[near]]
            group = np.concatenate([group, near])
        return taken
