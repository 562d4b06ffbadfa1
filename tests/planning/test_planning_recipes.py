"""The recipes: they parse, they are what their names and the page say."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml
from peft import get_peft_model
from published_configs import PUBLISHED
from recipes import HEAD, PAGE, RECIPES, gpu_of, plan_of, row, tables
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from hera_trainer import HeRAConfig
from hera_trainer.alignment.checks import check_arguments
from hera_trainer.planning.model import meta_model
from hera_trainer.planning.plan import GIB, plan_run, usable_bytes


@pytest.fixture(params=RECIPES, ids=lambda recipe: recipe.stem)
def recipe(request):
    return request.param


def parse(recipe, tmp_path):
    parser = TrlParser((ScriptArguments, HeRAConfig, ModelConfig, DatasetMixtureConfig))
    on_cpu = ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    return parser.parse_args_and_config(["--config", str(recipe), *on_cpu])


def test_every_size_of_gpu_and_every_model_has_a_recipe():
    assert {gpu_of(recipe) for recipe in RECIPES} == {8, 12, 16, 24}
    assert {yaml.safe_load(recipe.read_text())["model_name_or_path"] for recipe in RECIPES} == set(PUBLISHED)


def test_a_recipe_parses_and_is_what_was_planned(recipe, tmp_path):
    script, config, model, mixture = parse(recipe, tmp_path)
    plan = plan_of(recipe)
    assert script.dataset_name == "trl-lib/llava-instruct-mix" and not mixture.datasets
    check_arguments(config)
    assert config.pool_size() == plan.pool >= 64 > config.num_neighbors + 1
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_neighbors", "num_aligned_heads"):
        assert getattr(plan.settings, name) == getattr(config, name)
    for name in ("dtype", "load_in_4bit", "use_bnb_nested_quant", "use_peft", "lora_r", "lora_target_modules"):
        assert getattr(plan.settings, name) == getattr(model, name)
    assert plan.settings.optim == config.optim
    assert plan.settings.gradient_checkpointing == config.gradient_checkpointing is True
    quantization = get_quantization_config(model)
    assert (quantization is not None) == ("QLoRA" in recipe.read_text().splitlines()[0])


def test_a_recipe_trains_the_adapter_that_was_planned(recipe, tmp_path):
    model = parse(recipe, tmp_path)[2]
    adapted = get_peft_model(
        meta_model(PUBLISHED[model.model_name_or_path]()), get_peft_config(model), low_cpu_mem_usage=True
    )
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == plan_of(recipe).trained > 0
    in_tower = any(re.search(r"\.(visual|vision_tower|vision_model)\.", name) for name in trained)
    assert in_tower == (model.lora_target_modules == "all-linear")


def test_a_recipe_fits_its_gpu_with_room_to_spare(recipe):
    plan, gpu = plan_of(recipe), gpu_of(recipe)
    assert plan.total <= usable_bytes(gpu) < gpu * GIB
    batch, steps = plan.settings.per_device_train_batch_size, plan.settings.gradient_accumulation_steps
    twice = replace(plan.settings, per_device_train_batch_size=2 * batch, gradient_accumulation_steps=steps // 2)
    config = PUBLISHED[yaml.safe_load(recipe.read_text())["model_name_or_path"]]()
    assert plan.total < plan_run(config, twice).total <= usable_bytes(gpu)


def test_the_first_lines_name_the_commands(recipe):
    lines = recipe.read_text().splitlines()
    assert f"{gpu_of(recipe)} GB" in lines[0] and "not yet measured on a GPU" in lines[0]
    assert lines[1] == f"#   hera plan --config examples/configs/{recipe.name} --gpu-memory {gpu_of(recipe)}"


def test_the_page_has_what_planning_gives():
    text = PAGE.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `") and "gb.yaml" in line]
    expected = ["| " + " | ".join(row(recipe)) + " |" for recipe in RECIPES]
    assert sorted(rows) == sorted(expected), "run `python tests/support/recipes.py`"
    assert tables() in text and " | ".join(HEAD) in text
    assert "Estimated, not yet measured on a GPU" in text
