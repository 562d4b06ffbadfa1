"""One self-contained HTML page of a training run."""

from __future__ import annotations

from .page import write_report

__all__ = ["write_report"]
