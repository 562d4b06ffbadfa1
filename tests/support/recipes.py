"""Writes the tables of `docs/recipes.md`: `python tests/support/recipes.py`. A test compares the page with them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from published_configs import PUBLISHED

from hera_trainer.cli.plan import settings_of_config
from hera_trainer.planning.plan import GIB, RunPlan, RunSettings, plan_run

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes.md"
RECIPES = sorted((ROOT / "examples" / "configs").glob("*gb.yaml"))
HEAD = ["Recipe", "Weights", "Trained", "Pixels", "Activations", "Alignment", "Peak", "Largest", "Set", "First pass"]


def gpu_of(recipe: Path) -> int:
    """Memory of the GPU that a recipe is for, in GB, from its name."""
    return int(re.fullmatch(r".*_(\d+)gb", recipe.stem)[1])


@cache
def plan_of(recipe: Path) -> RunPlan:
    """The plan of a recipe's settings, with the model's configuration from `published_configs`."""
    model, _, settings = settings_of_config(recipe)
    return plan_run(PUBLISHED[model](), RunSettings(**settings))


def row(recipe: Path) -> list[str]:
    """A recipe's row: GiB, and what the first pass adds with the deepest head in the first third and the last layer."""
    plan = plan_of(recipe)
    weights = plan.fixed["weights"] + plan.fixed["unpacked_layer"]
    sizes = [
        weights,
        sum(plan.fixed.values()) - weights,
        plan.batch["inputs"],
        plan.batch["activations"] + plan.batch["largest_stage"],
        sum(plan.alignment.values()),
        plan.total,
    ]
    shares = [f"{share:.0%}" for share in plan.first_pass.values()]
    name = f"`{recipe.name}`"
    return [
        name,
        *(f"{size / GIB:.2f}" for size in sizes),
        str(plan.largest_batch(gpu_of(recipe))),
        f"{plan.settings.per_device_train_batch_size} x {plan.settings.gradient_accumulation_steps}",
        " to ".join(shares),
    ]


def tables() -> str:
    """All tables with their commands, by the size of the GPU."""
    parts = []
    for gpu in sorted({gpu_of(recipe) for recipe in RECIPES}):
        recipes = [recipe for recipe in RECIPES if gpu_of(recipe) == gpu]
        rows = [HEAD, ["---"] * len(HEAD), *(row(recipe) for recipe in recipes)]
        lines = ["| " + " | ".join(cells) + " |" for cells in rows]
        commands = [f"hera plan --config examples/configs/{recipe.name} --gpu-memory {gpu}" for recipe in recipes]
        parts += [f"### {gpu} GB", "\n".join(lines), "\n".join(["```bash", *commands, "```"])]
    return "\n\n".join(parts)


def main() -> None:
    text = PAGE.read_text()
    start, end = text.index("<!-- tables -->") + len("<!-- tables -->"), text.index("<!-- end of tables -->")
    PAGE.write_text(f"{text[:start]}\n\n{tables()}\n\n{text[end:]}")


if __name__ == "__main__":
    main()
