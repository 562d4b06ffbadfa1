"""`hera merge`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.files import replacing_folder, restore_folder
from .parser import Parser


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hera merge",
        description="Writes an adapter into its base model, for evaluation and serving. OUTPUT is then an ordinary "
        "model with its processor, in safetensors. The base model of an adapter that was trained in 4 bit is loaded in "
        "16 bit.",
        epilog="examples:\n"
        "  hera merge run merged\n"
        "  hera merge run merged --dtype bfloat16 --overwrite\n"
        "  hera merge run merged --base-model Qwen/Qwen2.5-VL-3B-Instruct     if the adapter names another place\n\n"
        "ADAPTER is a folder that training wrote, one of its checkpoints, or a name on the Hub.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="PEFT adapter")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write")
    parser.add_argument("--revision", default=None, help="branch, tag or commit of ADAPTER")
    parser.add_argument("--base-model", default=None, help="base model, if not the one that the adapter names")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="data type to merge and save in; auto: that of the base model's configuration [auto]",
    )
    parser.add_argument("--device", default="cpu", help="where to merge [%(default)s]")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file [%(default)s]")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    return parser


def merge_adapter(
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    base_model: str | os.PathLike | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Any:
    """Writes an adapter into its base model and saves it with its processor. `output` appears when it is complete.

    Args:
        adapter (`str` or `os.PathLike`): Folder of a PEFT adapter, or its name on the Hub.
        output (`str` or `os.PathLike`): Folder to write.
        revision (`str`, *optional*): Branch, tag or commit of the adapter.
        base_model (`str` or `os.PathLike`, *optional*): Base model, if not the one that the adapter names.
        dtype (`str`, *optional*, defaults to `"auto"`): Data type to merge and save in.
        device (`str`, *optional*, defaults to `"cpu"`): Where to merge.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Largest weight file.
        overwrite (`bool`, *optional*, defaults to `False`): Replace `output` if it exists.

    Returns:
        [`~transformers.PreTrainedModel`]: The merged model.

    Raises:
        `OSError`: If a model is not found.
        `ValueError`: If `output` exists, `adapter` is none or can't be merged, or the base model is stored quantized.
    """
    from ..runs.control import mark_control, read_control
    from .loading import adapter_folder, base_of, load_model
    from .paths import local_path

    name = local_path(adapter)
    folder = adapter_folder(name, revision)
    if folder is None:
        there = os.path.isdir(name)
        reason = "it has no adapter_config.json" if there else "no adapter_config.json can be read from the Hub"
        raise ValueError(f"{name!r} is no adapter: {reason}. Check its name; a full model needs no merging.")
    target = Path(output).absolute()
    base = base_of(folder, base_model)
    restore_folder(target)
    _check_target(target, overwrite, [Path(folder), Path(base[0])])
    _check_not_quantized(*base)
    control = read_control(folder)
    model, processor = load_model(folder, dtype=dtype, device=device, base_model=base_model)
    with replacing_folder(target) as temporary:
        merged = merge(model)
        merged.save_pretrained(temporary, max_shard_size=max_shard_size)
        processor.save_pretrained(temporary)
        mark_control(temporary, control)
    return merged


def merge(model: Any) -> Any:
    """The base model of a [`~peft.PeftModel`] with the adapter in its weights, in the data types that these had.

    Raises:
        `ValueError`: If the adapter is of a kind that can't be merged, such as prompt tuning, or holds NaN.
    """
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(model.base_model, BaseTuner):
        kind = model.active_peft_config.peft_type
        raise ValueError(f"An adapter of type {getattr(kind, 'value', kind)} can't be written into the base model.")
    # Whole layers that an adapter brings (`modules_to_save`) are float32 whatever the base model is.
    dtypes = {
        name.replace(".base_layer", "").replace(".original_module", ""): parameter.dtype
        for name, parameter in model.base_model.model.named_parameters()
    }
    merged = model.merge_and_unload(safe_merge=True)
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    own, out = merged.get_input_embeddings(), merged.get_output_embeddings()
    if out is not None and out.weight is not own.weight:  # else who goes by the configuration would drop the head
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    return merged


def _check_target(target: Path, overwrite: bool, sources: list[Path]) -> None:
    from transformers.utils import CONFIG_NAME

    from ..runs.written_files import RUN_FILE

    for source in sources:
        if source.exists() and target.resolve() in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"OUTPUT {str(target)!r} holds what is to be merged. Choose another folder.")
    if target.is_file():
        raise ValueError(f"OUTPUT {str(target)!r} is a file. Choose a folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"OUTPUT {str(target)!r} is not empty. Choose another folder, or replace it with --overwrite.")
    if not Path(target, CONFIG_NAME).is_file():
        raise ValueError(
            f"OUTPUT {str(target)!r} holds no model, and --overwrite replaces a model's folder only. Choose another."
        )
    marks = (RUN_FILE, "trainer_state.json", "training_args.bin", "checkpoint-*")
    of_a_run = [name for name in marks if any(target.glob(name))]
    if of_a_run:
        raise ValueError(
            f"OUTPUT {str(target)!r} is the folder of a training run ({', '.join(of_a_run)}), which --overwrite would "
            "delete. Choose another."
        )


def _check_not_quantized(base: str, revision: str | None) -> None:
    from .loading import model_config

    quantization = getattr(model_config(base, revision), "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    raise ValueError(
        f"The base model {base!r} is stored quantized ({getattr(method, 'value', method)}), and an adapter can't be "
        "written into such weights without loss. Name the 16-bit model that it was made from: --base-model."
    )


def main(arguments: Sequence[str]) -> None:
    args = _parser().parse_args(arguments)
    model = merge_adapter(**vars(args))
    size = sum(file.stat().st_size for file in Path(args.output).glob("*.safetensors"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"Merged: {args.output} ({parameters / 1e6:,.1f} M parameters, {dtype}, {size / 1e9:,.2f} GB)")
