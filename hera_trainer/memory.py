"""A queue of past samples that joins the candidates of the alignment loss."""

from __future__ import annotations

import os

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import write_atomically


def image_keys(teacher: Tensor) -> Tensor:
    """One integer an image: equal images have equal teacher vectors, bit for bit.

    Args:
        teacher (`Tensor` of shape `[B, d_teacher]`): Teacher vectors, float32.

    Returns:
        `LongTensor` of shape `[B]`.
    """
    bits = teacher.float().contiguous().view(torch.int32).long()
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator) * 2 + 1
    return (bits * factors.to(bits.device)).sum(-1)  # wraps around, as a hash may


class SampleQueue:
    """First-in-first-out memory of the last `size` samples. Their representations carry no gradient.

    Args:
        size (`int`): Largest number of samples kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.heads: Tensor | None = None  # [m, Q, d_model]
        self.teacher: Tensor | None = None  # [Q, d_teacher]
        self.keys: Tensor | None = None  # [Q]

    def __len__(self) -> int:
        return 0 if self.keys is None else len(self.keys)

    @torch.no_grad()
    def push(self, heads: Tensor, teacher: Tensor) -> None:
        """Takes samples, forgetting the oldest.

        Args:
            heads (`Tensor` of shape `[m, B, d_model]`): Head representations.
            teacher (`Tensor` of shape `[B, d_teacher]`): Teacher vectors of the same samples.
        """
        heads, teacher, keys = heads.detach().float(), teacher.detach().float(), image_keys(teacher)
        if self.heads is not None and self.teacher is not None and self.keys is not None:
            heads = torch.cat([self.heads, heads], dim=1)
            teacher, keys = torch.cat([self.teacher, teacher]), torch.cat([self.keys, keys])
        # Cloned: a view would keep everything that was ever pushed in memory.
        self.heads = heads[:, -self.size :].clone()
        self.teacher, self.keys = teacher[-self.size :].clone(), keys[-self.size :].clone()

    def save(self, path: str | os.PathLike) -> None:
        """Writes the queue as safetensors, atomically. Writes nothing while it is empty."""
        if self.heads is None or self.teacher is None or self.keys is None:
            return
        tensors = {"heads": self.heads, "teacher": self.teacher, "keys": self.keys}
        content = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        write_atomically(path, lambda temporary: save_file(content, temporary))

    def load(self, path: str | os.PathLike, device: torch.device) -> None:
        """Reads what `save` wrote. The last `size` samples are kept."""
        tensors = load_file(path, device=str(device))
        self.heads = tensors["heads"][:, -self.size :].clone()
        self.teacher = tensors["teacher"][-self.size :].clone()
        self.keys = tensors["keys"][-self.size :].clone()
