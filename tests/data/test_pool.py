"""How many samples of a pool will take part: said before training, and refused where hardly a pool has enough."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value
from runs import config, logged, trainer
from tiny import build_vlm, image_dataset
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import HeRATrainer
from hera_trainer.data.pool import RowCounts, skipped_share


def test_share_by_counting_all_pools() -> None:
    """7 rows, of which 3 are usable, in pools of 4: each of the 35 pools, or each of the 7 ** 4 with replacement."""
    usable = [True] * 3 + [False] * 4
    for least in range(6):
        for pools, is_stream in (
            (list(itertools.combinations(usable, 4)), False),
            (list(itertools.product(usable, repeat=4)), True),
        ):
            expected = sum(sum(pool) < least for pool in pools) / len(pools)
            assert skipped_share(4, least, 3, 7, is_stream) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("pool", "least", "usable", "rows"),
    [
        (16, 12, 20, 24),
        (16, 12, 5, 30),
        (64, 12, 1000, 6000),
        (50, 3, 4, 40),
        (40, 2, 6, 30),
        (128, 12, 66_500, 665_000),
    ],
)
def test_share_against_simulation(pool: int, least: int, usable: int, rows: int) -> None:
    rng, draws = np.random.default_rng(0), 100_000
    simulated = {
        False: rng.hypergeometric(usable, rows - usable, min(pool, rows), draws),  # an epoch has no more than its rows
        True: rng.binomial(pool, usable / rows, draws),
    }
    for is_stream, counts in simulated.items():
        share = skipped_share(pool, least, usable, rows, is_stream)
        deviation = (share * (1 - share) / draws) ** 0.5
        assert abs((counts < least).mean() - share) <= 4 * deviation + 1e-9


def one_in(every: int, n: int = 96) -> Dataset:
    """Rows of which one in so many has a teacher vector."""
    rows = image_dataset(n=n, with_features=8)
    vectors = [vector if i % every == 0 else None for i, vector in enumerate(rows["teacher_features"])]
    feature = List(Value("float32"))
    return rows.remove_columns("teacher_features").add_column("teacher_features", vectors, feature=feature)


def prepared(tmp_path: Any, rows: Any, **settings: Any) -> HeRATrainer:
    defaults = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_neighbors": 10, "max_steps": 2}
    run = trainer(tmp_path, dataset=rows, **{**defaults, "aligned_heads": ["L0H1"], **settings})
    run.prepare_alignment()
    return run


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "gradient_accumulation_steps"),
        ({"per_device_train_batch_size": 16, "contrast_scope": "micro_batch"}, "per_device_train_batch_size"),
        ({"queue_size": 5}, "gradient_accumulation_steps"),
    ],
)
def test_one_image_in_six_rows(tmp_path: Any, settings: dict[str, Any], name: str, streamed: bool) -> None:
    """Pools of 16 with 10 neighbours: the value that the message names passes, and no smaller one does."""
    rows = one_in(6).to_iterable_dataset() if streamed else one_in(6)
    first = "the first " if streamed else ""
    beginning = rf"16 of {first}96 rows have an image\. .* Of the 16 samples compared, 2\.7.* are expected"
    with pytest.raises(ValueError, match=beginning) as error:
        prepared(tmp_path, rows, **settings)
    value = int(str(error.value).split(f"Set `{name}=")[1].split("`")[0])
    prepared(tmp_path, rows, **{**settings, name: value})
    with pytest.raises(ValueError, match=f"Set `{name}={value}` or more"):
        prepared(tmp_path, rows, **{**settings, name: value - 1})


def test_a_queue_makes_up_for_rows_without_images(tmp_path: Any) -> None:
    """With as many past samples as are needed, one of its own is enough for a step."""
    run = prepared(tmp_path, one_in(6), queue_size=40, max_steps=12, logging_steps=1)
    run.train()
    expected = skipped_share(16, 1, 16, 96, is_stream=False)
    assert expected < 0.05 and logged(run, "alignment_pool")[-1] > 12
    filled = next(i for i, pool in enumerate(logged(run, "alignment_pool")) if pool > 0)
    assert sum(logged(run, "alignment_skipped")[filled:]) <= 2


def test_too_few_rows_for_any_pool(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"8 of 96 rows .* Please add rows with images, or set `alignment_weight=0`"):
        prepared(tmp_path, one_in(12))


@pytest.mark.parametrize(("every", "share"), [(1, "0.0%"), (2, None)])
def test_what_is_said(tmp_path: Any, every: int, share: str | None, caplog: Any) -> None:
    """Once, and as a warning, which is shown where logging is not set up."""
    run = prepared(tmp_path, one_in(every), gradient_accumulation_steps=6)
    run.train()
    (record,) = [record for record in caplog.records if "are expected to take part" in record.message]
    share = share or f"{skipped_share(24, 12, 48, 96, is_stream=False):.1%}"
    assert record.levelname == "WARNING" and f"and {share} of the optimizer steps to go without it" in record.message
    assert f"{96 // every} of 96 rows have an image. Of these, 32 were looked at: 32 have a label" in record.message
    assert f"Of the 24 samples compared, {24 / every:.1f} are expected" in record.message


@pytest.mark.parametrize(
    ("rows", "settings", "share"),
    [
        (30, {}, "50.0%"),  # 24 and 6 rows, of which at least 12 must have an image
        (30, {"max_steps": 1}, "0.0%"),
        (30, {"dataloader_drop_last": True}, "50.0%"),  # a micro-batch of 4 is left
        (26, {"dataloader_drop_last": True}, "0.0%"),
        (48, {}, "0.0%"),
    ],
)
def test_the_last_step_of_an_epoch_counts(tmp_path: Any, rows: int, settings: Any, share: str, caplog: Any) -> None:
    settings = {"max_steps": -1, "num_train_epochs": 1, "logging_steps": 1, **settings}
    run = prepared(tmp_path, one_in(1, rows), gradient_accumulation_steps=6, **settings)
    run.train()
    assert f"and {share} of the optimizer steps to go without it" in caplog.text
    skipped = logged(run, "alignment_skipped")
    assert f"{sum(skipped) / len(skipped):.1%}" == share


def test_tokens_to_pool(tmp_path: Any) -> None:
    """Those of the completions, all rows being looked at; as many as a pass over single rows pools."""
    run = prepared(tmp_path, one_in(1, 30), per_device_train_batch_size=16)
    batches = [run.data_collator([row]) for row in run.train_dataset]
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert run.teacher_vectors.count_rows() == RowCounts(30, 30, 30, 30, tokens, False)


def test_rows_without_a_label_do_not_count(tmp_path: Any) -> None:
    """Every second row's answer is cut off, by whatever makes the batches."""
    rows = image_dataset(n=32, with_features=8)
    cut = {rows[i]["completion"][0]["content"] for i in range(1, 32, 2)}
    model, processor = build_vlm("llava")
    collator = DataCollatorForVisionLanguageModeling(processor)

    def cutting(examples: list[dict[str, Any]]) -> Any:
        is_cut = torch.tensor([example["completion"][0]["content"] in cut for example in examples])
        batch = collator(examples)
        batch["labels"][is_cut] = -100
        return batch

    args = config(tmp_path, per_device_train_batch_size=16, num_neighbors=10, aligned_heads=["L0H1"])
    run = HeRATrainer(model, args, cutting, rows, processing_class=processor)
    with pytest.raises(ValueError, match=r"32 of 32 rows .* at: 16 have a label.* Of the 16 .* 8\.0 are expected"):
        run.prepare_alignment()


def test_selected_rows_are_counted_as_selected(tmp_path: Any) -> None:
    rows = one_in(6)
    with_image = rows.filter(lambda row: row["teacher_features"] is not None)
    assert len(with_image) == 16
    run = prepared(tmp_path, rows.select(range(0, 96, 6)))  # all of them have a vector
    counts = run.teacher_vectors.count_rows()
    assert (counts.rows, counts.with_image, counts.usable) == (16, 16, 16)
    assert torch.equal(run.teacher_vectors.image_batch()["input_ids"], run.data_collator([rows[0]])["input_ids"])
