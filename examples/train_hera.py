"""Fine-tune a vision-language model with head-wise representation alignment.

```
accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/train_hera.py \
    --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct \
    --dataset_name trl-lib/llava-instruct-mix \
    --use_peft --lora_target_modules all-linear \
    --output_dir Qwen2.5-VL-3B-HeRA
```
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from hera_trainer import HeRAConfig, HeRATrainer


def read_dataset(name: str, config: str | None) -> DatasetDict | Dataset:
    """A data set of the Hub, or one that `save_to_disk` wrote to the folder `name`."""
    if Path(name, "dataset_info.json").is_file() or Path(name, "dataset_dict.json").is_file():
        return load_from_disk(name)
    return load_dataset(name, name=config)


def main(script_args: ScriptArguments, training_args: HeRAConfig, model_args: ModelConfig) -> None:
    dtype = model_args.dtype
    training_args.model_init_kwargs = {
        **(training_args.model_init_kwargs or {}),
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": "auto" if dtype is None else dtype,
    }
    dataset = read_dataset(script_args.dataset_name, script_args.dataset_config)
    splits = dataset if isinstance(dataset, DatasetDict) else {script_args.dataset_train_split: dataset}
    evaluated = training_args.eval_strategy != "no" or training_args.monitor_steps
    trainer = HeRATrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=splits[script_args.dataset_train_split],
        eval_dataset=splits[script_args.dataset_test_split] if evaluated else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, HeRAConfig, ModelConfig))
    main(*parser.parse_args_and_config())
