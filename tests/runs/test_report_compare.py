"""The page of several runs: what it shows is what their records hold."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from compared_runs import logged, scores, write, write_all
from report_page import Page
from report_runs import ALIGNED, STEPS, record, write_json, write_run

from hera_trainer import cli
from hera_trainer.runs.record import read_run
from hera_trainer.runs.report import page as report_page
from hera_trainer.runs.report import write_report
from hera_trainer.runs.report.groups import controls, differing, grouped, named_runs, training_differences

pytest.importorskip("plotly")


def rendered(folders: list[Path]) -> Page:
    return Page(report_page.render_comparison([read_run(folder) for folder in folders], plotly_js=""))


def named(folders: list[Path]) -> list[Any]:
    return named_runs([read_run(folder) for folder in folders])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(folders):
    return rendered(folders)


SFT, ALIGNED_RUNS = "SFT (sft)", "aligned (aligned-0 \N{HORIZONTAL ELLIPSIS} aligned-2, 3 runs)"
CONTROLS = "control (control-0, control-1)"
ENDS = ("", ", least", ", greatest")


def test_runs_of_the_same_settings_but_for_the_seed_are_one_group(folders):
    groups = grouped(named(folders))
    assert [group.name for group in groups] == [SFT, ALIGNED_RUNS, CONTROLS]
    assert [[run.name for run in group.runs] for group in groups] == [
        ["sft"],
        ["aligned-0", "aligned-1", "aligned-2"],
        ["control-0", "control-1"],
    ]
    assert len({group.color for group in groups}) == len({group.dash for group in groups}) == 3


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"seed": 7, "data_seed": 3}, True),
        ({"output_dir": "x", "logging_steps": 3, "hub_model_id": "a/b", "save_steps": 2, "report_to": ["wandb"]}, True),
        ({"similarity": "cosine"}, False),
        ({"alignment_weight": 0.1}, False),
        ({"learning_rate": 1e-3}, False),
        ({"teacher_control": "permuted"}, False),
        ({"seed": 0}, False),  # what tells two runs of one seed apart is not recorded
        ({"load_best_model_at_end": True, "save_steps": 2}, False),
    ],
)
def test_what_makes_another_group(tmp_path, changes, same):
    best = {name: value for name, value in changes.items() if name == "load_best_model_at_end"}
    runs = named([write(tmp_path / "a", 0, **best), write(tmp_path / "b", 1, **{"seed": 1, **changes})])
    assert len(grouped(runs)) == (1 if same else 2)


@pytest.mark.parametrize("same", [True, False])
def test_the_ranking_of_another_run_makes_no_group_of_its_own(tmp_path, same):
    """The first seed has ranked its heads, and the others take them."""
    first = write(tmp_path / "a", 0)
    others = [write(tmp_path / str(seed), seed, seed=seed, head_ranking_path="heads.json") for seed in (1, 2)]
    if not same:
        content = json.loads((first / "hera_run.json").read_text())
        write_json(first / "hera_run.json", {**content, "aligned_heads": ["L0H0"]})
    runs = [[run.name for run in group.runs] for group in grouped(named([first, *others]))]
    assert runs == ([["a", "1", "2"]] if same else [["a"], ["1", "2"]])


def test_other_models_data_and_adapters_are_other_groups(tmp_path):
    changes = [{}, {"model": "x"}, {"dataset": "x"}, {"adapter": {"r": 8}}, {"rows": 9}, {"hardware": {"processes": 2}}]
    for seed, change in enumerate(changes):
        write_run(tmp_path / str(seed), **change, config={**record()["config"], "seed": seed})
    assert len(grouped(named([tmp_path / str(seed) for seed in range(len(changes))]))) == len(changes)


def test_a_run_without_alignment_is_no_control(tmp_path):
    (run,) = named([write(tmp_path / "a", 0, alignment_weight=0, teacher_control="permuted")])
    assert run.title == "SFT (a)"


def test_controls_align_the_same_heads(tmp_path, folders):
    control = write(tmp_path / "control", 5, teacher_control="permuted", head_ranking_path="heads.json")
    assert [(run.name, other.name) for run, other in controls(named([folders[1], control]))] == [
        ("aligned-0", "control")
    ]
    content = json.loads((control / "hera_run.json").read_text())
    write_json(control / "hera_run.json", {**content, "aligned_heads": ["L0H0"]})
    assert not controls(named([folders[1], control]))
    assert "It differs from aligned-0 in aligned heads." in rendered([folders[1], control]).text


def test_runs_without_settings_stay_by_themselves(tmp_path):
    for name in "ab":
        write_json(tmp_path / name / "trainer_state.json", {"global_step": 1, "log_history": [{"step": 1, "loss": 2}]})
    folders = [tmp_path / name for name in "ab"]
    assert [group.name for group in grouped(named(folders))] == ["run (a)", "run (b)"]
    page = rendered(folders)
    assert "The settings of a, b were not recorded" in page.text
    assert "unless alignment is off (alignment_weight=0) and there is no monitor; SFTTrainer does not." in page.text
    assert page.tables["Last logged"][1:] == [["run (a)", "1", "1", "2", "-"], ["run (b)", "1", "1", "2", "-"]]


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [write(tmp_path / part / "out", i) for i, part in enumerate(("sft", "aligned"))]
    assert [run.name for run in named(folders)] == ["sft/out", "aligned/out"]


def test_controls_belong_to_the_run_of_their_seed(folders):
    pairs = [(run.name, control.name) for run, control in controls(named(folders))]
    assert pairs == [("aligned-0", "control-0"), ("aligned-1", "control-1")]


def test_only_what_differs_is_in_the_table(page, folders):
    table = page.tables["Settings that are not the same in all runs"]
    assert table == [
        ["Setting", SFT, ALIGNED_RUNS, CONTROLS],
        ["runs", "sft", "aligned-0, aligned-1, aligned-2", "control-0, control-1"],
        ["teacher", "None", "org/teacher", "org/teacher"],
        ["alignment_weight", "0", "0.01", "0.01"],
        ["teacher_control", "none", "none", "permuted"],
        ["seed", "0", "0, 1, 2", "0, 1"],
    ]
    assert training_differences(named(folders)) == ["teacher", "alignment_weight", "teacher_control", "seed"]
    assert differing(named(folders))["seed"] == [0, 0, 1, 2, 0, 1]


def test_title_names_the_runs_and_the_first_line_the_controls(page, folders):
    names = "sft, aligned-0, aligned-1, aligned-2, control-0, control-1"
    assert f"{names} - HeRA report of 6 runs" in page.text
    first = "HeRA report of 6 runs: control runs control-0, control-1 , trained with other images' teacher vectors"
    assert page.text.index(first) < page.text.index("Settings that are not the same")
    assert (
        "Model org/model Data set org/data" in page.text
        and "trained with other images" not in rendered(folders[:2]).text
    )


def test_every_legend_marks_controls_and_sft(page):
    curves = {name: figure for name, figure in page.figures.items() if figure["data"][0]["type"] == "scatter"}
    assert len(curves) == 11
    for name, figure in curves.items():
        shown = [trace for trace in figure["data"] if trace.get("showlegend") is not False]
        names = [trace["name"] for trace in shown]
        with_sft = name in ("loss", "held-out-0") or name.startswith("mknn")
        assert names == ([SFT] if with_sft else []) + [ALIGNED_RUNS, CONTROLS]
        assert figure["layout"]["showlegend"] is True
        assert [trace["line"]["dash"] for trace in shown][-2:] == ["solid", "dash"]
        assert len({trace["meta"] for trace in shown}) == len(shown)


def test_curves_hold_mean_and_range_over_seeds(page):
    for name, value in (("loss", lambda shift: 2.5 - 0.5 + shift / 16), ("pull", lambda shift: 0.1 + shift / 50)):
        least, greatest, mean = (trace for trace in page.figures[name]["data"] if trace["name"] == ALIGNED_RUNS)
        values = [value(shift) for shift in (1, 2, 3)]
        i = mean["x"].index(30)
        assert least["y"][i] == pytest.approx(min(values)) and greatest["y"][i] == pytest.approx(max(values))
        assert mean["y"][i] == pytest.approx(statistics.mean(values)) and greatest["fill"] == "tonexty"
    table = page.tables["Language-model loss"]
    assert table[0] == [
        "Step",
        SFT,
        *(f"{g}{e}" for g in (ALIGNED_RUNS, CONTROLS) for e in ("", ", least", ", greatest")),
    ]
    means = [f"{2.0 + shift / 16:.4g}" for shift in (0, 2, 1, 3, 5.5, 5, 6)]
    assert ["30", *means] == next(row for row in table if row[0] == "30")


def test_means_are_of_the_steps_that_all_seeds_logged(tmp_path, folders):
    short = write(tmp_path / "short", 8, seed=9)
    log = [entry for entry in logged(8, 0.01) if entry["step"] <= 30]
    write_json(short / "trainer_state.json", {"global_step": 30, "log_history": log})
    figure = rendered([folders[1], short]).figures["loss"]
    assert all(trace["x"] == [10, 20, 30] for trace in figure["data"])


def test_seeds_that_cannot_be_drawn_together_are_said(tmp_path, folders):
    odd = write(tmp_path / "odd", 8, seed=9)
    log = [{**entry, "step": entry["step"] + 5} for entry in logged(8, 0.01) if "alignment_pull" not in entry]
    write_json(odd / "trainer_state.json", {"global_step": 65, "log_history": log})
    page = rendered([folders[1], odd])
    assert "aligned (aligned-0, odd) is not drawn: its runs logged this at different steps." in page.text
    assert "Of aligned (aligned-0, odd), 1 logged this." in page.text
    assert page.figures["mknn-text-all"]["data"] == [] and page.figures["pull"]["data"][-1]["x"][-1] == STEPS


def test_heads_that_sft_measures_are_outlined(tmp_path):
    sft = write(tmp_path / "sft", 0, alignment_weight=0, aligned_heads=["L2H3"])
    path = sft / "hera_run.json"
    write_json(path, {**json.loads(path.read_text()), "aligned_heads": []})
    shapes = rendered([sft, write(tmp_path / "aligned", 1)]).figures["change-text-0"]["layout"]["shapes"]
    assert {(shape["x0"] + 0.5, shape["y0"] + 0.5) for shape in shapes} == {(3, 2)}


def test_a_seed_without_a_finite_loss_leaves_no_mean(tmp_path, folders):
    broken = write(tmp_path / "broken", 8, seed=9)
    log = [{**e, "lm_loss": math.nan} if e["step"] == 30 and "lm_loss" in e else e for e in logged(8, 0.01)]
    write_json(broken / "trainer_state.json", {"global_step": STEPS, "log_history": log})
    for trace in rendered([folders[1], broken]).figures["loss"]["data"]:
        assert [x for x, y in zip(trace["x"], trace["y"], strict=True) if y is None] == [30]


def test_maps_hold_the_change_of_each_run_on_one_scale(page):
    shifts = {0: "SFT (sft)", 1: "aligned (aligned-0)", 5: "control (control-0)", 6: "control (control-1)"}
    for offset, context in ((1, "text"), (2, "image")):
        traces = [page.figures[f"change-{context}-{i}"]["data"][0] for i in range(6)]
        for i, shift in enumerate((0, 1, 2, 3, 5, 6)):
            change = scores(shift, STEPS, offset).scores - scores(shift, 0, offset).scores
            for layer, row in enumerate(change.tolist()):
                for head, value in enumerate(row):
                    cell = traces[i]["z"][layer][head]
                    assert cell is None if math.isnan(value) else cell == pytest.approx(value, abs=1e-6)
            shapes = page.figures[f"change-{context}-{i}"]["layout"]["shapes"]
            assert {(s["x0"] + 0.5, s["y0"] + 0.5) for s in shapes} == {(head.head, head.layer) for head in ALIGNED}
        widest = max(abs(cell) for trace in traces for row in trace["z"] for cell in row if cell is not None)
        assert {trace["zmax"] for trace in traces} == {-trace["zmin"] for trace in traces}
        assert traces[0]["zmax"] == pytest.approx(widest, abs=1e-6)
    assert all(title in page.text for title in shifts.values())


def test_what_the_teacher_adds(page):
    for offset, context in ((1, "text"), (2, "image")):
        for i, (run, control) in enumerate(((1, 5), (2, 6))):
            difference = scores(run, STEPS, offset).scores - scores(control, STEPS, offset).scores
            z = page.figures[f"teacher-{context}-{i}"]["data"][0]["z"]
            assert z[3][2] == pytest.approx(difference[3, 2].item(), abs=1e-6) and z[1][0] is None
        assert f"teacher-{context}-2" not in page.figures
    table = page.tables["Text only: last mutual k-NN of runs and their controls"]
    last = {shift: [0.05 + i / 50 + shift / 100 + 0.03 for i in range(3)] for shift in (1, 2, 5, 6)}

    def row(name, run, control):
        pairs = zip(last[run], last[control], strict=True)
        return [name, *(cell for a, b in pairs for cell in (f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}"))]

    assert table[1] == row("aligned-0 and control (control-0)", 1, 5)
    assert table[2] == row("aligned-1 and control (control-1)", 2, 6)
    assert table[3] == ["Mean of aligned (aligned-0, aligned-1)", *(["", "", "-0.0400"] * 3)]
    assert len(table) == 4


def test_a_control_without_its_run_is_said(tmp_path, folders):
    odd = write(tmp_path / "odd", 7, teacher_control="permuted", learning_rate=1e-3, seed=1)
    saved = [write(tmp_path / f"{i}", 1, load_best_model_at_end=True, save_steps=i) for i in range(2)]
    other = write(tmp_path / "saved", 1, load_best_model_at_end=True, save_steps=2, teacher_control="permuted")
    assert "It differs from 0 in save_steps." in rendered([*saved[:1], other]).text
    page = rendered([folders[1], folders[2], odd])
    assert "None of the aligned runs has the settings and the seed of control (odd)." in page.text
    assert "It differs from aligned-1 in learning_rate." in page.text
    assert not any(name.startswith("teacher") for name in page.figures)
    assert "control (odd)" in rendered([folders[0], odd]).text


def test_closing_table(page):
    table = page.tables["Text only: first and last mutual k-NN"]
    parts = [f"{title} heads: {when}" for title in ("Aligned", "Top", "All") for when in ("first", "last")]
    assert table[0] == ["Run", "n", *parts]

    def cells(shifts):
        found = []
        for i in range(3):
            for step in (0, STEPS):
                values = [0.05 + i / 50 + shift / 100 + step / 2000 for shift in shifts]
                mean, low, high = (f"{f(values):.4f}" for f in (statistics.mean, min, max))
                found.append(mean if len(values) == 1 else f"{mean}\n({low} to {high})")
        return found

    assert table[1:4] == [
        [SFT, "1", *cells([0])],
        [ALIGNED_RUNS, "3", *cells([1, 2, 3])],
        [CONTROLS, "2", *cells([5, 6])],
    ]
    high = []
    for step in (0, STEPS):
        values = [scores(shift, step, 1).null_p95 for shift in (0, 1, 2, 3, 5, 6)]
        high.append(f"{statistics.mean(values):.4f}\n({min(values):.4f} to {max(values):.4f})")
    assert table[4:] == [
        ["Chance, k / (N - 1), k = 5, N = 101", "", *(["0.0500"] * 6)],
        ["95th percentile of chance, k = 5, N = 101", "", *(high * 3)],
    ]
    assert page.tables["Last logged"] == [
        [
            *("Run", "n", "Steps", "Language-model loss", "Held-out loss", "Alignment loss"),
            *("Pull at the aligned heads", "Temperature", "Seconds"),
        ],
        [SFT, "1", "60", "1.5", "1.5", "-", "-", "-", "100"],
        [
            *(ALIGNED_RUNS, "3", "60", "1.625\n(1.562 to 1.688)", "1.625\n(1.562 to 1.688)"),
            *("2.75\n(2.625 to 2.875)", "0.14\n(0.12 to 0.16)", "0.07", "102\n(101 to 103)"),
        ],
        [
            *(CONTROLS, "2", "60", "1.844\n(1.812 to 1.875)", "1.844\n(1.812 to 1.875)"),
            *("2.312\n(2.25 to 2.375)", "0.21\n(0.2 to 0.22)", "0.07", "105.5\n(105 to 106)"),
        ],
    ]
    each = page.tables["Last logged, each run"]
    assert [row[0] for row in each[2:5]] == [f"aligned (aligned-{seed})" for seed in range(3)]
    assert each[3] == ["aligned (aligned-1)", "1", "60", "1.625", "1.625", "2.75", "0.14", "0.07", "102"]


def test_a_control_that_has_trained_for_less_long(tmp_path, folders):
    """Both are compared at the last step that both were measured at."""
    control = write(tmp_path / "control", 5, teacher_control="permuted")
    content = json.loads((control / "trainer_state.json").read_text())
    entries = [entry for entry in content["log_history"] if entry["step"] <= 30]
    write_json(control / "trainer_state.json", {"global_step": 30, "log_history": entries})
    for path in (control / "alignment_monitor").glob(f"step-{STEPS:08d}-*"):
        path.unlink()
    page = rendered([folders[1], control])
    added = page.figures["teacher-image-0"]["data"][0]["z"][0][0]
    assert added == pytest.approx((scores(1, 30, 2).scores - scores(5, 30, 2).scores)[0, 0].item(), abs=1e-6)
    (row,) = page.tables["Image in context: last mutual k-NN of runs and their controls"][1:]
    assert row[0] == "aligned-0 and control (control), step 30" and row[3] == "-0.0400"
    assert page.tables["Text only: first and last mutual k-NN"][1][3] == "0.0900"  # alone, at its own last step


def test_scores_of_other_teachers_stand_apart(tmp_path, folders):
    other = write(tmp_path / "other", 5)
    for path in (other / "alignment_monitor").glob("step-*-text.json"):
        write_json(path, {**json.loads(path.read_text()), "teacher": "org/another"})
    page = rendered([folders[1], other])
    assert (
        "Text only: with k = 5, N = 101, teacher org/teacher (aligned-0) and with k = 5, N = 101, teacher org/another"
        in page.text
    )
    assert "Text only: first and last mutual k-NN" not in page.tables
    assert "Image in context: first and last mutual k-NN" in page.tables


def test_a_monitor_with_a_teacher_of_its_own_is_named(tmp_path):
    folders = [write(tmp_path / name, seed, seed=seed) for seed, name in enumerate("ab")]
    assert "teacher org/" not in rendered(folders).text
    for path in (path for folder in folders for path in (folder / "alignment_monitor").glob("step-*-text.json")):
        write_json(path, {**json.loads(path.read_text()), "teacher": "org/other"})
    page = rendered(folders)
    table = page.tables["Text only: first and last mutual k-NN"]
    assert [row[0] for row in table[2:]] == [
        f"{name}, k = 5, N = 101, teacher org/other" for name in ("Chance, k / (N - 1)", "95th percentile of chance")
    ]
    assert "k = 5, N = 101, teacher org/other; chance 0.0500." in page.text
    assert page.text.count("teacher org/teacher") == 0 and "cannot be compared" not in page.text


def test_scores_of_other_k_or_n_stand_apart(tmp_path, folders):
    other = write(tmp_path / "other", 5, k=5, samples=201, teacher_control="permuted")
    page = rendered([folders[1], other])
    assert (
        "Scores that were measured otherwise cannot be compared. Text only: with k = 5, N = 101 (aligned-0) and with"
        in page.text
    )
    assert "Text only: first and last mutual k-NN" not in page.tables
    for scale, name, chance in (("101", "aligned (aligned-0)", "0.0500"), ("201", "control (other)", "0.0250")):
        table = page.tables[f"Text only: first and last mutual k-NN (k = 5, N = {scale})"]
        assert [row[0] for row in table[1:-1]] == [name, f"Chance, k / (N - 1), k = 5, N = {scale}"]
        assert table[2][2] == chance
    assert not any(name.startswith("teacher") for name in page.figures)
    assert "control run" not in page.tables and not any("their controls" in caption for caption in page.tables)
    one, two = (page.figures[name]["data"][0] for name in ("change-text-0", "change-text1-0"))
    assert one["zmax"] != two["zmax"]
    lines = [[trace["name"] for trace in page.figures[f"mknn-text{i}-aligned"]["data"]] for i in ("", "1")]
    assert lines == [["aligned (aligned-0)"], ["control (other)"]]


def test_last_is_of_the_weights_that_were_loaded(tmp_path, folders):
    """Of a run that ended with the weights of step 30, what was measured at step 60 is left out."""
    best = write(tmp_path / "best", 1, seed=0, load_best_model_at_end=True)
    control = write(tmp_path / "best-control", 5, seed=0, load_best_model_at_end=True, teacher_control="permuted")
    content = json.loads((best / "trainer_state.json").read_text())
    write_json(best / "trainer_state.json", {**content, "best_model_checkpoint": "checkpoint-30"})
    page = rendered([best, control])
    change = page.figures["change-text-0"]["data"][0]["z"][0][0]
    assert change == pytest.approx((scores(1, 30, 1).scores - scores(1, 0, 1).scores)[0, 0].item(), abs=1e-6)
    added = page.figures["teacher-text-0"]["data"][0]["z"][0][0]
    assert added == pytest.approx((scores(1, 30, 1).scores - scores(5, 30, 1).scores)[0, 0].item(), abs=1e-6)
    (row,) = page.tables["Text only: last mutual k-NN of runs and their controls"][1:]
    assert row[0] == "best and control (best-control), step 30"
    assert row[1:4] == ["0.0750", "0.1150", "-0.0400"]  # 0.05 + shift / 100 + 30 / 2000, of both
    rows = {row[0]: row for row in page.tables["Text only: first and last mutual k-NN"][1:]}
    assert rows["aligned (best)"][2:4] == ["0.0600", "0.0750"]  # 0.05 + 1 / 100, and 30 / 2000 more
    last = [scores(shift, step, 1).null_p95 for shift, step in ((1, 30), (5, STEPS))]
    assert rows["95th percentile of chance, k = 5, N = 101"][3].startswith(f"{sum(last) / 2:.4f}")


def test_held_out_losses_are_of_the_weights_that_were_loaded(tmp_path):
    """As what else was measured is; what training logs is of its last step."""
    best = write(tmp_path / "best", 1, load_best_model_at_end=True)
    other = write(tmp_path / "other", 2, seed=1)
    evaluated = [
        {"step": step, "eval_loss": loss, "image_gain": gain} for step, loss, gain in ((30, 1.5, 0.25), (60, 1.9, 0.1))
    ]
    log = [entry for entry in logged(1, 0.01) if "eval_loss" not in entry]
    write_json(
        best / "trainer_state.json", {"log_history": [*log, *evaluated], "best_model_checkpoint": "checkpoint-30"}
    )
    page = rendered([best, other])
    table = page.tables["Last logged"]
    row = dict(zip(table[0], table[1], strict=True))
    assert (row["Held-out loss"], row["Image gain"], row["Language-model loss"]) == ("1.5", "0.25", "1.562")
    said = "Where the best weights were loaded in the end, held-out loss, image gain and mutual k-NN are theirs"
    assert said in page.text and said not in rendered([other]).text


def test_a_run_measured_in_two_ways_is_left_out(tmp_path, folders):
    mixed = write(tmp_path / "mixed", 5, seed=1)
    scores(5, STEPS, 1, num_samples=51).save(mixed / "alignment_monitor" / f"step-{STEPS:08d}-text.json")
    page = rendered([folders[1], mixed])
    said = (
        "Text only: the scores of mixed are left out, since it was measured with k = 5, N = 101 and with k = 5, N = 51."
    )
    assert said in page.text
    assert [row[0] for row in page.tables["Text only: first and last mutual k-NN"][1:-2]] == ["aligned (aligned-0)"]
    assert len(page.tables["Image in context: first and last mutual k-NN"]) == 4


def test_alignment_losses_that_cannot_be_compared_are_marked(tmp_path, folders):
    for name, value in (("num_neighbors", 10), ("gradient_accumulation_steps", 16), ("queue_size", 64)):
        text = rendered([folders[1], write(tmp_path / name, 5, **{name: value})]).text
        assert f"Not to be compared between runs that differ in {name}." in text
    assert "Not to be compared" not in rendered(folders).text


def test_a_run_that_goes_on_is_named(tmp_path, folders):
    on = write(tmp_path / "on", 5)
    write_json(on / "hera_run.json", {**json.loads((on / "hera_run.json").read_text()), "finished": None})
    write_json(on / "trainer_state.json", {"global_step": 30, "log_history": logged(5, 0.01)[:4]})
    page = rendered([folders[0], on])
    assert "No end is recorded of on: still running, or stopped early." in page.text


def test_the_page_is_well_formed_and_read_aloud(page):
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for link in page.tagged("a"):
        assert link["href"].removeprefix("#") in ids
    plots = [attributes for attributes in page.tagged("div") if attributes.get("class") == "plot"]
    assert len(plots) == len(page.figures) == 11 + 12 + 4
    assert all(plot["role"] == "img" and len(plot["aria-label"]) > 40 for plot in plots)
    assert len({attributes["aria-label"] for attributes in page.tagged("button")}) == 2 * len(plots)


def test_one_run_in_a_list_is_the_page_of_a_run(tmp_path):
    run = write_run(tmp_path / "run")
    texts = [write_report(argument, tmp_path / "page.html").read_text() for argument in (run, str(run), [run])]
    assert len({text[: text.index("Made by")] for text in texts}) == 1
    assert "HeRA run report" in texts[0]


def test_command(folders, tmp_path, capsys):
    arguments = ["report", *map(str, folders)]
    assert cli.main(arguments) == 0
    path = folders[0].parent / "comparison.html"
    assert capsys.readouterr().out.startswith(str(path)) and "HeRA report of 6 runs" in path.read_text()
    path.unlink()
    assert cli.main([*arguments, "--output", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").is_file()


@pytest.mark.parametrize("wrong", ["nothing", "empty", "twice"])
def test_folders_that_are_no_runs_are_refused(tmp_path, folders, capsys, wrong):
    (tmp_path / "empty").mkdir()
    named = {"nothing": tmp_path / "nothing", "empty": tmp_path / "empty", "twice": folders[0].parent / "." / "sft"}
    said = {"nothing": "is not a folder", "empty": "holds no training run", "twice": "is named twice"}
    output = tmp_path / "page.html"
    assert cli.main(["report", str(folders[0]), str(named[wrong]), "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hera report: error: ") and error.count("\n") == 1
    assert said[wrong] in error and named[wrong].name in error and not output.exists()


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="no run to report"):
        write_report([])


def test_names_are_escaped_and_private_ones_hidden(tmp_path, folders):
    attack, token = "<script>alert(1)<br>", "hf_" + "a" * 30
    odd = write(
        tmp_path / attack.replace("/", "_"), 1, run_note=attack, hub_token=token, head_ranking_path="/home/a/r.json"
    )
    text = report_page.render_comparison([read_run(folders[0]), read_run(odd)], plotly_js="")
    assert "<script>alert" not in text and token not in text and "/home" not in text and str(tmp_path) not in text
    page = Page(text)
    assert not any("<" in trace["name"] for trace in page.figures["loss"]["data"])  # plotly reads tags in names
