"""Two processes on a stream compute what one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from streaming_worker import run
from streams import rows_of_all_kinds
from two_processes import launched_once


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the two processes left what they know."""
    return launched_once("streaming_worker.py", tmp_path_factory)


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    """What each process knows."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory) -> dict[str, Any]:
    """The same run in one process."""
    stream = rows_of_all_kinds().to_iterable_dataset()
    return run(tmp_path_factory.mktemp("single"), str(folder / "teacher"), stream, 1, 0)


def assert_same(ranks: list[dict[str, Any]], expected: dict[str, Any], name: str) -> None:
    for rank in ranks:
        for entry, other in zip(rank[name]["logs"], expected["logs"], strict=True):
            assert entry == pytest.approx(other, rel=1e-5)
        assert rank[name]["weights"] == pytest.approx(expected["weights"], rel=1e-9)
        assert rank[name]["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-5)
        assert rank[name]["scores"] == expected["scores"]


@pytest.mark.parametrize("workers", [0, 1])
def test_two_processes_equal_one(ranks, expected, workers):
    assert_same(ranks, expected, f"workers {workers}")


def test_a_stream_of_several_files_is_divided_by_files(ranks, folder, tmp_path):
    """Each process reads its own: two rows of the first half and two of the second are a micro-batch."""
    order = [i for start in range(0, 12, 2) for i in (start, start + 1, start + 12, start + 13)]
    stream = rows_of_all_kinds().select(order).to_iterable_dataset()
    expected = run(tmp_path, str(folder / "teacher"), stream, 1, ranked=30)
    assert_same(ranks, expected, "shards")


def test_a_process_without_rows_ends_the_pass_for_all(ranks):
    """Steps four and five are those of a second pass, as the first two of the first."""
    for rank in ranks:
        steps = rank["uneven"]["logs"]
        assert [pool for *_, pool, _, _ in steps] == [8] * 5
    first, second = (rank["uneven"]["weights"] for rank in ranks)
    assert first == second


def test_each_process_encodes_its_part(ranks, expected):
    """Of the images of the ranking, beside the one that shows the width, and of those of training and evaluation."""
    ranking, later = zip(*(rank["workers 0"]["images"] for rank in ranks), strict=True)
    assert expected["images"] == [1 + 14, 7 + 7 + 1 + 16]
    assert sum(ranking) == 2 + 14 and min(ranking) >= 1 + 5
    # In the first step, both processes have rows with the images of rows 0, 1 and 7.
    assert sum(later) == (7 + 3) + 7 + 2 + 16


def test_processes_that_read_different_rows_are_refused(ranks):
    for rank in ranks:
        assert "read different rows from `train_dataset`" in rank["error"] and "`seed`" in rank["error"]
