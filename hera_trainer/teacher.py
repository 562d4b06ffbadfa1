"""The frozen vision teacher: one vector an image, read from a pretrained vision encoder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from huggingface_hub import hf_hub_download
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

# Raised whenever a digest below would cover something else than before; old cache entries are then never found again.
IDENTITY_VERSION = 1

_WEIGHT_FILES = ("*.safetensors", "*.bin")
_CONFIG_FILES = ("config.json", "preprocessor_config.json")
# Parameters that the class-token readout never uses: a checkpoint may lack them.
_UNUSED_WITH_CLASS_TOKEN = ("pooler.", "embeddings.mask_token")


class TeacherOutputError(ValueError):
    """The teacher returned NaN or infinity for an image.

    Args:
        index (`int`): Position of that image in the list given to [`VisionTeacher.encode`].
    """

    def __init__(self, index: int):
        super().__init__(
            f"The vision teacher returned NaN or infinity for image {index} of the list. Load it with "
            "`dtype=torch.float32`, or set `teacher_model_name_or_path` to another teacher."
        )
        self.index = index


class TeacherReadout:
    """Decides which vector of a vision encoder's output is the teacher's vector.

    - An encoder with a class token (DINOv2 and DINOv3 ViTs, with registers or without, ViT, DeiT, ViT-MAE, CLIP vision)
      is read there: `last_hidden_state[:, 0]` of the last layer. The class token comes first, before registers and
      patches, and no pooling head, which a checkpoint may not even have trained, stands between it and us.
    - Any other encoder (SigLIP, SigLIP2, DINOv3 ConvNeXt, ...) is read at its pooled output, `pooler_output`.

    Whether there is a class token is seen from the parameters, not from a list of model types.

    Args:
        model (`PreTrainedModel`): The vision encoder.
    """

    CLASS_TOKENS = ("embeddings.cls_token", "embeddings.class_embedding")

    def __init__(self, model: PreTrainedModel):
        self.uses_class_token = any(name.endswith(self.CLASS_TOKENS) for name, _ in model.named_parameters())
        self.model_type = model.config.model_type

    def __call__(self, outputs: Any) -> torch.Tensor:
        """Returns the vectors `[B, d_teacher]` of a batch, in the encoder's dtype."""
        if self.uses_class_token:
            return outputs.last_hidden_state[:, 0]
        pooled = outputs.get("pooler_output")
        if pooled is None:
            raise ValueError(
                f"A vision teacher of type {self.model_type!r} has neither a class token nor a pooled output: there is "
                "no one vector an image. Set `teacher_model_name_or_path` to an encoder that has one, such as DINOv2."
            )
        return pooled.flatten(1)  # convolutional encoders pool to [B, d, 1, 1]


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Converts any PIL image to RGB, 8 bits a channel, the way a person would see it.

    - EXIF orientation is applied first.
    - Transparency (RGBA, LA, a palette or PNG `tRNS` entry) is composited on white.
    - 16-bit greyscale is scaled to 8 bits (65535 becomes 255); PIL alone would clip it at 255. 32-bit integer greyscale
      is how PIL hands out some 16-bit files and is scaled alike, values beyond 16 bits clipped.
    - Everything else (greyscale, CMYK, palette, YCbCr, 1 bit) converts as PIL does it.

    An RGB image without orientation comes back with the same pixels; applying the function twice changes nothing.

    Args:
        image (`PIL.Image.Image`): The image. It is not modified.

    Returns:
        `PIL.Image.Image`: An image of mode `"RGB"`.
    """
    if image.getexif().get(PIL.Image.ExifTags.Base.Orientation, 1) != 1:
        image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return PIL.Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class VisionTeacher:
    """A frozen vision encoder that turns each image into one vector.

    [`TeacherReadout`] says which vector that is. Build one by name with [`VisionTeacher.from_pretrained`], or from
    objects already in memory. The encoder is put into eval mode and its parameters stop requiring gradients; of a
    composite model (CLIP, SigLIP) only the vision tower is kept; a ViT-MAE stops masking (its `mask_ratio` becomes 0).

    `name` is the name or path it was loaded from, or the model type of one made from objects in memory.

    Args:
        model (`PreTrainedModel`): The vision encoder, or a composite model that contains one.
        image_processor (`BaseImageProcessor`): Its image processor.

    Raises:
        ValueError: If `model` is a composite model without a vision tower.
    """

    def __init__(self, model: PreTrainedModel, image_processor: Any):
        if _vision_config(model.config) is not None:
            tower = model.get_encoder(modality="image")
            if tower is model:
                raise ValueError(f"No vision tower found in a {type(model).__name__}. Pass its vision encoder alone.")
            model = tower
        # Leaves a head for classification or reconstruction behind. Of an encoder that is bare already, `base_model`
        # may be a mere part (DINOv3), hence the question.
        bare: Any = MODEL_MAPPING.get(type(model.config), type(model))
        if not isinstance(model, bare):
            model = model.base_model
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self.image_processor = image_processor
        self.readout = TeacherReadout(self.model)
        self._is_mae = self.model.config.model_type == "vit_mae"
        if self._is_mae:
            self.model.config.mask_ratio = 0.0
        self.name: str = self.model.config.model_type
        self._identity: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> VisionTeacher:
        """Loads a teacher and its image processor from the Hub or a local folder. Remote code is never run.

        Args:
            name_or_path (`str` or `os.PathLike`): Model id on the Hugging Face Hub, or a local folder.
            device (`str` or `torch.device`, *optional*): Where it runs. The accelerator if there is one, else the CPU.
            dtype (`torch.dtype`, *optional*): Dtype of its weights and arithmetic. `torch.float32` if not given.

        Returns:
            `VisionTeacher`: The teacher, ready to encode.

        Raises:
            ValueError: If the teacher can't be loaded, with the name, the reason and the setting to change.
        """
        checkpoint = _Checkpoint.open(name_or_path)
        teacher = cls(checkpoint.load_model(dtype), checkpoint.image_processor)
        teacher.name = checkpoint.name
        teacher._identity = checkpoint.identity(dtype)
        if device is None:
            device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        return teacher.to(device)

    @property
    def hidden_size(self) -> int:
        """Width of the vectors, `d_teacher`."""
        config = self.model.config
        sizes = getattr(config, "hidden_sizes", None)  # convolutional encoders: one width a stage
        return sizes[-1] if sizes else config.hidden_size

    @property
    def identity(self) -> str:
        """Hex digest of all that determines the vectors: weights, configuration, preprocessing.

        For a teacher made by [`VisionTeacher.from_pretrained`] it equals [`teacher_identity`] of the name. For one made
        from objects in memory the weights themselves are digested, anew at each access.
        """
        if self._identity is not None:
            return self._identity
        weights = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        config = self.model.config.to_dict()
        for where_from in ("_name_or_path", "transformers_version"):
            config.pop(where_from, None)
        return _digest(weights=weights.hexdigest(), config=config, preprocessing=self.image_processor.to_dict())

    def to(self, device: str | torch.device) -> VisionTeacher:
        """Moves the encoder to `device` and returns the teacher itself."""
        module: torch.nn.Module = self.model  # type checkers can't follow how transformers wraps `to`
        module.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Sequence[PIL.Image.Image], batch_size: int = 32) -> torch.Tensor:
        """Encodes images, each made RGB by [`to_rgb`] and then prepared by the teacher's own image processor.

        Args:
            images (`list[PIL.Image.Image]`): The images, of any size and mode.
            batch_size (`int`, *optional*, defaults to `32`): Images a forward pass.

        Returns:
            `torch.Tensor`: float32, `[len(images), d_teacher]`, on the CPU.

        Raises:
            TeacherOutputError: (a `ValueError`) if a vector is not finite; `.index` is the image's position.
            ValueError: If something in the list is no PIL image, or the encoder gives no one vector an image.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, not {batch_size}.")
        for index, image in enumerate(images):
            if not isinstance(image, PIL.Image.Image):
                raise ValueError(f"Item {index} is a {type(image).__name__}, no PIL image: open it with PIL first.")
        self.model.eval()
        vectors = torch.empty(len(images), self.hidden_size)
        for start in range(0, len(images), batch_size):
            rgb = [to_rgb(image) for image in images[start : start + batch_size]]
            batch = self._forward(rgb).float().cpu()  # [b, d]
            bad = (~batch.isfinite().all(dim=1)).nonzero()
            if len(bad):
                raise TeacherOutputError(start + int(bad[0]))
            vectors[start : start + len(rgb)] = batch
        return vectors

    def _forward(self, rgb: list[PIL.Image.Image]) -> torch.Tensor:
        inputs = self.image_processor(images=rgb, return_tensors="pt").to(self.model.device, self.model.dtype)
        if self._is_mae:
            # Even unmasked, a ViT-MAE shuffles its patches by random noise: fixed noise keeps order and draws nothing.
            patches = self.model.embeddings.patch_embeddings.num_patches
            inputs["noise"] = torch.arange(patches, device=self.model.device).expand(len(rgb), -1)
        # A surrounding autocast would make the vectors depend on who asks.
        with torch.autocast(self.model.device.type, enabled=False):
            return self.readout(self.model(**inputs))


def teacher_identity(name_or_path: str | os.PathLike, dtype: torch.dtype | None = None) -> str:
    """Hex digest that tells teachers apart, without loading any weights into a model.

    It covers, for a name on the Hub, the name and the commit its configuration resolves to; for a local folder, the
    content of its weight files (`*.safetensors`, `*.bin`), `config.json` and `preprocessor_config.json`, not where the
    folder lies. In both cases also the preprocessing as the image processor reports it, and the dtype.

    Args:
        name_or_path (`str` or `os.PathLike`): As in [`VisionTeacher.from_pretrained`].
        dtype (`torch.dtype`, *optional*): As in [`VisionTeacher.from_pretrained`].

    Returns:
        `str`: sha256, 64 hex digits. Equals `VisionTeacher.from_pretrained(name_or_path, dtype=dtype).identity`.

    Raises:
        ValueError: If the teacher is not found, or its commit can't be resolved (offline and not in the local cache).
    """
    return _Checkpoint.open(name_or_path).identity(dtype)


@dataclass
class _Checkpoint:
    """A teacher on the Hub (`revision` is a commit hash) or in a local folder (`revision` is None)."""

    name: str
    revision: str | None
    config: PretrainedConfig
    image_processor: Any

    @classmethod
    def open(cls, name_or_path: str | os.PathLike) -> _Checkpoint:
        name = os.fspath(name_or_path)
        with _explained(name):
            revision = None if os.path.isdir(name) else _resolve_commit(name)
            # One commit for all that is read, so that the identity holds even if the repository moves on meanwhile.
            pinned = {} if revision is None else {"revision": revision}
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, **pinned)
            image_processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **pinned)
        return cls(name, revision, config, image_processor)

    def identity(self, dtype: torch.dtype | None) -> str:
        if self.revision is not None:
            source: dict[str, Any] = {"name": self.name, "commit": self.revision}
        else:
            folder = Path(self.name)
            found = {path for pattern in (*_WEIGHT_FILES, *_CONFIG_FILES) for path in folder.glob(pattern)}
            source = {path.name: _file_digest(path) for path in found}
        return _digest(source=source, preprocessing=self.image_processor.to_dict(), dtype=str(dtype or torch.float32))

    def load_model(self, dtype: torch.dtype | None) -> PreTrainedModel:
        config = _vision_config(self.config) or self.config  # a composite checkpoint: read its vision tower alone
        pinned = {} if self.revision is None else {"revision": self.revision}
        # Loading may initialise weights before it overwrites them: the caller's random state is not ours to move.
        with _explained(self.name), torch.random.fork_rng(devices=[]), _quiet_load_report():
            model, report = AutoModel.from_pretrained(
                self.name,
                config=config,
                dtype=dtype or torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                **pinned,
            )
            missing = set(report["missing_keys"])
            if TeacherReadout(model).uses_class_token:
                missing = {key for key in missing if not key.startswith(_UNUSED_WITH_CLASS_TOKEN)}
            if missing:
                raise ValueError(f"the checkpoint lacks weights of its vision encoder, such as {min(missing)!r}")
        return model


def _vision_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """The vision tower's configuration inside a composite one (CLIP, SigLIP), else None."""
    return getattr(config, "vision_config", None)


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
            "its weights, `config.json` and `preprocessor_config.json`."
        ) from error


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
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(**parts: Any) -> str:
    text = json.dumps({"version": IDENTITY_VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
