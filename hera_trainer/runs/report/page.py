"""The page of a run, or of several: gathered from what they left, and written as one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ... import __version__
from ...common.files import write_atomically
from ...common.redaction import public_name, public_settings
from ...heads.head import granularity_of
from ..record import CONTEXTS, RunRecord, public_ranking, read_run
from .compare_curves import compared_curves_section
from .compare_maps import compared_heads_section, teacher_section
from .compare_tables import differences_section, results_section
from .curves import curves_section
from .groups import NamedRun, control_of, grouped, named_runs
from .maps import chosen_section, heads_section, mean_of
from .parts import Section, number_text, score_text
from .settings import duration, environment_section, other_teacher, rankings_of, settings_section, teacher_of, time_text

REPORT_FILE = "report.html"
COMPARISON_FILE = "comparison.html"


def write_report(
    run_dirs: str | os.PathLike | Sequence[str | os.PathLike], output: str | os.PathLike | None = None
) -> Path:
    """Writes one HTML page of a training run: maps of its attention heads before and after, curves, the aligned heads,
    configuration, versions. Of several runs, it puts them side by side: what differs between their settings, their
    curves and the changes of their heads, what an aligned run has over its control (`teacher_control`), and what came
    out. Runs of the same settings but for the seed are shown by their mean and range.

    The page holds everything it needs, plotly.js included (about 5 MB), opens from disk and makes no network request.
    It names neither tokens nor the folders of this computer above those of the runs.

    Runs that go on, were killed, or were made without alignment or monitor are reported too; the page then says what is
    missing and how to get it.

    Args:
        run_dirs (`str`, `os.PathLike` or a sequence of them): The `output_dir` of a run, or of several.
        output (`str` or `os.PathLike`, *optional*):
            The file to write. By default `report.html` in the run's folder; of several runs, `comparison.html` beside
            the folder of the first.

    Returns:
        `Path`: The file that was written.

    Raises:
        `ImportError`: If plotly is not installed.
        `ValueError`: If a folder holds nothing of a run or is named twice, or `output` is a folder.

    Example:

    ```python
    >>> from hera_trainer.runs.report import write_report
    >>> write_report("out")
    PosixPath('out/report.html')
    >>> write_report(["runs/sft", "runs/aligned", "runs/control"])
    PosixPath('runs/comparison.html')
    ```
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('Reports need plotly. Install it with `pip install "hera-trainer[report]"`.') from error
    folders = [run_dirs] if isinstance(run_dirs, (str, os.PathLike)) else list(run_dirs)
    _check_folders(folders)
    first = Path(folders[0])
    own = first / REPORT_FILE if len(folders) == 1 else first.parent / COMPARISON_FILE
    path = own if output is None else Path(output)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder. Name the HTML file to write, such as {str(path / own.name)!r}.")
    runs = [read_run(folder) for folder in folders]
    page = render(runs[0], get_plotlyjs()) if len(runs) == 1 else render_comparison(runs, get_plotlyjs())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def render(run: RunRecord, plotly_js: str) -> str:
    """The page of a run as text.

    Args:
        run ([`~runs.record.RunRecord`]): The run.
        plotly_js (`str`): Source of plotly.js.
    """
    _hide(run)
    sections = [
        heads_section(run),
        chosen_section(run),
        curves_section(run),
        settings_section(run),
        environment_section(run),
    ]
    return _page(
        sections,
        plotly_js,
        kind="HeRA run report",
        name=public_name(run.path.resolve().name),
        controls=[(control, "control run", "")] if (control := control_of(run)) else [],
        facts=_facts(run),
        tiles=_tiles(run),
    )


def render_comparison(records: Sequence[RunRecord], plotly_js: str) -> str:
    """The page of several runs as text.

    Args:
        records (sequence of [`~runs.record.RunRecord`]): The runs.
        plotly_js (`str`): Source of plotly.js.
    """
    for record in records:
        _hide(record)
    runs = named_runs(records)
    groups = grouped(runs)
    sections = [
        differences_section(runs, groups),
        compared_curves_section(runs, groups),
        compared_heads_section(runs),
        teacher_section(runs, groups),
        results_section(runs, groups),
    ]
    facts = [_facts(record) for record in records]
    return _page(
        sections,
        plotly_js,
        kind=f"HeRA report of {len(runs)} runs",
        name=", ".join(run.name for run in runs),
        controls=_controls(runs),
        facts=[fact for fact in facts[0] if all(fact in others for others in facts)],
        tiles=[],
    )


def _hide(run: RunRecord) -> None:
    """Takes secrets and folders out of a run, again: the files may be of another hand."""
    run.record = public_settings(run.record)
    run.head_ranking = None if run.head_ranking is None else public_ranking(run.head_ranking)
    run.monitored = {
        context: {step: public_ranking(ranking) for step, ranking in steps.items()}
        for context, steps in run.monitored.items()
    }


def _check_folders(folders: Sequence[str | os.PathLike]) -> None:
    if not folders:
        raise ValueError("There is no run to report. Name the `output_dir` of one or more runs.")
    seen: set[Path] = set()
    for folder in folders:
        path = Path(folder).resolve()
        if path in seen:
            raise ValueError(f"{str(folder)!r} is named twice. Name each run once.")
        seen.add(path)


def _controls(runs: Sequence[NamedRun]) -> list[tuple[str, str, str]]:
    """Each control among runs, what those are that were it, and their names."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if run.kind == "control":
            names.setdefault(control_of(run.record), []).append(run.name)
    return [(control, f"control run{'s' * (len(of) > 1)}", ", ".join(of)) for control, of in names.items()]


def _page(sections: Sequence[Section], plotly_js: str, **content: Any) -> str:
    """The page of what it is made of."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    sections = [section for section in sections if section.plots or section.tables or section.missing]
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        **content,
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
    models = [ranking.model for ranking in rankings_of(run) if ranking.model]
    model = run.record.get("model") or (models[0] if models else "")
    facts = [("Model", model), ("Data set", run.record.get("dataset")), ("Teacher", teacher_of(run))]
    return [(name, public_name(str(value))) for name, value in facts if value]


def _tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """Name, value and detail of what is to be seen first."""
    tiles = [_status(run)]
    if run.log_history:
        step = max(entry.get("step", 0) for entry in run.log_history)
        epochs = [entry["epoch"] for entry in run.log_history if entry.get("epoch") is not None]
        details = [f"epoch {number_text(epochs[-1])}"] if epochs else []
        details += [f"weights of step {run.best_step:,}"] if run.best_step is not None else []
        tiles.append(("Steps", f"{step:,}", ", ".join(details)))
    if duration(run):
        tiles.append(("Duration", duration(run), ""))
    for name, keys in (("Language-model loss", ("lm_loss", "loss")), ("Alignment loss", ("alignment_loss",))):
        values = next((run.curve(key)[1] for key in keys if run.curve(key)[0]), [])
        if values:
            tiles.append((name, _from_to(number_text(values[0]), number_text(values[-1])), "first and last log"))
    for context in CONTEXTS:
        pair = run.before_after(context)
        if pair is None:
            continue
        before, after = (mean_of(each, run.aligned_heads) for each in pair)
        if before is not None and after is not None:
            name = f"Aligned {granularity_of(run.aligned_heads)}s, {CONTEXTS[context]}"
            detail = f"mean mutual k-NN, chance {score_text(pair[1].chance)}{other_teacher(pair[1], teacher_of(run))}"
            tiles.append((name, _from_to(score_text(before), score_text(after)), detail))
    gains = [gain.gain for step, gain in sorted(run.image_gains.items()) if run.leads_to_result(step)]
    if gains:
        text = _from_to(number_text(gains[0]), number_text(gains[-1])) if len(gains) > 1 else number_text(gains[0])
        tiles.append(("Image gain", text, "nats a token"))
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
