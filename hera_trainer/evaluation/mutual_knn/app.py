"""The page of the Space: the metric, on rows that are typed in."""

from __future__ import annotations

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

if __name__ == "__main__":
    launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("mutual_knn.py"))))
