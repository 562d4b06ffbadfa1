"""The page of a run: gathered from what it left, and written as one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ... import __version__
from ...common.files import write_atomically
from ...common.redaction import public_name, public_settings
from ..record import CONTEXTS, RunRecord, read_run
from .curves import curves_section
from .maps import chosen_section, heads_section, mean_of
from .parts import Section, number_text, score_text
from .settings import duration, environment_section, settings_section, time_text

REPORT_FILE = "report.html"


def write_report(run_dir: str | os.PathLike, output: str | os.PathLike | None = None) -> Path:
    """Writes one HTML page of a training run: maps of its attention heads before and after, curves, the aligned heads,
    configuration, versions. The page holds everything it needs, plotly.js included (about 5 MB), opens from disk and
    makes no network request. It names neither tokens nor the folders of this computer.

    Runs that go on, were killed, or were made without alignment or monitor are reported too; the page then says what is
    missing and how to get it.

    Args:
        run_dir (`str` or `os.PathLike`): The run's `output_dir`.
        output (`str` or `os.PathLike`, *optional*): The file to write, `report.html` in `run_dir` by default.

    Returns:
        `Path`: The file that was written.

    Raises:
        `ImportError`: If plotly is not installed.
        `ValueError`: If `run_dir` holds nothing of a run, or `output` is a folder.

    Example:

    ```python
    >>> from hera_trainer.runs.report import write_report
    >>> write_report("out")
    PosixPath('out/report.html')
    ```
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('Reports need plotly. Install it with `pip install "hera-trainer[report]"`.') from error
    path = Path(run_dir, REPORT_FILE) if output is None else Path(output)
    if path.is_dir():
        raise ValueError(
            f"{str(path)!r} is a folder. Name the HTML file to write, such as {str(path / REPORT_FILE)!r}."
        )
    run = read_run(run_dir)
    page = render(run, get_plotlyjs())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def render(run: RunRecord, plotly_js: str) -> str:
    """The page as text.

    Args:
        run ([`~runs.record.RunRecord`]): The run.
        plotly_js (`str`): Source of plotly.js.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    run.record = public_settings(run.record)  # again: the file may be of another hand
    sections = [
        section
        for section in (
            heads_section(run),
            chosen_section(run),
            curves_section(run),
            settings_section(run),
            environment_section(run),
        )
        if section.plots or section.tables or section.missing
    ]
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        name=public_name(run.path.resolve().name),
        facts=_facts(run),
        tiles=_tiles(run),
        sections=sections,
        figures=_figures(sections),
        style=(folder / "style.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        plotly_js=plotly_js,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=__version__,
    )


def _figures(sections: Sequence[Section]) -> dict[str, Any]:
    plots = [plot for section in sections for group in section.plots.values() for plot in group]
    return {plot.name: plot.figure for plot in plots}


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """Model, data set and teacher, as far as they are known."""
    config = run.record.get("config") or {}
    rankings = [*(ranking for steps in run.monitored.values() for ranking in steps.values()), run.head_ranking]
    teachers = [ranking.teacher for ranking in rankings if ranking is not None and ranking.teacher]
    models = [ranking.model for ranking in rankings if ranking is not None and ranking.model]
    teacher = teachers[0] if teachers else ""
    if "teacher" in run.record:
        teacher = run.record["teacher"] or ""
    elif not teacher and config.get("alignment_weight"):
        teacher = config.get("teacher_model_name_or_path") or ""
    model = run.record.get("model") or (models[0] if models else "")
    facts = [("Model", model), ("Data set", run.record.get("dataset")), ("Teacher", teacher)]
    return [(name, public_name(str(value))) for name, value in facts if value]


def _tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """Name, value and detail of what is to be seen first."""
    tiles = [_status(run)]
    if run.log_history:
        step = max(entry.get("step", 0) for entry in run.log_history)
        epochs = [entry["epoch"] for entry in run.log_history if entry.get("epoch") is not None]
        tiles.append(("Steps", f"{step:,}", f"epoch {number_text(epochs[-1])}" if epochs else ""))
    if duration(run):
        tiles.append(("Duration", duration(run), ""))
    for name, keys in (("Language-model loss", ("lm_loss", "loss")), ("Alignment loss", ("alignment_loss",))):
        values = next((run.curve(key)[1] for key in keys if run.curve(key)[0]), [])
        if values:
            tiles.append((name, _from_to(number_text(values[0]), number_text(values[-1])), "first and last log"))
    for context in CONTEXTS:
        pair = run.before_after(context)
        before, after = (None, None) if pair is None else (mean_of(each, run.aligned_heads) for each in pair)
        if before is not None and after is not None:
            name = f"Aligned heads, {CONTEXTS[context]}"
            tiles.append((name, _from_to(score_text(before), score_text(after)), "mean mutual k-NN"))
    return tiles


def _status(run: RunRecord) -> tuple[str, str, str]:
    if run.record.get("finished"):
        return "Status", "finished", time_text(run.record["finished"])
    if run.curve("train_runtime")[0]:  # what a trainer logs last
        return "Status", "finished", ""
    if not run.record:
        return "Status", "not recorded", "there is no hera_run.json"
    return "Status", "no end recorded", "still running, or stopped early"


def _from_to(first: str, last: str) -> str:
    return f"{first} \N{RIGHTWARDS ARROW} {last}"
