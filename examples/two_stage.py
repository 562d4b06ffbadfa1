"""Train a vision-language model in two stages, both with head-wise representation alignment.

Stage 1 trains the projector between a frozen vision tower and a frozen language model on captions, stage 2 the
projector and the language model on instructions. The heads are ranked once, before stage 1, and stay the same.

```
accelerate launch --config_file examples/accelerate_configs/ddp.yaml --num_processes 8 examples/two_stage.py \
    --model_name_or_path path/to/a/model/with/a/new/projector \
    --caption_dataset path/to/captions \
    --instruction_dataset path/to/instructions \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 2 --stage1_gradient_accumulation_steps 4 \
    --stage1_learning_rate 1e-3 --learning_rate 2e-5 --num_train_epochs 1 \
    --output_dir two-stage
```

Everything that `HeRAConfig` knows is an argument, and goes for both stages. With `--use_peft --lora_target_modules
all-linear` stage 2 trains an adapter outside of the vision tower, and the projector beside it. After an interruption,
the same command with `--resume_from_checkpoint two-stage/stage2/checkpoint-500` goes on from there; stage 1 does not
run again.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText
from trl import ModelConfig, TrlParser, get_peft_config

from hera_trainer import HeRAConfig, HeRATrainer
from hera_trainer.cli.rows import load_rows


@dataclass
class TwoStageArguments:
    """What the stages do not share.

    Args:
        caption_dataset (`str`): Data set of stage 1: a name on the Hub, a folder or a file.
        instruction_dataset (`str`): Data set of stage 2.
        dataset_split (`str`, *optional*, defaults to `"train"`): Split of both that is trained on.
        projector (`str`, *optional*, defaults to `"multi_modal_projector"`): Part of the projector's parameter names.
        vision_tower (`str`, *optional*, defaults to `"vision_tower"`): Part of those of the vision tower.
        stage1_learning_rate (`float`, *optional*, defaults to `1e-3`): Learning rate of stage 1.
        stage1_gradient_accumulation_steps (`int`, *optional*): Accumulation in stage 1, as in stage 2 by default.
    """

    caption_dataset: str = field(metadata={"help": "Data set of stage 1: a name on the Hub, or a folder."})
    instruction_dataset: str = field(metadata={"help": "Data set of stage 2: a name on the Hub, or a folder."})
    dataset_split: str = field(default="train", metadata={"help": "Split of both that is trained on."})
    projector: str = field(
        default="multi_modal_projector", metadata={"help": "Part of the projector's parameter names."}
    )
    vision_tower: str = field(default="vision_tower", metadata={"help": "Part of the vision tower's parameter names."})
    stage1_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of stage 1."})
    stage1_gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "Accumulation in stage 1, as in stage 2 by default."}
    )


def train_stage(
    stage: int,
    model_path: str,
    dataset: Dataset,
    args: HeRAConfig,
    script_args: TwoStageArguments,
    model_args: ModelConfig,
) -> None:
    """Loads a model, freezes what the stage does not train, trains the rest and saves it: all of it, or with `use_peft`
    in stage 2 the adapter with the projector."""
    model = AutoModelForImageTextToText.from_pretrained(
        model_path,
        dtype=model_args.dtype or "float32",
        revision=model_args.model_revision if stage == 1 else None,
        attn_implementation=model_args.attn_implementation,
    )
    for name, parameter in model.named_parameters():
        is_projector, is_tower = script_args.projector in name, script_args.vision_tower in name
        parameter.requires_grad_(is_projector or (stage == 2 and not is_tower))
    peft_config = get_peft_config(model_args) if stage == 2 else None
    if isinstance(peft_config, LoraConfig) and peft_config.exclude_modules is None:
        peft_config.exclude_modules = rf".*{re.escape(script_args.vision_tower)}.*"
    trainer = HeRATrainer(model, args, train_dataset=dataset, peft_config=peft_config)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


def stage_of(checkpoint: str | None, output_dir: Path) -> int:
    """The stage in which to begin: that of the checkpoint to resume from, or the first."""
    if not checkpoint:
        return 1
    folders = Path(checkpoint).resolve().parents  # where a stage has begun anew, it lies in `earlier-run`
    stages = [stage for stage in (1, 2) if (output_dir / f"stage{stage}").resolve() in folders]
    if not stages:
        raise ValueError(
            f"`resume_from_checkpoint` ({checkpoint}) must be the folder of a checkpoint in `{output_dir / 'stage1'}` "
            f"or `{output_dir / 'stage2'}`."
        )
    return stages[0]


def main(script_args: TwoStageArguments, training_args: HeRAConfig, model_args: ModelConfig) -> None:
    out = Path(training_args.output_dir)
    first = stage_of(training_args.resume_from_checkpoint, out)
    stage1, stage2 = copy.deepcopy(training_args), copy.deepcopy(training_args)
    stage1.output_dir, stage2.output_dir = str(out / "stage1"), str(out / "stage2")
    if first == 1:
        stage2.resume_from_checkpoint = None
    stage1.learning_rate = script_args.stage1_learning_rate
    stage1.gradient_accumulation_steps = (
        script_args.stage1_gradient_accumulation_steps or training_args.gradient_accumulation_steps
    )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("Stage 1 trains the projector itself, and no quantized weights: leave `load_in_...` out.")
    model_args.lora_modules_to_save = model_args.lora_modules_to_save or [script_args.projector]

    if first == 1:
        captions = load_rows(script_args.caption_dataset, split=script_args.dataset_split)
        train_stage(1, model_args.model_name_or_path, captions, stage1, script_args, model_args)
    if training_args.aligned_heads is None:  # the heads that were ranked before stage 1
        stage2.head_ranking_path = str(out / "stage1" / "head_ranking.json")
    instructions = load_rows(script_args.instruction_dataset, split=script_args.dataset_split)
    train_stage(2, stage1.output_dir, instructions, stage2, script_args, model_args)


if __name__ == "__main__":
    parser = TrlParser((TwoStageArguments, HeRAConfig, ModelConfig))
    main(*parser.parse_args_and_config())
