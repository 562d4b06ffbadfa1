"""`hera sft`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from peft import LoraConfig
from tiny import image_dataset, save_tiny_dinov2, save_vlm
from transformers import AutoModelForImageTextToText, AutoProcessor
from two_processes import TIMEOUT, free_port

import hera_trainer
from hera_trainer import HeadRanking, HeRAConfig, HeRATrainer
from hera_trainer.cli import main
from hera_trainer.cli.sft import load_data, parse
from hera_trainer.runs.checkpoints import is_complete
from hera_trainer.runs.record import read_run

STEPS = 3
BASE = {"model_name_or_path": "m", "dataset_name": "d", "use_cpu": True, "bf16": False}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model, a teacher, data on disk, and the settings of a short run."""
    folder = tmp_path_factory.mktemp("parts")
    save_vlm("qwen2_5_vl", folder / "model")
    save_tiny_dinov2(folder / "teacher")
    rows = image_dataset(n=24)
    rows.save_to_disk(folder / "rows")
    chats = [[*row["prompt"], *row["completion"]] for row in rows.select_columns(["prompt", "completion"])]
    rows.select_columns("images").add_column("messages", chats).save_to_disk(folder / "chats")
    rows.select_columns(["images", "prompt"]).add_column("messages", chats).save_to_disk(folder / "more")
    rows.select_columns("images").add_column("text", ["A duck."] * len(rows)).save_to_disk(folder / "texts")
    datasets.DatasetDict(train=rows, test=image_dataset(n=8, seed=1)).save_to_disk(folder / "splits")
    return folder


def settings(parts, output_dir, **kwargs):
    return {
        "output_dir": str(output_dir),
        "teacher_model_name_or_path": str(parts / "teacher"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_neighbors": 3,
        "num_aligned_heads": 2,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_steps": STEPS,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "disable_tqdm": True,
        **kwargs,
    }


def write_yaml(path, **content):
    path.write_text(yaml.safe_dump(content))
    return str(path)


def losses(output_dir, step=STEPS):
    state = json.loads(Path(output_dir, f"checkpoint-{step}", "trainer_state.json").read_text())
    names = ("loss", "alignment_loss", "temperature", "grad_norm", "eval_loss", "eval_alignment_loss")
    return [{name: entry[name] for name in names if name in entry} for entry in state["log_history"]]


def error_of(arguments, capsys, code=1):
    if code == 2:
        with pytest.raises(SystemExit) as stopped:
            main(["sft", *map(str, arguments)])
        assert stopped.value.code == 2
    else:
        assert main(["sft", *map(str, arguments)]) == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("hera sft: error: ")
    return line


def test_yaml_is_what_the_trainer_does(parts, tmp_path, capsys):
    """Losses of the command, of flags alone, and of HeRATrainer in Python are the same numbers."""
    more = {"learn_temperature": False, "eval_strategy": "steps", "eval_steps": 2, "queue_size": 4}
    config = write_yaml(
        tmp_path / "run.yaml",
        model_name_or_path=str(parts / "model"),
        dataset_name=str(parts / "splits"),
        use_peft=True,
        lora_target_modules="q_proj o_proj",
        lora_r=4,
        **settings(parts, tmp_path / "yaml", **more),
    )
    assert main(["sft", "--config", config]) == 0
    assert "Aligned heads: L" in capsys.readouterr().out

    stored = datasets.load_from_disk(parts / "splits")
    trainer = HeRATrainer(
        model=str(parts / "model"),
        args=HeRAConfig(**settings(parts, tmp_path / "python", **more)),
        train_dataset=stored["train"],
        eval_dataset=stored["test"],
        peft_config=LoraConfig(
            r=4, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    assert losses(tmp_path / "yaml") == losses(tmp_path / "python")
    assert len([entry for entry in losses(tmp_path / "yaml") if "alignment_loss" in entry]) == STEPS

    flags = ["--model_name_or_path", parts / "model", "--dataset_name", parts / "splits", "--use_peft"]
    flags += ["--lora_target_modules", "q_proj", "o_proj", "--lora_r", 4, "--learn-temperature", "false"]
    for name, value in settings(parts, tmp_path / "flags", **more).items():
        flags += [] if name == "learn_temperature" else [f"--{name}", value]
    assert main(["sft", *map(str, flags)]) == 0
    assert losses(tmp_path / "flags") == losses(tmp_path / "yaml")
    assert (tmp_path / "flags" / "adapter_model.safetensors").is_file()


def test_resume(parts, tmp_path, capsys):
    """Without a checkpoint it begins, with one it goes on, and ends where an uninterrupted run does."""
    base = {"model_name_or_path": str(parts / "model"), "dataset_name": str(parts / "rows")}
    heads = {"aligned_heads": "L0H1 L1H2", "lr_scheduler_type": "constant", "save_steps": 2}
    run = {**base, **settings(parts, tmp_path / "run", **heads)}
    whole = write_yaml(tmp_path / "whole.yaml", **{**run, "output_dir": str(tmp_path / "whole"), "max_steps": 4})
    half = write_yaml(tmp_path / "half.yaml", **{**run, "max_steps": 2, "resume_from_checkpoint": True})
    rest = write_yaml(tmp_path / "rest.yaml", **{**run, "max_steps": 4})
    assert main(["sft", "--config", whole]) == 0
    assert main(["sft", f"--config={half}"]) == 0
    assert main(["sft", "--config", rest, "--resume_from_checkpoint"]) == 0
    assert losses(tmp_path / "run", 4) == losses(tmp_path / "whole", 4)
    started = (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns
    assert main(["sft", "--config", rest, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")]) == 0
    assert (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns == started
    line = error_of(["--config", rest, "--resume_from_checkpoint", tmp_path / "no"], capsys)
    assert "has no `trainer_state.json`" in line


@pytest.mark.parametrize("weight", [0.1, 0.0])
def test_a_run_that_was_killed_within_its_first_checkpoint_begins_anew(parts, tmp_path, capsys, weight):
    """The same command can be started again after every crash. Without alignment the rule is SFTTrainer's."""
    base = {"model_name_or_path": str(parts / "model"), "dataset_name": str(parts / "rows")}
    run = settings(parts, tmp_path / "run", aligned_heads="L0H1", save_steps=2, max_steps=2, alignment_weight=weight)
    config = write_yaml(tmp_path / "run.yaml", **base, **run)
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-2" / "adapter_config.json").write_text("{}")
    words = ["sft", "--config", config, "--resume_from_checkpoint"]
    if weight == 0:
        assert main(words) == 1
        return
    with pytest.warns(UserWarning, match="Training begins anew: the writing of checkpoint-2 was interrupted"):
        assert main(words) == 0
    assert is_complete(tmp_path / "run" / "checkpoint-2")


def test_monitor_looks_at_what_is_held_out(parts, tmp_path):
    flags = ["--model_name_or_path", parts / "model", "--dataset_name", parts / "rows", "--test_split_size", 0.25]
    run = {"max_steps": 1, "monitor_steps": 1, "monitor_num_samples": 6, "eval_strategy": "no"}
    for name, value in settings(parts, tmp_path / "run", aligned_heads="L0H1", **run).items():
        flags += [f"--{name}", value]
    assert main(["sft", *map(str, flags)]) == 0
    assert HeadRanking.load(tmp_path / "run" / "alignment_monitor" / "step-00000001-text.json").num_samples == 6
    record = read_run(tmp_path / "run").record
    assert (record["dataset"], record["rows"]) == ("rows", 18)


def test_4bit_adapter_from_training_to_an_ordinary_model(parts, tmp_path):
    pytest.importorskip("bitsandbytes")
    flags = ["--model_name_or_path", save_vlm("qwen2_5_vl", tmp_path / "model", hidden_size=64), "--load_in_4bit"]
    flags += ["--dataset_name", parts / "rows", "--use_peft", "--lora_target_modules", "all-linear"]
    for name, value in settings(parts, tmp_path / "run", max_steps=1, aligned_heads="L0H1").items():
        flags += [f"--{name}", value]
    assert main(["sft", *map(str, flags)]) == 0
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    _, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert AutoProcessor.from_pretrained(tmp_path / "merged").tokenizer("red")["input_ids"]


@pytest.mark.slow
def test_two_processes(parts, tmp_path):
    """As a module under a launcher: the same losses as in one process with twice the batch."""
    model = save_vlm("llava", tmp_path / "llava")  # the language-model loss of Qwen2.5-VL depends on the cut
    base = {"model_name_or_path": model, "dataset_name": str(parts / "rows"), "lora_dropout": 0.0}
    base |= {"use_peft": True, "lora_target_modules": "all-linear", "aligned_heads": ["L0H1", "L2H0"]}
    one = write_yaml(tmp_path / "one.yaml", **base, **settings(parts, tmp_path / "one"))
    two = {**settings(parts, tmp_path / "two"), "per_device_train_batch_size": 2}
    two = write_yaml(tmp_path / "two.yaml", **base, **two)
    assert main(["sft", "--config", one]) == 0
    environment = {**os.environ, "PYTHONPATH": str(Path(hera_trainer.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(free_port()), "-m", "hera_trainer", "sft", "--config", two]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stdout.count("Saved to") == 1
    for ours, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert ours.keys() == theirs.keys() >= ({"loss", "alignment_loss"} if "loss" in ours else set())
        assert ours == pytest.approx(theirs, rel=1e-4)


# --- Options ---------------------------------------------------------------------------------------------------------


def test_options_of_every_class():
    flags = ["--dataset_name", "data", "--model-name-or-path", "m", "--alignment_weight", "0.5", "--aligned_heads"]
    flags += ["L0H1", "L2H3", "--model_init_kwargs", '{"use_cache": false}', "--max_length", "none", "--streaming"]
    script_args, training_args, model_args, mixture = parse([*flags, "--use_cpu", "--bf16", "no"])
    assert (script_args.dataset_name, model_args.model_name_or_path, mixture.streaming) == ("data", "m", True)
    assert (training_args.alignment_weight, training_args.aligned_heads) == (0.5, ["L0H1", "L2H3"])
    assert training_args.model_init_kwargs == {"use_cache": False} and training_args.max_length is None


def test_flags_go_before_the_file(tmp_path):
    content = {**BASE, "learning_rate": "1e-3", "model_init_kwargs": {"use_cache": False}}
    config = write_yaml(tmp_path / "a.yaml", **content, aligned_heads="L0H1 L1H2", num_neighbors=4)
    _, training_args, _, _ = parse(["--num_neighbors", "5", "--config", config])
    assert (training_args.num_neighbors, training_args.learning_rate) == (5, 1e-3)
    assert training_args.aligned_heads == ["L0H1", "L1H2"] and training_args.model_init_kwargs == {"use_cache": False}


def test_no_is_no_in_yaml(tmp_path):
    """YAML reads it as false."""
    config = tmp_path / "a.yaml"
    write_yaml(config, **BASE)
    config.write_text(config.read_text() + "\neval_strategy: no\nsave_strategy: no\n")
    _, training_args, _, _ = parse(["--config", str(config)])
    assert (training_args.eval_strategy, training_args.save_strategy) == ("no", "no")


def test_help_begins_with_what_is_of_this_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["sft", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    sections = ["data:", "model, quantization and LoRA:", "head-wise representation alignment:", "training (Trainer):"]
    places = [text.index(f"\n{section}\n") for section in sections]
    assert places == sorted(places) and "examples:" in text and "--config run.yaml" in text
    for name in (
        "--alignment_weight",
        "--learning_rate",
        "--load_in_4bit",
        "--dataset_name",
        "--packing",
        "--datasets",
    ):
        assert f"\n  {name}" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--aligment_weight", "1"], ["--aligment_weight", "did you mean --alignment_weight?"]),
        (["--learning_rate", "fast"], ["--learning_rate", "fast"]),
        (["--head_selection", "best"], ["best", "worst"]),
        (["--config"], ["--config"]),
    ],
)
def test_wrong_flags(arguments, words, capsys):
    line = error_of(arguments, capsys, code=2)
    assert all(word in line for word in words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("alignment_wieght: 1", ["`alignment_wieght`", "did you mean `alignment_weight`?"]),
        ("banana: 1", ["`banana`", "--help"]),
        ("- a", ["mapping"]),
        (yaml.safe_dump({**BASE, "env": {"HF_HOME": "/elsewhere"}}), ["`env`", "HF_HOME", "shell"]),
        ("a: [b", ["no YAML"]),
        (yaml.safe_dump({**BASE, "dataset_name": None, "datasets": [{"path": "a", "splitt": "b"}]}), ["splitt"]),
        (yaml.safe_dump({**BASE, "temperature": -1}), ["`temperature`"]),
        (None, ["No such file"]),
    ],
)
def test_wrong_files(content, words, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    line = error_of(["--config", path], capsys)
    assert all(word in line for word in words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset_name", "x"], "--model_name_or_path"),
        (["--model_name_or_path", "x"], "--dataset_name"),
        (["--model_name_or_path", "x", "--dataset_name", "y", "--load_in_4bit"], "--use_peft"),
        (["--model_name_or_path", "x", "--dataset_name", "y", "--load_in_8bit"], "--use_peft"),
        (["--model_name_or_path", "x", "--dataset_name", "./y"], "'./y'"),
    ],
)
def test_what_cannot_be_run(flags, words, capsys, tmp_path):
    line = error_of([*flags, "--use_cpu", "--bf16", "no", "--output_dir", tmp_path], capsys)
    assert words in line


# --- Data ------------------------------------------------------------------------------------------------------------


def data_of(parts, tmp_path, evaluated=True, seed=0, **content):
    config = write_yaml(tmp_path / "data.yaml", **{**BASE, "dataset_name": None, **content})
    script_args, _, _, mixture = parse(["--config", config])
    return load_data(script_args, mixture, evaluated, seed)


def texts(rows):
    return [row["completion"][0]["content"] for row in rows]


def test_held_out_part(parts, tmp_path):
    """Every process must hold the same rows out."""
    for source in ({"dataset_name": str(parts / "rows")}, {"datasets": [{"path": str(parts / "rows")}]}):
        train, held_out = data_of(parts, tmp_path, test_split_size=0.25, **source)
        again, _ = data_of(parts, tmp_path, test_split_size=0.25, evaluated=False, **source)
        other, _ = data_of(parts, tmp_path, test_split_size=0.25, seed=1, **source)
        assert (len(train), len(held_out)) == (18, 6) and texts(train) == texts(again) != texts(other)
        assert sorted(texts(train) + texts(held_out)) == sorted(texts(datasets.load_from_disk(parts / "rows")))
    assert len(data_of(parts, tmp_path, test_split_size=5, dataset_name=str(parts / "rows"))[1]) == 5


def test_mixture(parts, tmp_path):
    rows = {"path": str(parts / "rows"), "columns": ["images", "prompt", "completion"]}
    others = {"path": str(parts / "splits"), "split": "test"}
    train, held_out = data_of(parts, tmp_path, evaluated=False, datasets=[rows, others])
    stored, test = datasets.load_from_disk(parts / "rows"), datasets.load_from_disk(parts / "splits")["test"]
    assert texts(train) == texts(stored) + texts(test) and held_out is None
    # A column beside the messages does no harm: they are what is trained on.
    chats = {"path": str(parts / "chats")}
    train, _ = data_of(parts, tmp_path, evaluated=False, datasets=[chats, {"path": str(parts / "more")}])
    assert len(train) == 2 * len(stored)
    parted = [{**rows, "fraction": 1}, {**others, "fraction": 3}]  # 8 rows are three quarters of 10.7
    train, _ = data_of(parts, tmp_path, evaluated=False, datasets=parted)
    assert texts(train) == texts(stored)[:3] + texts(test)


def test_stream(parts, tmp_path):
    name = str(parts / "splits")
    train, held_out = data_of(parts, tmp_path, dataset_name=name, dataset_streaming=True)
    assert isinstance(train, datasets.IterableDataset) and isinstance(held_out, datasets.IterableDataset)
    assert texts(train) == texts(datasets.load_from_disk(name)["train"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"dataset_name": "rows"}, "--test_split_size"),
        ({"datasets": [{"path": "rows"}]}, "--test_split_size"),
        ({"dataset_name": "rows", "dataset_streaming": True, "test_split_size": 0.5}, "stream"),
        ({"datasets": [{"path": "rows", "fraction": 1}, {"path": "rows"}], "test_split_size": 0.5}, "`fraction`"),
        ({"datasets": [{"path": "texts"}, {"path": "chats"}]}, "texts `text`, chats `mess"),
        ({"datasets": [{"path": "texts"}, {"path": "rows"}], "streaming": True}, "texts `text`, rows `prompt`"),
        (
            {"datasets": [{"path": "rows"}, {"path": "chats"}], "test_split_size": 0.5},
            "rows `prompt`.*chats `messages`",
        ),
    ],
)
def test_data_that_does_not_work(parts, tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(parts)
    with pytest.raises(ValueError, match=words):
        data_of(parts, tmp_path, **content)


def test_a_tracker_that_is_missing(monkeypatch, capsys):
    from hera_trainer.cli import sft

    monkeypatch.setattr(sft, "get_available_reporting_integrations", lambda: [])
    arguments = ["--model_name_or_path", "x", "--dataset_name", "y", "--report_to", "tensorboard"]
    assert "pip install tensorboard" in error_of(arguments, capsys)
