"""Fine-tune a vision-language model with head-wise representation alignment.

```
python examples/train_hera.py \
    --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct \
    --dataset_name trl-lib/llava-instruct-mix \
    --use_peft --lora_target_modules all-linear --dtype bfloat16 \
    --output_dir Qwen2.5-VL-3B-HeRA
```
"""

from __future__ import annotations

from functools import partial

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from hera_trainer import HeRAConfig, HeRATrainer
from hera_trainer.cli.rows import load_rows


def main(script_args: ScriptArguments, training_args: HeRAConfig, model_args: ModelConfig) -> None:
    dtype = model_args.dtype
    training_args.model_init_kwargs = {
        **(training_args.model_init_kwargs or {}),
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": "auto" if dtype is None else dtype,
    }
    read = partial(load_rows, script_args.dataset_name, config=script_args.dataset_config)
    evaluated = training_args.eval_strategy != "no" or training_args.monitor_steps
    trainer = HeRATrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=read(split=script_args.dataset_train_split),
        eval_dataset=read(split=script_args.dataset_test_split) if evaluated else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, HeRAConfig, ModelConfig))
    main(*parser.parse_args_and_config())
