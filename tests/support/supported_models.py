"""Writes `docs/supported_models.md`: `python tests/support/supported_models.py`. A test holds it to that."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import torch
import transformers
import trl
from families import ALL_FAMILIES, FAULTS, REFUSED
from model_zoo import ALL_TYPES, MAPPING, SIDE_BY_SIDE, TRANSFORMERS, UPSTREAM_FAULTS, build
from packaging.version import Version
from torch import nn

from hera_trainer.heads.accessor import HeadAccessor
from hera_trainer.heads.layouts import decoder_accessor
from hera_trainer.heads.registry import get_head_accessor

PAGE = Path(__file__).parents[2] / "docs" / "supported_models.md"
_VERSION = r"(?<=model type of transformers )\d+[.]\d+"
_CHECKED = r"(?<=checked with )transformers \d+[.]\d+ and TRL \d+[.]\d+"

# Types that take part in no next-token training, though they are no encoder-decoders.
NOT_TRAINED = {
    "evolla": "reads proteins, not images",
    "git": "its hidden states begin with those of the image, which have no labels",
    "pi0": "predicts a robot's actions, not text; the heads are those of its vision-language model",
}


# What else must be known of a type that the whole trainer runs with.
LOGITS = "SFTTrainer scales the logits by the text model's `logit_scale`, the model's own forward does not"
NOTES = {
    "aya_vision": LOGITS,
    "cohere2_vision": LOGITS,
    "paligemma": "with `messages` it trains, but every token sees the whole answer",
    "fast_vlm": "the statistics of its tower's BatchNorm move in training, and no adapter holds them",
}
FORMS = {"prompt_completion": "`prompt` and `completion`", "messages": "`messages`"}


def uses(model: nn.Module, accessor: HeadAccessor) -> str:
    """What the heads of a model can be used for: everything, ranking and reading, or reading."""
    if accessor.needs:
        return "read"
    return "rank, read" if model.config.is_encoder_decoder or model.config.model_type in NOT_TRAINED else "all"


def path_of_projections(model: nn.Module, accessor: HeadAccessor) -> str:
    """Where the output projections are, with `i` for the number of the layer."""
    names = {id(module): name for name, module in model.named_modules()}
    layers = names[id(accessor.layers[0])].removesuffix(".0")
    first = accessor.layers_with_heads[0]
    within = names[id(accessor.projection(first))].removeprefix(f"{layers}.{first}.")
    return f"{layers}[i]." + re.sub(r"[.](\d+)[.]", r"[\1].", within)


def proven(model_type: str) -> str:
    """How much of the way from a type's heads to a trained adapter the tests go."""
    if model_type in UPSTREAM_FAULTS:
        return "heads"
    return "trainer" if model_type in ALL_FAMILIES else "model"


def note(model: nn.Module, accessor: HeadAccessor) -> str:
    """Why the heads of a model can't be used for everything, and what else must be known of them."""
    model_type = model.config.model_type
    if accessor.needs:
        return f"the decoder needs {accessor.needs}"
    if model_type in UPSTREAM_FAULTS:
        version, error, what = UPSTREAM_FAULTS[model_type]
        return f"cannot be run: since transformers {version}, its forward raises {error.__name__}, as it {what}"
    if any(accessor.passes(layer) > 1 for layer in accessor.layers_with_heads):
        return "looped: heads of layers that are gone through several times are read in the first pass"
    if model_type in SIDE_BY_SIDE:
        return "heads only: whole layers, which put out several residual streams, can't be aligned"
    stops = [
        f'at {FORMS[form]}, SFTTrainer stops: `{error.__name__}`, "{message}"; '
        "[a collator that can](data.md#types-that-need-a-collator-of-their-own)"
        for (name, form), (error, message) in REFUSED.items()
        if name == model_type
    ]
    if model_type in FAULTS:
        error, message, cure = FAULTS[model_type]
        stops.append(f'SFTTrainer stops: `{error.__name__}`, "{message}", unless `{cure}`')
    if stops or model_type in NOTES:
        return "; ".join([*stops, *([NOTES[model_type]] if model_type in NOTES else [])])
    return NOT_TRAINED.get(model_type, "encoder-decoder" if model.config.is_encoder_decoder else "")


def default_model(model_type: str) -> nn.Module | None:
    """A type's model, or at least its language model, as its default configuration has it; on the meta device."""
    config = transformers.CONFIG_MAPPING[model_type]()
    for build_default in (
        lambda: getattr(transformers, MAPPING[model_type])(config),
        lambda: transformers.AutoModel.from_config(config.get_text_config(decoder=True)),
    ):
        try:
            with torch.device("meta"):
                return build_default()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            print(f"{model_type}: no model from the default configuration ({str(error)[:80]})", file=sys.stderr)
    return None


def default_sizes(model_type: str) -> tuple[str, str]:
    """Layers with heads, and heads x size, of a type's default configuration."""
    model = default_model(model_type)
    if model is None:
        return "no default", "no default"
    accessor = decoder_accessor(model)
    layers = accessor.layers_with_heads
    counts = Counter((accessor.num_heads(layer), accessor.head_dim(layer)) for layer in layers)
    sizes = [f"{heads} x {size}" + (f" in {n}" if len(counts) > 1 else "") for (heads, size), n in counts.items()]
    return f"{len(layers)} of {accessor.num_layers}", ", ".join(sizes)


def page_rows() -> dict[str, list[str]]:
    """Of each type on the page, the columns that `row` gives."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    return {cells[0].strip("`"): [*cells[:3], *cells[-2:]] for cells in rows}


def page_version() -> Version:
    """The version of transformers whose types are on the page."""
    (version,) = re.findall(_VERSION, PAGE.read_text())
    return Version(version)


def row(model_type: str) -> list[str]:
    """Those columns of a type's row that do not depend on its default configuration."""
    model = build(model_type)
    accessor = get_head_accessor(model)
    path = path_of_projections(model, accessor)
    return [f"`{model_type}`", uses(model, accessor), f"`{path}`", proven(model_type), note(model, accessor)]


def main() -> None:
    rows = []
    for model_type in ALL_TYPES:
        name, use, path, *last = row(model_type)
        rows.append([name, use, path, *default_sizes(model_type), *last])
    head = ["Type", "Heads for", "Output projection", "Layers with heads", "Heads x size", "Proven", "Note"]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
    version, trls = f"{TRANSFORMERS.major}.{TRANSFORMERS.minor}", Version(trl.__version__)
    text = re.sub(_VERSION, version, PAGE.read_text())
    text = re.sub(_CHECKED, f"transformers {version} and TRL {trls.major}.{trls.minor}", text)
    start, end = text.index("<!-- table -->") + len("<!-- table -->"), text.index("<!-- end of table -->")
    PAGE.write_text(f"{text[:start]}\n\n{table}\n\n{text[end:]}")


if __name__ == "__main__":
    main()
