"""Configuration of [`HeRATrainer`]."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from trl import SFTConfig

from .heads.head import GRANULARITIES, SELECTIONS, parse_units
from .objectives.contrastive import MIN_TEMPERATURE, TEMPERATURES
from .objectives.metrics import check_clip_quantile
from .objectives.registry import get_objective
from .objectives.similarity import SIMILARITIES

CONTRAST_SCOPES = ("step", "micro_batch")
TEACHER_CONTROLS = ("none", "permuted")


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
        alignment_objective (`str`, *optional*, defaults to `"contrastive"`):
            What is minimised: `"contrastive"`, the paper's multi-positive InfoNCE ([`HeRALoss`]); `"feature"`, the
            cosine to the teacher vector through trainable projectors; `"cka"`, linear centred kernel alignment;
            `"uniformity"`, which spreads representations without a teacher; or one registered with
            [`register_objective`].
        target_pull (`float`, *optional*):
            Pull of the alignment loss at the aligned heads, relative to that of the language-model loss
            (`alignment_pull` in the logs), that the weight follows, from `alignment_weight` in the first step. By
            default the weight is fixed, as in the paper.
        similarity (`str`, *optional*, defaults to `"centered_cosine"`):
            How the contrastive objective compares head representations: `"dot"`, dot products as eq. 4 is printed;
            `"cosine"`, dot products of normalised vectors; `"centered_cosine"`, the same after the mean over the pool
            is taken away.
        teacher_similarity (`str`, *optional*, defaults to `"cosine"`):
            How teacher vectors are compared when neighbours are looked up, of the same three.
        metric_similarity (`str`, *optional*, defaults to `"cosine"`):
            How vectors are compared when heads are ranked and monitored, of the same three.
        temperature (`float`, *optional*):
            Initial temperature τ of the contrastive loss (eq. 8). By default 0.3 with `similarity="centered_cosine"`,
            0.07 with `"cosine"`, and 1 with `"dot"`.
        learn_temperature (`bool`, *optional*, defaults to `True`):
            Whether log τ is trained, by an optimizer of its own without weight decay.
        objective_learning_rate (`float`, *optional*):
            Learning rate of the objective's own parameters (the temperature, projectors), which follows the model's
            schedule. `learning_rate` by default.
        contrast_scope (`str`, *optional*, defaults to `"step"`):
            Which samples are compared with each other. `"step"`: all samples of an optimizer step, of every
            micro-batch and every process, so that the loss does not depend on how the batch is cut; with gradient
            accumulation, each micro-batch runs once more, without gradient and up to the deepest aligned head.
            `"micro_batch"`: the samples of one micro-batch on all processes.
        image_feature_gib (`float`, *optional*, defaults to `1.0`):
            GiB of image features, what a frozen vision tower and projector compute, that a process keeps on its device
            between the two passes of a step. More waits in main memory, up to four times as much, or is computed again;
            0 computes all of them twice.
        queue_size (`int`, *optional*, defaults to `0`):
            Number of past samples that join the candidates of either scope, without gradient.
        neighbor_group_size (`int`, *optional*, defaults to `0`):
            Number of samples in a group of neighbours. Each pool of samples that are compared is made up of such
            groups: a random sample and the ones nearest to it by teacher vector in the whole data set. With `0`,
            samples are drawn at random, as the paper does. Not more than the pool's size, and not for streams.

        > Parameters that control which heads are aligned

        alignment_granularity (`str`, *optional*, defaults to `"head"`):
            What is aligned: single attention heads (`"head"`), or, as controls of the paper have it, whole decoder
            layers (`"layer"`): the pooled residual stream that leaves them. All settings of heads are then of layers.
        num_aligned_heads (`int`, *optional*, defaults to `5`):
            Number m of attention heads, or layers, to align.
        head_selection (`str`, *optional*, defaults to `"worst"`):
            Which heads or layers of the ranking to align: `"worst"` (least aligned with the teacher, the paper's
            choice), `"top"` or `"random"` (its controls), or `"middle"`, the layers nearest the middle of the depth
            (with `alignment_granularity="layer"` only).
        aligned_heads (`list[str]`, *optional*):
            Explicit heads such as `["L3H4", "L5H11"]` (layer and query head, both from 0), or layers such as
            `["L12"]`. No ranking runs, and `num_aligned_heads` and `head_selection` are ignored.
        ranking_num_samples (`int`, *optional*, defaults to `1000`):
            Number of samples with distinct images on which heads are ranked; of a stream, the first that come.
        ranking_clip_quantile (`float`, *optional*):
            Quantile to which the values of each space are clamped before heads are ranked, and while they are watched
            (see [`mutual_knn`]); the reference code of the metric has 0.95. The loss is not concerned. By default
            nothing is clamped, and ranking is faster.
        head_ranking_path (`str`, *optional*):
            JSON file of a ready ranking (see [`HeadRanking.save`]). No ranking runs.

        > Parameters that control the teacher

        teacher_model_name_or_path (`str`, *optional*, defaults to `"facebook/dinov2-large"`):
            Frozen vision encoder whose neighbourhoods are aligned with. Not looked up for data sets that bring a
            `teacher_features` column.
        teacher_batch_size (`int`, *optional*, defaults to `32`):
            Number of images the teacher encodes at a time, before training or, for a stream, before each step.
        teacher_control (`str`, *optional*, defaults to `"none"`):
            `"permuted"` makes a control run: each distinct image of the training data has another image's teacher
            vector, the same one all through the run (drawn by `seed`). Ranking, evaluation and monitor keep the right
            ones. What such a run gains, the teacher has not taught.
        publish_control (`bool`, *optional*, defaults to `False`):
            Whether the result of a control run may be pushed to the Hub.

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
    alignment_objective: str = field(
        default="contrastive",
        metadata={
            "help": "What is minimised: 'contrastive' (the paper), 'feature' (cosine to the teacher vector through "
            "trainable projectors), 'cka', 'uniformity' (without a teacher), or a registered one."
        },
    )
    target_pull: float | None = field(
        default=None,
        metadata={
            "help": "Pull of the alignment loss at the aligned heads, relative to that of the language-model loss, "
            "that the weight follows. Default: the weight is fixed."
        },
    )
    similarity: str = field(
        default="centered_cosine",
        metadata={
            "help": "How the contrastive objective compares head representations: 'dot', 'cosine' or "
            "'centered_cosine' (the mean over the pool is taken away first).",
            "choices": list(SIMILARITIES),
        },
    )
    teacher_similarity: str = field(
        default="cosine",
        metadata={
            "help": "How teacher vectors are compared when neighbours are looked up, of the same three.",
            "choices": list(SIMILARITIES),
        },
    )
    metric_similarity: str = field(
        default="cosine",
        metadata={
            "help": "How vectors are compared when heads are ranked and monitored, of the same three.",
            "choices": list(SIMILARITIES),
        },
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Initial temperature of the contrastive loss. Default: 0.3 with the similarity 'centered_cosine', "
            "0.07 with 'cosine', 1 with 'dot'."
        },
    )
    learn_temperature: bool = field(
        default=True,
        metadata={"help": "Whether the log temperature is trained, by an optimizer of its own without weight decay."},
    )
    objective_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the objective's own parameters (the temperature, projectors), which follows the "
            "model's schedule. Default: `learning_rate`."
        },
    )
    contrast_scope: str = field(
        default="step",
        metadata={
            "help": "Which samples are compared with each other: 'step' (all of an optimizer step, on all processes) "
            "or 'micro_batch' (those of one micro-batch on all processes).",
            "choices": list(CONTRAST_SCOPES),
        },
    )
    image_feature_gib: float = field(
        default=1.0,
        metadata={
            "help": "GiB of image features, what a frozen vision tower and projector compute, that a process keeps on "
            "its device between the two passes of a step. More waits in main memory, or is computed again; 0 computes "
            "all of them twice."
        },
    )
    queue_size: int = field(
        default=0, metadata={"help": "Number of past samples that join the candidates, without gradient."}
    )
    neighbor_group_size: int = field(
        default=0,
        metadata={
            "help": "Number of samples in a group of neighbours, of which each pool of samples that are compared is "
            "made up: a random sample and the ones nearest to it by teacher vector in the whole data set. 0: samples "
            "are drawn at random."
        },
    )
    alignment_granularity: str = field(
        default="head",
        metadata={
            "help": "What is aligned: single attention heads ('head'), or whole decoder layers ('layer'): the pooled "
            "residual stream that leaves them. All settings of heads are then of layers.",
            "choices": list(GRANULARITIES),
        },
    )
    num_aligned_heads: int = field(default=5, metadata={"help": "Number of attention heads, or layers, to align."})
    head_selection: str = field(
        default="worst",
        metadata={
            "help": "Which heads or layers of the ranking to align: 'worst' (least aligned with the teacher), 'top', "
            "'random', or 'middle' (the layers nearest the middle of the depth).",
            "choices": list(SELECTIONS),
        },
    )
    aligned_heads: list[str] | None = field(
        default=None,
        metadata={
            "help": "Explicit heads such as 'L3H4 L5H11' (layer and query head, both from 0), or layers such as 'L12'. "
            "No ranking runs, and `num_aligned_heads` and `head_selection` are ignored."
        },
    )
    ranking_num_samples: int = field(
        default=1000,
        metadata={
            "help": "Number of samples with distinct images on which heads are ranked; of a stream, the first that "
            "come."
        },
    )
    ranking_clip_quantile: float | None = field(
        default=None,
        metadata={
            "help": "Quantile to which the values of each space are clamped before heads are ranked, and while they "
            "are watched; the reference code of the metric has 0.95. The loss is not concerned. Default: nothing is "
            "clamped."
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
    teacher_control: str = field(
        default="none",
        metadata={
            "help": "'permuted' makes a control run: each image of the training data has another image's teacher "
            "vector. Ranking, evaluation and monitor keep the right ones.",
            "choices": list(TEACHER_CONTROLS),
        },
    )
    publish_control: bool = field(
        default=False, metadata={"help": "Whether the result of a control run may be pushed to the Hub."}
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
        self._check_numbers()
        if self.greater_is_better is None and "alignment_loss/" in (self.metric_for_best_model or ""):
            self.greater_is_better = False  # a term of the loss, whose name `Trainer` does not know for one
        super().__post_init__()
        self._check_at_least("alignment_weight", 0)
        self._check_objective()
        for name in ("image_feature_gib", "queue_size", "neighbor_group_size"):
            self._check_at_least(name, 0)
        if self.neighbor_group_size == 1:
            raise ValueError(
                "`neighbor_group_size` must be at least 2, a sample and its nearest, or 0 to draw samples at random; "
                "got 1."
            )
        for name in ("num_neighbors", "num_aligned_heads", "ranking_num_samples", "teacher_batch_size"):
            self._check_at_least(name, 1)
        if self.alignment_weight > 0 and self.ranking_num_samples < self.num_neighbors + 2:
            raise ValueError(
                f"`ranking_num_samples` ({self.ranking_num_samples}) must exceed `num_neighbors + 1` "
                f"({self.num_neighbors + 1}): a sample's neighbours are found among the others."
            )
        check_clip_quantile(self.ranking_clip_quantile, "ranking_clip_quantile")
        if self.monitor_steps is not None:
            self._check_at_least("monitor_steps", 1)
            self._check_at_least("monitor_num_samples", self.num_neighbors + 2)
        self._check_units()
        self._check_choice("contrast_scope", CONTRAST_SCOPES)
        self._check_choice("teacher_control", TEACHER_CONTROLS)

    def _check_numbers(self) -> None:
        """Makes whole numbers of 5.0, as YAML and searches write them, and refuses text and fractions."""
        for name, annotation in HeRAConfig.__annotations__.items():
            kind = {"int": int, "float": float}.get(annotation.removesuffix(" | None"))
            value = getattr(self, name)
            if kind is None or value is None:
                continue
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if not is_number or (kind is int and not float(value).is_integer()):
                wanted = "a whole number" if kind is int else "a number"
                raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")
            setattr(self, name, kind(value))

    def _check_units(self) -> None:
        self._check_choice("alignment_granularity", GRANULARITIES)
        self._check_choice("head_selection", SELECTIONS)
        if self.head_selection == "middle" and self.alignment_granularity == "head":
            raise ValueError(
                "`head_selection='middle'` chooses whole layers. Set `alignment_granularity='layer'`, or choose heads "
                "by 'worst', 'top' or 'random'."
            )
        if self.aligned_heads is not None:
            if not self.aligned_heads:
                raise ValueError("`aligned_heads` is empty. Leave it at `None` to rank heads and choose the worst.")
            # Parsed and written again, so that AttentionHead objects are taken too and the config stays JSON.
            self.aligned_heads = [str(unit) for unit in parse_units(self.aligned_heads, self.alignment_granularity)]

    def _check_objective(self) -> None:
        for name in ("similarity", "teacher_similarity", "metric_similarity"):
            self._check_choice(name, SIMILARITIES)
        if self.temperature is not None:  # `None` stays, so that it follows a similarity that is set later
            self._check_at_least("temperature", MIN_TEMPERATURE)
        if self.objective_learning_rate is not None:
            self._check_at_least("objective_learning_rate", 0)
        if self.target_pull is not None:
            self._check_at_least("target_pull", 0)
            if self.target_pull == 0:
                raise ValueError(
                    "`target_pull` must be positive. To train without alignment, set `alignment_weight=0`."
                )
        objective = get_objective(self.alignment_objective)
        if self.queue_size > 0 and not objective.uses_queue:
            raise ValueError(
                f"`queue_size` ({self.queue_size}) has no effect with `alignment_objective="
                f"{self.alignment_objective!r}`, which compares samples of one pool. Set `queue_size=0`."
            )
        if self.teacher_control != "none" and not objective.uses_teacher:
            raise ValueError(
                f"`teacher_control` has no effect with `alignment_objective={self.alignment_objective!r}`, which uses "
                "no teacher and is a control itself. Set `teacher_control='none'`."
            )
        defaults = {field.name: field.default for field in fields(self)}
        for name in objective.ignored_settings:
            orders_batches = name == "teacher_similarity" and self.neighbor_group_size > 0
            if getattr(self, name) != defaults[name] and not orders_batches:
                raise ValueError(
                    f"`{name}` has no effect with `alignment_objective={self.alignment_objective!r}`. Leave it at its "
                    f"default, {defaults[name]!r}."
                )

    def own_settings(self) -> dict[str, Any]:
        """The settings that [`~trl.SFTConfig`] does not have, by name."""
        names = HeRAConfig.__annotations__.keys() - SFTConfig.__dataclass_fields__.keys()
        return {name: copy(getattr(self, name)) for name in sorted(names)}

    @property
    def initial_temperature(self) -> float:
        """`temperature`, or where it is `None` that of the `similarity`."""
        return TEMPERATURES[self.similarity] if self.temperature is None else self.temperature

    def least_samples(self) -> int:
        """Number of valid samples, those of the queue included, below which a pool goes without the alignment loss."""
        return get_objective(self.alignment_objective).from_config(self).least_samples

    @property
    def num_process_batches(self) -> int:
        """Batches of `per_device_train_batch_size` that all processes take at a time: one each, or one in all, which
        `split_batches` divides among them."""
        return 1 if getattr(self.accelerator_config, "split_batches", False) else self.world_size

    def pool_size(self, micro_batch_size: int | None = None) -> int:
        """Number of samples that are compared with each other in training, the queue left out.

        Args:
            micro_batch_size (`int`, *optional*): Instead of `per_device_train_batch_size`.
        """
        size = (micro_batch_size or self.per_device_train_batch_size) * self.num_process_batches
        return size * self.gradient_accumulation_steps if self.contrast_scope == "step" else size

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")

    def _check_at_least(self, name: str, least: float) -> None:
        value = getattr(self, name)
        if value is None or not value >= least:  # also refuses NaN
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
