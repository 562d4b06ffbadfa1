"""The page of the Space: the metric, on rows that are typed in. AMBER's folder `data` must lie beside this file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

if __name__ == "__main__":
    folder = Path(__file__).parent
    metric = evaluate.load(str(folder / "amber.py"))
    # The form has no field for paths, and no part-of-speech tagger is installed.
    metric.compute = partial(metric.compute, annotations=folder / "data", nouns="tokens")
    launch_gradio_widget(metric)
