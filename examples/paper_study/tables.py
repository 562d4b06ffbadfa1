"""The tables of docs/results.md, each of the records of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean

from records import (
    NAMES,
    Measure,
    Record,
    aligned,
    aligned_heads,
    before_training,
    by_arm,
    by_seed,
    can_be_shown,
    differences,
    last,
    measures_of,
    mknn,
    number,
    other,
    pairs,
    rank_correlation,
    seeds,
    top,
    worst,
)

# What is added by what comes first to what comes second, seed by seed.
COMPARED = (
    ("aligned", "aligned control"),
    ("aligned", "SFT"),
    ("aligned control", "SFT"),
    ("aligned", "uniformity"),
    ("uniformity", "SFT"),
    ("stage 1", "stage 1 uniformity"),
    ("longer stage 1", "longer stage 1 control"),
    ("longer stage 1", "longer neither"),
    *((arm, other) for arm in ("stage 1", "stage 2", "both") for other in (f"{arm} control", "neither")),
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def references(records: Sequence[Record]) -> str:
    """What scores are held against."""
    found = records[0]["references"]
    null, p95 = found["null"]
    wording = ""
    if "wording" in found:
        wording = f" The commonest answer to each of {found['questions']} questions is right in {found['wording']:.3f}."
    return (
        f"{found['n']} held-out images, k = {found['k']}. Unrelated spaces score {null:.3f} "
        f"(95th percentile {p95:.3f}), "
        f"DINOv2 ViT-S and EfficientNet-Lite2 score {found['ceiling']:.3f} with each other."
        f"{wording}"
    )


def signature(records: Sequence[Record]) -> str:
    """Mutual k-NN on the way, every seed, as SFT, alignment and control leave it."""
    start = before_training(records)
    steps = sorted({int(step) for record in records for step in record["measured"]})
    header = ["arm", "seeds", *(f"aligned five, step {step}" for step in steps)]
    header += ["top five, last", "all, last", "held-out loss", "pull, last"]
    rows = []
    for arm, runs in by_arm(records).items():
        row = [arm, " / ".join(str(run["seed"]) for run in runs)]
        for step in steps:
            found = runs if step else [start]
            row.append(seeds([mknn(run, aligned(run), step=step) for run in found]))
        row.append(seeds([mknn(run, top(run, start)) for run in runs]))
        row.append(seeds([mean(last(run)["mknn"]["image"][run["config"]["teacher"]]) for run in runs]))
        row.append(seeds([last(run)["lm_loss"] for run in runs]))
        pulls = [run["log"]["alignment_pull"][-1] for run in runs if "alignment_pull" in run["log"]]
        row.append(seeds(pulls, 2) if pulls else "")
        rows.append(row)
    ordered = sorted(pairs(records), key=lambda pair: pair[0]["seed"])
    added = [aligned_heads(run) - aligned_heads(control) for run, control in ordered]
    sentence = ""
    if added:
        listed = seeds(added, sign="+")
        sentence = f"\n\nAligned minus control at the last step: {listed}, in the mean {number(added, sign='+')}."
    return f"{markdown(header, rows)}{sentence}\n\n{references(records)}"


def search(records: Sequence[Record]) -> str:
    """Aligned runs beside their controls, one seed."""
    header = ["setting", "teacher", "aligned heads", "control", "**difference**", "difference by the other encoder"]
    header += ["held-out alignment loss", "control", "held-out loss", "control", "pull, last"]
    rows = []
    for run, control in pairs(records):
        both = (run, control)
        teacher = run["config"]["teacher"]
        scores = [aligned_heads(record) for record in both]
        others = [aligned_heads(record, encoder=other(record)) for record in both]
        row = [run["arm"], NAMES[teacher], *(f"{score:.3f}" for score in scores)]
        row += [f"**{scores[0] - scores[1]:+.3f}**", f"{others[0] - others[1]:+.3f}"]
        row += [f"{last(record)['alignment_loss'][teacher]:.3f}" for record in both]
        row += [f"{last(record)['lm_loss']:.3f}" for record in both]
        pull = run["log"].get("alignment_pull")
        rows.append([*row, f"{pull[-1]:.2f}" if pull else ""])
    return markdown(header, rows)


def repeated(records: Sequence[Record]) -> str:
    """The same over several seeds, with intervals."""
    header = ["setting", "seeds", "aligned heads", "control", "**difference**", "difference by the other encoder"]
    header += ["held-out loss", "control"]
    rows = []
    for arm in dict.fromkeys(run["arm"] for run, _ in pairs(records)):
        some = [(run, control) for run, control in pairs(records) if run["arm"] == arm]
        scores = [[aligned_heads(record) for record in both] for both in zip(*some, strict=True)]
        added = [aligned_heads(run) - aligned_heads(control) for run, control in some]
        others = [aligned_heads(run, encoder=other(run)) - aligned_heads(c, encoder=other(c)) for run, c in some]
        losses = [[last(record)["lm_loss"] for record in both] for both in zip(*some, strict=True)]
        row = [arm, str(len(some)), *map(number, scores), f"**{number(added, sign='+')}**", number(others, sign="+")]
        rows.append([*row, *map(number, losses)])
    return markdown(header, rows)


def before_and_sft(records: Sequence[Record]) -> str:
    """What the search's runs are held against, by teacher: the heads are others for each."""
    header = ["", *(f"aligned five by {NAMES[name]}" for name in NAMES), "held-out loss"]
    rows = []
    for record in records:
        row = ["before training" if record["arm"] == "start" else record["arm"]]
        for name in NAMES:
            taught = {**record, "config": {**record["config"], "teacher": name}}
            row.append(f"{aligned_heads(taught):.3f}")
        rows.append([*row, f"{last(record)['lm_loss']:.3f}"])
    return f"{markdown(header, rows)}\n\n{references(records)}"


def confirmation(records: Sequence[Record], first: Sequence[Measure] = ()) -> str:
    """All measures of all arms, and what the teacher adds, with intervals."""
    start = before_training(records)
    arms = by_arm(records)
    measures = [*first, *measures_of(records)]
    rows = [["before training", "", *(number([value(start, start)], digits) for _, digits, value in measures)]]
    for arm, runs in arms.items():
        values = ([value(run, start) for run in runs] for _, _, value in measures)
        cells = [number(found, digits) for found, (_, digits, _) in zip(values, measures, strict=True)]
        rows.append([arm, str(len(runs)), *cells])
    notes = []
    for one, another in COMPARED:
        if by_seed(arms.get(one, ()), arms.get(another, ())):
            found = [differences(arms[one], arms[another], start, measure) for measure in measures]
            cells = [number(values, measure[1], sign="+") for values, measure in zip(found, measures, strict=True)]
            rows.append([f"**{one} minus {another}**", str(len(found[0])), *cells])
            name, compared = f"{one} minus {another}", by_seed(arms[one], arms[another])
            notes += [_of_other_heads(name, compared), _of_other_precision(name, compared)]
    table = markdown(["", "seeds", *(name for name, _, _ in measures)], rows)
    return "\n\n".join([table, *filter(None, notes), references(records)])


def _of_other_heads(name: str, pairs: Sequence[tuple[Record, Record]]) -> str:
    """Says so if runs that are compared have aligned other heads."""
    chosen = [[set(record["aligned_heads"][record["config"]["teacher"]]) for record in pair] for pair in pairs]
    unequal = [one & other for one, other in chosen if one != other]
    if not unequal:
        return ""
    return (
        f"*{name}*: in {len(unequal)} of {len(chosen)} pairs the two runs were made on CPUs that round otherwise, and "
        f"have {min(map(len, unequal))} of their aligned heads in common; the difference is that of these."
    )


def _of_other_precision(name: str, pairs: Sequence[tuple[Record, Record]]) -> str:
    """Says so if runs that are compared were computed in different precisions."""
    unequal = sum(one["config"].get("bf16") != other["config"].get("bf16") for one, other in pairs)
    return f"*{name}*: in {unequal} of {len(pairs)} pairs one run was computed in float32." if unequal else ""


def stages(records: Sequence[Record]) -> str:
    """The same, with what the first stage left."""
    return confirmation(
        records, [("aligned five after stage 1", 3, lambda run, start: mknn(run, aligned(run), step=0))]
    )


def both_draws(results: dict[str, list[Record]]) -> str:
    """What alignment in stage 1 adds, over the seeds of both draws of held-out images, each seed of one of them."""
    found = [results[name] for name in ("stages", "stages_confirmed") if can_be_shown(name, results)]
    if len(found) < 2:
        return "Not measured yet."
    rows = []
    for another in ("stage 1 control", "neither"):
        cells: dict[str, list[float]] = {name: [] for name, _, _ in measures_of(found[0])}
        for records in found:
            arms, start = by_arm(records), before_training(records)
            for measure in measures_of(records):
                cells[measure[0]] += differences(arms["stage 1"], arms[another], start, measure)
        count = len(next(iter(cells.values())))
        rows.append([f"**stage 1 minus {another}**", str(count), *(number(v, sign="+") for v in cells.values())])
    return markdown(["", "seeds", *cells], rows)


def hours(results: dict[str, list[Record]]) -> str:
    """How long the runs of each experiment took, all together."""
    rows = [
        [name, str(len(found)), f"{sum(r['seconds'] for r in found) / 3600:.1f}"] for name, found in results.items()
    ]
    total = [record for found in results.values() for record in found]
    rows.append(["all", str(len(total)), f"{sum(record['seconds'] for record in total) / 3600:.1f}"])
    return markdown(["experiment", "runs", "hours"], rows)


def head_map(records: Sequence[Record]) -> str:
    """How firm the ranking is: maps beside the first one of their model."""
    firsts: dict[str, Record] = {}
    for record in records:
        firsts.setdefault(_model(record), record)
    header = ["what is ranked on", "samples", "draws", "of the worst five in common with the first"]
    header += ["rank correlation with the first", "worst head", "best head", "best layer", "unrelated spaces"]
    grouped: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        grouped.setdefault((record["arm"], record["config"]["samples"]), []).append(record)
    rows = []
    for (arm, samples), maps in grouped.items():
        reference = firsts[_model(maps[0])]
        shown = [record for record in maps if record is not reference]
        common = " / ".join(str(len(worst(record) & worst(reference))) for record in shown)
        agreement = seeds([rank_correlation(record, reference) for record in shown], 2) if shown else ""
        flat = [[score for row in record["scores"] for score in row] for record in maps]
        row = [arm, str(samples), str(len(maps)), common, agreement]
        row += [f"{mean(map(min, flat)):.3f}", f"{mean(map(max, flat)):.3f}"]
        row += [f"{mean(max(record['layer_scores']) for record in maps):.3f}"]
        rows.append([*row, f"{mean(record['null'][0] for record in maps):.3f}"])
    return markdown(header, rows)


def _model(record: Record) -> str:
    return record["config"].get("model", "smollm2")


def stage1(records: Sequence[Record]) -> str:
    """All but the control, and the pair if there is one."""
    table = before_and_sft([record for record in records if not record["arm"].endswith(" control")])
    return f"{table}\n\n{search(records)}" if pairs(records) else table


SECTIONS: dict[str, Callable[[Sequence[Record]], str]] = {
    "signature": signature,
    "references": before_and_sft,
    "stage1": stage1,
    "finished": confirmation,
    "temperature": search,
    "pull": search,
    "similarity": search,
    "default": repeated,
    "neighbors": search,
    "pool": search,
    "heads": search,
    "leads": repeated,
    "weights": stage1,
    "stages": stages,
    "stages_confirmed": stages,
    "concepts": stages,
    "longer": stages,
    "confirmation": confirmation,
    "use": stages,
    "head_map": head_map,
}
