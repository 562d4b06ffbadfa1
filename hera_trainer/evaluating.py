"""Evaluating an aligned model: the language-model loss as SFTTrainer has it, the alignment loss beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

from .alignment import Alignment
from .config import HeRAConfig
from .contrast import EvalPools
from .heads.quantized import frozen_packing

# The mixin calls on to a Trainer: type checkers must see it, the class hierarchy must not repeat it.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class EvaluationMixin(_Base):
    """Reports the alignment loss of evaluation data over pools as large as in training."""

    args: HeRAConfig
    model: Any
    alignment: Alignment | None
    prepare_alignment: Any
    _eval_pools: EvalPools | None
    _train_batch_size: int

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.prepare_alignment()
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self.prepare_alignment()
        return super().predict(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        loop_args = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.alignment is None:
            return super().evaluation_loop(*loop_args)
        # As large as in training, also where `auto_find_batch_size` has found a smaller one.
        size = self.args.pool_size(self._train_batch_size // max(1, self.args.n_gpu))
        pools = self._eval_pools = EvalPools(self.alignment.criterion, size, self.accelerator)
        try:
            with self.alignment.attached():
                output = super().evaluation_loop(*loop_args)
        finally:
            self._eval_pools = None
            self.alignment.check_passes()  # an optimizer may hold other weights for evaluation
        assert output.metrics is not None
        if pools.pools:
            output.metrics[f"{metric_key_prefix}_alignment_loss"] = pools.total / pools.pools
        output.metrics[f"{metric_key_prefix}_alignment_left_out"] = pools.left_out
        return output

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.alignment is None:
            return super().prediction_step(*args, **kwargs)
        with frozen_packing(self.model):
            return super().prediction_step(*args, **kwargs)
