"""What the study measures of a model on held-out images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import (
    AttentionHead,
    HeadCapture,
    HeRALoss,
    get_head_accessor,
    mutual_knn_null,
    nearest_neighbors,
)
from hera_trainer.alignment.contrast import spread
from hera_trainer.demo.evaluate import majority_accuracy
from hera_trainer.evaluation.image_gain import other_rows
from hera_trainer.heads.registry import unwrap_model
from hera_trainer.objectives.metrics import neighbor_overlap

NEIGHBORS = 10
BATCH_SIZE = 50
# One yardstick for all arms, whatever they were trained with.
YARDSTICK = {"similarity": "centered_cosine", "temperature": 0.3}


@dataclass
class HeldOut:
    """Held-out images and what the encoders make of them.

    Args:
        rows (`Dataset`): Columns `images`, `prompt` and `completion`.
        vectors (`Mapping[str, Tensor]`): By name of the encoder, `[N, d]`.
        questions (`Dataset`, *optional*): Short answers to questions about other images, for models that are trained on
            questions: the same columns, `question` and `answer`.
        trained_questions (`Dataset`, *optional*): The questions that they are trained on.
    """

    rows: Dataset
    vectors: Mapping[str, Tensor]
    questions: Dataset | None = None
    trained_questions: Dataset | None = None

    def neighbors(self) -> dict[str, Tensor]:
        """By name of the encoder, each image's neighbours `[N, k]`."""
        return {name: nearest_neighbors(vectors, NEIGHBORS) for name, vectors in self.vectors.items()}

    def references(self, seed: int = 0) -> dict[str, Any]:
        """What scores are held against: what unrelated spaces score, and the two encoders each other, and the accuracy
        of giving each question's commonest answer."""
        first, second = self.neighbors().values()
        null = mutual_knn_null(first, second, seed=seed)
        found = {
            "n": len(self.rows),
            "k": NEIGHBORS,
            "null": [null.mean, null.p95],
            "ceiling": neighbor_overlap(first, second),
        }
        asked, trained = self.questions, self.trained_questions
        if asked is not None and trained is not None:
            found["questions"] = len(asked)
            found["wording"] = majority_accuracy(
                trained["answer"], asked["answer"], trained["question"], asked["question"]
            )
        return found


@torch.no_grad()
def measure(
    model: nn.Module,
    processor: Any,
    held_out: HeldOut,
    aligned: Mapping[str, Sequence[AttentionHead]],
    in_full: bool = True,
) -> dict[str, Any]:
    """Mutual k-NN of all heads with both encoders, with the image in context; the aligned heads' alignment loss and
    spread; the language-model loss. In full, also mutual k-NN on text alone, and what the loss rises by when the images
    are permuted, and the share of questions that are answered right, if there are any.

    Args:
        model (`nn.Module`): A model, in whatever mode; it is put into eval mode.
        processor (`Any`): Its processor.
        held_out ([`HeldOut`]): What to measure on.
        aligned (`Mapping[str, Sequence[AttentionHead]]`): By encoder, the heads that training with it aligns.
        in_full (`bool`): Take four passes through the model instead of one.
    """
    training = model.training
    model.eval()
    accessor = get_head_accessor(model)
    heads = accessor.heads()
    capture = HeadCapture(accessor, heads, model.config.model_type)
    rows = _trained_on(held_out.rows)
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    read: dict[str, Tensor] = {}
    read["image"], loss, _ = _read(model, collate, rows, capture)
    places = {name: [heads.index(head) for head in chosen] for name, chosen in aligned.items()}
    measured: dict[str, Any] = {"lm_loss": loss, "alignment_loss": {}, "spread": {}}
    for name, vectors in held_out.vectors.items():
        z = read["image"][places[name]]
        measured["alignment_loss"][name] = HeRALoss(NEIGHBORS, **YARDSTICK)(z, vectors).item()
        measured["spread"][name] = spread(z, torch.ones(len(vectors), dtype=torch.bool)).mean().item()
    if in_full:
        others = other_rows([1] * len(rows), range(len(rows)), seed=0)
        permuted = [{**row, "images": rows[other]["images"]} for row, other in zip(rows, others, strict=True)]
        measured["image_gain"] = _read(model, collate, permuted)[1] - loss
        if held_out.questions is not None:
            measured["vqa_accuracy"] = _read(model, collate, _trained_on(held_out.questions))[2]
        read["text"], _, _ = _read(model, partial(_captions_alone, processor), rows, capture)
    measured["mknn"] = {}
    for context, vectors in read.items():
        found = [nearest_neighbors(z, NEIGHBORS) for z in vectors]
        measured["mknn"][context] = {
            name: [round(neighbor_overlap(own, targets), 4) for own in found]
            for name, targets in held_out.neighbors().items()
        }
    model.train(training)
    return measured


def _trained_on(rows: Dataset) -> list[dict]:
    return [{name: row[name] for name in ("images", "prompt", "completion")} for row in rows]


def _read(
    model: nn.Module, collate: Callable, rows: Sequence[dict], capture: HeadCapture | None = None
) -> tuple[Tensor, float, float]:
    """Representations of the captured heads `[m, N, d_model]`, the mean loss of the labelled tokens, and the share of
    rows whose labelled tokens are all the likeliest ones: those are what greedy decoding gives."""
    vectors: list[Tensor] = []
    loss, tokens, right = 0.0, 0, 0
    for start in range(0, len(rows), BATCH_SIZE):
        some = [dict(row) for row in rows[start : start + BATCH_SIZE]]  # TRL's collator writes into them
        batch = {name: value.to(model.device) for name, value in collate(some).items()}
        with nullcontext() if capture is None else capture.attached():
            if capture is not None:
                capture.start(batch["labels"] != -100, train=False)
            logits, labels = _labelled(model, batch)
            if capture is not None:
                vectors.append(capture.vectors().cpu())
        loss += F.cross_entropy(logits, labels[labels != -100], reduction="sum").item()
        missed = torch.zeros_like(labels, dtype=torch.bool)
        missed[labels != -100] = logits.argmax(-1) != labels[labels != -100]
        right += int((~missed.any(dim=1)).sum())
        tokens += len(logits)
    return torch.cat(vectors, dim=1) if vectors else torch.empty(0), loss / tokens, right / len(rows)


def _labelled(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits that predict the labelled tokens `[n, vocabulary]`, and the shifted labels `[B, T - 1]`. Logits of other
    positions, most of them, are not made."""
    inner = unwrap_model(model)
    labels = batch["labels"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = inner.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    return inner.lm_head(hidden[labels != -100]).float(), labels


def _captions_alone(processor: Any, rows: Sequence[dict]) -> dict[str, Tensor]:
    """A batch of texts without template and image, as heads are ranked."""
    texts = [row["completion"][0]["content"] for row in rows]
    batch = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
