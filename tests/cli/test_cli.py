"""The command line and the plots."""

from __future__ import annotations

import subprocess
import sys

import jinja2
import pytest
import torch

from hera_trainer import AttentionHead, HeadRanking, __version__
from hera_trainer.cli import COMMANDS, main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], list(COMMANDS)),
        (["demo", "--help"], ["--output-dir", "--steps", "hera-demo", "hera-trainer[demo]"]),
        (["rank", "--help"], ["--teacher", "--context", "--caption-column", "examples:"]),
        (["encode", "--help"], ["--teacher", "HF_HOME", "examples:"]),
        (["merge", "--help"], ["--base-model", "--overwrite", "examples:"]),
        (["env", "--help"], ["example:"]),
    ],
)
def test_help(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words)


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"hera-trainer {__version__}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["hera: error: ", "`hera --help`"]),
        (["dance"], ["hera: error: ", "'dance'"]),
        (["demo", "--steps", "many"], ["hera demo: error: ", "'many' is no whole number", "`hera demo --help`"]),
        (["demo", "--steps", "0"], ["'0' is no whole number of at least 1"]),
        (["rank", "model"], ["hera rank: error: ", "DATASET"]),
        (["rank", "model", "data", "--k", "0"], ["--k", "at least 1"]),
        (["encode", "data", "--batch-size", "-1"], ["--batch-size", "at least 1"]),
        (["eval", "model"], ["hera eval: error: ", "--metric"]),
        (["merge", "adapter"], ["hera merge: error: ", "OUTPUT"]),
        (["plan", "model", "--gpu-memory", "-3"], ["--gpu-memory", "such as 16"]),
        (["report"], ["hera report: error: ", "RUN_DIR"]),
        (["env", "--all"], ["hera env: error: ", "--all"]),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words)


def test_errors_are_one_line(monkeypatch, capsys):
    import hera_trainer.demo.run

    def fail(*args, **kwargs):
        raise ImportError("The demo needs the package x. Install its parts with: y")

    monkeypatch.setattr(hera_trainer.demo.run, "run_demo", fail)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "hera demo: error: The demo needs the package x. Install its parts with: y\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError("several\nlines  of text"), 1, "hera env: error: several lines of text\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
            1,
            "hera env: error: The memory of the GPU is full. Use smaller batches or 4-bit weights: `hera plan` "
            "estimates what fits. (CUDA out of memory. Tried to allocate 2 GiB)\n",
        ),
        (
            jinja2.TemplateError("System role not supported"),
            1,
            "hera env: error: The chat template does not take these turns, or cannot be read. Give others, or "
            "another template. (System role not supported)\n",
        ),
        (KeyboardInterrupt(), 130, "hera env: interrupted\n"),
    ],
)
def test_exit_codes(error, code, said, monkeypatch, capsys):
    import hera_trainer.cli.env

    def fail():
        raise error

    monkeypatch.setattr(hera_trainer.cli.env, "environment", fail)
    assert main(["env"]) == code
    assert capsys.readouterr().err == said


def test_mistakes_of_the_program_keep_their_traceback(monkeypatch):
    import hera_trainer.cli.env

    def fail():
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(hera_trainer.cli.env, "environment", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["env"])


def test_help_and_light_names_do_not_import_trl():
    """The loss and the metrics serve people without TRL, and help comes at once."""
    code = (
        "import sys, hera_trainer.cli\n"
        "from hera_trainer import HeRALoss, mutual_knn\n"
        "assert 'trl' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for command in ("rank", "encode", "merge", "env"):
        code = f"import sys, hera_trainer.cli.{command} as command\ncommand._parser().format_help()\n"
        subprocess.run([sys.executable, "-c", f"{code}assert 'torch' not in sys.modules"], check=True)


@pytest.fixture
def ranking():
    scores = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    scores[2] = torch.nan  # a layer without heads
    return HeadRanking(scores, torch.rand(6), k=5, num_samples=100)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_heat_map(tmp_path, ranking, ending):
    from hera_trainer.heads.heat_map import plot_head_scores

    path = tmp_path / f"heads.{ending}"
    plot_head_scores(ranking, path, ranking.select("worst", 2), title="Scores")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") if ending == "png" else b"<svg" in content


def test_heat_map_draws_scores_and_outlines(tmp_path, ranking, monkeypatch):
    """What is drawn are the scores, on one scale for all panels, with an outline where the heads are."""
    import matplotlib.figure

    from hera_trainer.heads.heat_map import plot_head_scores

    figures = []
    original = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k))
    )
    other = HeadRanking(ranking.scores / 2, ranking.layer_scores, k=5, num_samples=100)
    plot_head_scores({"before": ranking, "after": other}, tmp_path / "x.png", [AttentionHead(3, 1)])
    axes = [axis for axis in figures[0].axes if axis.images]
    assert [axis.get_title() for axis in axes] == ["before", "after"]
    for axis, drawn in zip(axes, (ranking, other), strict=True):
        torch.testing.assert_close(
            torch.tensor(axis.images[0].get_array().filled(float("nan"))), drawn.scores, equal_nan=True
        )
        assert axis.images[0].get_clim() == axes[0].images[0].get_clim()
        (outline,) = axis.patches
        assert outline.get_xy() == (0.5, 2.5)
