"""What is checked and chosen before the first training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from ..config import HeRAConfig
from ..data.pool import check_pool
from ..data.teacher_vectors import count_with_image
from ..heads.accessor import HeadAccessor
from ..heads.checks import trains_outside_decoder
from ..heads.modes import needs_whole_forward
from ..heads.registry import unwrap_model
from ..objectives.objective import AlignmentObjective

logger = get_logger(__name__)


def check_arguments(args: HeRAConfig) -> None:
    """Refuses settings under which the alignment loss would mean nothing.

    Raises:
        `ValueError`: Naming the setting and the value that passes.
    """
    check_pool(args)
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs, over which Trainer would divide each batch (`nn.DataParallel`), and "
            "head representations cannot be read there. Start one process a GPU with `accelerate launch`, or let it "
            "see one: `CUDA_VISIBLE_DEVICES=0`."
        )
    for name in ("packing", "padding_free"):
        if getattr(args, name):
            raise ValueError(
                f"`{name}=True` mixes several samples in one sequence, so head representations cannot be pooled by "
                f"sample. Set `{name}=False`, or `alignment_weight=0`."
            )
    optimizer = getattr(args.optim, "value", args.optim)
    if optimizer in ("lomo", "adalomo") and _takes_two_passes(args):
        raise ValueError(
            f"`optim={optimizer!r}` moves the weights after each micro-batch, so that those of a step would be "
            "compared at different weights. Set `gradient_accumulation_steps=1`, or choose another optimizer."
        )
    by_micro_batch = args.contrast_scope == "micro_batch" and not args.queue_size
    if args.train_sampling_strategy == "batch_rebalance" and by_micro_batch:
        raise ValueError(
            "`train_sampling_strategy='batch_rebalance'` makes micro-batches of few long samples, which would be "
            "compared with nothing. Set `contrast_scope='step'`, or `train_sampling_strategy='random'`."
        )
    knows_lengths = not args.remove_unused_columns  # there may be a column of them
    if args.train_sampling_strategy == "group_by_length" and not (knows_lengths or args.neighbor_group_size):
        raise ValueError(
            "`train_sampling_strategy='group_by_length'` asks for the length of each row, which vision data does not "
            "have before it is collated. Set `train_sampling_strategy='random'`."
        )


def _takes_two_passes(args: HeRAConfig) -> bool:
    """Whether a step's micro-batches are read before they are trained on."""
    return args.contrast_scope == "step" and args.gradient_accumulation_steps > 1


def check_unchanged(settings: Mapping[str, Any], args: HeRAConfig) -> None:
    """Refuses settings of the alignment that were changed after the trainer was made: what reads them has read them,
    and record and card would name values that were not trained with.

    Args:
        settings (`Mapping[str, Any]`): [`HeRAConfig.own_settings`] when the trainer was made.
        args ([`HeRAConfig`]): The settings now.

    Raises:
        `ValueError`: Naming the first of them.
    """
    for name, value in args.own_settings().items():
        if value != settings[name] and name != "publish_control":  # which pushing reads
            raise ValueError(
                f"`{name}` was changed after the trainer was made, from {settings[name]!r} to {value!r}. Set it in "
                "`HeRAConfig`, and make a new trainer."
            )


def check_not_monitored(args: HeRAConfig) -> None:
    """Refuses to choose the best model by what the monitor measures, which evaluation does not.

    Raises:
        `ValueError`: Naming the setting.
    """
    metric = (args.metric_for_best_model or "").removeprefix("eval_").partition("/")[0]
    if metric in ("alignment_mknn", "alignment_mknn_image", "image_gain"):
        raise ValueError(
            f"`metric_for_best_model={args.metric_for_best_model!r}` is measured by the monitor (`monitor_steps`), and "
            "not by evaluation, by which the best model is chosen. Choose by `eval_loss`, or with alignment by "
            "`eval_alignment_loss`."
        )


def check_best_metric(args: HeRAConfig, eval_dataset: Any) -> None:
    """Refuses to choose the best model by an alignment loss that evaluation cannot give, as it has no full pool.

    Args:
        args ([`HeRAConfig`]): The settings.
        eval_dataset: With teacher vectors, or a dictionary of such data sets.

    Raises:
        `ValueError`: Naming both numbers.
    """
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    # `auto_find_batch_size` may find a smaller one, and compare fewer.
    needed = max(1 if args.auto_find_batch_size else args.pool_size(), args.least_samples())
    for name, rows in (eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}).items():
        if metric.partition("/")[0] != (f"{name}_alignment_loss" if name else "alignment_loss"):
            continue
        usable = count_with_image(rows, needed)
        if usable < needed:
            raise ValueError(
                f"`metric_for_best_model={args.metric_for_best_model!r}` needs {needed} evaluation rows with an image, "
                f"as many as are compared in training, but there are {usable}. Evaluate on more, or choose by "
                "`eval_loss`."
            )


def check_whole_layers(model: nn.Module, accelerator: Accelerator) -> None:
    """Refuses layers that are not whole in each process, or computed in 8-bit floats: tensor parallelism, weights that
    transformers itself has sharded, and fp8.

    Raises:
        `ValueError`: Naming the setting.
    """
    parallelism = getattr(accelerator, "parallelism_config", None)
    if getattr(unwrap_model(model), "is_distributed_loading_by_transformers", False) or (
        parallelism is not None and parallelism.tp_enabled
    ):
        raise ValueError(
            "The model's layers are divided among the processes (tensor parallelism, or `distributed_config`), so that "
            "heads cannot be read and each sample would be compared with its own copy. Load it without, and shard it "
            "with accelerate's FSDP2, or set `alignment_weight=0`."
        )
    if accelerator.mixed_precision == "fp8":
        raise ValueError(
            "`mixed_precision='fp8'` replaces layers after heads were chosen in them. Use bf16, or set "
            "`alignment_weight=0`."
        )


def check_rows_train(model: nn.Module, accessor: HeadAccessor, without_image: int) -> None:
    """Refuses rows in which nothing that is trained takes part, for several processes: one that has such a row alone
    would not take part in the sum of gradients, on which the others wait.

    Args:
        model (`nn.Module`): The model.
        accessor ([`HeadAccessor`]): Its attention heads.
        without_image (`int`): Number of rows without an image.

    Raises:
        `ValueError`: Naming the cure.
    """
    if without_image and trains_outside_decoder(model, accessor):
        raise ValueError(
            f"{without_image:,} rows have no image, and what is trained lies before the language model (the projector, "
            "as in stage 1), so that they train nothing, and processes would wait for each other. Leave them out "
            "with `dataset.filter`."
        )


def check_tokens_stay(model: nn.Module, accelerator: Accelerator) -> None:
    """Refuses what gives the language model other positions than the labels have: prompt-learning adapters (prompt,
    prefix and P-tuning), which put some in front, and parallelism that divides sequences.

    Raises:
        `ValueError`: Naming the cure.
    """
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        if adapter.is_prompt_learning:
            raise ValueError(
                f"The prompt-learning adapter {name!r} ({adapter.peft_type.value}) puts virtual tokens before the text,"
                " so head representations cannot be matched with labels. Use another adapter, such as LoRA, or set "
                "`alignment_weight=0`."
            )
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "Context and sequence parallelism divide the tokens of a sample over processes, so head representations "
            "cannot be pooled. Set `cp_size` and `sp_size` of the parallelism config to 1, or `alignment_weight=0`."
        )


def check_hooks_of_adapters(model: nn.Module, args: HeRAConfig) -> None:
    """Refuses aLoRA with activation checkpointing where a step takes two passes: PEFT's hooks then wait for a backward,
    which the first pass does not have.

    Raises:
        `ValueError`: Naming the settings that pass.
    """
    checkpointing = args.gradient_checkpointing or getattr(args, "activation_checkpointing", None)
    if _takes_two_passes(args) and checkpointing and needs_whole_forward(model):
        raise ValueError(
            "aLoRA does not go through several micro-batches a step under activation checkpointing. Set "
            "`gradient_checkpointing=False`, or `gradient_accumulation_steps=1`."
        )


def check_loss_scaling(criterion: AlignmentObjective, args: HeRAConfig, accelerator: Accelerator) -> None:
    """Refuses to train parameters of the objective under DeepSpeed in fp16: its engine scales the loss by a factor of
    its own, and takes it out of the gradients of the model's parameters only.

    Raises:
        `ValueError`: Naming the settings that pass.
    """
    trained = [name for name, parameter in criterion.named_parameters() if parameter.requires_grad]
    if trained and accelerator.state.deepspeed_plugin and accelerator.mixed_precision == "fp16":
        contrastive = args.alignment_objective == "contrastive"
        raise ValueError(
            f"The {args.alignment_objective} objective cannot train its own parameters ({', '.join(trained)}) under "
            "DeepSpeed in fp16, whose loss scale is taken out of the model's gradients only. Use bf16"
            f"{', or set `learn_temperature=False`' if contrastive else ''}."
        )
