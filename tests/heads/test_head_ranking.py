"""HeadRanking: choosing heads, and the file in which a ranking is kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rankings import HEADS, rank
from tiny import build_vlm, image_dataset

from hera_trainer.heads.head import AttentionHead, DecoderLayer, parse_unit, parse_units
from hera_trainer.heads.ranking import HeadRanking
from hera_trainer.heads.scoring import _gram_factors, head_neighbors
from hera_trainer.objectives import metrics
from hera_trainer.objectives.metrics import nearest_neighbors

NAN = float("nan")


def make_ranking(**settings: Any) -> HeadRanking:
    scores = torch.tensor([[0.3, 0.1, NAN], [NAN, NAN, NAN], [0.2, 0.3, 0.05]])
    return HeadRanking(scores, torch.tensor([0.1, 1 / 3, 0.0]), **{"k": 10, "num_samples": 50, **settings})


def names(heads: list[AttentionHead]) -> list[str]:
    return [str(head) for head in heads]


def test_selecting_heads() -> None:
    ranking = make_ranking()
    assert names(ranking.heads()) == ["L0H0", "L0H1", "L2H0", "L2H1", "L2H2"]
    assert ranking.score(AttentionHead(2, 0)) == pytest.approx(0.2)
    assert names(ranking.select("worst", 3)) == ["L2H2", "L0H1", "L2H0"]
    assert names(ranking.select("top", 3)) == ["L0H0", "L2H1", "L2H0"]  # a tie: by layer and head
    assert ranking.select() == ranking.select("worst", 5)
    assert names(ranking.select("worst", 5)) == ["L2H2", "L0H1", "L2H0", "L0H0", "L2H1"]
    assert all(isinstance(head, AttentionHead) for head in ranking.select("random", 2))


def test_selecting_layers() -> None:
    ranking = HeadRanking(torch.zeros(6, 2), torch.tensor([0.3, 0.1, NAN, 0.4, 0.1, 0.2]), k=2, num_samples=9)
    layers = ranking.units("layer")
    assert names(layers) == ["L0", "L1", "L3", "L4", "L5"]
    assert ranking.score(DecoderLayer(3)) == pytest.approx(0.4)
    chosen = {name: names(ranking.select(name, 3, granularity="layer")) for name in ("worst", "top", "middle")}
    assert chosen == {"worst": ["L1", "L4", "L5"], "top": ["L3", "L0", "L5"], "middle": ["L3", "L1", "L4"]}
    assert set(ranking.select("random", 3, seed=1, granularity="layer")) < set(layers)
    odd = HeadRanking(torch.zeros(5, 2), torch.zeros(5), k=2, num_samples=9)
    assert names(odd.select("middle", 3, granularity="layer")) == ["L2", "L1", "L3"]
    with pytest.raises(ValueError, match="between 1 and the 5 layers"):
        ranking.select("worst", 6, granularity="layer")
    with pytest.raises(ValueError, match="of layers, 'middle'"):
        ranking.select("middle", 1)


def test_names_of_heads_and_layers() -> None:
    assert parse_unit("L12") == DecoderLayer(12) and parse_unit(AttentionHead(3, 4)) == AttentionHead(3, 4)
    assert parse_units(["L0", DecoderLayer(7)], "layer") == [DecoderLayer(0), DecoderLayer(7)]
    for granularity, other in (("head", "L3"), ("layer", "L3H4")):
        with pytest.raises(ValueError, match=f"{other!r}, but `alignment_granularity` is {granularity!r}"):
            parse_units([other], granularity)
    with pytest.raises(ValueError, match="'layer 3' is not a decoder layer"):
        parse_units(["layer 3"], "layer")
    with pytest.raises(ValueError, match="'3' is not an attention head"):
        parse_units(["3"], "head")


def test_ties_go_by_layer_and_head() -> None:
    ranking = HeadRanking(torch.full((3, 3), 0.5), torch.zeros(3), k=2, num_samples=9)
    for selection in ("worst", "top"):
        assert names(ranking.select(selection, 4)) == ["L0H0", "L0H1", "L0H2", "L1H0"]


def test_random_heads() -> None:
    ranking = HeadRanking(
        torch.rand(8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(8), k=2, num_samples=9
    )
    draws = [ranking.select("random", 5, seed=seed) for seed in range(40)]
    assert draws == [ranking.select("random", 5, seed=seed) for seed in range(40)]
    assert draws[0] == ranking.select("random", 5)
    assert all(len(set(draw)) == 5 and set(draw) <= set(ranking.heads()) for draw in draws)
    assert len({tuple(sorted(draw)) for draw in draws}) > 35
    assert sorted(ranking.select("random", 64)) == ranking.heads()
    # The scores have no say.
    flat = HeadRanking(torch.zeros(8, 8), torch.zeros(8), k=2, num_samples=9)
    assert flat.select("random", 5, seed=1) == draws[1]


def test_refused_selections() -> None:
    for m in (0, -1, 6):
        with pytest.raises(ValueError, match=rf"`num_aligned_heads` \({m}\) must be between 1 and the 5 heads"):
            make_ranking().select("worst", m)
    with pytest.raises(ValueError, match=r"`head_selection` must be 'worst', 'top' or 'random'.*, got 'best'"):
        make_ranking().select("best", 2)


def test_save_and_load(tmp_path: Path) -> None:
    facts = {"seed": 7, "context": "image", "model": "a/model", "teacher": "a/teacher", "dataset_fingerprint": "f00"}
    ranking = make_ranking(**facts)
    path = tmp_path / "some" / "folder" / "ranking.json"
    ranking.save(path)
    assert os.listdir(path.parent) == ["ranking.json"]  # nothing temporary is left
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["scores"][1] == [None, None, None]
    assert {name: content[name] for name in (*facts, "k", "num_samples")} == {**facts, "k": 10, "num_samples": 50}
    assert set(content["versions"]) >= {"hera-trainer", "torch", "transformers"}

    loaded = HeadRanking.load(path)
    torch.testing.assert_close(loaded.scores, ranking.scores, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(loaded.layer_scores, ranking.layer_scores, rtol=0, atol=0)
    assert {name: getattr(loaded, name) for name in facts} == facts
    assert (loaded.k, loaded.num_samples, loaded.versions) == (10, 50, ranking.versions)
    assert loaded.select("worst", 3) == ranking.select("worst", 3)
    # Again, over the old file and from a string.
    make_ranking(seed=8).save(str(path))
    assert HeadRanking.load(str(path)).seed == 8
    assert os.listdir(path.parent) == ["ranking.json"]


def test_what_scores_are_held_against(tmp_path: Path) -> None:
    facts = {"null_mean": 0.204, "null_p95": 0.25, "ceiling": 0.5, "ceiling_model": "a/second", "clip_quantile": 0.95}
    make_ranking(**facts).save(tmp_path / "ranking.json")
    loaded = HeadRanking.load(tmp_path / "ranking.json")
    assert {name: getattr(loaded, name) for name in facts} == facts
    assert loaded.chance == 10 / 49
    assert loaded.scale == "k = 10, N = 50, clipped at quantile 0.95"
    assert loaded.references(digits=3) == [
        "unrelated spaces 0.204 (95th percentile 0.250)",
        "ceiling 0.500 (a/second)",
    ]


def test_files_of_before_have_no_null(tmp_path: Path) -> None:
    (tmp_path / "ranking.json").write_text(json.dumps(VALID))
    loaded = HeadRanking.load(tmp_path / "ranking.json")
    assert (loaded.null_mean, loaded.null_p95, loaded.ceiling, loaded.clip_quantile) == (None,) * 4
    assert loaded.scale == "k = 2, N = 5"
    assert loaded.references() == ["unrelated spaces 0.5000"]


def test_what_a_ranking_remembers(tmp_path: Path) -> None:
    model, processor = build_vlm("qwen3_5")
    model.config.name_or_path = "a/model"
    dataset = image_dataset(14, with_features=5)
    ranking = rank(model, processor, dataset, seed=5, teacher_name="a/teacher")
    assert (ranking.model, ranking.teacher, ranking.seed) == ("a/model", "a/teacher", 5)
    assert ranking.dataset_fingerprint == dataset._fingerprint
    ranking.save(tmp_path / "ranking.json")
    loaded = HeadRanking.load(tmp_path / "ranking.json")
    torch.testing.assert_close(loaded.scores, ranking.scores, rtol=0, atol=0, equal_nan=True)
    assert loaded.scores.isnan().sum() == 3 * HEADS


def test_an_interrupted_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ranking.json"
    make_ranking(seed=1).save(path)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_ranking(seed=2).save(path)
    assert HeadRanking.load(path).seed == 1


VALID = {"scores": [[0.1, 0.2]], "layer_scores": [0.1], "k": 2, "num_samples": 5}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"null",
        b"[1, 2]",
        b'"text"',
        b"{}",
        json.dumps({**VALID, "scores": [[0.1], [0.1, 0.2]]}).encode(),
        json.dumps({**VALID, "scores": "0.1"}).encode(),
        json.dumps({**VALID, "scores": [["a"]]}).encode(),
        json.dumps({**VALID, "scores": [0.1, 0.2]}).encode(),
        json.dumps({**VALID, "scores": 0.1}).encode(),
        json.dumps({**VALID, "unknown": 1}).encode(),
        json.dumps({name: VALID[name] for name in VALID if name != "k"}).encode(),
        json.dumps(VALID).encode()[:-20],
    ],
)
def test_files_that_are_no_ranking(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ranking.json"
    path.write_bytes(json.dumps(VALID).encode())
    assert HeadRanking.load(path).k == 2
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"ranking\.json' is not a head ranking.*`head_ranking_path`"):
        HeadRanking.load(path)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(ValueError, match="is not a head ranking that can be read"):
            HeadRanking.load(path)


@pytest.mark.parametrize("rank", [6, 3, 0])
def test_neighbours_in_head_space_are_those_of_the_contributions(rank):
    """Also where a head's weight uses fewer directions than the head has, or none."""
    generator = torch.Generator().manual_seed(rank)
    weights = [
        torch.randn(6, rank, generator=generator) @ torch.randn(rank, 20, generator=generator),
        torch.randn(6, 20),
    ]
    factors = _gram_factors(torch.stack(weights))
    for factor, weight in zip(factors, weights, strict=True):
        torch.testing.assert_close(factor @ factor.T, weight @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("center", [False, True])
def test_heads_of_a_layer_are_compared_together(monkeypatch: pytest.MonkeyPatch, center: bool) -> None:
    """Bit for bit as each head by itself, in groups that the heads do not fill."""
    monkeypatch.setattr(metrics, "_CACHED_SIMILARITIES", 2 * 60 * 60)
    pooled, blocks = torch.randn(60, 5, 8), torch.randn(5, 8, 24)
    found = list(head_neighbors(pooled, blocks, 4, True, center=center))
    factors = _gram_factors(blocks)
    expected = [nearest_neighbors(pooled[:, head] @ factors[head], 4, True, center=center) for head in range(5)]
    assert len(found) == 5 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
