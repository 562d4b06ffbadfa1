"""The page of a run, as text. What it looks like in a browser is in `test_report_browser.py`."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from itertools import permutations
from pathlib import Path

import pytest
from report_page import Page
from report_runs import ALIGNED, HEADS, LAYERS, STEPS, log_entries, ranking, record, write_json, write_run

from hera_trainer import cli
from hera_trainer.runs.record import RunRecord, read_run
from hera_trainer.runs.report import page as report_page
from hera_trainer.runs.report import write_report
from hera_trainer.runs.report.curves import _skipped, curves_section, held_out_losses, running_mean
from hera_trainer.runs.report.parts import number_text, summary_text
from hera_trainer.runs.report.settings import duration

pytest.importorskip("plotly")


def rendered(folder: Path) -> Page:
    return Page(report_page.render(read_run(folder), plotly_js=""))


def test_maps_hold_the_measurements(tmp_path):
    page = rendered(write_run(tmp_path))
    for offset, context in ((1, "text"), (2, "image")):
        before, after = ranking(offset).scores, ranking(STEPS + offset).scores
        expected = {"before": before, "after": after, "difference": after - before}
        for name, scores in expected.items():
            trace = page.figures[f"heads-{context}-{name}"]["data"][0]
            for layer, row in enumerate(scores.tolist()):
                for head, score in enumerate(row):
                    cell = trace["z"][layer][head]
                    assert cell is None if math.isnan(score) else cell == pytest.approx(score, abs=1e-6)
            places = {
                (s["x0"] + 0.5, s["y0"] + 0.5) for s in page.figures[f"heads-{context}-{name}"]["layout"]["shapes"]
            }
            assert places == {(head.head, head.layer) for head in ALIGNED}
        one, other = (page.figures[f"heads-{context}-{name}"]["data"][0] for name in ("before", "after"))
        assert (one["zmin"], one["zmax"]) == (other["zmin"], other["zmax"])


def test_tables_hold_what_the_plots_show(tmp_path):
    page = rendered(write_run(tmp_path))
    table = page.tables["Text only, after (step 60): score of each head"]
    assert table[0] == ["", *(f"Head {head}" for head in range(HEADS))]
    scores = ranking(STEPS + 1).scores.tolist()
    assert table[1:] == [
        [f"Layer {layer}", *("-" if math.isnan(score) else f"{score:.4f}" for score in scores[layer])]
        for layer in range(LAYERS)
    ]
    loss = page.tables["Language-model loss"]
    assert loss[0] == ["Step", "training", "evaluation"]
    assert loss[1] == ["1", "2.483", "-"] and loss[-1] == ["60", "1.5", "1.625"] and len(loss) == STEPS + 1
    assert page.tables["Image gain"] == [["Step", "gain"], ["0", "0.25"], ["30", "0.5"], ["60", "0.75"]]
    assert "Image gain 0.25 \N{RIGHTWARDS ARROW} 0.75 nats a token" in page.text
    skipped = page.tables["Without alignment loss, running total"]
    assert [row[1] for row in skipped[1:]] == [str((s >= 20) + (s >= 40)) for s in range(1, STEPS + 1)]
    assert "60 samples were left out of the alignment loss" in page.text


def test_aligned_heads_before_and_after(tmp_path):
    page = rendered(write_run(tmp_path))
    table = page.tables["The 2 aligned heads and their mutual k-NN with the teacher"]
    rankings = [ranking(0), *(ranking(seed) for seed in (1, STEPS + 1, 2, STEPS + 2))]

    def row(name, scores):
        chosen, a, b, c, d = scores
        return [name, *(f"{s:.4f}" for s in (chosen, a, b)), f"{b - a:+.4f}", f"{c:.4f}", f"{d:.4f}", f"{d - c:+.4f}"]

    for line, head in zip(table[1:], ALIGNED, strict=False):
        assert line == row(str(head), [r.scores[head].item() for r in rankings])
    assert table[3] == row(
        "Mean of the aligned heads", [sum(r.scores[h].item() for h in ALIGNED) / 2 for r in rankings]
    )
    top = sorted(ranking(0).heads(), key=ranking(0).score)[-2:]
    name = "Mean of the 2 heads that were most aligned"
    assert table[4] == row(name, [sum(map(r.score, top)) / 2 for r in rankings])
    assert table[5] == row("Mean of all heads", [r.scores.nanmean().item() for r in rankings])
    assert table[6] == ["Chance, k / (N - 1)", "0.0500", "0.0500", "0.0500", "", "0.0500", "0.0500", ""]
    assert table[7] == ["95th percentile of chance", "0.0600", "0.0601", "0.0661", "", "0.0602", "0.0662", ""]
    assert len(table) == 8 and "against a column of the other kind" not in page.text


def test_scores_stand_beside_what_unrelated_spaces_reach(tmp_path):
    page = rendered(write_run(tmp_path))
    assert "k = 5, N = 101). To hold it against: unrelated spaces 0.0500 (95th percentile 0.0601). Aligned" in page.text
    assert page.text.count("k = 5, N = 101; unrelated spaces 0.0500") == 2  # below the curve of each context
    table = page.tables["Mutual k-NN, text only"]
    assert table[0][-1] == "95th percentile of chance"
    assert [row[-1] for row in table[1:]] == ["0.0601", "0.0631", "0.0661"]
    assert page.text.count("mean mutual k-NN, chance 0.0500") == 2


def test_ranking_on_more_samples_with_a_ceiling(tmp_path):
    write_run(tmp_path)
    other = ranking(0, num_samples=501, ceiling=0.4, ceiling_model="/home/ann/encoders/second")
    other.save(tmp_path / "head_ranking.json")
    page = rendered(tmp_path)
    table = page.tables["The 2 aligned heads and their mutual k-NN with the teacher"]
    assert table[6][1:3] == ["0.0100", "0.0500"]
    assert table[8] == ["Ceiling, second", "0.4000", "-", "-", "", "-", "-", ""]
    assert "measured with k = 5, N = 501 and with k = 5, N = 101. Hold each against its own chance" in page.text


def test_measured_otherwise_after_a_while(tmp_path):
    write_run(tmp_path)
    for context in ("text", "image"):
        ranking(9, context, num_samples=51).save(tmp_path / "alignment_monitor" / f"step-{STEPS:08d}-{context}.json")
    page = rendered(tmp_path)
    assert not any("difference" in name for name in page.figures)
    assert "cannot be compared, since they were measured otherwise: k = 5, N = 101 at first, k = 5, N = 51" in page.text
    assert page.text.count("Measured with k = 5, N = 101 and with k = 5, N = 51, which cannot be compared.") == 2
    assert "mean mutual k-NN" not in page.text
    table = page.tables["The 2 aligned heads and their mutual k-NN with the teacher"]
    assert table[0] == ["Head", "Score in the ranking"]


def test_a_monitor_with_a_teacher_of_its_own(tmp_path):
    """What it measured is not said to be of the teacher that the run was trained with."""
    write_run(tmp_path, teacher="org/teacher")
    assert "teacher org/" not in rendered(tmp_path).text
    for path in (tmp_path / "alignment_monitor").glob("step-*-text.json"):
        write_json(path, {**json.loads(path.read_text()), "teacher": "/home/ann/encoders/other"})
    text = rendered(tmp_path).text
    assert "over N samples (k = 5, N = 101, teacher other). To hold" in text
    assert "measured with k = 5, N = 101 and with k = 5, N = 101, teacher other. Hold each against its own" in text
    assert text.count("k = 5, N = 101, teacher other; unrelated spaces") == 1  # below the curve of the context
    assert text.count("mean mutual k-NN, chance 0.0500, teacher other") == 1
    (tmp_path / "head_ranking.json").unlink()
    shutil.copytree(tmp_path, tmp_path / "alone")
    for path in (tmp_path / "alone" / "alignment_monitor").glob("step-*-image.json"):
        path.unlink()
    assert "The columns were measured with k = 5, N = 101, teacher other. " in rendered(tmp_path / "alone").text


def test_a_monitor_with_another_teacher_after_a_while(tmp_path):
    write_run(tmp_path, teacher="org/teacher")
    for context in ("text", "image"):
        last = tmp_path / "alignment_monitor" / f"step-{STEPS:08d}-{context}.json"
        ranking(9, context, teacher="org/other").save(last)
    text = rendered(tmp_path).text
    assert "measured otherwise: k = 5, N = 101 at first, k = 5, N = 101, teacher org/other at last." in text
    said = "Measured with k = 5, N = 101 and with k = 5, N = 101, teacher org/other, which cannot be compared."
    assert text.count(said) == 2


def test_best_weights(tmp_path):
    """What was measured after the step of the weights that were loaded in the end is in the curves only."""
    settings = {**record()["config"], "load_best_model_at_end": True}
    write_run(tmp_path, config=settings)
    state = {"global_step": STEPS, "log_history": log_entries(), "best_model_checkpoint": "checkpoint-30"}
    write_json(tmp_path / "trainer_state.json", state)
    page = rendered(tmp_path)
    before, after = ranking(1), ranking(30 + 1)
    table = page.tables["Text only, after (step 30): score of each head"]
    assert table[1][1] == f"{after.scores[0, 0]:.4f}"
    rows = page.tables["The 2 aligned heads and their mutual k-NN with the teacher"]
    a, b = (each.scores[ALIGNED[0]].item() for each in (before, after))
    assert rows[1][2:5] == [f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}"]
    assert "loading the weights of step 30, the best in evaluation" in page.text
    assert "Steps 60 epoch 1, weights of step 30" in page.text
    assert "Image gain 0.25 \N{RIGHTWARDS ARROW} 0.5 nats a token" in page.text
    assert [row[0] for row in page.tables["Image gain"][1:]] == ["0", "30", "60"]
    # Still going on, its weights are the last ones.
    write_run(tmp_path, config=settings, finished=None)
    write_json(tmp_path / "trainer_state.json", state)
    assert "Text only, after (step 60): score of each head" in rendered(tmp_path).tables
    write_run(tmp_path, config=settings)
    write_json(tmp_path / "trainer_state.json", {**state, "best_model_checkpoint": "checkpoint-20"})
    page = rendered(tmp_path)
    assert "Up to step 20, the weights of which were loaded in the end, nothing was measured but once." in page.text
    assert not any("difference" in name for name in page.figures)


def test_aligned_layers(tmp_path):
    """Their own scores in the table, and their whole rows outlined in the maps."""
    page = rendered(write_run(tmp_path, aligned_heads=["L3", "L0"]))
    table = page.tables["The 2 aligned layers and their mutual k-NN with the teacher"]
    scores = ranking(0).layer_scores
    assert [row[:2] for row in table[1:3]] == [["L3", f"{scores[3]:.4f}"], ["L0", f"{scores[0]:.4f}"]]
    assert ["Mean of all layers", f"{scores.nanmean():.4f}"] in [row[:2] for row in table]
    shapes = page.figures["heads-text-before"]["layout"]["shapes"]
    assert {(s["x0"], s["x1"], s["y0"], s["y1"]) for s in shapes} == {(-0.5, 3.5, 2.5, 3.5), (-0.5, 3.5, -0.5, 0.5)}


def test_settings_that_were_changed_come_first(tmp_path):
    page = rendered(write_run(tmp_path))
    assert page.tables["Settings that differ from the defaults"][1:] == [
        ["num_neighbors", "5", "10"],
        ["max_steps", str(STEPS), "-1"],
    ]
    everything = page.tables["All 5 settings"][1:]
    assert ["alignment_weight", "0.01"] in everything
    assert page.tables["Versions"][1:] == [["trl", "1.16.0"]]
    assert ["duration", "1 h 14 min"] in page.tables["Time"]


def test_the_time_that_a_run_lay_dead_does_not_count(tmp_path):
    days = {"started": "2026-01-01T08:00:00+00:00", "finished": "2026-01-05T09:00:00+00:00"}
    for seconds, shown in ((5400.4, "1 h 30 min"), (None, "")):
        write_json(tmp_path / "hera_run.json", record(**days, seconds=seconds, resumed_from="checkpoint-2"))
        assert duration(read_run(tmp_path)) == shown


def test_steps_whose_loss_was_not_finite_had_samples_enough(tmp_path):
    log = [{"step": step, "alignment_skipped": 1.0, "alignment_not_finite": float(step > 1)} for step in (1, 2, 3)]
    too_few, not_finite = _skipped(RunRecord(tmp_path, {}, log))
    assert (list(too_few.values), list(not_finite.values)) == ([1.0, 1.0, 1.0], [0.0, 1.0, 2.0])


@pytest.mark.parametrize(("similarity", "own"), [("centered_cosine", 0.3), ("cosine", 0.07)])
def test_the_temperature_that_a_similarity_comes_with_is_no_change(tmp_path, similarity, own):
    """The configuration has a number in the place of the default, which is `None`."""
    for temperature in (own, 0.2):
        config = {**record()["config"], "similarity": similarity, "temperature": temperature}
        page = rendered(write_run(tmp_path, config=config))
        changed = [row[0] for row in page.tables["Settings that differ from the defaults"][1:]]
        assert ("temperature" in changed) == (temperature == 0.2)
        assert ("similarity" in changed) == (similarity == "cosine")


def test_values_are_escaped_and_private_ones_hidden(tmp_path):
    attack, token = "</script><script>alert(1)</script>", "hf_" + "a" * 30
    log = [*log_entries(), {"step": STEPS, f"eval_{attack}_loss": 1.0}]
    settings = {**record()["config"], "run_note": attack, "hub_token": token, "head_ranking_path": "/home/ann/r.json"}
    write_run(tmp_path, model="/home/ann/models/mine", dataset=attack, config=settings, versions={"trl": attack})
    write_json(tmp_path / "trainer_state.json", {"global_step": STEPS, "log_history": log})
    text = report_page.render(read_run(tmp_path), plotly_js="")
    assert attack not in text and "<script>alert" not in text
    assert token not in text and "/home" not in text and str(tmp_path) not in text
    page = Page(text)
    assert ["trl", attack] in page.tables["Versions"] and "mine" in page.text
    assert ["head_ranking_path", "r.json", "None"] in page.tables["Settings that differ from the defaults"]
    names = [trace["name"] for trace in page.figures["loss"]["data"]]
    assert not any("<" in name for name in names)  # plotly reads tags in names


def test_everything_is_in_the_one_file(tmp_path, capsys):
    write_run(tmp_path / "run")
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "report.html"
    assert capsys.readouterr().out.startswith(str(path))
    from plotly.offline import get_plotlyjs

    text = path.read_text(encoding="utf-8")
    assert get_plotlyjs() in text
    page = Page(report_page.render(read_run(tmp_path / "run"), plotly_js=""))
    assert not page.tagged("link") and not page.tagged("img") and not page.tagged("iframe")
    assert all("src" not in attributes for _, attributes in page.elements)
    assert "https:" not in text.replace(get_plotlyjs(), "") and "http:" not in text.replace(get_plotlyjs(), "")
    assert "default-src 'none'" in page.tagged("meta")[4]["content"]


def test_what_reads_the_page_aloud_finds_its_way(tmp_path):
    page = rendered(write_run(tmp_path))
    assert page.tagged("html")[0]["lang"] == "en"
    assert [len(page.tagged(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1, 1, 1, 1, 1]
    ids = {attributes["id"] for _, attributes in page.elements if attributes.get("id")}
    for link in page.tagged("a"):
        assert link["href"].removeprefix("#") in ids
    plots = [attributes for attributes in page.tagged("div") if attributes.get("class") == "plot"]
    assert len(plots) == len(page.figures) == 14
    assert all(plot["role"] == "img" and len(plot["aria-label"]) > 40 for plot in plots)
    label = next(plot["aria-label"] for plot in plots if plot["id"] == "plot-heads-text-before")
    scores = ranking(1)
    low, high = scores.select("worst", 1)[0], scores.select("top", 1)[0]
    assert f"Lowest {low} {scores.score(low):.4f}, highest {high} {scores.score(high):.4f}" in label
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.tagged("th"))
    assert len(page.tagged("caption")) == len(page.tagged("table"))


def test_run_without_monitor(tmp_path):
    page = rendered(write_run(tmp_path, monitor=False))
    assert "heads-text" in page.figures and not any("difference" in name for name in page.figures)
    assert "no map after it" in page.text and "monitor_steps=50" in page.text
    assert page.tables["The 2 aligned heads and their mutual k-NN with the teacher"][0] == [
        "Head",
        "Score in the ranking",
    ]


def test_run_that_goes_on_or_was_killed(tmp_path):
    write_run(tmp_path, finished=None)
    for path in (tmp_path / "alignment_monitor").glob("step-000000[36]*"):
        path.unlink()
    (tmp_path / "trainer_state.json").unlink()
    write_json(
        tmp_path / "checkpoint-20" / "trainer_state.json", {"global_step": 20, "log_history": log_entries(20)[:-1]}
    )
    page = rendered(tmp_path)
    assert "no end recorded" in page.text and "1 h 14 min" not in page.text
    assert "measured only once" in page.text
    assert len(page.tables["Alignment loss"]) == 21


def test_run_that_has_only_begun(tmp_path):
    write_json(tmp_path / "hera_run.json", record(finished=None))
    page = rendered(tmp_path)
    assert page.figures == {} and "Nothing was logged yet" in page.text


def test_plain_run(tmp_path):
    log = [{"step": step, "loss": 2.0 - step / 10} for step in (1, 2, 3)]
    write_json(tmp_path / "checkpoint-3" / "trainer_state.json", {"global_step": 3, "log_history": log})
    page = rendered(tmp_path)
    assert list(page.figures) == ["loss"] and len(page.tables["Language-model loss"]) == 4
    for missing in ("no ranking", "no alignment loss", "configuration was not recorded", "Versions and hardware"):
        assert missing in page.text
    # Of HeRATrainer, too, a run may leave no record.
    assert page.text.count("unless alignment is off (alignment_weight=0) and there is no monitor") == 2


def test_run_with_alignment_off(tmp_path):
    write_json(tmp_path / "hera_run.json", record(aligned_heads=[], config={"alignment_weight": 0}))
    write_json(tmp_path / "trainer_state.json", {"global_step": 1, "log_history": [{"step": 1, "loss": 2.0}]})
    page = rendered(tmp_path)
    assert "Alignment was off in this run (alignment_weight=0)" in page.text
    assert "alignment was off" in page.text and "Aligned heads" not in page.text


def test_long_runs_are_thinned(tmp_path):
    log = [{"step": step, "lm_loss": float(step)} for step in range(1, 9001)]
    write_json(tmp_path / "trainer_state.json", {"global_step": 9000, "log_history": log})
    page = rendered(tmp_path)
    raw, mean = page.figures["loss"]["data"]
    assert len(raw["x"]) == len(mean["x"]) == 2000 and (raw["x"][0], raw["x"][-1]) == (1, 9000)
    assert raw["y"] == raw["x"]
    assert mean["y"][-1] == sum(range(8641, 9001)) / 360  # the mean of the last 9000 / 25 logs
    assert "2,000 of 9,000 logged points are drawn" in page.text
    rows = page.tables["Language-model loss, 60 of 9,000 logged steps"][1:]
    assert len(rows) == 60 and rows[-1] == ["9,000", "9,000"]


def test_running_means_are_those_of_each_window():
    numbers = random.Random(0)
    values = [numbers.gauss(5, 2) for _ in range(1003)]
    values[100], values[700] = 1e15, -math.inf  # what is huge counts while it is in the window, and no longer
    values[300:340] = [math.nan] * 40
    for window in (1, 5, 40, 41, 1003, 5000):
        lasts = ([v for v in values[max(0, i + 1 - window) : i + 1] if math.isfinite(v)] for i in range(len(values)))
        expected = [math.fsum(last) / len(last) if last else math.nan for last in lasts]
        assert running_mean(values, window) == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert running_mean([], 5) == [] and running_mean([2, 4], 5) == [2, 3]


def losses_of(*names: str) -> RunRecord:
    """A run that has logged both losses of each evaluation set; the name of the only one is empty."""
    prefixes = [f"eval_{name}".rstrip("_") for name in names]
    entries = [{"step": 10, f"{each}_loss": 1.5, f"{each}_alignment_loss": 2.5} for each in prefixes]
    return RunRecord(Path("run"), {}, [{"step": 10, "lm_loss": 1.0, "alignment_loss": 3.0}, *entries])


@pytest.mark.parametrize("names", [("",), ("alignment",), ("alignment", "qa"), ("easy", "of_alignment"), ("a", "b")])
def test_losses_of_evaluation_sets_of_any_name(names):
    run = losses_of(*names)
    assert held_out_losses(run) == [f"eval_{name}".rstrip("_") + "_loss" for name in names]
    plots = {plot.name: plot.figure["data"] for plot in curves_section(run).plots[""]}
    for plot, first, other in (("loss", 1.0, 1.5), ("alignment-loss", 3.0, 2.5)):
        lines = {line["name"]: list(line["y"]) for line in plots[plot]}
        shown = {f"evaluation, {name}" if name else "evaluation": [other] for name in names}
        assert lines == {"training": [first], **shown}


def test_without_alignment_an_evaluation_set_may_have_its_name():
    run = RunRecord(Path("run"), {}, [{"step": 10, "loss": 1.0, "eval_alignment_loss": 1.5, "eval_qa_loss": 1.7}])
    assert held_out_losses(run) == ["eval_alignment_loss", "eval_qa_loss"]
    assert [plot.name for plot in curves_section(run).plots[""]] == ["loss"]


def test_lines_of_a_plot_have_colours_of_their_own():
    run = losses_of("easy", "hard", "ood")
    run.log_history.append({"step": 10, "alignment_loss/near": 1.0, "alignment_loss/far": 2.0})
    for plot in curves_section(run).plots[""]:
        colors = [line["meta"] for line in plot.figure["data"]]
        assert len(colors) == (4 if plot.name == "loss" else 6) and len(set(colors)) == len(colors)


def test_a_run_that_diverged_leaves_no_mean_and_the_range_of_the_others():
    for values in permutations([1, math.nan, 2]):
        assert summary_text(values, number_text) == "nan\n(1 to 2, 1 of 3 not finite)"
    for values in permutations([1, math.inf, 2, None]):
        assert summary_text(values, number_text) == "nan\n(1 to 2, 1 of 3 not finite, n = 3)"
    assert summary_text([math.nan, 1], number_text) == "nan\n(1 of 2 not finite)"
    assert summary_text([1, 3], number_text) == "2\n(1 to 3)"


@pytest.mark.parametrize("make", [None, lambda folder: folder.mkdir()])
def test_folder_without_a_run_is_an_error_of_one_line(tmp_path, capsys, make):
    folder = tmp_path / "nothing"
    if make is not None:
        make(folder)
    assert cli.main(["report", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hera report: error: ") and error.count("\n") == 1 and "output_dir" in error
    assert not list(tmp_path.rglob("*.html"))


def test_output_that_is_a_folder_is_refused(tmp_path):
    write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="is a folder"):
        write_report(tmp_path / "run", tmp_path)
    path = write_report(tmp_path / "run", tmp_path / "new" / "page.html")
    assert path == tmp_path / "new" / "page.html" and path.is_file()
    shutil.rmtree(path.parent)


def test_missing_plotly_names_the_cure(tmp_path, monkeypatch, capsys):
    write_run(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    assert cli.main(["report", str(tmp_path)]) == 1
    assert 'pip install "hera-trainer[report]"' in capsys.readouterr().err


def test_colours_have_contrast():
    style = (Path(report_page.__file__).parent / "style.css").read_text()
    light, dark = (dict(re.findall(r"(--[\w-]+): (#\w{6});", block)) for block in style.split("@media screen", 1))

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert set(dark) == set(light)
    for colors in (light, dark):
        for text in ("--text", "--quiet", "--link"):  # WCAG 2: 4.5 for text, 3 for what carries meaning in a plot
            assert min(contrast(colors[text], colors[ground]) for ground in ("--page", "--surface")) >= 4.5
        assert contrast(colors["--text"], colors["--note"]) >= 4.5
        for line in ("--aligned", "--focus", *(f"--series-{i}" for i in range(1, 7))):
            assert contrast(colors[line], colors["--surface"]) >= 3


def test_pull_spread_weight_and_terms_of_the_loss():
    log = [
        {
            "step": step,
            "alignment_loss": 2.0,
            "alignment_loss/near": 0.5,
            "alignment_loss/far": 1.5,
            "alignment_pull": step / 10,
            "alignment_weight": 0.01 * step,
            "alignment_spread": step / 100,
            "alignment_pool": 16.0,
        }
        for step in (1, 2, 3)
    ]
    run = RunRecord(Path("run"), {"config": {"num_neighbors": 5, "alignment_objective": "cka"}}, log)
    plots = {plot.name: plot for plot in curves_section(run).plots[""]}
    lines = {name: {line["name"]: list(line["y"]) for line in plot.figure["data"]} for name, plot in plots.items()}
    assert lines["pull"] == {"pull": [0.1, 0.2, 0.3], "weight": [0.01, 0.02, 0.03]}
    assert lines["spread"] == {"spread": [0.01, 0.02, 0.03]}
    assert lines["alignment-loss"] == {"training": [2.0] * 3, "near": [0.5] * 3, "far": [1.5] * 3}
    assert "ln" not in plots["alignment-loss"].note  # the least value of the contrastive loss is not that of another
