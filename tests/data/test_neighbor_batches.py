"""Batches of neighbours: each row once an epoch, in groups that brute force finds too and that lie in one pool each."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value
from neighbor_worker import CLUSTERS, GROUP, POOL, SAVED, STEPS, clustered_rows, rows_seen, watched
from runs import config
from runs import trainer as hera_run
from tiny import build_vlm, image_dataset
from torch.utils.data import RandomSampler, SequentialSampler
from transformers import set_seed
from trl import SFTTrainer
from two_processes import launched_once

import hera_trainer.data.neighbor_table as neighbor_table_module
from hera_trainer import HeRATrainer
from hera_trainer.data.neighbor_batches import NeighborGroupSampler, UnusedRows, neighbor_sampler
from hera_trainer.data.neighbor_table import NeighborTable, neighbor_table
from hera_trainer.teacher.column import TEACHER_COLUMN

CPU = torch.device("cpu")


def near_first(vectors: np.ndarray, row: int) -> list[int]:
    """All other rows by falling cosine similarity, in double precision."""
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return [i for i in np.argsort(-(unit @ unit[row])).tolist() if i != row]


def random_vectors(n: int, d: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def table_of(vectors: np.ndarray, image_of: Any = None, k: int | None = None) -> NeighborTable:
    """The table of images with these vectors, each of which has one row if nothing else is said."""
    images = np.arange(len(vectors)) if image_of is None else np.array(image_of)
    neighbors = np.array([near_first(vectors, i)[:k] for i in range(len(vectors))], dtype=np.int32)
    return NeighborTable(images, neighbors)


def with_vectors(vectors: list[Any]) -> Dataset:
    return Dataset.from_dict({"number": range(len(vectors))}).add_column(
        TEACHER_COLUMN, vectors, feature=List(Value("float32"))
    )


def pools_of(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


# --- The table -------------------------------------------------------------------------------------------------------


def test_table_against_brute_force() -> None:
    """Rows in disorder, some of them of one image, some without an image."""
    vectors = random_vectors(40)
    drawn = [*np.random.default_rng(1).permutation(40).tolist(), 3, 3, 17]
    rows = with_vectors([None, *(vectors[i] for i in drawn), None])
    table = neighbor_table(rows, 5, "cosine", CPU)
    assert (table.image_of[[0, -1]] == -1).all() and table.neighbors.shape == (40, 5)
    number = dict(zip(table.image_of[1:-1].tolist(), drawn, strict=True))  # image of the table -> row of `vectors`
    assert sorted(number) == list(range(40))
    for row, image in zip(drawn, table.image_of[1:-1], strict=True):
        assert [number[i] for i in table.neighbors[image].tolist()] == near_first(vectors, row)[:5]


def test_table_of_few_images_and_of_one() -> None:
    table = neighbor_table(with_vectors(list(random_vectors(4))), 64, "cosine", CPU)
    assert [sorted([i, *row]) for i, row in enumerate(table.neighbors.tolist())] == [[0, 1, 2, 3]] * 4
    with pytest.raises(ValueError, match=r"All images .* are equal.*Set `neighbor_group_size=0`"):
        neighbor_table(with_vectors([[1.0, 2.0]] * 5), 4, "cosine", CPU)


def test_dot_products_without_normalisation() -> None:
    """The longest vector is everyone's nearest, as it is not among directions."""
    vectors = np.concatenate([np.eye(6, 8), [[9.0] * 8]]).astype(np.float32)
    table = neighbor_table(with_vectors(list(vectors)), 1, "dot", CPU)
    longest = table.image_of[6]
    assert all(table.neighbors[table.image_of[i], 0] == longest for i in range(6))


def test_the_search_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the same vectors in another order; not where another result is asked for, or a file is broken."""
    searches = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        searches.append(args)
        return search(*args, **kwargs)

    search = neighbor_table_module.nearest_neighbors
    monkeypatch.setattr(neighbor_table_module, "nearest_neighbors", counted)
    rows = with_vectors(list(random_vectors(30, seed=7)))
    first = neighbor_table(rows, 4, "cosine", CPU)
    again = neighbor_table(rows.shuffle(seed=0), 4, "cosine", CPU)
    assert len(searches) == 1 and np.array_equal(first.neighbors, again.neighbors)
    assert not np.array_equal(first.image_of, again.image_of)
    neighbor_table(rows, 5, "cosine", CPU)
    neighbor_table(rows, 4, "dot", CPU)
    neighbor_table(rows.select(range(29)), 4, "cosine", CPU)
    assert len(searches) == 4
    for file in (neighbor_table_module.cache_root() / "neighbors").glob("*.npy"):
        file.write_bytes(file.read_bytes()[:-40])
    assert np.array_equal(neighbor_table(rows, 4, "cosine", CPU).neighbors, first.neighbors) and len(searches) == 5


# --- The order -------------------------------------------------------------------------------------------------------

# 50 images; 10 of them have two more rows each, and 15 rows have no image.
IMAGE_OF = [*range(50), *range(10), *range(10), *([-1] * 15)]


@pytest.mark.parametrize(("pool", "group"), [(16, 4), (16, 5), (7, 7), (200, 12), (85, 60)])
def test_every_row_once_an_epoch(pool: int, group: int) -> None:
    sampler = NeighborGroupSampler(table_of(random_vectors(50), IMAGE_OF, k=2 * group), pool, group, seed=3)
    orders = []
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(IMAGE_OF))) and len(sampler) == len(IMAGE_OF)
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_an_order_depends_on_seed_and_epoch_alone() -> None:
    table = table_of(random_vectors(50), IMAGE_OF)
    sampler, same, other = (NeighborGroupSampler(table, 16, 4, seed) for seed in (0, 0, 1))
    first, states = list(sampler), (torch.get_rng_state(), np.random.get_state()[1].copy())
    sampler.set_epoch(4)
    list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == list(same) == first != list(other)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.random.get_state()[1], states[1])


@pytest.mark.parametrize("size", [2, 5, 8])
def test_groups_against_brute_force(size: int) -> None:
    """A group is a row and the nearest ones that no group had before, as long as there are enough."""
    vectors = random_vectors(60)
    unused, left = UnusedRows(table_of(vectors), np.random.default_rng(0)), set(range(60))
    seeds = []
    for _ in range(60 // size):
        seed, *others = unused.take_group(size).tolist()
        assert others == [i for i in near_first(vectors, seed) if i in left][: size - 1] and seed in left
        left -= {seed, *others}
        seeds.append(seed)
    assert len(left) == 60 % size and seeds != sorted(seeds)


def test_a_list_that_is_used_up_goes_on_with_another_row() -> None:
    """Each image knows its nearest only: groups of five are whole pairs of them as far as there are some."""
    vectors = random_vectors(40)
    near = [near_first(vectors, i)[0] for i in range(40)]
    unused, left = UnusedRows(table_of(vectors, k=1), np.random.default_rng(0)), set(range(40))
    for _ in range(8):
        group = unused.take_group(5).tolist()
        place = 0
        while place < 5:
            seed = group[place]
            left.discard(seed)
            if place < 4 and near[seed] in left:
                assert group[place + 1] == near[seed]
                left.discard(near[seed])
                place += 1
            place += 1
    assert not left


def test_a_group_has_an_image_once() -> None:
    """Of images with many rows each, as long as so many images have a row left."""
    image_of = np.random.default_rng(2).permutation(np.repeat(np.arange(20), 6))
    unused = UnusedRows(table_of(random_vectors(20), image_of), np.random.default_rng(0))
    left, full = np.full(20, 6), 0
    while left.sum() >= 8:
        group = image_of[unused.take_group(8)]
        if (left > 0).sum() >= 8:
            assert len(set(group.tolist())) == 8
            full += 1
        np.subtract.at(left, group, 1)
        assert (left >= 0).all()
    assert full >= 10


def test_groups_of_clusters_lie_in_one_pool_each() -> None:
    vectors = np.array(clustered_rows()[TEACHER_COLUMN])
    sampler = NeighborGroupSampler(table_of(vectors, k=2 * GROUP), POOL, GROUP)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        groups = pools_of([row % CLUSTERS for row in sampler], GROUP)
        assert [set(group) for group in groups] == [{group[0]} for group in groups]
        assert len({group[0] for group in groups}) == CLUSTERS


def test_the_last_group_of_a_pool_may_be_smaller() -> None:
    """Pools of 6 and groups of 4; places 0, 1, 2 and 9 are taken by rows without an image."""
    sampler = NeighborGroupSampler(table_of(random_vectors(20)), 6, GROUP)
    whole = [places.tolist() for places in sampler._places_of_groups(np.arange(20))]
    assert whole == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11], [12, 13, 14, 15], [16, 17], [18, 19]]
    rest = [places.tolist() for places in sampler._places_of_groups(np.delete(np.arange(20), [0, 1, 2, 9]))]
    assert rest == [[3, 4, 5], [6, 7, 8, 10], [11], [12, 13, 14, 15], [16, 17], [18, 19]]


def test_rows_without_an_image_lie_at_random_places() -> None:
    """Each place is taken by one of them as often as by chance."""
    table, draws = table_of(random_vectors(50), IMAGE_OF), 1000
    taken = np.zeros(len(IMAGE_OF))
    for seed in range(draws):
        taken += np.array(IMAGE_OF)[list(NeighborGroupSampler(table, 16, 4, seed))] < 0
    share = 15 / len(IMAGE_OF)
    assert np.abs(taken / draws - share).max() < 4.5 * (share * (1 - share) / draws) ** 0.5


def test_more_true_neighbours_than_at_random() -> None:
    """Of the ten nearest of 2,000 samples about 50 centres, counted exactly, in the pools of an epoch; no part of the
    epoch has much fewer than another."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 24))[rng.integers(50, size=2000)] + rng.standard_normal((2000, 24))
    table = table_of(vectors, k=48)
    nearest = [set(near_first(vectors, i)[:10]) for i in range(2000)]

    def true_neighbors(order: list[int]) -> np.ndarray:
        return np.array([sum(len(nearest[i] & set(pool)) for i in pool) for pool in pools_of(order, 100)]) / 100

    grouped = true_neighbors(list(NeighborGroupSampler(table, 100, 12)))
    random = true_neighbors(rng.permutation(2000).tolist())
    assert random.mean() == pytest.approx(10 * 99 / 1999, abs=0.1)  # as many as by chance
    assert grouped.mean() > 5 * random.mean() and grouped.min() > 2.5 * random.max()
    assert grouped[:10].mean() == pytest.approx(grouped[10:].mean(), rel=0.15)


# --- The trainer -----------------------------------------------------------------------------------------------------


def test_off_is_the_order_of_sft_trainer(tmp_path: Path) -> None:
    rows = image_dataset(n=24, with_features=8)
    batches = {}
    for trainer_class in (SFTTrainer, HeRATrainer):
        model, processor = build_vlm("llava")
        args = config(tmp_path, aligned_heads=["L0H1"], num_train_epochs=2)
        run = trainer_class(model, args, train_dataset=rows, processing_class=processor)
        if trainer_class is HeRATrainer:
            run.prepare_alignment()
        set_seed(5)
        assert type(run._get_train_sampler()) is RandomSampler
        loader = run.get_train_dataloader()
        batches[trainer_class] = [batch["input_ids"] for _ in range(2) for batch in loader]
    for ours, theirs in zip(batches[HeRATrainer], batches[SFTTrainer], strict=True):
        assert torch.equal(ours, theirs)


def expected_pools(run: HeRATrainer) -> list[list[int]]:
    """The pools of two epochs, as the sampler of a run alone gives them."""
    sampler = neighbor_sampler(run.args, clustered_rows(), run.micro_batch_size)
    pools = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        pools += pools_of(list(sampler), sampler.pool_size)
    return pools


def assert_whole_groups(pools: list[list[int]], size: int) -> None:
    """Of each cluster in a pool, all rows are in it, and each row is seen once in each of two epochs."""
    for pool in pools:
        assert len(pool) == size
        assert all(set(range(row % CLUSTERS, 48, CLUSTERS)) <= set(pool) for row in pool)
    seen = [row for pool in pools for row in pool]
    assert sorted(seen[:48]) == sorted(seen[48:]) == list(range(48)) and seen[:48] != seen[48:]


@pytest.fixture(scope="module")
def single(tmp_path_factory: Any) -> tuple[Path, Any]:
    """A run of one process: its folder, and the rows of each step."""
    folder = tmp_path_factory.mktemp("single")
    return folder, rows_seen(folder, 3, 4)


def test_with_accumulation(single: tuple[Path, Any], tmp_path: Path) -> None:
    """A group of four lies in two micro-batches of three, but in one step."""
    _, seen = single
    assert [[len(batch) for batch in step] for step in seen] == [[3] * 4] * STEPS
    pools = [[row for batch in step for row in batch] for step in seen]
    assert pools == expected_pools(watched(tmp_path, 3, 4))
    assert_whole_groups(pools, POOL)


def test_resumed_in_the_middle_of_an_epoch(single: tuple[Path, Any]) -> None:
    folder, seen = single
    assert rows_seen(folder, 3, 4, resume=True) == seen[SAVED:]


def test_other_seeds_and_sizes(tmp_path: Path) -> None:
    run = watched(tmp_path, 3, 4, seed=3, data_seed=8)
    run.prepare_alignment()
    sampler = run._get_train_sampler()
    assert isinstance(sampler, NeighborGroupSampler) and (sampler.seed, sampler.pool_size) == (8, POOL)
    run._train_batch_size = 2  # as `auto_find_batch_size` sets it
    assert run._get_train_sampler().pool_size == 8
    run.args.data_seed = None
    assert run._get_train_sampler().seed == 3


def test_a_loader_before_anything_is_prepared(tmp_path: Path) -> None:
    run = watched(tmp_path, 3, 4)
    rows = [vector for batch in run.get_train_dataloader() for vector in batch[TEACHER_COLUMN].tolist()]
    assert sorted(rows) == sorted(clustered_rows()[TEACHER_COLUMN])


def test_alignment_weight_0_draws_at_random(tmp_path: Path) -> None:
    assert type(watched(tmp_path, 3, 4, alignment_weight=0.0)._get_train_sampler()) is RandomSampler


# --- Two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What each process saw."""
    folder = launched_once("neighbor_worker.py", tmp_path_factory)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_a_step_of_two_processes(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    """Two micro-batches of three in each process are the pools of one process."""
    steps = zip(*(rank["step"] for rank in ranks), strict=True)
    pools = [[row for batches in zip(*step, strict=True) for batch in batches for row in batch] for step in steps]
    assert pools == expected_pools(watched(tmp_path, 3, 4))
    assert_whole_groups(pools, POOL)


def test_micro_batches_of_two_processes(ranks: list[dict[str, Any]]) -> None:
    """Two samples of each process are a pool, and a group."""
    batches = zip(*([batch for step in rank["micro_batch"] for batch in step] for rank in ranks), strict=True)
    pools = [first + second for first, second in batches]
    assert len(pools) == STEPS * 3
    assert_whole_groups(pools, GROUP)


def test_two_processes_resume_in_the_middle_of_an_epoch(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["resumed"] == rank["step"][SAVED:]


# --- What is refused -------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, message: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message):
        hera_run(tmp_path, **{"neighbor_group_size": 3, **settings})


def test_refused_before_the_model_is_looked_at(tmp_path: Path) -> None:
    stream = image_dataset(n=24, with_features=8).to_iterable_dataset()
    refused(tmp_path, "`train_dataset` is a stream. Set `neighbor_group_size=0`", dataset=stream, max_steps=2)
    for strategy in ("group_by_length", "sequential", "batch_rebalance"):
        refused(tmp_path, f"{strategy}.* both want to order the samples", train_sampling_strategy=strategy)
    refused(tmp_path, "`split_batches=True`", accelerator_config={"split_batches": True})
    refused(tmp_path, r"\(7\) exceeds the 6 samples .* Set `neighbor_group_size=6`", neighbor_group_size=7)
    hera_run(tmp_path, neighbor_group_size=6)
    settings = {"gradient_accumulation_steps": 2, "contrast_scope": "micro_batch"}
    refused(tmp_path, r"\(12\) exceeds the 6 samples", neighbor_group_size=12, **settings)
    hera_run(tmp_path, neighbor_group_size=12, gradient_accumulation_steps=2)


def test_an_order_of_the_users_own_is_not_silently_taken(tmp_path: Path) -> None:
    class Own(HeRATrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset)

    settings = {"neighbor_group_size": 3, "aligned_heads": ["L0H1"], "max_steps": 1}
    with pytest.raises(ValueError, match=r"`_get_train_sampler` is overridden\. Set `neighbor_group_size=0`"):
        hera_run(tmp_path, trainer_class=Own, **settings).train()
    run = hera_run(tmp_path, **settings)
    run.train_dataset = run.train_dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match="it is a stream"):
        run.train()
