"""Plots of rankings and runs: what is drawn is what was measured."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hera_trainer import AttentionHead, HeadRanking, RunRecord, plot_head_scores, plot_run
from hera_trainer.heads.heat_map import pixels

HEADS = [AttentionHead(0, 1), AttentionHead(3, 2)]
STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture
def ranking():
    scores = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    scores[2] = torch.nan  # a layer without heads
    return HeadRanking(scores, torch.rand(6), k=5, num_samples=101)


def drawn(axis):
    return torch.tensor(axis.images[0].get_array().filled(float("nan")))


@pytest.mark.parametrize("ending", STARTS)
def test_written_by_ending(tmp_path, ranking, ending):
    path = tmp_path / "new" / f"heads.{ending}"
    ranking.plot(path, HEADS)
    assert path.read_bytes().startswith(STARTS[ending])


def test_unknown_ending(tmp_path, ranking):
    with pytest.raises(ValueError, match="xyz"):
        ranking.plot(tmp_path / "heads.xyz")


def test_before_after_and_difference(ranking):
    before = HeadRanking(ranking.scores / 2, ranking.layer_scores, k=5, num_samples=101)
    figure = ranking.plot(heads=HEADS, before=before, title="Change")
    first, second, change = (axis for axis in figure.axes if axis.images)
    assert [axis.get_title() for axis in (first, second, change)] == ["before", "after", "difference"]
    for axis, scores in ((first, before.scores), (second, ranking.scores), (change, ranking.scores - before.scores)):
        torch.testing.assert_close(drawn(axis), scores, equal_nan=True)
        assert [patch.get_xy() for patch in axis.patches] == [(0.5, -0.5), (1.5, 2.5)]
    assert first.images[0].get_clim() == second.images[0].get_clim()
    low, high = change.images[0].get_clim()
    assert low == -high and high == pytest.approx(np.nanmax(ranking.scores.numpy() / 2))
    assert figure._suptitle.get_text().startswith("Change")
    # Colours mean something: a scale beside the scores, and one beside the difference.
    assert [axis.get_ylabel() for axis in figure.axes if not axis.images] == [
        "mutual k-NN, k = 5, N = 101\nunrelated spaces 0.050",
        "change",
    ]


def test_one_ranking_has_one_panel(ranking):
    assert len([axis for axis in ranking.plot().axes if axis.images]) == 1


def test_what_scores_are_held_against_stands_beside_the_colours(ranking):
    second = replace(ranking, null_p95=0.07, ceiling=0.5, ceiling_model="a/second")
    first = replace(ranking, null_p95=0.06)
    for panels in ({"a": first, "b": second}, {"a": second, "b": first}):
        figure = plot_head_scores(panels)
        (label,) = [axis.get_ylabel() for axis in figure.axes if not axis.images]
        assert label.splitlines()[1:] == ["unrelated spaces 0.050 (95th percentile 0.070)", "ceiling 0.500 (a/second)"]


@pytest.mark.parametrize("change", [{"k": 6}, {"num_samples": 100}, {"clip_quantile": 0.95}])
def test_scores_that_cannot_be_compared(ranking, change):
    other = replace(ranking, **change)
    with pytest.raises(ValueError, match=r"measured with k = .* and with k = .* cannot be compared"):
        ranking.plot(before=other)
    with pytest.raises(ValueError, match="cannot be compared"):
        plot_head_scores({"a": ranking, "b": other})
    assert other.plot().axes


def test_rankings_of_different_models(ranking):
    other = HeadRanking(ranking.scores[:3], ranking.layer_scores[:3], k=5, num_samples=101)
    with pytest.raises(ValueError, match="different models"):
        plot_head_scores({"a": ranking, "b": other})
    with pytest.raises(ValueError, match="no head ranking"):
        plot_head_scores({})


def test_pixels_are_those_of_the_file(tmp_path, ranking):
    figure = ranking.plot()
    figure.set_dpi(80)
    image = pixels(figure)
    assert image.dtype == np.uint8
    figure.savefig(tmp_path / "same.png", dpi=80)
    file = np.asarray(Image.open(tmp_path / "same.png").convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20
    np.testing.assert_allclose(image.astype(float), file, atol=8)  # drawing twice lays text out to the subpixel


def run_of(log, monitored=None, path="some-run"):
    return RunRecord(Path(path), {"model": "org/model"}, log, None, monitored or {})


def test_curves(tmp_path, ranking):
    groups = {"alignment_mknn_image/all": 0.1, "alignment_mknn_image/aligned": 0.05}
    log = [{"step": 0, **groups, "image_gain": 0.25, "epoch": 0.0}]
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 9.0, "lm_loss": 4.0 - step, "temperature": 0.07 - step / 1000})
        log[-1] |= {"alignment_pull": step / 10, "alignment_spread": step / 5}
    log.append({"step": 3, "alignment_mknn_image/all": 0.2, "alignment_mknn_image/aligned": 0.3, "image_gain": 0.5})
    log.append({"step": 3, "train_loss": 5.0})
    figure = plot_run(run_of(log, {"image": {0: ranking}}), tmp_path / "run.svg")
    lines = {axis.get_title(): axis.get_lines() for axis in figure.axes}
    assert list(lines) == [
        "language-model loss",
        "pull",
        "spread",
        "temperature",
        "image gain, nats a token",
        "mutual k-NN, image in context",
    ]
    np.testing.assert_array_equal(lines["pull"][0].get_xydata(), [[1, 0.1], [2, 0.2], [3, 0.3]])
    np.testing.assert_array_equal(lines["image gain, nats a token"][0].get_xydata(), [[0, 0.25], [3, 0.5]])
    np.testing.assert_array_equal(lines["language-model loss"][0].get_xydata(), [[1, 3.0], [2, 2.0], [3, 1.0]])
    aligned, all_heads, chance = lines["mutual k-NN, image in context"]
    np.testing.assert_array_equal(aligned.get_xydata(), [[0, 0.05], [3, 0.3]])
    np.testing.assert_array_equal(all_heads.get_xydata(), [[0, 0.1], [3, 0.2]])
    assert [line.get_label() for line in (aligned, all_heads, chance)] == ["aligned heads", "all heads", "chance"]
    assert set(chance.get_ydata()) == {5 / 100}
    assert (tmp_path / "run.svg").read_bytes().startswith(STARTS["svg"])


def filled(axis):
    """Lower and upper ends of what is filled from side to side."""
    return {tuple(sorted({round(y, 6) for _, y in path.vertices})) for c in axis.collections for path in c.get_paths()}


def test_band_of_unrelated_spaces(ranking):
    log = [{"step": step, "alignment_mknn/all": 0.1 + step / 10} for step in (0, 1, 2)]
    measured = {step: replace(ranking, null_p95=high) for step, high in ((0, 0.06), (1, 0.08), (2, 0.07))}
    (axis,) = plot_run(run_of(log, {"text": measured})).axes
    (patch,) = axis.patches
    assert (patch.get_y(), patch.get_y() + patch.get_height()) == pytest.approx((0.05, 0.08))
    # Measured otherwise after a while: a level for each, and words.
    measured[2] = replace(ranking, k=10, null_p95=0.15)
    (axis,) = plot_run(run_of(log, {"text": measured})).axes
    chance = axis.get_lines()[-1]
    np.testing.assert_allclose(chance.get_xydata(), [[0, 0.05], [1, 0.05], [2, 0.1]])
    assert "do not compare" in chance.get_label() and not axis.patches
    ((low, *_, high),) = filled(axis)
    assert (low, high) == (0.05, 0.15)


def test_curve_of_a_run_without_alignment():
    (axis,) = plot_run(run_of([{"step": 1, "loss": 2.0}])).axes
    np.testing.assert_array_equal(axis.get_lines()[0].get_xydata(), [[1, 2.0]])


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="'some-run' has no logged losses"):
        plot_run(run_of([{"step": 1, "epoch": 1.0}]))


def test_without_matplotlib(ranking, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install \"hera-trainer\[plot\]\""):
        ranking.plot()
