"""How strongly the alignment loss pulls at the aligned heads, and a weight that holds it there."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

# As VQGAN bounds its adaptive weight.
MIN_WEIGHT, MAX_WEIGHT = 1e-4, 1e2
# Of the running mean over optimizer steps.
_DECAY = 0.9
# Below this pull nothing moved in the runs of some tens of steps that were measured (docs/results.md).
_WEAK = 0.03
_SHORT_RUN = 1000  # optimizer steps


def advice(pull: float, steps: int) -> str | None:
    """What to say of a run with a fixed weight whose pull is too weak for its length; `None` if it is not.

    Args:
        pull (`float`): The pull of its first steps.
        steps (`int`): Optimizer steps of the run.
    """
    if pull >= _WEAK or steps >= _SHORT_RUN:
        return None
    return (
        f"The alignment loss pulls at the aligned heads with {pull:.2g} of the strength of the language-model loss "
        f"(`alignment_pull`), in a run of {steps} steps. In the short runs that were measured (docs/results.md), so "
        "little moved nothing; `target_pull=0.3` moved heads where the projector was new, and `target_pull=1` where it "
        "was trained. (The default `alignment_weight` is the paper's, for thousands of steps.)"
    )


class Pull:
    """Compares, at the aligned heads, the gradient of the weighted alignment loss with the gradient that reaches the
    same place from above: that of the language-model loss, and what deeper aligned heads send down.

    Both are taken with respect to each head's contribution to the residual stream at the pooled positions, where the
    backward pass has them anyway; where whole layers are aligned, with respect to the stream that leaves each. The pull
    is the norm of the first over the norm of the second, over all aligned heads and all samples of an optimizer
    step.

    With a target, the weight follows: it is the target divided by a running mean of the pull of weight 1, as VQGAN
    ([Esser et al., 2021](https://arxiv.org/abs/2012.09841)) weighs its adversarial loss, within `MIN_WEIGHT` and
    `MAX_WEIGHT`. It changes between optimizer steps only, and is the same in all processes.

    Args:
        weight (`float`): Weight of the alignment loss; with a target, that of the first step.
        target (`float`, *optional*): Pull to hold.
        accelerator ([`~accelerate.Accelerator`], *optional*): Adds up over processes.
    """

    def __init__(self, weight: float, target: float | None = None, accelerator: Accelerator | None = None) -> None:
        self.initial = weight
        self.target = target
        self.accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        """Begins again with the initial weight."""
        self.weight: float | Tensor = self.initial
        self._mean: Tensor | float = 0.0  # of the pull of weight 1
        self._steps: Tensor | float = 0.0
        self._squares: Tensor | None = None  # of both norms, in the step under way
        self._logged: Tensor | None = None  # and since the last log

    def observe(self, from_above: Tensor, own: Tensor, mask: Tensor) -> None:
        """Called in the backward pass of each aligned layer.

        Args:
            from_above (`Tensor` of shape `[B, T, d_model]`):
                Gradient at the output of the layer's output projection, or at that of an aligned layer.
            own (`Tensor` of shape `[B, h, d_model]`):
                Gradient of the weighted alignment loss at the h heads' vectors, or at the one of an aligned layer.
            mask (`BoolTensor` of shape `[B, T]`): Positions that the vectors are means over.
        """
        # A head's vector is a mean over n positions, so that each of them gets 1/n of its gradient.
        count = mask.sum(1).clamp(min=1)
        pulled = own.float().square().sum((1, 2)).div(count).sum()
        norms = torch.linalg.vector_norm(from_above, dim=-1, dtype=torch.float32)
        held = norms.square().masked_fill(~mask, 0.0).sum() * own.shape[1]
        squares = torch.stack([pulled, held])
        self._squares = squares if self._squares is None else self._squares + squares

    def before_step(self, compared: Tensor | bool = True) -> None:
        """To be called by all processes after the backward passes of an optimizer step.

        Args:
            compared (`Tensor` or `bool`, *optional*, defaults to `True`):
                Whether samples were compared in this step. Where too few could be, no loss pulled, and nothing is
                logged.
        """
        squares, self._squares = self._squares, None
        if squares is None:  # nothing was pooled here, but all processes add up
            if self.target is None or self.accelerator is None:
                return
            squares = torch.zeros(2, device=self.accelerator.device)
        # One step that overflowed in fp16 would hide all others from the log.
        seen = torch.where(squares.isfinite().all() & compared, squares, 0.0)
        self._logged = seen if self._logged is None else self._logged + seen
        if self.target is None:
            return
        if self.accelerator is not None:
            squares = self.accelerator.reduce(squares, reduction="sum")
        unit = (squares[0] / squares[1]).sqrt() / self.weight
        # A step without pool, or one that overflowed in fp16, says nothing.
        says = unit.isfinite() & (unit > 0)
        self._mean = torch.where(says, _DECAY * self._mean + (1 - _DECAY) * unit, self._mean)
        self._steps = self._steps + says.float()
        mean = self._mean / (1 - _DECAY**self._steps)  # of its first steps, which begin at zero
        self.weight = torch.where(self._steps > 0, (self.target / mean).clamp(MIN_WEIGHT, MAX_WEIGHT), self.weight)

    def take_logged(self, device: torch.device) -> Tensor:
        """Squared norms since the last call, `[2]`, of this process."""
        logged, self._logged = self._logged, None
        return torch.zeros(2, device=device) if logged is None else logged.to(device)

    def metrics(self, squares: Tensor) -> dict[str, float]:
        """What is logged.

        Args:
            squares (`Tensor` of shape `[2]`): `take_logged` of all processes, added up.
        """
        pulled, held = squares.tolist()
        metrics = {"alignment_pull": (pulled / held) ** 0.5} if 0 < held < float("inf") else {}
        if self.target is not None:
            metrics["alignment_weight"] = float(self.weight)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The weight and the running mean, as JSON can hold them; nothing without a target."""
        if self.target is None:
            return {}
        return {"weight": float(self.weight), "mean": float(self._mean), "steps": float(self._steps)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Takes what `state_dict` gave; nothing without a target."""
        if self.target is not None and state:
            self.weight, self._mean, self._steps = (
                torch.tensor(state[name], device=device) for name in ("weight", "mean", "steps")
            )
