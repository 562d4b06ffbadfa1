"""The frozen vision teacher: one vector an image, read from a pretrained vision encoder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers import MODEL_MAPPING, BatchFeature, PreTrainedModel

from ..common.digest import weights_digest
from ..common.precision import exact_products
from .checkpoint import TeacherCheckpoint, digest, plain_config, preprocessing, vision_tower
from .readout import TeacherReadout


class TeacherOutputError(ValueError):
    """The teacher returned NaN, infinity or nothing but zeros for an image.

    Args:
        index (`int`): Position of that image in the list given to [`VisionTeacher.encode`].
        what (`str`): What it returned.
    """

    def __init__(self, index: int, what: str):
        super().__init__(f"The vision teacher returned {what} for image {index} of the list. {cure_of(what)}")
        self.index = index


ZEROS = "nothing but zeros"  # near to no other vector, and far from none


def fault_of(vector: torch.Tensor) -> str | None:
    """What is wrong with a vector `[d_teacher]`, if it cannot have neighbours."""
    if not bool(vector.isfinite().all()):
        return "NaN or infinity"
    return None if bool(vector.any()) else ZEROS


def cure_of(what: str) -> str:
    """What to do about it."""
    dtype = "" if what == ZEROS else "Load it with `dtype=torch.float32`, or set "
    return f"{dtype or 'Set '}`teacher_model_name_or_path` to another teacher."


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
    composite model (CLIP, SigLIP) only the vision tower is kept; a ViT-MAE or Hiera stops masking.

    `name` is the name or path it was loaded from, or the model type of one made from objects in memory.

    Args:
        model (`PreTrainedModel`): The vision encoder, or a composite model that contains one.
        image_processor (`BaseImageProcessor`): Its image processor.

    Raises:
        ValueError: If `model` is a composite model without a vision tower, a timm model with a classification head, or
            no transformers model at all.
    """

    def __init__(self, model: PreTrainedModel, image_processor: Any):
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"A {type(model).__name__} is no transformers model. Pass a `PreTrainedModel`: a timm model becomes "
                'one with `AutoModel.from_pretrained("timm/...")`.'
            )
        model = vision_tower(model)
        # Leaves a head for classification or reconstruction behind. Of an encoder that is bare already, `base_model`
        # may be a mere part (DINOv3), hence the question.
        bare: Any = MODEL_MAPPING.get(type(model.config), type(model))
        if not isinstance(model, bare):
            if model.config.model_type == "timm_wrapper":
                raise ValueError(f"A {type(model).__name__} has a head. Pass a `TimmWrapperModel`, which has none.")
            model = model.base_model
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self.image_processor = image_processor
        self.readout = TeacherReadout(self.model)
        self._hidden_size: int | None = None
        self._is_mae = self.model.config.model_type == "vit_mae"
        self._stop_masking()
        self.name: str = self.model.config.model_type
        self._loaded: tuple[str, str] | None = None  # its state when it was loaded, and its identity

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
            device (`str` or `torch.device`, *optional*):
                Where it runs. The accelerator if there is one, under a launcher this process's own, else the CPU.
            dtype (`torch.dtype`, *optional*): Dtype of its weights and arithmetic. `torch.float32` if not given.

        Returns:
            `VisionTeacher`: The teacher, ready to encode.

        Raises:
            ValueError: If the teacher can't be loaded, with the name, the reason and the setting to change.
        """
        checkpoint = TeacherCheckpoint.open(name_or_path)
        teacher = cls(checkpoint.load_model(dtype), checkpoint.image_processor)
        teacher.name = checkpoint.name
        teacher._loaded = teacher._state(), checkpoint.identity(dtype)
        return teacher.to(_own_device() if device is None else device)

    @property
    def hidden_size(self) -> int:
        """Width of the vectors, `d_teacher`, as the vector of a blank image shows it.

        Encoders keep it at different places of their configuration, and many convolutional ones do not keep it at all.
        """
        if self._hidden_size is None:
            self._hidden_size = self._forward([PIL.Image.new("RGB", (224, 224))]).shape[1]
        return self._hidden_size

    @property
    def identity(self) -> str:
        """Hex digest of all that determines the vectors: weights, configuration, preprocessing.

        For a teacher made by [`VisionTeacher.from_pretrained`] it equals [`teacher_identity`] of the name. For one made
        from objects in memory, or changed since it was loaded (another dtype, other weights, another size of its image
        processor, another readout), the weights themselves are digested, anew at each access. A subclass is told apart
        by its name, not by its code.
        """
        own = self._own_ways()
        if not own and self._loaded is not None and self._loaded[0] == self._state():
            return self._loaded[1]
        return digest(
            weights=weights_digest(self.model),
            config=plain_config(self.model.config),
            preprocessing=preprocessing(self.image_processor),
            **own,
        )

    def _own_ways(self) -> dict[str, Any]:
        """What makes other vectors of the same encoder: a class of one's own, of the teacher or of its readout, by its
        name, and a readout that was changed. Empty of a teacher as it comes."""
        own: dict[str, Any] = {}
        readout = self.readout if isinstance(self.readout, FunctionType) else type(self.readout)
        for name, kind, plain in (("teacher", type(self), VisionTeacher), ("readout", readout, TeacherReadout)):
            if kind is not plain:
                own[name] = f"{kind.__module__}.{kind.__qualname__}"
        settings = getattr(self.readout, "__dict__", {})
        if settings != vars(TeacherReadout(self.model)):
            simple = (bool, int, float, str, type(None))  # others have no text that is the same in every process
            own["settings"] = {
                name: value if isinstance(value, simple) else type(value).__qualname__
                for name, value in settings.items()
            }
        return own

    def _state(self) -> str:
        """Changes with the preprocessing, with the dtype of a parameter, and when one is written to; not with the
        device."""
        parameters = [(tensor.dtype, tensor._version) for tensor in self.model.parameters()]
        return digest(parameters=parameters, preprocessing=preprocessing(self.image_processor))

    def to(self, device: str | torch.device) -> VisionTeacher:
        """Moves the encoder to `device` and returns the teacher itself."""
        module: torch.nn.Module = self.model  # type checkers can't follow how transformers wraps `to`
        module.to(device)
        return self

    def _stop_masking(self) -> None:
        if self._is_mae:
            self.model.config.mask_ratio = 0.0
        elif self.model.config.model_type == "hiera":  # one from a `HieraForPreTraining` masks, a `HieraModel` does not
            self.model.embeddings.is_mae = self.model.embeddings.patch_embeddings.is_mae = False

    @torch.no_grad()
    def encode(self, images: Sequence[PIL.Image.Image], batch_size: int = 32) -> torch.Tensor:
        """Encodes images, each made RGB by [`to_rgb`] and then prepared by the teacher's own image processor.

        Args:
            images (`list[PIL.Image.Image]`): The images, of any size and mode.
            batch_size (`int`, *optional*, defaults to `32`): Images a forward pass.

        Returns:
            `torch.Tensor`: float32, `[len(images), d_teacher]`, on the CPU.

        Raises:
            TeacherOutputError: (a `ValueError`) if a vector is not finite, or zero; `.index` is the image's position.
            ValueError: If something in the list is no PIL image, or the encoder gives no one vector an image.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, not {batch_size}.")
        for index, image in enumerate(images):
            if not isinstance(image, PIL.Image.Image):
                raise ValueError(f"Item {index} is a {type(image).__name__}, no PIL image: open it with PIL first.")
        if not images:
            return torch.empty(0, self.hidden_size)
        vectors = torch.empty(0)
        for start in range(0, len(images), batch_size):
            rgb = [to_rgb(image) for image in images[start : start + batch_size]]
            batch = self._forward(rgb).float().cpu()  # [b, d]
            usable = batch.isfinite().all(dim=1) & batch.any(dim=1)
            if not bool(usable.all()):
                bad = int(usable.int().argmin())
                raise TeacherOutputError(start + bad, str(fault_of(batch[bad])))
            if start == 0:
                vectors = torch.empty(len(images), batch.shape[1])
            vectors[start : start + len(rgb)] = batch
        return vectors

    def _forward(self, rgb: list[PIL.Image.Image]) -> torch.Tensor:
        return self.forward_prepared(self.image_processor(images=rgb, return_tensors="pt"))

    @torch.no_grad()
    def forward_prepared(self, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Runs the encoder once on images that its image processor has prepared already, in another process perhaps.

        Args:
            prepared (`Mapping[str, torch.Tensor]`): What the image processor made of n images.

        Returns:
            `torch.Tensor`: `[n, d_teacher]`, in the encoder's dtype and on its device. Not checked for NaN.
        """
        self.model.eval()
        inputs = BatchFeature(dict(prepared)).to(self.model.device, self.model.dtype)
        if self._is_mae:
            # Even unmasked, a ViT-MAE shuffles its patches by random noise: fixed noise keeps order and draws nothing.
            patches = self.model.embeddings.patch_embeddings.num_patches
            inputs["noise"] = torch.arange(patches, device=self.model.device).expand(len(inputs["pixel_values"]), -1)
        # A surrounding autocast, or TF32, would make the vectors depend on who asks.
        with exact_products(self.model.device, convolutions=True):
            return self.readout(self.model(**inputs))


def teacher_identity(name_or_path: str | os.PathLike, dtype: torch.dtype | None = None) -> str:
    """Hex digest that tells teachers apart, without loading any weights into a model.

    It covers, for a name on the Hub, the name and the commit its configuration resolves to; for a local folder, the
    content of its weight files (`*.safetensors`, `*.bin`), `config.json` and `preprocessor_config.json`, not where the
    folder lies. In both cases also the preprocessing as the image processor reports it, the dtype, and the version of
    [`TeacherReadout`]'s rules.

    Args:
        name_or_path (`str` or `os.PathLike`): As in [`VisionTeacher.from_pretrained`].
        dtype (`torch.dtype`, *optional*): As in [`VisionTeacher.from_pretrained`].

    Returns:
        `str`: sha256, 64 hex digits. Equals `VisionTeacher.from_pretrained(name_or_path, dtype=dtype).identity`.

    Raises:
        ValueError: If the teacher is not found, or its commit can't be resolved (offline and not in the local cache).
    """
    return TeacherCheckpoint.open(name_or_path).identity(dtype)


def _own_device() -> torch.device:
    """The accelerator of this process, also before anything has set it: each process of a launcher has its own."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK") or -1)
    return accelerator if rank < 0 else torch.device(accelerator.type, rank % torch.accelerator.device_count())
