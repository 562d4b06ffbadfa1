"""Measures, for each precision of a backbone, how far head vectors are from an explicit computation with dequantized
weights, without and with LoRA, and whether LoRA steps train; prints a Markdown table.

    python examples/precision_table.py                              # tiny random models of three families
    python examples/precision_table.py --family qwen3_5             # of one
    python examples/precision_table.py --family llava --model PATH  # a local checkpoint of that family
    python examples/precision_table.py --page docs/precisions.md    # and writes it between the markers of the page

Runs on the CPU, from a checkout of the repository, in about two minutes. Precisions whose library is not installed are
left out.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKERS = ("<!-- precisions -->", "<!-- /precisions -->")
COLUMNS = ("precision", "library", "vectors, training", "vectors, evaluation", "blocks", "LoRA steps train", "run on")
FAMILIES = ("llava", "qwen3_5", "qwen3_vl")
ON_A_GPU = {"GPTQ": "gptqmodel", "AWQ": "gptqmodel", "mixed fp16 with a gradient scaler": "torch"}


def deviations(scheme: Any, path: str) -> list[float]:
    """Largest relative deviation of head vectors in training mode, in evaluation mode, and of the blocks of all output
    projections, each without and with LoRA."""
    import torch
    from precisions import (
        batch_of,
        captured,
        deviation,
        explicit_vectors,
        explicit_weight,
        heads_of_two_layers,
        with_lora,
    )

    from hera_trainer.heads.modes import evaluating
    from hera_trainer.heads.projection import projection_blocks
    from hera_trainer.heads.registry import get_head_accessor

    worst = [0.0, 0.0, 0.0]
    batch, model = batch_of(path), scheme.load(path)
    for wrap in (lambda plain: plain, with_lora):
        model = wrap(model)
        heads, accessor = heads_of_two_layers(model), get_head_accessor(model)
        for place, mode in enumerate((torch.no_grad(), evaluating(model))):
            model.train()
            with mode:
                found = deviation(captured(model, batch, heads), explicit_vectors(model, batch, heads))
            worst[place] = max(worst[place], found)
        for layer in accessor.layers_with_heads:
            with evaluating(model):
                blocks = projection_blocks(accessor.projection(layer), accessor.num_heads(layer))
                weight = explicit_weight(accessor.projection(layer))
            worst[2] = max(worst[2], deviation(blocks, weight.T.reshape(blocks.shape)))
    return worst


def trains(scheme: Any, path: str, folder: str) -> bool:
    """Whether four LoRA steps with evaluations between them move every adapter, lower the loss and stay finite."""
    import torch
    from precisions import lora_config
    from tiny import image_dataset, sft_args
    from transformers import AutoProcessor, PrinterCallback

    from hera_trainer import HeRAConfig, HeRATrainer

    dataset = image_dataset(n=16, with_features=8)
    args = HeRAConfig(
        **sft_args(folder, per_device_train_batch_size=8, max_steps=4, eval_strategy="steps", eval_steps=1),
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        num_neighbors=3,
        num_aligned_heads=3,
        alignment_weight=0.1,
        ranking_num_samples=16,
        model_init_kwargs=scheme.init_kwargs() if scheme.convert is None else None,
    )
    trainer = HeRATrainer(
        path if scheme.convert is None else scheme.load(path),
        args,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(path),
        peft_config=lora_config(),
    )
    trainer.remove_callback(PrinterCallback)
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in trained.items()}
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    moved = all(not torch.equal(value, before[name]) and value.isfinite().all() for name, value in trained.items())
    return moved and losses[-1] < losses[0]


def table(families: list[str], model: str | None) -> str:
    """The Markdown table."""
    import datasets
    import transformers
    from precisions import PRECISIONS, SIZES
    from tiny import save_vlm

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
    ]
    print(*lines, sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        paths = [model or save_vlm(family, f"{folder}/{family}", **SIZES) for family in families]
        for name, scheme in PRECISIONS.items():
            if find_spec(scheme.library) is None:
                continue
            found = [max(values) for values in zip(*(deviations(scheme, path) for path in paths), strict=True)]
            works = all(trains(scheme, path, f"{folder}/out") for path in paths)
            cells = [name, scheme.library, *(f"{value:.1e}" for value in found), "yes" if works else "no", "CPU"]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    for name, library in ON_A_GPU.items():
        lines.append(f"| {name} | {library} | | | | | GPU only; not yet run on a GPU |")
        print(lines[-1])
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, help="one family; all by default")
    parser.add_argument("--model", help="local checkpoint of that family, with a processor that has a chat template")
    parser.add_argument("--page", help="Markdown file whose table is replaced")
    args = parser.parse_args()
    if args.model and not args.family:
        parser.error("`--model` needs `--family`")
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    if not args.model:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only get in the way of tiny models
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    markdown = table([args.family] if args.family else list(FAMILIES), args.model)
    if args.page:
        path = Path(args.page)
        block = f"{MARKERS[0]}\n{markdown}\n{MARKERS[1]}"
        path.write_text(re.sub(f"{MARKERS[0]}.*{MARKERS[1]}", lambda _: block, path.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
