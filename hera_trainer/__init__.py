"""Head-wise representation alignment for fine-tuning vision-language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config import HeRAConfig
    from .features import add_teacher_features
    from .heads.accessor import HeadAccessor
    from .heads.capture import HeadCapture
    from .heads.head import AttentionHead
    from .heads.layouts import decoder_accessor
    from .heads.ranking import HeadRanking, rank_heads
    from .heads.registry import get_head_accessor, register_head_accessor
    from .loss import HeRALoss
    from .metrics import mutual_knn, nearest_neighbors
    from .teacher import VisionTeacher
    from .trainer import HeRATrainer

# Imported when first used: the loss and the metrics need torch only, and should not cost the import of TRL.
_HOMES = {
    "AttentionHead": "heads.head",
    "HeRAConfig": "config",
    "HeRALoss": "loss",
    "HeRATrainer": "trainer",
    "HeadAccessor": "heads.accessor",
    "HeadCapture": "heads.capture",
    "HeadRanking": "heads.ranking",
    "VisionTeacher": "teacher",
    "add_teacher_features": "features",
    "decoder_accessor": "heads.layouts",
    "get_head_accessor": "heads.registry",
    "mutual_knn": "metrics",
    "nearest_neighbors": "metrics",
    "rank_heads": "heads.ranking",
    "register_head_accessor": "heads.registry",
}

__all__ = [
    "AttentionHead",
    "HeRAConfig",
    "HeRALoss",
    "HeRATrainer",
    "HeadAccessor",
    "HeadCapture",
    "HeadRanking",
    "VisionTeacher",
    "__version__",
    "add_teacher_features",
    "decoder_accessor",
    "get_head_accessor",
    "mutual_knn",
    "nearest_neighbors",
    "rank_heads",
    "register_head_accessor",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
