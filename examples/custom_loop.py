"""Head-wise representation alignment in a training loop of your own: accelerate and transformers, no TRL.

    accelerate launch examples/custom_loop.py \\
        --model Qwen/Qwen2.5-VL-3B-Instruct --dataset trl-lib/llava-instruct-mix --split "train[:2000]" --output_dir out

The data has a column `image` or `images`, at least one image a row, and `prompt` and `completion` as lists of messages.
The function `train_step` is the part to copy: it gives the gradients that `HeRATrainer` gives.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from hera_trainer import Alignment, HeadCapture, HeRALoss, add_teacher_features, mutual_knn, rank_heads
from hera_trainer.cli.rows import load_rows


def with_parts(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with a list of parts as content, which processors take."""
    return [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def collate(rows: list[dict[str, Any]], processor: ProcessorMixin) -> dict[str, Any]:
    """Inputs of the model, labels on the completions alone, and each row's teacher vector."""
    texts, images, answers = [], [], []
    for row in rows:
        shown = row["images"] if "images" in row else [row["image"]]
        prompt, answer = with_parts(row["prompt"]), with_parts(row["completion"])
        first = next(turn for turn in prompt if turn["role"] == "user")
        first["content"] = [{"type": "image"} for _ in shown] + first["content"]
        before = processor.apply_chat_template(prompt, add_generation_prompt=True)
        texts.append(processor.apply_chat_template(prompt + answer))
        answers.append(processor.tokenizer(texts[-1].removeprefix(before), add_special_tokens=False)["input_ids"])
        images.append(shown)
    # The template has written the special tokens already.
    batch = processor(
        images=images, text=texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt"
    )
    lengths = batch["attention_mask"].sum(1).tolist()
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    for labels, ids, length, answer in zip(batch["labels"], batch["input_ids"], lengths, answers, strict=True):
        labels[length - len(answer) : length] = ids[length - len(answer) : length]
    batch["teacher_features"] = torch.tensor([row["teacher_features"] for row in rows])
    return dict(batch)


def train_step(
    accelerator: Accelerator, model: nn.Module, batches: Sequence[dict[str, Any]], alignment: Alignment
) -> dict[str, float]:
    """The backward passes of one optimizer step over its micro-batches: what `HeRATrainer` does. The language-model
    loss is the mean over all tokens of the step, on all processes. (For models with `accepts_loss_kwargs = False`, such
    as Qwen-VL, `Trainer` takes the mean of the means instead.)

    Args:
        accelerator ([`~accelerate.Accelerator`]): As it prepared the model.
        model (`nn.Module`): The model, in training mode.
        batches (sequence of `dict`):
            Model inputs, `labels` `[B, T]` and `teacher_features` `[B, d_teacher]`, NaN for no image.
        alignment ([`Alignment`]): Attached to the model.

    Returns:
        `dict[str, float]`: What [`HeRATrainer`] logs: `lm_loss`, `alignment_loss`, `temperature`, ...
    """
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
    tokens = accelerator.reduce(torch.stack(counts).sum(), reduction="sum")

    def forward(batch: dict[str, Any]) -> Tensor:
        inputs = dict(batch)
        alignment.observe(inputs)  # reads the heads of the next forward pass
        return model(**inputs, use_cache=False).loss

    alignment.begin_step(len(batches))
    if alignment.needs_first_pass:  # without gradient, up to the deepest aligned head
        alignment.first_pass(batches, forward)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            with alignment.same_randomness():  # the dropout of the first pass
                loss = forward(batch)
            loss = loss * counts[i] * accelerator.num_processes / tokens
            accelerator.backward(alignment.add_to(loss))
            alignment.end_micro_batch()
    return alignment.metrics()


@torch.no_grad()
def measure(model: nn.Module, batches: Sequence[dict[str, Any]], capture: HeadCapture, k: int) -> float:
    """Mean mutual k-NN of the captured heads with the teacher, the images in context."""
    training = model.training
    model.eval()
    heads, teacher = [], []
    with capture.attached():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name not in ("labels", "teacher_features")}
            heads.append(capture.read(lambda x: model(**x, use_cache=False), inputs, batch["labels"] != -100, True))
            teacher.append(batch["teacher_features"])
    model.train(training)
    vectors = torch.cat(teacher)
    return sum(mutual_knn(z, vectors, k) for z in torch.cat(heads, dim=1)) / len(capture.heads)


def steps_of(loader: DataLoader, accumulation: int, steps: int) -> Iterator[list[dict[str, Any]]]:
    """The micro-batches of each optimizer step, epoch after epoch."""
    done = 0
    while done < steps:
        batches = iter(loader)
        while done < steps and len(step := list(islice(batches, accumulation))) == accumulation:
            yield step
            done += 1
        if not done:
            raise ValueError("The data is less than one optimizer step. Lower `--batch_size` or `--accumulation`.")


def main(arguments: Sequence[str] | None = None) -> dict[str, Tensor | float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True, help="name on the Hub, or folder of `save_to_disk`")
    parser.add_argument("--split", default="train")
    parser.add_argument("--teacher", default="facebook/dinov2-large")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--num_neighbors", type=int, default=10)
    parser.add_argument("--num_heads", type=int, default=5)
    parser.add_argument("--ranking_samples", type=int, default=1000)
    parser.add_argument("--weight", type=float, default=0.01)
    parser.add_argument("--target_pull", type=float, help="pull that the weight follows (docs/choosing.md)")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args(arguments)

    accelerator = Accelerator(cpu=args.cpu)
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(accelerator.device)
    processor = AutoProcessor.from_pretrained(args.model)
    dataset = add_teacher_features(load_rows(args.dataset, split=args.split), args.teacher, distributed=True)

    # The heads are ranked before anything is trained, and stay the same.
    ranking = rank_heads(
        model, processor, dataset, k=args.num_neighbors, num_samples=args.ranking_samples, distributed=True
    )
    heads = ranking.select("worst", args.num_heads)
    accelerator.print("Aligned heads:", *heads)

    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    criterion = HeRALoss(args.num_neighbors).to(accelerator.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    loader = DataLoader(
        dataset.with_format(None), args.batch_size, shuffle=True, collate_fn=partial(collate, processor=processor)
    )
    # After the adapter is in place: the projections are other modules now.
    alignment = Alignment(
        model, criterion, heads, weight=args.weight, target_pull=args.target_pull, accelerator=accelerator
    )
    assert alignment.capture is not None
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    some = list(islice(iter(loader), args.accumulation))  # enough to see a trend; take held-out rows for a result
    results: dict[str, Any] = {
        "heads": heads,
        "before": measure(model, some, alignment.capture, args.num_neighbors),
        "log": [],
    }
    model.train()
    with alignment.attached():
        for step, batches in enumerate(steps_of(loader, args.accumulation, args.steps), start=1):
            logs = train_step(accelerator, model, batches, alignment)
            accelerator.clip_grad_norm_(trained, 1.0)
            alignment.before_optimizer_step()
            optimizer.step()
            alignment.optimizer_step(args.learning_rate)
            optimizer.zero_grad()
            results["log"].append(logs)
            accelerator.print(f"step {step}", *(f"{name} {value:.4f}" for name, value in logs.items()))
    results["after"] = measure(model, some, alignment.capture, args.num_neighbors)
    accelerator.print(f"Mutual k-NN of the aligned heads: {results['before']:.3f} before, {results['after']:.3f} after")
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        processor.save_pretrained(args.output_dir)
        ranking.save(Path(args.output_dir, "head_ranking.json"))
    return results


if __name__ == "__main__":
    main()
