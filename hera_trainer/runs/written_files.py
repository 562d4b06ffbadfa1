"""Names of the files that a run writes."""

from __future__ import annotations

import json
import tempfile
from glob import escape
from pathlib import Path
from typing import Any

import accelerate.utils
import peft.utils
from huggingface_hub.constants import REPOCARD_NAME, SAFETENSORS_WEIGHTS_FILE_PATTERN
from peft import PeftModel
from torch import nn
from transformers import utils as names
from transformers.trainer import TRAINER_STATE_NAME

RANKING_FILE = "head_ranking.json"
RUN_FILE = "hera_run.json"  # in the `output_dir` of a run, not in its checkpoints
CONTROL_FILE = "hera_control.json"  # beside whatever a control run saves
CARD_FILE = REPOCARD_NAME
PLOTS_FOLDER = "hera"
MONITOR_FOLDER = "alignment_monitor"
EARLIER_FOLDER = "earlier-run"  # where a run begins anew, of what another one has left
RECORDS = (RUN_FILE, TRAINER_STATE_NAME, MONITOR_FOLDER)  # what a run leaves of its course

# Patterns of what saving an adapter or a model writes.
ADAPTER_FILES = (peft.utils.CONFIG_NAME, peft.utils.SAFETENSORS_WEIGHTS_NAME)
MODEL_FILES = (
    *(names.CONFIG_NAME, names.GENERATION_CONFIG_NAME, names.SAFE_WEIGHTS_NAME, names.SAFE_WEIGHTS_INDEX_NAME),
    SAFETENSORS_WEIGHTS_FILE_PATTERN.format(suffix="-?????-of-?????"),
)


def holds_adapter(folder: Path) -> bool:
    """Whether what a folder holds is an adapter, and not a whole model. Where two runs have left one of each, the
    record says which is the newer.

    Raises:
        `ValueError`: If nothing says so.
    """
    whole = (names.SAFE_WEIGHTS_NAME, names.SAFE_WEIGHTS_INDEX_NAME)
    adapter = (folder / peft.utils.CONFIG_NAME).is_file()
    if not adapter or not any((folder / name).is_file() for name in whole):
        return adapter
    path = folder / RUN_FILE
    files = json.loads(path.read_text()).get("files") if path.is_file() else None
    if files is None:
        raise ValueError(
            f"{str(folder)!r} holds an adapter ({peft.utils.CONFIG_NAME}) and the weights of a whole model, of two "
            "runs. Remove the files of the one that is not meant."
        )
    return peft.utils.CONFIG_NAME in files


def written_by(model: nn.Module, processor: Any) -> list[str]:
    """The files that saving a model and its processor writes, as patterns of their paths in the folder.

    Args:
        model (`nn.Module`): The model, a [`~peft.PeftModel`] or not.
        processor: The trainer's `processing_class`.
    """
    model = accelerate.utils.extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(model, PeftModel):
        folders = ["" if adapter == "default" else f"{escape(adapter)}/" for adapter in model.peft_config]
        found = [f"{folder}{name}" for folder in folders for name in ADAPTER_FILES]
    elif getattr(model, "_hf_peft_config_loaded", False):  # an adapter that transformers holds itself
        found = [names.GENERATION_CONFIG_NAME, *ADAPTER_FILES]
    else:
        found = list(MODEL_FILES)
    if processor is not None:  # which may have tokenizers in folders, vocabularies of any name, and code
        with tempfile.TemporaryDirectory() as folder:
            processor.save_pretrained(folder)
            paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            found += [escape(path.relative_to(folder).as_posix()) for path in paths]
    return found
