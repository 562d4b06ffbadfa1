"""A vision teacher as it lies on the Hub or in a folder: how it is found, loaded, and told apart from others."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.utils import is_timm_available
from transformers.utils import logging as transformers_logging

from .readout import TeacherReadout

# Raised whenever a digest below would cover something else than before, or `TeacherReadout` would read another vector
# of the same encoder; old cache entries are then never found again.
IDENTITY_VERSION = 2

_WEIGHT_FILES = ("*.safetensors", "*.bin")
_CONFIG_FILES = ("config.json", "preprocessor_config.json")
# Parameters that the class-token readout never uses: a checkpoint may lack them.
_UNUSED_WITH_CLASS_TOKEN = ("pooler.", "embeddings.mask_token")


@dataclass
class TeacherCheckpoint:
    """A teacher on the Hub (`revision` is a commit hash) or in a local folder (`revision` is None)."""

    name: str
    revision: str | None
    config: PretrainedConfig
    image_processor: Any

    @classmethod
    def open(cls, name_or_path: str | os.PathLike) -> TeacherCheckpoint:
        """Reads configuration and image processor, no weights. Raises `ValueError` with the name and the reason."""
        name = os.fspath(name_or_path)
        with _explained(name):
            revision = None if os.path.isdir(name) else _resolve_commit(name)
            # One commit for all that is read, so that the identity holds even if the repository moves on meanwhile.
            pinned = {} if revision is None else {"revision": revision}
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, **pinned)
            if config.model_type == "timm_wrapper":
                if not is_timm_available():
                    raise ImportError("it is a timm model, which needs the timm library: `pip install timm`.")
                if config.model_args:
                    # timm writes it into the folders that it saves, transformers passes its own: there is no head.
                    config.model_args.pop("num_classes", None)
            image_processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **pinned)
        return cls(name, revision, config, image_processor)

    def identity(self, dtype: torch.dtype | None) -> str:
        """Hex digest of all that determines the vectors; see [`teacher_identity`]."""
        if self.revision is not None:
            source: dict[str, Any] = {"name": self.name, "commit": self.revision}
        else:
            folder = Path(self.name)
            found = {path for pattern in (*_WEIGHT_FILES, *_CONFIG_FILES) for path in folder.glob(pattern)}
            source = {path.name: _file_digest(path) for path in found}
        pixels = preprocessing(self.image_processor)
        return digest(source=source, preprocessing=pixels, dtype=str(dtype or torch.float32))

    def load_model(self, dtype: torch.dtype | None) -> PreTrainedModel:
        """Loads the vision encoder, alone where transformers can load it so. It must have all weights that are read."""
        config = vision_config(self.config)
        if type(config) not in MODEL_MAPPING:
            config = self.config  # not composite, or one whose tower loads only as a part of the whole (ALIGN)
        pinned = {} if self.revision is None else {"revision": self.revision}
        # Loading may initialise weights before it overwrites them: the caller's random state is not ours to move.
        with _explained(self.name), _undivided(), torch.random.fork_rng(devices=[]), _quiet_load_report():
            model, report = AutoModel.from_pretrained(
                self.name,
                config=config,
                dtype=dtype or torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                **pinned,
            )
            encoder, missing = _tower(model, set(report["missing_keys"]))
            if TeacherReadout(encoder).uses_class_token:
                missing = {key for key in missing if not key.startswith(_UNUSED_WITH_CLASS_TOKEN)}
            elif (pooler := {key for key in encoder.state_dict() if key.startswith("pooler.")}) and pooler <= missing:
                # The checkpoint was trained without this head: the patch tokens are read, never an untrained vector.
                encoder.pooler = None
                missing -= pooler
            if missing:
                raise ValueError(f"the checkpoint lacks weights of its vision encoder, such as {min(missing)!r}")
        return encoder


def preprocessing(image_processor: Any) -> dict[str, Any]:
    """What determines the pixels that an image processor makes: its settings, and which library resizes."""
    # torchvision goes without a name here, so that what was computed with it before is found.
    backend = {"backend": "PIL"} if type(image_processor).__name__.endswith("Pil") else {}
    return {**image_processor.to_dict(), **backend}


def plain_config(config: PretrainedConfig) -> dict[str, Any]:
    """What a configuration says of a model, without where it came from."""
    return {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}


def vision_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """The vision tower's configuration inside a composite one (CLIP, SigLIP), else None."""
    return getattr(config, "vision_config", None)


def vision_tower(model: PreTrainedModel) -> PreTrainedModel:
    """The vision encoder inside a composite model; any other model itself."""
    if vision_config(model.config) is None:
        return model
    tower = model.get_encoder(modality="image")
    if tower is model:
        raise ValueError(f"No vision tower found in a {type(model).__name__}. Pass its vision encoder alone.")
    return tower


def _tower(model: PreTrainedModel, missing: set[str]) -> tuple[PreTrainedModel, set[str]]:
    """The vision encoder, and which of its own parameters are among the missing ones of the model."""
    tower = vision_tower(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is tower)
    return tower, {key.removeprefix(prefix) for key in missing if key.startswith(prefix)}


def _resolve_commit(name: str) -> str:
    # In the Hub's local cache a file lies under `snapshots/<commit hash>/`.
    commit = Path(hf_hub_download(name, "config.json")).parent.name
    if re.fullmatch(r"[0-9a-f]{40}", commit) is None:
        raise ValueError(f"its commit hash could not be resolved, found {commit!r}")
    return commit


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns whatever goes wrong inside into a ValueError with the teacher's name and the setting to change."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"The vision teacher {name!r} could not be loaded: {error}\nSet `teacher_model_name_or_path` to a vision "
            "encoder on the Hugging Face Hub that can be reached or is in the local cache, or to a local folder with "
            "its weights, `config.json` and, but for timm models, `preprocessor_config.json`."
        ) from error


@contextlib.contextmanager
def _undivided() -> Iterator[None]:
    """transformers divides whatever is loaded under DeepSpeed ZeRO-3 among the processes. A teacher is whole in each of
    them, and loaded only by those that have something to encode."""
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


@contextlib.contextmanager
def _quiet_load_report() -> Iterator[None]:
    """Silences the table of unexpected keys (a composite's text tower, a head): missing ones are checked by us."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _file_digest(path: Path) -> str:
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def digest(**parts: Any) -> str:
    """Hex digest of JSON-like parts, of the current `IDENTITY_VERSION`."""
    text = json.dumps({"version": IDENTITY_VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
