"""A queue of past samples that joins the candidates of the alignment loss."""

from __future__ import annotations

import json
import os

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..common.files import write_atomically

# Teacher vectors of one image differ by rounding where it was encoded in batches of other sizes, as in streams. Those
# of different images differ by much more.
_SAME_IMAGE = 1e-4


class SampleQueue:
    """The last `size` samples, first in, first out. Their representations carry no gradient.

    Args:
        size (`int`): Largest number of samples kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.clear()

    def clear(self) -> None:
        """Forgets all samples."""
        self.heads: Tensor | None = None  # [m, Q, d_model]
        self.teacher: Tensor | None = None  # [Q, d_teacher]

    def __len__(self) -> int:
        return 0 if self.teacher is None else len(self.teacher)

    @torch.no_grad()
    def push(self, heads: Tensor, teacher: Tensor) -> None:
        """Takes samples, forgetting the oldest.

        Args:
            heads (`Tensor` of shape `[m, B, d_model]`): Head representations.
            teacher (`Tensor` of shape `[B, d_teacher]`): Teacher vectors of the same samples.
        """
        heads, teacher = heads.detach().float(), teacher.detach().float()
        if self.heads is not None and self.teacher is not None:
            heads, teacher = torch.cat([self.heads, heads], dim=1), torch.cat([self.teacher, teacher])
        # Cloned: a view would keep everything that was ever pushed in memory.
        self.heads, self.teacher = heads[:, -self.size :].clone(), teacher[-self.size :].clone()

    def same_image(self, teacher: Tensor) -> Tensor:
        """Which past samples have the image of which sample, by the teacher's vectors.

        Args:
            teacher (`Tensor` of shape `[B, d_teacher]`): Teacher vectors, float32.

        Returns:
            `BoolTensor` of shape `[B, Q]`.
        """
        assert self.teacher is not None
        # Not by matrix products, whose rounding is as large as the difference.
        distance = torch.cdist(teacher, self.teacher, compute_mode="donot_use_mm_for_euclid_dist")
        return distance <= _SAME_IMAGE * torch.linalg.vector_norm(teacher, dim=1, keepdim=True)

    def save(self, path: str | os.PathLike, identity: dict[str, str] | None = None) -> None:
        """Writes the queue as safetensors, atomically. Writes nothing while it is empty.

        Args:
            path (`str` or `os.PathLike`): Where to.
            identity (`dict[str, str]`, *optional*): What the samples depend on, see [`SampleQueue.identity_of`].
        """
        if self.heads is None or self.teacher is None:
            return
        tensors = {"heads": self.heads, "teacher": self.teacher}
        content = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        # As one entry: safetensors writes several in no fixed order, and equal queues shall be equal files.
        metadata = None if identity is None else {"identity": json.dumps(identity, sort_keys=True)}
        write_atomically(path, lambda temporary: save_file(content, temporary, metadata))

    @staticmethod
    def identity_of(path: str | os.PathLike) -> dict[str, str]:
        """What the samples of a file depend on, and the width of their teacher vectors: those of other heads or of
        another teacher mean nothing to a run."""
        with safe_open(path, framework="pt") as file:
            width = file.get_slice("teacher").get_shape()[1]
            identity = json.loads((file.metadata() or {}).get("identity", "{}"))
            return {**identity, "teacher width": str(width)}

    def load(self, path: str | os.PathLike, device: torch.device) -> None:
        """Reads what `save` wrote. The last `size` samples are kept."""
        tensors = load_file(path, device=str(device))
        self.heads = tensors["heads"][:, -self.size :].clone()
        self.teacher = tensors["teacher"][-self.size :].clone()
