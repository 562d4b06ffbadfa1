"""Two processes compute what one does: gradients, temperature, queue, head ranking and teacher's vectors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_worker import CASES, image_rows, ranking, train, uneven_pools, whole_run
from reference import assert_gradients_equal
from safetensors.torch import load_file
from tiny_teachers import vectors_of
from two_processes import launched_once

from hera_trainer.common.processes import Team
from hera_trainer.teacher.vectors import add_teacher_features

# Largest deviation, relative to the largest value of each parameter's gradient: float32 sums in another order.
TOLERANCE = 5e-4
PAIRS = [(name, cut) for name, case in CASES.items() if not name.endswith("plain") for cut in case.cuts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the two processes left what they computed."""
    return launched_once("distributed_worker.py", tmp_path_factory)


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    """What each process knows."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The same run in one process, computed once."""
    results: dict[str, Any] = {}

    def result(name: str) -> Any:
        if name not in results:
            results[name] = train(CASES[name], CASES[name].single, tmp_path_factory.mktemp("single"))
        return results[name]

    return result


def alignment_part(total: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value - plain.get(name, torch.zeros_like(value)) for name, value in total.items()}


def key(name: str, cut: tuple[int, int]) -> str:
    return f"{name} {cut[0]}x{cut[1]}"


# Training


@pytest.mark.parametrize(("name", "cut"), PAIRS, ids=[key(*pair) for pair in PAIRS])
def test_gradients_are_those_of_one_process(folder, single, name, cut):
    """At the last step, so that the queue has been filled by the ones before."""
    expected, actual = single(name)[0], load_file(folder / f"{key(name, cut)}.safetensors")
    if (plain := f"{name} plain") in CASES:
        expected = alignment_part(expected, single(plain)[0])
        actual = alignment_part(actual, load_file(folder / f"{key(plain, cut)}.safetensors"))
    assert expected["log_temperature"] != 0
    assert_gradients_equal(actual, expected, TOLERANCE)


@pytest.mark.parametrize(("name", "cut"), PAIRS, ids=[key(*pair) for pair in PAIRS])
def test_temperature_is_that_of_one_process_on_every_rank(ranks, single, name, cut):
    known = single(name)[1]
    first, second = (rank[key(name, cut)] for rank in ranks)
    assert first["log_temperature"] == second["log_temperature"] == pytest.approx(known["log_temperature"], rel=1e-5)
    assert first["temperature_gradients"] == second["temperature_gradients"]
    assert first["temperature_gradients"] == pytest.approx(known["temperature_gradients"], rel=1e-5)
    assert abs(known["log_temperature"] - math.log(0.3)) > 1e-3


@pytest.mark.parametrize(("name", "cut"), PAIRS, ids=[key(*pair) for pair in PAIRS])
def test_logs_are_those_of_one_process(ranks, single, name, cut):
    names = ["alignment_loss", "alignment_pool", "alignment_left_out", "alignment_skipped", "temperature"]
    if CASES[name].family != "qwen2_5_vl":  # whose language-model loss depends on the cut
        names += ["loss", "lm_loss", "grad_norm"]
    for rank in ranks:
        for entry, expected in zip(rank[key(name, cut)]["logs"], single(name)[1]["logs"], strict=True):
            assert [entry[n] for n in names] == pytest.approx([expected[n] for n in names], rel=1e-5)
            assert expected["alignment_skipped"] == 0


@pytest.mark.parametrize(("name", "cut"), [pair for pair in PAIRS if "queue" in pair[0]])
def test_queue_is_that_of_one_process_on_every_rank(ranks, single, name, cut):
    expected = single(name)[1]["queue"]
    first, second = (rank[key(name, cut)]["queue"] for rank in ranks)
    assert first == second
    assert first["teacher"] == expected["teacher"]  # the same samples in the same order
    assert len(expected["teacher"]) == CASES[name].settings["queue_size"]
    np.testing.assert_allclose(first["heads"], expected["heads"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pool", "first"), [("first has 3", 3), ("first has 0", 0)])
def test_processes_may_contribute_differently(ranks, pool, first):
    expected = uneven_pools(None)[pool]
    assert expected["samples"] > 0 and expected["value"] > 0
    for rank, own in zip(ranks, (slice(0, first), slice(first, None)), strict=True):
        actual = rank["pools"][pool]
        assert actual["samples"] == expected["samples"] and actual["queue"] == expected["queue"]
        assert actual["value"] == pytest.approx(expected["value"], rel=1e-6)
        assert actual["temperature_grad"] == pytest.approx(expected["temperature_grad"], rel=1e-5)
        # Twice, since distributed training takes the mean over both processes.
        gradient = 2 * np.array(expected["heads_grad"])[:, own]
        np.testing.assert_allclose(
            np.array(actual["heads_grad"]).reshape(gradient.shape), gradient, rtol=1e-4, atol=1e-6
        )
    assert sum(rank["pools"][pool]["left_out"] for rank in ranks) == expected["left_out"] == 1


def test_a_frozen_tower_runs_once_a_micro_batch(ranks):
    assert [rank["frozen tower 2x2"]["towers"] for rank in ranks] == [2, 2]
    assert [rank["llava lora 2x2"]["towers"] for rank in ranks] == [4, 4]  # trained, so that it runs in both passes


# Ranking


def test_ranking_is_divided_and_equals_that_of_one_process(ranks):
    expected = ranking(distributed=False)
    # 25 samples: 7 batches of 4, so that the second process repeats the last one; or a single batch, which both run.
    assert {name: result.pop("forwards") for name, result in expected.items()} == {
        "uneven": 7,
        "one batch": 1,
        "images": 7,
    }
    for rank in ranks:
        actual = rank["ranking"]
        assert {name: result.pop("forwards") for name, result in actual.items()} == {
            "uneven": 4,
            "one batch": 1,
            "images": 4,
        }
        assert actual == expected  # bit for bit: the batches are the same


def test_whole_run_equals_that_of_one_process(folder, ranks, tmp_path):
    """Teacher's vectors, ranking, choice of heads and the first step, as a user starts it."""
    expected = whole_run(tmp_path, str(folder / "teacher"), batch_size=8)
    for rank in ranks:
        actual = rank["whole"]
        assert actual["scores"] == expected["scores"] and actual["heads"] == expected["heads"]
        for name in ("loss", "lm_loss", "alignment_loss", "grad_norm"):
            assert actual["logs"][0][name] == pytest.approx(expected["logs"][0][name], rel=1e-5)
        assert actual["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-4)
    assert expected["evaluation"]["alignment_left_out"] == 4


def test_caches_hold_one_file_of_each_kind(folder, ranks):
    cache = folder / "home" / "hera_trainer"
    assert [path.suffix for path in (cache / "head_rankings").iterdir()] == [".json"]
    assert [path.suffix for path in (cache / "teacher_features").iterdir()] == [".arrow"]


# Teacher's vectors


def test_each_process_encodes_its_half(ranks):
    """35 images in batches of 4: the first process takes 20, the second 15, and each file has one writer."""
    shared = [rank["teacher"]["shared"] for rank in ranks]
    assert [known["images"] for known in shared] == [20, 15]
    written = [set(known["written"]) for known in shared]
    assert all(written) and not written[0] & written[1]
    assert [sum(name.endswith(".arrow") for name in names) for names in written] == [1, 0]


def test_processes_without_a_common_file_system_encode_for_themselves(ranks):
    for rank in ranks:
        assert rank["teacher"]["apart"]["images"] == 35
        assert sum(name.endswith(".arrow") for name in rank["teacher"]["apart"]["written"]) == 1


def test_columns_equal_those_of_one_process(folder, ranks, tmp_path):
    column = vectors_of(add_teacher_features(image_rows(), folder / "teacher", batch_size=4, cache_dir=tmp_path))
    expected = np.stack([row for row in column if row is not None])
    for number, rank in enumerate(ranks):
        for name in ("shared", "apart"):
            actual = np.load(folder / f"{name}-{number}.npy")
            assert np.array_equal(actual, expected)  # bit for bit: the batches are the same
            assert rank["teacher"][name]["nulls"] == 5


def test_a_broken_image_stops_all_processes(ranks):
    """The process that does not meet it does not wait for ever either."""
    for rank in ranks:
        assert "Row 36" in rank["teacher"]["error"]
    assert "Process 1 failed" in ranks[0]["teacher"]["error"]


def test_one_process_alone_communicates_nothing(tmp_path):
    team = Team(distributed=True)
    rows = torch.rand(3, 2)
    assert (team.index, team.count, team.is_main) == (0, 1, True)
    assert team.gather_rows(rows) is rows and team.same(rows) is rows
    assert team.any(True) and not team.any(False)
    assert team.sharers(tmp_path) == [0] and not list(tmp_path.iterdir())
    with pytest.raises(KeyError, match="as it is"), team.together():
        raise KeyError("as it is")
