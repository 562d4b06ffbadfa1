"""Whether enough samples are compared with each other."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from math import comb

from accelerate.logging import get_logger

from ..config import HeRAConfig

logger = get_logger(__name__)


# Share of pools that go without alignment above which data is refused.
_MOST = 0.5


@dataclass
class RowCounts:
    """What is known of the training data's rows before the first step.

    Args:
        rows (`int`): All rows, or the first ones of a stream.
        with_image (`int`): Those with an image.
        collated (`int`): Rows with an image, drawn at random, that were collated as they are trained on.
        with_label (`int`): Those of them with a label outside of their images.
        tokens (`int`): Tokens of these rows that are pooled.
        is_stream (`bool`): Whether the rows are of a stream.
    """

    rows: int
    with_image: int
    collated: int
    with_label: int
    tokens: int
    is_stream: bool

    @property
    def usable(self) -> int:
        """Rows that can take part in the alignment loss, as far as the collated ones tell."""
        return round(self.with_image * self.with_label / max(1, self.collated))

    def __str__(self) -> str:
        return (
            f"{self.with_image:,} of {'the first ' if self.is_stream else ''}{self.rows:,} rows have an image. Of "
            f"these, {self.collated} were looked at: {self.with_label} have a label, with "
            f"{self.tokens / max(1, self.with_label):.1f} tokens each to pool."
        )


def check_pool(args: HeRAConfig, micro_batch_size: int | None = None) -> None:
    """Refuses settings under which too few samples are compared: with no more than `num_neighbors + 1`, every other
    sample is a neighbour and the alignment loss carries nothing; with fewer than `neighbor_group_size`, no group of
    neighbours is whole.

    Args:
        args ([`HeRAConfig`]): The settings.
        micro_batch_size (`int`, *optional*): The batch size in force, if it is not the configured one.

    Raises:
        `ValueError`: Naming the smallest setting that passes.
    """
    batch = micro_batch_size or args.per_device_train_batch_size
    pool = args.pool_size(micro_batch_size)
    if pool < args.neighbor_group_size:
        raise ValueError(
            f"`neighbor_group_size` ({args.neighbor_group_size}) exceeds the {pool} samples that are compared with "
            f"each other. Set `neighbor_group_size={pool}` or less, or compare more (see `contrast_scope`)."
        )
    pool += args.queue_size
    least = args.least_samples()
    if pool >= least:
        return
    missing = least - args.queue_size
    if args.contrast_scope == "step":
        made_of = "`per_device_train_batch_size` x `gradient_accumulation_steps` x processes + `queue_size`"
        numbers = f"{batch} x {args.gradient_accumulation_steps} x {args.num_process_batches} + {args.queue_size}"
        cure = f"gradient_accumulation_steps={-(-missing // (batch * args.num_process_batches))}"
    else:
        made_of = "`per_device_train_batch_size` x processes + `queue_size`"
        numbers = f"{batch} x {args.num_process_batches} + {args.queue_size}"
        cure = f"per_device_train_batch_size={-(-missing // args.num_process_batches)}"
    if args.alignment_objective != "contrastive":
        raise ValueError(
            f"Too few samples are compared for `alignment_objective={args.alignment_objective!r}`: {pool} ({made_of} = "
            f"{numbers}), but {least} are needed. Set `{cure}` or more."
        )
    raise ValueError(
        f"Too few samples are compared for `num_neighbors` ({args.num_neighbors}): {pool} ({made_of} = {numbers}), but "
        f"{least} are needed, or every other sample is a neighbour. Set `{cure}` or more, or lower `num_neighbors`."
    )


def skipped_share(pool: int, least: int, usable: int, rows: int, is_stream: bool) -> float:
    """Share of pools with fewer than `least` samples that can take part, exactly.

    Args:
        pool (`int`): Samples of a pool.
        least (`int`): Samples that must be able to take part.
        usable (`int`): Rows that can.
        rows (`int`): All rows.
        is_stream (`bool`):
            Whether these are the first rows of many more, so that samples are drawn independently (binomial), and not
            without replacement (hypergeometric).
    """
    if is_stream:
        ways = (comb(pool, i) * usable**i * (rows - usable) ** (pool - i) for i in range(min(least, pool + 1)))
        return sum(ways) / rows**pool
    few, many = sorted((usable, min(pool, rows)))  # an epoch gives no more; what is drawn from what is the same
    ways = (comb(many, i) * comb(rows - many, few - i) for i in range(min(least, few + 1)))
    return sum(ways) / comb(rows, few)


def _share_of_epoch(args: HeRAConfig, pool: int, least: int, usable: int, rows: int, skipped: float) -> float:
    """Share of the optimizer steps that go without alignment, with the last of an epoch, which may be shorter.

    Args:
        args ([`HeRAConfig`]): The settings.
        pool, least, usable, rows (`int`): See [`skipped_share`].
        skipped (`float`): The share of whole steps.
    """
    steps, last = divmod(rows, pool)
    if args.dataloader_drop_last:
        last -= last % (args.per_device_train_batch_size * args.num_process_batches)
    if not last or 0 < args.max_steps <= steps:
        return skipped
    return (steps * skipped + skipped_share(last, least, usable, rows, is_stream=False)) / (steps + 1)


def check_expected_pool(args: HeRAConfig, counts: RowCounts) -> None:
    """Says how many rows have images and labels and how many samples of a pool can be expected to take part, and
    refuses data of which so few can that most pools would be skipped: that would be plain fine-tuning.

    It is logged as a warning though all be well: loggers hide less than that, and who trains on data whose images or
    labels are lost should see it before the first step.

    Args:
        args ([`HeRAConfig`]): The settings.
        counts ([`RowCounts`]): What is known of the rows.

    Raises:
        `ValueError`: Naming the smallest setting that passes.
    """
    whole_step, usable, rows, is_stream = args.contrast_scope == "step", counts.usable, counts.rows, counts.is_stream
    pool, least = args.pool_size(), max(1, args.least_samples() - args.queue_size)
    skipped = skipped_share(pool, least, usable, rows, is_stream)
    queue = f", beside {args.queue_size} past ones," if args.queue_size else ""
    share = skipped if is_stream or not whole_step else _share_of_epoch(args, pool, least, usable, rows, skipped)
    expected = (
        f"{counts} Of the {pool} samples compared, {pool * usable / rows:.1f}{queue} are expected to take part in the "
        f"alignment loss, and {share:.1%} of the {'optimizer steps' if whole_step else 'micro-batches'} to go "
        "without it."
    )
    if skipped <= _MOST:
        logger.warning(expected)
        return
    more = "shuffle the stream, so that rows with images come early" if is_stream else "add rows with images"
    if args.max_length is not None:
        more += f", or raise `max_length` ({args.max_length}), which cuts labels and image tokens off"
    if usable < (1 if is_stream else least):  # not even all of them in one pool would do
        raise ValueError(f"{expected} Please {more}, or set `alignment_weight=0` to train as SFTTrainer does.")
    name = "gradient_accumulation_steps" if whole_step else "per_device_train_batch_size"
    unit = pool // getattr(args, name)
    enough = -(-2 * least * rows // (usable * unit))  # on average twice as many as are needed
    value = 1 + bisect_left(
        range(1, enough), True, key=lambda n: skipped_share(n * unit, least, usable, rows, is_stream) <= _MOST
    )
    raise ValueError(
        f"{expected} Set `{name}={value}` or more, a larger `queue_size` or a smaller `num_neighbors`, or {more}."
    )
