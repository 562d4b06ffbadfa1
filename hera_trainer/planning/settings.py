"""The settings that a plan depends on."""

from __future__ import annotations

from dataclasses import dataclass

from ..heads.head import GRANULARITIES
from ..objectives.contrastive import HeRALoss
from ..objectives.registry import get_objective

# Optimizers whose state is known, by their names in `TrainingArguments.optim`.
OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit"),
    *("paged_adamw_8bit", "paged_adamw_32bit"),
)


@dataclass
class RunSettings:
    """The settings of a run that its plan depends on, named as in [`HeRAConfig`] and TRL's `ModelConfig`.

    Args:
        dtype (`str`, *optional*, defaults to `"bfloat16"`): Dtype of the model's weights.
        load_in_4bit (`bool`, *optional*, defaults to `False`): Whether bitsandbytes quantizes the linear layers.
        use_bnb_nested_quant (`bool`, *optional*, defaults to `False`): Double quantization.
        use_peft (`bool`, *optional*, defaults to `True`): LoRA; without it, all weights are trained.
        lora_r (`int`, *optional*, defaults to `16`): Rank.
        lora_target_modules (`str` or `list[str]`, *optional*, defaults to `"all-linear"`): As PEFT has it.
        lora_modules_to_save (`list[str]`, *optional*): Modules of which the adapter holds whole copies.
        use_dora (`bool`, *optional*, defaults to `False`): DoRA.
        optim (`str`, *optional*, defaults to `"adamw_torch_fused"`): Optimizer.
        per_device_train_batch_size (`int`, *optional*, defaults to `8`): Samples of a micro-batch.
        gradient_accumulation_steps (`int`, *optional*, defaults to `4`): Micro-batches of an optimizer step.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`): Whether activations are recomputed.
        alignment_weight (`float`, *optional*, defaults to `0.01`): Weight of the alignment loss; 0 plans SFTTrainer.
        alignment_objective (`str`, *optional*, defaults to `"contrastive"`): What is minimised.
        contrast_scope (`str`, *optional*, defaults to `"step"`): Which samples are compared.
        image_feature_gib (`float`, *optional*, defaults to `1.0`): GiB of image features kept between the two passes.
        queue_size (`int`, *optional*, defaults to `0`): Past samples that join.
        num_neighbors (`int`, *optional*, defaults to `10`): Neighbours k.
        neighbor_group_size (`int`, *optional*, defaults to `0`): Samples of a group of neighbours in a pool.
        alignment_granularity (`str`, *optional*, defaults to `"head"`): Whether heads or whole layers are aligned.
        num_aligned_heads (`int`, *optional*, defaults to `5`): Heads (or layers) m.
        aligned_heads (`list[str]`, *optional*): Explicit heads or layers.
        head_ranking_path (`str`, *optional*): A ranking of which the worst heads are taken.
        head_selection (`str`, *optional*, defaults to `"worst"`): Which heads of the ranking.
        seed (`int`, *optional*, defaults to `42`): Seed, which random heads are drawn with.
        processes (`int`, *optional*, defaults to `1`): Processes, each with a GPU of its own.
        teacher_dim (`int`, *optional*, defaults to `1024`): Width of the teacher's vectors (DINOv2-large).
        image_size (`tuple[int, int]`, *optional*, defaults to `(640, 480)`): Width and height of an image.
        image_tokens (`int`, *optional*): Tokens of an image, instead of what follows from its size.
        text_tokens (`int`, *optional*, defaults to `256`): Tokens of text in a sample; all count as scored.
    """

    dtype: str = "bfloat16"
    load_in_4bit: bool = False
    use_bnb_nested_quant: bool = False
    use_peft: bool = True
    lora_r: int = 16
    lora_target_modules: str | list[str] | None = "all-linear"
    lora_modules_to_save: list[str] | None = None
    use_dora: bool = False
    optim: str = "adamw_torch_fused"
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 4
    gradient_checkpointing: bool = True
    alignment_weight: float = 0.01
    alignment_objective: str = "contrastive"
    contrast_scope: str = "step"
    image_feature_gib: float = 1.0
    queue_size: int = 0
    num_neighbors: int = 10
    neighbor_group_size: int = 0
    alignment_granularity: str = "head"
    num_aligned_heads: int = 5
    aligned_heads: list[str] | None = None
    head_ranking_path: str | None = None
    head_selection: str = "worst"
    seed: int = 42
    processes: int = 1
    teacher_dim: int = 1024
    image_size: tuple[int, int] = (640, 480)
    image_tokens: int | None = None
    text_tokens: int = 256

    def __post_init__(self) -> None:
        least = dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "num_neighbors"), 1)
        least |= dict.fromkeys(("num_aligned_heads", "processes", "teacher_dim", "text_tokens", "lora_r"), 1)
        for name, bound in {**least, "queue_size": 0, "neighbor_group_size": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < bound:
                raise ValueError(f"`{name}` must be a whole number of at least {bound}, got {value!r}.")
        if self.image_tokens is not None and self.image_tokens < 0:
            raise ValueError(f"`image_tokens` must be at least 0, got {self.image_tokens!r}.")
        if not self.image_feature_gib >= 0:
            raise ValueError(f"`image_feature_gib` must be at least 0, got {self.image_feature_gib!r}.")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"`dtype` must be 'bfloat16', 'float16' or 'float32', got {self.dtype!r}.")
        if self.load_in_4bit and not self.use_peft:
            raise ValueError("4-bit weights cannot be trained themselves. Use LoRA, or leave out `load_in_4bit`.")
        if self.contrast_scope not in ("step", "micro_batch"):
            raise ValueError(f"`contrast_scope` must be 'step' or 'micro_batch', got {self.contrast_scope!r}.")
        if self.alignment_granularity not in GRANULARITIES:
            raise ValueError(f"`alignment_granularity` must be 'head' or 'layer', got {self.alignment_granularity!r}.")
        get_objective(self.alignment_objective)  # says which there are
        if self.optim not in OPTIMIZERS:
            raise ValueError(
                f"The state of optimizer {self.optim!r} is not known here. Plan with one of: {', '.join(OPTIMIZERS)}."
            )

    def pool_size(self, batch: int | None = None, accumulation: int | None = None) -> int:
        """Samples compared with each other, as [`HeRAConfig.pool_size`] has it, and the queue."""
        size = (batch or self.per_device_train_batch_size) * self.processes
        steps = (accumulation or self.gradient_accumulation_steps) if self.contrast_scope == "step" else 1
        return size * steps + self.queue_size

    @property
    def num_heads(self) -> int:
        """Number of aligned heads or layers."""
        return len(self.aligned_heads) if self.aligned_heads else self.num_aligned_heads

    @property
    def has_first_pass(self) -> bool:
        """Whether each step begins with a pass of its own that reads the heads."""
        return bool(self.alignment_weight) and self.contrast_scope == "step" and self.gradient_accumulation_steps > 1

    @property
    def least_pool(self) -> int:
        """The smallest pool, the queue included, that is not refused."""
        objective = get_objective(self.alignment_objective)
        least = self.num_neighbors + 2 if issubclass(objective, HeRALoss) else objective.least_samples
        return max(least, self.neighbor_group_size + self.queue_size)
