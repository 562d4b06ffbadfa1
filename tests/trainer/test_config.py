"""HeRAConfig: defaults, documentation, validation, and the ways in and out of it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import sft_args
from transformers import HfArgumentParser
from trl import SFTConfig, TrlParser

from hera_trainer.config import HeRAConfig
from hera_trainer.heads.head import AttentionHead, DecoderLayer
from hera_trainer.objectives.contrastive import HeRALoss
from hera_trainer.objectives.registry import register_objective

register_objective("own")(type("Own", (HeRALoss,), {}))

DEFAULTS = {
    "alignment_weight": 0.01,
    "alignment_granularity": "head",
    "num_aligned_heads": 5,
    "head_selection": "worst",
    "aligned_heads": None,
    "num_neighbors": 10,
    "temperature": None,
    "learn_temperature": True,
    "alignment_objective": "contrastive",
    "target_pull": None,
    "similarity": "centered_cosine",
    "teacher_similarity": "cosine",
    "metric_similarity": "cosine",
    "objective_learning_rate": None,
    "teacher_control": "none",
    "publish_control": False,
    "teacher_model_name_or_path": "facebook/dinov2-large",
    "teacher_batch_size": 32,
    "ranking_num_samples": 1000,
    "ranking_clip_quantile": None,
    "head_ranking_path": None,
    "max_length": None,
    "contrast_scope": "step",
    "image_feature_gib": 1.0,
    "queue_size": 0,
    "neighbor_group_size": 0,
    "gradient_accumulation_steps": 4,
    "monitor_steps": None,
    "monitor_num_samples": 500,
}
INHERITED = {field.name for field in dataclasses.fields(SFTConfig)}
OWN_FIELDS = {f.name: f for f in dataclasses.fields(HeRAConfig) if f.name in inspect.get_annotations(HeRAConfig)}
OVERRIDDEN = INHERITED & set(OWN_FIELDS)


def config(tmp_path: Path, **kwargs: Any) -> HeRAConfig:
    return HeRAConfig(**sft_args(tmp_path), **kwargs)


def own_values(args: HeRAConfig) -> dict[str, Any]:
    return {name: getattr(args, name) for name in OWN_FIELDS}


def test_defaults(tmp_path: Path) -> None:
    args = HeRAConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert own_values(args) == DEFAULTS
    assert isinstance(args, SFTConfig)


def test_all_other_defaults_are_those_of_sft_config(tmp_path: Path) -> None:
    ours, theirs = (
        HeRAConfig(str(tmp_path), use_cpu=True, bf16=False),
        SFTConfig(str(tmp_path), use_cpu=True, bf16=False),
    )
    for name in INHERITED - OVERRIDDEN - {"logging_dir", "run_name"}:
        if not name.startswith("_") and not dataclasses.is_dataclass(getattr(theirs, name)):
            assert str(getattr(ours, name)) == str(getattr(theirs, name)), name


# --- Documentation ---------------------------------------------------------------------------------------------------


def test_the_fields_are_the_documented_ones() -> None:
    documented = re.findall(r"^        (\w+) \(`", HeRAConfig.__doc__, flags=re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert set(documented) | OVERRIDDEN == set(OWN_FIELDS) == set(DEFAULTS)


@pytest.mark.parametrize("name", sorted(OWN_FIELDS))
def test_each_field_is_described_twice(name: str) -> None:
    field = OWN_FIELDS[name]
    assert len(field.metadata["help"]) > 20
    if name in OVERRIDDEN:
        theirs = next(f.default for f in dataclasses.fields(SFTConfig) if f.name == name)
        assert f"    > - `{name}`: Defaults to `{field.default}` instead of `{theirs}`" in HeRAConfig.__doc__
        return
    entry = re.search(
        rf"^        {name} \(`(?P<type>[^`]+)`, \*optional\*(, defaults to `(?P<default>[^`]+)`)?\):\n            \S",
        HeRAConfig.__doc__,
        flags=re.MULTILINE,
    )
    assert entry is not None
    # As written down: parsers of the command line replace the field's own `type`.
    assert HeRAConfig.__annotations__[name].removesuffix(" | None") == entry["type"]
    documented = None if entry["default"] is None else entry["default"].strip('"')
    assert documented == (None if field.default is None else str(field.default))


# --- Validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("alignment_weight", -0.01),
        ("alignment_weight", math.nan),
        ("temperature", 0.0),
        ("temperature", 0.0099),
        ("temperature", math.nan),
        ("num_neighbors", 0),
        ("num_aligned_heads", 0),
        ("num_aligned_heads", -1),
        ("ranking_num_samples", 0),
        ("ranking_num_samples", 11),
        ("ranking_clip_quantile", 0.0),
        ("ranking_clip_quantile", 1.0),
        ("ranking_clip_quantile", 95.0),
        ("teacher_batch_size", 0),
        ("head_selection", "best"),
        ("head_selection", "Worst"),
        ("aligned_heads", []),
        ("contrast_scope", "window"),
        ("image_feature_gib", -0.5),
        ("image_feature_gib", math.nan),
        ("queue_size", -1),
        ("neighbor_group_size", -1),
        ("neighbor_group_size", 1),
        ("monitor_steps", 0),
    ],
)
def test_refused_values(tmp_path: Path, setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^`{setting}`"):
        config(tmp_path, **{setting: value})


@pytest.mark.parametrize("text", ["3H4", "L3H", "L-1H0", "L3H4H5", "l3h4", "L3 H4", "L3.5H1", ""])
def test_refused_heads(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text)) + " is not an attention head.*'L3H4'"):
        config(tmp_path, aligned_heads=["L0H0", text])


def test_values_at_the_bounds_pass(tmp_path: Path) -> None:
    bounds = {"alignment_weight": 0.0, "temperature": 0.01, "num_aligned_heads": 1, "teacher_batch_size": 1}
    args = config(tmp_path, **bounds, num_neighbors=1, ranking_num_samples=3)
    assert own_values(args) == {**DEFAULTS, **bounds, "num_neighbors": 1, "ranking_num_samples": 3}
    with pytest.raises(ValueError, match=r"`ranking_num_samples` \(21\) must exceed `num_neighbors \+ 1` \(21\)"):
        config(tmp_path, num_neighbors=20, ranking_num_samples=21)
    assert config(tmp_path, num_neighbors=20, ranking_num_samples=22).ranking_num_samples == 22


@pytest.mark.parametrize("selection", ["worst", "top", "random"])
def test_selections(tmp_path: Path, selection: str) -> None:
    assert config(tmp_path, head_selection=selection).head_selection == selection


@pytest.mark.parametrize(("scope", "expected"), [("step", 8 * 3), ("micro_batch", 8)])
def test_the_size_of_a_pool(tmp_path: Path, scope: str, expected: int) -> None:
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, "queue_size": 100}
    args = config(tmp_path, contrast_scope=scope, **sizes)
    assert args.pool_size() == expected
    assert args.pool_size(micro_batch_size=2) == expected // 4


# --- Ways in and out -------------------------------------------------------------------------------------------------


def test_attention_heads_are_taken_as_objects_and_kept_as_text(tmp_path: Path) -> None:
    args = config(tmp_path, aligned_heads=[AttentionHead(3, 4), "L12H0", " L1H1 "])
    assert args.aligned_heads == ["L3H4", "L12H0", "L1H1"]
    assert [type(head) for head in args.aligned_heads] == [str, str, str]


@pytest.mark.parametrize("text", ["L0H0", "L3H4", "L12H31"])
def test_attention_head_and_its_text(text: str) -> None:
    head = AttentionHead.parse(text)
    assert str(head) == f"L{head.layer}H{head.head}" == text
    assert head == (head.layer, head.head)
    assert AttentionHead(layer=head.layer, head=head.head) == head
    assert sorted([AttentionHead(10, 0), AttentionHead(2, 5), head])[-1] >= head


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_neighbors", 5.0), ("queue_size", np.int64(7)), ("alignment_weight", 1), ("monitor_steps", 3.0)],
)
def test_numbers_as_yaml_and_searches_write_them(tmp_path: Path, name: str, value: float) -> None:
    args = HeRAConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: value})
    found = getattr(args, name)
    assert found == value and type(found) is (float if name == "alignment_weight" else int)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_neighbors", 2.5, "a whole number"),
        ("num_aligned_heads", "5", "a whole number"),
        ("queue_size", float("nan"), "a whole number"),
        ("alignment_weight", "0.1", "a number"),
        ("target_pull", True, "a number"),
    ],
)
def test_what_is_no_number(tmp_path: Path, name: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be {words}, got"):
        HeRAConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: value})


@pytest.mark.parametrize("objective", ["feature", "cka", "uniformity"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("similarity", "dot"), ("temperature", 0.3), ("learn_temperature", False), ("teacher_similarity", "dot")],
)
def test_settings_that_an_objective_does_not_read(tmp_path: Path, objective: str, name: str, value: object) -> None:
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "alignment_objective": objective}
    HeRAConfig(**settings, **{name: DEFAULTS[name]})
    with pytest.raises(ValueError, match=rf"`{name}` has no effect with `alignment_objective='{objective}'`"):
        HeRAConfig(**settings, **{name: value})
    if name == "teacher_similarity":  # batches of neighbours are made by it
        HeRAConfig(**settings, **{name: value}, neighbor_group_size=8)


def test_a_control_of_an_objective_without_teacher(tmp_path: Path) -> None:
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "teacher_control": "permuted"}
    HeRAConfig(**settings, alignment_objective="feature")
    with pytest.raises(ValueError, match="uses no teacher and is a control itself"):
        HeRAConfig(**settings, alignment_objective="uniformity")


CHANGED = {
    "alignment_weight": 0.5,
    "alignment_granularity": "layer",
    "num_aligned_heads": 2,
    "head_selection": "middle",
    "aligned_heads": ["L3", "L11"],
    "num_neighbors": 4,
    "temperature": 0.2,
    "learn_temperature": False,
    "alignment_objective": "own",
    "target_pull": 0.3,
    "similarity": "dot",
    "teacher_similarity": "dot",
    "metric_similarity": "centered_cosine",
    "objective_learning_rate": 1e-2,
    "teacher_control": "permuted",
    "publish_control": True,
    "teacher_model_name_or_path": "some/teacher",
    "teacher_batch_size": 3,
    "ranking_num_samples": 50,
    "ranking_clip_quantile": 0.95,
    "head_ranking_path": "ranking.json",
    "max_length": 77,
    "contrast_scope": "micro_batch",
    "image_feature_gib": 0.5,
    "queue_size": 64,
    "neighbor_group_size": 16,
    "gradient_accumulation_steps": 2,
    "monitor_steps": 50,
    "monitor_num_samples": 90,
}


def test_the_changed_values_cover_every_field() -> None:
    assert set(CHANGED) == set(OWN_FIELDS)
    assert all(CHANGED[name] != DEFAULTS[name] for name in CHANGED)


@pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
def test_from_the_command_line(tmp_path: Path, parser_class: type[HfArgumentParser]) -> None:
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    (args,) = parser_class((HeRAConfig,)).parse_args_into_dataclasses(words)
    assert own_values(args) == DEFAULTS
    for name, value in CHANGED.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    (args,) = parser_class((HeRAConfig,)).parse_args_into_dataclasses(words)
    assert own_values(args) == CHANGED


def test_the_temperature_follows_a_similarity_that_is_set_later(tmp_path: Path) -> None:
    args = HeRAConfig(**sft_args(tmp_path))
    for similarity, temperature in (("centered_cosine", 0.3), ("cosine", 0.07), ("dot", 1.0)):
        swept = dataclasses.replace(args, similarity=similarity)
        args.similarity = similarity
        for config in (args, swept):
            assert HeRALoss.from_config(config).temperature == pytest.approx(temperature)
            assert config.initial_temperature == temperature
    assert dataclasses.replace(args, temperature=0.5).initial_temperature == 0.5


def test_switches_on_the_command_line(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--no_learn_temperature"]
    (args,) = TrlParser((HeRAConfig,)).parse_args_into_dataclasses(words)
    assert args.learn_temperature is False


def test_choices_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        TrlParser((HeRAConfig,)).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--head_selection", "best"]
        )
    assert "invalid choice: 'best'" in capsys.readouterr().err


def test_from_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    values = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, **CHANGED}
    path.write_text(json.dumps(values))  # JSON is YAML
    (args,) = TrlParser((HeRAConfig,)).parse_args_and_config(["--config", str(path), "--num_neighbors", "6"])
    assert own_values(args) == {**CHANGED, "num_neighbors": 6}


@pytest.mark.parametrize("values", [DEFAULTS, CHANGED])
def test_dictionary_and_json_round_trip(tmp_path: Path, values: dict[str, Any]) -> None:
    args = HeRAConfig(**{**sft_args(tmp_path), **values})
    for content in (args.to_dict(), json.loads(args.to_json_string())):
        assert {name: content[name] for name in OWN_FIELDS} == values
        assert own_values(HeRAConfig(**content)) == values


# --- Heads or layers -------------------------------------------------------------------------------------------------


def test_layers_are_named_as_layers(tmp_path: Path) -> None:
    args = config(tmp_path, alignment_granularity="layer", aligned_heads=["L2", DecoderLayer(0)])
    assert args.aligned_heads == ["L2", "L0"]
    assert config(tmp_path, alignment_granularity="layer", head_selection="middle").aligned_heads is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alignment_granularity": "token"}, "`alignment_granularity` must be one of"),
        ({"head_selection": "middle"}, "Set `alignment_granularity='layer'`, or choose heads by 'worst'"),
        ({"aligned_heads": ["L2"]}, "Set `alignment_granularity='layer'`, or write layer and head: 'L3H4'"),
        (
            {"alignment_granularity": "layer", "aligned_heads": ["L2H1"]},
            "Set `alignment_granularity='head'`, or write layers alone: 'L3'",
        ),
    ],
)
def test_heads_and_layers_are_not_mixed_up(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path, **settings)
