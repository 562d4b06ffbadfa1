"""Head-wise representation alignment for fine-tuning vision-language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .alignment import Alignment
    from .callbacks import AlignmentMonitorCallback
    from .config import HeRAConfig
    from .contrast import Contrast
    from .data import TeacherBatch
    from .features import add_teacher_features
    from .heads.accessor import HeadAccessor
    from .heads.capture import HeadCapture
    from .heads.head import AttentionHead
    from .heads.layouts import decoder_accessor
    from .heads.ranking import HeadRanking, rank_heads
    from .heads.registry import get_head_accessor, register_head_accessor
    from .loss import HeRALoss
    from .metrics import mutual_knn, nearest_neighbors
    from .plots import plot_head_scores, plot_run
    from .report import write_report
    from .run_record import RunRecord, read_run
    from .teacher import VisionTeacher
    from .trainer import HeRATrainer
    from .window import StepWindow

# Imported when first used: the loss and the metrics need torch only, and should not cost the import of TRL.
_HOMES = {
    "Alignment": "alignment",
    "AlignmentMonitorCallback": "callbacks",
    "AttentionHead": "heads.head",
    "Contrast": "contrast",
    "HeRAConfig": "config",
    "HeRALoss": "loss",
    "HeRATrainer": "trainer",
    "HeadAccessor": "heads.accessor",
    "HeadCapture": "heads.capture",
    "HeadRanking": "heads.ranking",
    "RunRecord": "run_record",
    "StepWindow": "window",
    "TeacherBatch": "data",
    "VisionTeacher": "teacher",
    "add_teacher_features": "features",
    "decoder_accessor": "heads.layouts",
    "get_head_accessor": "heads.registry",
    "mutual_knn": "metrics",
    "nearest_neighbors": "metrics",
    "plot_head_scores": "plots",
    "plot_run": "plots",
    "rank_heads": "heads.ranking",
    "read_run": "run_record",
    "register_head_accessor": "heads.registry",
    "write_report": "report",
}

__all__ = [
    "Alignment",
    "AlignmentMonitorCallback",
    "AttentionHead",
    "Contrast",
    "HeRAConfig",
    "HeRALoss",
    "HeRATrainer",
    "HeadAccessor",
    "HeadCapture",
    "HeadRanking",
    "RunRecord",
    "StepWindow",
    "TeacherBatch",
    "VisionTeacher",
    "__version__",
    "add_teacher_features",
    "decoder_accessor",
    "get_head_accessor",
    "mutual_knn",
    "nearest_neighbors",
    "plot_head_scores",
    "plot_run",
    "rank_heads",
    "read_run",
    "register_head_accessor",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
