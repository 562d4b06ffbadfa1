"""What ranking all attention heads costs beside a plain forward pass of the same captions.

    python examples/benchmarks/ranking.py            # 1,000 captions, all 270 heads of SmolLM2-135M, bf16 autocast
    python examples/benchmarks/ranking.py --small    # a tiny random model of the test suite, in seconds

Ours is `rank_heads` as a whole, from the data set with teacher vectors to the scores. The plain forward runs the text
decoder alone on batches that are tokenized and padded already, the same ones in the same precision. What ranking adds
is the same for each head and nearly the same for captions of any length, so it weighs most where captions are short.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from datasets import Dataset
from harness import Result, Row, paired
from torch import nn

from hera_trainer import rank_heads
from hera_trainer.data.collator import TEACHER_COLUMN
from hera_trainer.heads.registry import get_head_accessor
from hera_trainer.heads.text import TextTokens

ROOT = Path(__file__).resolve().parent.parent.parent
BATCH_SIZE = 16  # the default of `rank_heads`
K = 10
TEACHER_WIDTH = 384


def parts(small: bool) -> tuple[nn.Module, Any, list[str]]:
    """Model, tokenizer and short captions."""
    if small:
        sys.path.insert(0, str(ROOT / "tests" / "support"))
        from tiny import build_vlm

        model, processor = build_vlm("llava")
        return model, processor.tokenizer, [f"an image of {number} things" for number in range(100, 180)]
    from hera_trainer.demo.data import emoji_captions
    from hera_trainer.demo.parts import load_language_model

    model, tokenizer = load_language_model()
    return model, tokenizer, list(emoji_captions(size=8)["caption"])


def captions(short: list[str], n: int, joined: int) -> list[str]:
    """n texts of some of the short captions each."""
    generator = np.random.default_rng(0)
    if joined == 1:
        return short[:n]
    return [" ".join(generator.choice(short, joined, replace=False)) for _ in range(n)]


def batches(model: nn.Module, tokenizer: Any, texts: list[str], device: str) -> list[dict[str, torch.Tensor]]:
    """The decoder's inputs, batch by batch, as `rank_heads` makes them: longest texts first, padded on the right."""
    tokens = TextTokens(tokenizer)
    encoded = sorted((tokens(text)[0] for text in texts), key=len, reverse=True)
    made = []
    for start in range(0, len(encoded), BATCH_SIZE):
        ids = encoded[start : start + BATCH_SIZE]
        attention = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        made.append({"input_ids": padded.to(device), "attention_mask": attention.to(device)})
    return made


def row(model: nn.Module, tokenizer: Any, texts: list[str], pairs: int, device: str) -> Row:
    """Ranking on `texts` against a plain forward of them."""
    accessor = get_head_accessor(model)
    vectors = np.random.default_rng(1).standard_normal((len(texts), TEACHER_WIDTH)).astype(np.float32)
    dataset = Dataset.from_dict({"text": texts, TEACHER_COLUMN: vectors.tolist()})
    prepared = batches(model, tokenizer, texts, device)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in prepared) / len(texts)
    heads = []

    def precision() -> AbstractContextManager:
        # A new one for each measurement: it keeps the weights that it has cast.
        return torch.autocast(device, dtype=torch.bfloat16)

    def ours() -> None:
        with precision():
            ranking = rank_heads(
                model, tokenizer, dataset, k=K, num_samples=len(texts), batch_size=BATCH_SIZE, progress=False
            )
        heads.append(len(ranking.heads()))

    def theirs() -> None:
        with precision(), torch.no_grad():
            for batch in prepared:
                accessor.decoder(**batch, use_cache=False)

    measured = paired(ours, theirs, pairs)
    return measured.row(
        f"ranking {heads[0]} heads on {len(texts)} captions of {tokens:.0f} tokens: time",
        "plain forward of the same captions",
        at_most=1.10,
        note="seconds, bf16 autocast",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a tiny random model of the test suite")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = parser.parse_args(arguments)
    model, tokenizer, short = parts(chosen.small)
    model.to(chosen.device)
    n, lengths = (40, [1]) if chosen.small else (1000, [1, 4, 16])
    rows = [row(model, tokenizer, captions(short, n, joined), chosen.pairs, chosen.device) for joined in lengths]
    name = "ranking" + ("_small" if chosen.small else "") + ("_cuda" if chosen.device == "cuda" else "")
    options = (" --small" if chosen.small else "") + f" --device {chosen.device}"
    Result(name, f"python examples/benchmarks/ranking.py --pairs {chosen.pairs}{options}", rows).save()


if __name__ == "__main__":
    main()
