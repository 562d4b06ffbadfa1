"""What a step of several micro-batches costs beside SFTTrainer's where the vision tower weighs as much as the language
model: its features are computed once for both passes.

    python examples/benchmarks/vision_tower.py                  # a LLaVA with random weights, bf16, on the CPU
    python examples/benchmarks/vision_tower.py --device cuda    # the same on a GPU
    python examples/benchmarks/vision_tower.py --small          # a tiny one, in a minute

LoRA on the language model alone, tower and projector frozen, heads in the first third of the layers. In the same turns:

1. HeRATrainer against SFTTrainer, whole optimizer steps of 8 micro-batches (see `training_step_parts.Steps`).
2. The same with `image_feature_gib=0`, which runs the tower in both passes.
3. A forward of tower and projector against one of the language model, without gradients: that they weigh the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from harness import Result, Row
from tiny import LLAVA_TEMPLATE, image_dataset, llava_tokenizer
from training_step import Turns, running
from training_step_parts import Setting, Steps
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

BAR = 1.12
ACCUMULATION = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. A block of the tower and a layer of the language model have as many weights; the tower has
    some more blocks, since it sees fewer tokens.

    Args:
        width, heads (`int`): Of tower and language model.
        layers, blocks (`int`): Layers of the language model, blocks of the tower.
        image, patch (`int`): Pixels along an edge.
        batch_size (`int`): Samples of a micro-batch.
        num_neighbors (`int`): The alignment loss's k.
    """

    width: int
    heads: int
    layers: int
    blocks: int
    image: int
    patch: int
    batch_size: int
    num_neighbors: int

    @property
    def aligned(self) -> list[str]:
        """Five heads of the first third of the layers, two of them in its last layer."""
        deepest = max(0, -(-self.layers // 3) - 1)
        return ["L0H0", "L0H1", "L0H2", f"L{deepest}H{self.heads - 2}", f"L{deepest}H{self.heads - 1}"]


LARGE = Shape(512, 8, 12, 14, 224, 14, 4, 10)
SMALL = Shape(48, 6, 3, 3, 24, 8, 2, 3)


def build(folder: Path, shape: Shape) -> None:
    """Fills a folder with the model, its processor and training data with random teacher vectors."""
    tokenizer = llava_tokenizer()
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
    width, patches = shape.width, (shape.image // shape.patch) ** 2
    shared = {"hidden_size": width, "num_attention_heads": shape.heads}
    text = {"model_type": "llama", "num_hidden_layers": shape.layers, "intermediate_size": width * 8 // 3, **ids}
    tower = {"num_hidden_layers": shape.blocks, "intermediate_size": 4 * width, "projection_dim": width}
    config = LlavaConfig(
        text_config={**shared, **text, "vocab_size": len(tokenizer)},
        vision_config={
            **{"model_type": "clip_vision_model", "image_size": shape.image, "patch_size": shape.patch},
            **shared,
            **tower,
        },
        vision_feature_layer=-1,
        image_seq_length=patches,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder / "model")
    crop = {"height": shape.image, "width": shape.image}
    images = CLIPImageProcessor(size={"shortest_edge": shape.image}, crop_size=crop)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    processor.save_pretrained(folder / "model")
    count = ACCUMULATION * shape.batch_size
    image_dataset(n=count, image_size=shape.image, with_features=16).save_to_disk(folder / "data")


def forwards(steps: Steps) -> dict[str, Callable[[], Any]]:
    """A forward of tower and projector over the batches of a step, and one of the language model."""
    trainer = steps.trainer
    model: Any = trainer.model.get_base_model().model  # type: ignore[operator]
    device = trainer.args.device
    batches = [
        {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}
        for each in steps.batches
        for batch in each
    ]

    def tower() -> None:
        with torch.no_grad(), trainer.accelerator.autocast():
            for batch in batches:
                model.get_image_features(batch["pixel_values"])

    def language() -> None:
        with torch.no_grad(), trainer.accelerator.autocast():
            for batch in batches:  # the image's placeholders are tokens like others here
                model.language_model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                )

    return {"tower": tower, "language": language}


def measure(folder: Path, pairs: int, small: bool, device: str) -> list[Row]:
    """All rows of the benchmark."""
    shape = SMALL if small else LARGE
    build(folder, shape)
    setting = Setting(
        str(folder),
        shape.aligned,
        shape.batch_size,
        ACCUMULATION,
        steps=1,
        num_neighbors=shape.num_neighbors,
        device=device,
        trains_projector=False,
    )
    twice = replace(setting, image_feature_gib=0.0)
    with running(setting, "sft", "ours") as steps, running(twice, "ours") as without:
        functions = {**steps, "twice": without["ours"], **forwards(steps["sft"])}
        turns = Turns.of(functions, pairs)
    deepest = shape.aligned[-1]
    note = f"deepest head {deepest} of {shape.layers} layers; {ACCUMULATION} x {shape.batch_size} samples"
    what = 'step with a heavy frozen tower, scope "step", accumulation 8, heads in the first third: time'

    def row(name: str, what: str, bar: float | None = None) -> Row:
        return turns.pairs(name, "sft").row(what, "SFTTrainer", at_most=bar, note=f"{note}; {turns.note(name, 'sft')}")

    weigh = turns.pairs("tower", "language").row(
        "a forward of tower and projector, no gradients: time",
        "a forward of the language model",
        note=turns.note("tower", "language"),
    )
    return [row("ours", what, BAR), row("twice", f"{what[:-6]}, `image_feature_gib=0`: time"), weigh]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = parser.parse_args(arguments)
    name = "vision_tower" + ("_small" if chosen.small else "") + ("_cuda" if chosen.device == "cuda" else "")
    command = f"python examples/benchmarks/vision_tower.py --pairs {chosen.pairs}"
    command += (" --small" if chosen.small else "") + f" --device {chosen.device}"
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), chosen.pairs, chosen.small, chosen.device)
    Result(name, command, rows).save()


if __name__ == "__main__":
    main()
