"""The samples on which attention heads are ranked."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..teacher.column import TEACHER_COLUMN, check_teacher_features
from ..teacher.encoder import VisionTeacher
from ..teacher.vectors import add_teacher_features
from .text import TextColumns, TextTokens, answer_text


class TooFewSamplesError(ValueError):
    """There are too few samples to find neighbours among.

    Args:
        found (`int`): Samples with distinct images and an answer.
        k (`int`): Neighbours.
    """

    def __init__(self, found: int, k: int) -> None:
        self.found = found
        super().__init__(
            f"Heads can be ranked on {found} samples with distinct images and an answer text only, but {k + 2} are "
            f"needed for {k} neighbours. Use more data, a smaller `num_neighbors`, or choose heads with "
            "`aligned_heads` or `head_ranking_path`."
        )


@dataclass
class Samples:
    """Samples drawn from a data set.

    Args:
        indices (`list[int]`): Their rows.
        tokens (list of `tuple[Tensor, Tensor]`):
            Token ids of each text and which of them are pooled, as [`~heads.text.TextTokens`] gives them.
        teacher (`Tensor` of shape `[N, d_teacher]`): Their teacher vectors.
        seed (`int`): Seed of the draw.
    """

    indices: list[int]
    tokens: list[tuple[Tensor, Tensor]]
    teacher: Tensor
    seed: int

    def digest(self) -> str:
        """Hex digest of what a ranking on text is computed from: token ids, positions pooled, and teacher vectors."""
        digest = hashlib.sha256(f"{list(self.teacher.shape)}\n".encode())
        digest.update(self.teacher.numpy().data)
        for ids, pooled in self.tokens:
            digest.update(f"{ids.tolist()} {pooled.int().tolist()}\n".encode())
        return digest.hexdigest()


def draw_samples(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    k: int,
    num_samples: int,
    seed: int,
    text_column: str | None = None,
) -> Samples:
    """Draws samples of distinct images with text. Arguments and errors are those of [`~heads.rank.rank_heads`]."""
    if num_samples < k + 2:
        raise ValueError(f"`num_samples` ({num_samples}) must be at least k + 2 = {k + 2}.")
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`dataset` is a {type(dataset).__name__}, but heads are ranked on a `datasets.Dataset`. Of a stream, take "
            "some rows: `Dataset.from_list(list(stream.take(1000)), features=stream.features)`."
        )
    if TEACHER_COLUMN not in dataset.column_names:
        raise ValueError(
            f"`dataset` has no `{TEACHER_COLUMN}` column. Add it with `hera_trainer.add_teacher_features`."
        )
    check_teacher_features(dataset)
    column = TextColumns(named=text_column).required(dataset.column_names)
    table = dataset.with_format(None).select_columns([TEACHER_COLUMN, column])  # images are not decoded
    text_tokens = TextTokens(tokenizer)
    indices, texts, tokens, vectors, images = [], set(), [], [], set()
    for index in np.random.default_rng(seed).permutation(len(table)).tolist():
        row = table[index]
        vector = row[TEACHER_COLUMN]
        if vector is None:
            continue
        image = np.asarray(vector, dtype=np.float32)  # equal images have equal vectors
        text = answer_text(row, TextColumns(named=column))
        encoded = text_tokens(text)
        if image.tobytes() in images or not encoded[1].any():
            continue
        images.add(image.tobytes())
        texts.add(text)
        indices.append(index)
        tokens.append(encoded)
        vectors.append(image)
        if len(indices) == num_samples:
            break
    if len(indices) < k + 2:
        raise TooFewSamplesError(len(indices), k)
    if len(texts) < len(indices) // 2:
        warnings.warn(
            f"The {len(indices)} samples on which attention heads are ranked have only {len(texts)} different texts, "
            "and equal texts have equal representations, so neighbours are arbitrary. Rank on descriptive captions: "
            "pass `head_ranking=rank_heads(model, processor, captions)` or `head_ranking_path`.",
            stacklevel=3,
        )
    return Samples(indices, tokens, torch.from_numpy(np.stack(vectors)), seed)


def second_vectors(
    dataset: Dataset,
    samples: Samples,
    encoder: VisionTeacher | str,
    batch_size: int,
    distributed: bool,
    device: torch.device | None = None,
) -> Tensor:
    """What a second vision encoder makes of the images of samples that were drawn.

    Args:
        dataset ([`~datasets.Dataset`]): The data set they were drawn from, with its images.
        samples ([`Samples`]): The samples.
        encoder ([`VisionTeacher`] or `str`): The encoder, or its name.
        batch_size (`int`): Images in one forward pass.
        distributed (`bool`): Divide the images among all processes of the run.
        device (`torch.device`, *optional*): Where an encoder that is named runs.

    Returns:
        `Tensor` of shape `[N, d]`, float32.

    Raises:
        `ValueError`: If a sample has a teacher vector but no image.
    """
    rows = dataset.remove_columns(TEACHER_COLUMN).select(samples.indices)
    rows = add_teacher_features(
        rows, encoder, batch_size=batch_size, desc="Ceiling", distributed=distributed, device=device
    )
    vectors = rows.with_format(None)[TEACHER_COLUMN][:]
    missing = [index for index, vector in zip(samples.indices, vectors, strict=True) if vector is None]
    if missing:
        raise ValueError(
            f"Row {missing[0]} has `{TEACHER_COLUMN}` but no image that the second encoder could look at. Leave "
            "`ceiling` out, or rank on rows with their images."
        )
    return torch.tensor(vectors, dtype=torch.float32)
