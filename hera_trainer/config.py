"""Configuration of [`HeRATrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import SFTConfig

from .heads.head import AttentionHead
from .objectives.contrastive import MIN_TEMPERATURE

HEAD_SELECTIONS = ("worst", "top", "random")
CONTRAST_SCOPES = ("step", "micro_batch")


@dataclass
class HeRAConfig(SFTConfig):
    r"""
    Configuration class for the [`HeRATrainer`].

    This class includes only the parameters of Head-Wise Representation Alignment
    ([paper](https://huggingface.co/papers/2606.23885)). For a full list of training arguments, please refer to
    [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the alignment loss

        alignment_weight (`float`, *optional*, defaults to `0.01`):
            Weight λ of the alignment loss beside the language-model loss (eq. 9). With `0`, the trainer is SFTTrainer:
            no teacher is loaded and no hook is placed.
        num_neighbors (`int`, *optional*, defaults to `10`):
            Number k of teacher neighbours that are positives of each sample, also used for ranking heads. More than
            `num_neighbors + 1` samples must be compared (see `contrast_scope`).
        temperature (`float`, *optional*, defaults to `0.07`):
            Initial temperature τ of the contrastive loss (eq. 8).
        learn_temperature (`bool`, *optional*, defaults to `True`):
            Whether log τ is trained, by an optimizer of its own at the schedule's rate of `learning_rate`, without
            weight decay.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether head representations and teacher vectors are L2-normalised before dot products.
        contrast_scope (`str`, *optional*, defaults to `"step"`):
            Which samples are compared with each other. `"step"`: all samples of an optimizer step, of every
            micro-batch and every process, so that the loss does not depend on how the batch is cut; with gradient
            accumulation, each micro-batch runs once more, without gradient and up to the deepest aligned head.
            `"micro_batch"`: the samples of one micro-batch on all processes.
        queue_size (`int`, *optional*, defaults to `0`):
            Number of past samples that join the candidates of either scope, without gradient.

        > Parameters that control which heads are aligned

        num_aligned_heads (`int`, *optional*, defaults to `5`):
            Number m of attention heads to align.
        head_selection (`str`, *optional*, defaults to `"worst"`):
            Which heads of the ranking to align: `"worst"` (least aligned with the teacher, the paper's choice),
            `"top"` or `"random"` (its controls).
        aligned_heads (`list[str]`, *optional*):
            Explicit heads such as `["L3H4", "L5H11"]` (layer and query head, both from 0). No ranking runs, and
            `num_aligned_heads` and `head_selection` are ignored.
        ranking_num_samples (`int`, *optional*, defaults to `1000`):
            Number of samples with distinct images on which heads are ranked; of a stream, the first that come.
        head_ranking_path (`str`, *optional*):
            JSON file of a ready ranking (see [`HeadRanking.save`]). No ranking runs.

        > Parameters that control the teacher

        teacher_model_name_or_path (`str`, *optional*, defaults to `"facebook/dinov2-large"`):
            Frozen vision encoder whose neighbourhoods are aligned with. Not looked up for data sets that bring a
            `teacher_features` column.
        teacher_batch_size (`int`, *optional*, defaults to `32`):
            Number of images the teacher encodes at a time, before training or, for a stream, before each step.

        > Parameters that control what is watched

        monitor_steps (`int`, *optional*):
            Every how many steps to measure, on `eval_dataset`, how well the aligned heads, the best ones and all heads
            agree with the teacher, in text alone and with the image in context; also before the first step and after
            the last (see [`AlignmentMonitorCallback`]). By default nothing is measured.
        monitor_num_samples (`int`, *optional*, defaults to `500`):
            Number of samples of `eval_dataset` with distinct images on which that is measured.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `max_length`: Defaults to `None` instead of `1024`, which cuts image tokens.
    > - `gradient_accumulation_steps`: Defaults to `4` instead of `1`: with the default batch of 8, 32 samples are
    >   compared with each other.
    """

    gradient_accumulation_steps: int = field(
        default=4,
        metadata={
            "help": "Number of micro-batches in an optimizer step. With `contrast_scope='step'`, all their samples are "
            "compared with each other."
        },
    )

    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Maximum length of the tokenized sequence. Sequences longer than `max_length` are truncated, image "
            "tokens included. If `None`, no truncation is applied."
        },
    )

    alignment_weight: float = field(
        default=0.01,
        metadata={
            "help": "Weight of the alignment loss beside the language-model loss. With 0, the trainer is SFTTrainer: "
            "no teacher is loaded and no hook is placed."
        },
    )
    num_neighbors: int = field(
        default=10,
        metadata={
            "help": "Number of teacher neighbours that are positives of each sample, also used for ranking heads. More "
            "than `num_neighbors + 1` samples must be compared (see `contrast_scope`)."
        },
    )
    temperature: float = field(default=0.07, metadata={"help": "Initial temperature of the contrastive loss."})
    learn_temperature: bool = field(
        default=True,
        metadata={
            "help": "Whether the log temperature is trained, by an optimizer of its own at the schedule's rate of "
            "`learning_rate`, without weight decay."
        },
    )
    normalize: bool = field(
        default=True,
        metadata={"help": "Whether head representations and teacher vectors are L2-normalised before dot products."},
    )
    contrast_scope: str = field(
        default="step",
        metadata={
            "help": "Which samples are compared with each other: 'step' (all of an optimizer step, on all processes) "
            "or 'micro_batch' (those of one micro-batch on all processes).",
            "choices": list(CONTRAST_SCOPES),
        },
    )
    queue_size: int = field(
        default=0, metadata={"help": "Number of past samples that join the candidates, without gradient."}
    )
    num_aligned_heads: int = field(default=5, metadata={"help": "Number of attention heads to align."})
    head_selection: str = field(
        default="worst",
        metadata={
            "help": "Which heads of the ranking to align: 'worst' (least aligned with the teacher), 'top' or 'random'.",
            "choices": list(HEAD_SELECTIONS),
        },
    )
    aligned_heads: list[str] | None = field(
        default=None,
        metadata={
            "help": "Explicit heads such as 'L3H4 L5H11' (layer and query head, both from 0). No ranking runs, and "
            "`num_aligned_heads` and `head_selection` are ignored."
        },
    )
    ranking_num_samples: int = field(
        default=1000,
        metadata={
            "help": "Number of samples with distinct images on which heads are ranked; of a stream, the first that "
            "come."
        },
    )
    head_ranking_path: str | None = field(
        default=None, metadata={"help": "JSON file of a ready head ranking. No ranking runs."}
    )
    teacher_model_name_or_path: str = field(
        default="facebook/dinov2-large",
        metadata={
            "help": "Frozen vision encoder whose neighbourhoods are aligned with. Not looked up for data sets that "
            "bring a `teacher_features` column."
        },
    )
    teacher_batch_size: int = field(
        default=32,
        metadata={
            "help": "Number of images the teacher encodes at a time, before training or, for a stream, before each "
            "step."
        },
    )
    monitor_steps: int | None = field(
        default=None,
        metadata={
            "help": "Every how many steps to measure, on `eval_dataset`, how well the aligned heads, the best ones and "
            "all heads agree with the teacher; also before the first step and after the last. Default: never."
        },
    )
    monitor_num_samples: int = field(
        default=500,
        metadata={"help": "Number of samples of `eval_dataset` with distinct images on which that is measured."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least("alignment_weight", 0)
        self._check_at_least("temperature", MIN_TEMPERATURE)
        self._check_at_least("queue_size", 0)
        for name in ("num_neighbors", "num_aligned_heads", "ranking_num_samples", "teacher_batch_size"):
            self._check_at_least(name, 1)
        if self.alignment_weight > 0 and self.ranking_num_samples < self.num_neighbors + 2:
            raise ValueError(
                f"`ranking_num_samples` ({self.ranking_num_samples}) must exceed `num_neighbors + 1` "
                f"({self.num_neighbors + 1}): a sample's neighbours are found among the others."
            )
        if self.monitor_steps is not None:
            self._check_at_least("monitor_steps", 1)
            self._check_at_least("monitor_num_samples", self.num_neighbors + 2)
        for name, choices in (("head_selection", HEAD_SELECTIONS), ("contrast_scope", CONTRAST_SCOPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        if self.aligned_heads is not None:
            if not self.aligned_heads:
                raise ValueError("`aligned_heads` is empty. Leave it at `None` to rank heads and choose the worst.")
            # Parsed and written again, so that AttentionHead objects are taken too and the config stays JSON.
            self.aligned_heads = [str(AttentionHead.parse(str(head))) for head in self.aligned_heads]

    def pool_size(self, micro_batch_size: int | None = None) -> int:
        """Number of samples that are compared with each other in training, the queue left out.

        Args:
            micro_batch_size (`int`, *optional*): Instead of `per_device_train_batch_size`.
        """
        size = (micro_batch_size or self.per_device_train_batch_size) * self.world_size
        return size * self.gradient_accumulation_steps if self.contrast_scope == "step" else size

    def _check_at_least(self, name: str, least: float) -> None:
        value = getattr(self, name)
        if value is None or not value >= least:  # also refuses NaN
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
