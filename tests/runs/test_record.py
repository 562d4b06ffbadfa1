"""What a run leaves in its output folder, and how it is read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from runs import trainer
from tiny import image_dataset, save_tiny_dinov2
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hera_trainer import AttentionHead, HeadRanking, read_run
from hera_trainer.common.redaction import holds_secret, public_name, public_settings
from hera_trainer.evaluation.image_gain import ImageGain
from hera_trainer.hub.files import publishable_files
from hera_trainer.runs.checkpoints import find_checkpoint
from hera_trainer.runs.record import forget_measurements, measurement_path
from hera_trainer.runs.record_callback import RunRecordCallback
from hera_trainer.runs.report.groups import settings_of
from hera_trainer.runs.written_files import RUN_FILE


def state(path, steps, losses=None, **entries):
    """Writes a trainer's state with one logged loss a step."""
    path.mkdir(parents=True, exist_ok=True)
    log = [{"step": step, "loss": float(step), **entries} for step in range(1, steps + 1)]
    content = {"global_step": steps, "log_history": log}
    (path / "trainer_state.json").write_text(json.dumps(content))
    return log


def ranking(value=0.5, **kwargs):
    return HeadRanking(torch.full((2, 2), value), torch.full((2,), value), k=1, num_samples=5, **kwargs)


class TestReading:
    def test_everything(self, tmp_path):
        log = state(tmp_path, 3)
        (tmp_path / RUN_FILE).write_text(json.dumps({"model": "m", "aligned_heads": ["L1H0", "L0H1"]}))
        ranking(0.25).save(tmp_path / "head_ranking.json")
        for step, value in ((0, 0.0), (100, 0.5), (20, 0.25)):
            ranking(value, context="image").save(measurement_path(tmp_path, step, "image"))
        ranking(0.75).save(measurement_path(tmp_path, 20, "text"))
        for step in (20, 0):
            ImageGain(2.0, 2.0 + step, 90, 12, 1).save(measurement_path(tmp_path, step, "gain"))
        (tmp_path / "alignment_monitor" / "notes.json").write_text("{")
        run = read_run(str(tmp_path))
        assert run.path == tmp_path and run.record["model"] == "m" and run.log_history == log
        assert run.aligned_heads == [AttentionHead(1, 0), AttentionHead(0, 1)]
        assert run.head_ranking.scores[0, 0] == 0.25
        assert {c: list(steps) for c, steps in run.monitored.items()} == {"image": [0, 20, 100], "text": [20]}
        assert [(step, gain.gain) for step, gain in run.image_gains.items()] == [(0, 0.0), (20, 20.0)]
        before, after = run.before_after("image")
        assert (before.scores[0, 0], after.scores[0, 0]) == (0.0, 0.5)
        assert run.before_after("text") is None and run.before_after("video") is None
        assert run.curve("loss") == ([1, 2, 3], [1.0, 2.0, 3.0])

    def test_checkpoint_that_goes_on_from_the_folders_state(self, tmp_path):
        """A run that was killed after a checkpoint, before its folder's state was refreshed."""
        state(tmp_path, 2)
        state(tmp_path / "checkpoint-4", 4)
        state(tmp_path / "checkpoint-3", 3)
        assert read_run(tmp_path).curve("loss")[0] == [1, 2, 3, 4]

    def test_checkpoint_of_an_earlier_run_into_the_same_folder(self, tmp_path):
        state(tmp_path / "checkpoint-4", 4, lr=1.0)
        state(tmp_path, 2)
        assert read_run(tmp_path).curve("loss")[0] == [1, 2]

    def test_checkpoints_alone(self, tmp_path):
        state(tmp_path / "checkpoint-20", 20)
        state(tmp_path / "checkpoint-100", 100)
        run = read_run(tmp_path)
        assert len(run.log_history) == 100 and run.record == {} and run.aligned_heads == []

    def test_half_a_state(self, tmp_path):
        state(tmp_path / "checkpoint-2", 2)
        (tmp_path / "checkpoint-4").mkdir()
        (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": ')
        with pytest.warns(UserWarning, match=r"checkpoint-4.*cannot be read as JSON.*left out"):
            assert len(read_run(tmp_path).log_history) == 2

    def test_refused(self, tmp_path):
        with pytest.raises(ValueError, match="is not a folder"):
            read_run(tmp_path / "none")
        with pytest.raises(ValueError, match=r"holds no training run.*hera_run\.json"):
            read_run(tmp_path)
        (tmp_path / RUN_FILE).write_text("[]")
        with pytest.raises(ValueError, match="holds no JSON object"):
            read_run(tmp_path)

    def test_forgetting(self, tmp_path):
        for step in (0, 2, 4):
            ranking().save(measurement_path(tmp_path, step, "text"))
            ImageGain(2.0, 2.5, 90, 12, 1).save(measurement_path(tmp_path, step, "gain"))
        forget_measurements(tmp_path, 2)
        assert list(read_run(tmp_path).monitored["text"]) == [0, 2] == list(read_run(tmp_path).image_gains)
        forget_measurements(tmp_path, -1)
        assert not list((tmp_path / "alignment_monitor").iterdir())


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Killed


class Logging(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        half = torch.tensor(0.5, requires_grad=True)
        self.trainer.log({"numpy": np.float32(0.5), "tensor": half * half})


class TestWriting:
    def test_a_whole_run(self, tmp_path, monkeypatch):
        secret = "hf_" + "a" * 30
        folder = tmp_path / "private" / "my-run"
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        run = trainer(
            folder, max_steps=2, hub_token=secret, peft_config=lora, run_name=str(folder), save_strategy="steps"
        )
        run.model.base_model.model.config.name_or_path = str(tmp_path / "models" / "base")
        run.train()
        kept = read_run(folder)
        assert kept.record["model"] == "base" and kept.record["dataset"] is None
        assert kept.aligned_heads == run.aligned_heads and len(run.aligned_heads) == 3
        assert kept.record["adapter"]["r"] == 4 and kept.record["adapter"]["target_modules"] == ["q_proj", "v_proj"]
        assert kept.record["config"]["num_neighbors"] == 3 and kept.record["config"]["output_dir"] == "my-run"
        assert kept.record["versions"]["torch"] == torch.__version__.split("+")[0]
        assert kept.record["hardware"]["processes"] == 1
        assert kept.record["started"] <= kept.record["finished"] and kept.record["resumed_from"] is None
        assert kept.log_history == run.state.log_history and "train_loss" in kept.log_history[-1]
        assert torch.equal(kept.head_ranking.scores, run.head_ranking.scores)
        # The state is the one that transformers writes and reads.
        assert TrainerState.load_from_json(str(folder / "trainer_state.json")).log_history == run.state.log_history
        for name in (RUN_FILE, "trainer_state.json", "head_ranking.json"):
            text = (folder / name).read_text()
            assert secret not in text and str(tmp_path) not in text
        assert not list(folder.glob("*.tmp"))
        # What the folder has besides is no checkpoint.
        assert get_last_checkpoint(str(folder)) == find_checkpoint(True, folder) == str(folder / "checkpoint-2")
        with pytest.raises(ValueError, match="output folder of a run, not a checkpoint"):
            find_checkpoint(folder, folder)

    def test_a_run_that_dies(self, tmp_path):
        run = trainer(tmp_path, max_steps=4, callbacks=[Kill()])
        run._record.seconds = 0
        with pytest.raises(Killed):
            run.train()
        kept = read_run(tmp_path)
        assert kept.curve("loss")[0] == [1, 2]
        assert kept.record["finished"] is None and kept.aligned_heads == run.aligned_heads

    def test_state_is_not_written_at_every_step(self, tmp_path, monkeypatch):
        written = []
        original = RunRecordCallback._write_state
        monkeypatch.setattr(
            RunRecordCallback,
            "_write_state",
            lambda self, args, state: (written.append(state.global_step), original(self, args, state)),
        )
        run = trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=3)
        run._record.seconds = 1e9
        run.train()
        # When training begins, with the first values, beside checkpoints, and when it ends.
        assert written == [0, 1, 3, 5, 5]

    def test_resumed_run_keeps_its_beginning(self, tmp_path):
        settings = {"save_strategy": "steps", "save_steps": 1}
        trainer(tmp_path, max_steps=1, **settings).train()
        record = json.loads((tmp_path / RUN_FILE).read_text())
        (tmp_path / RUN_FILE).write_text(json.dumps({**record, "started": "2026-01-01T00:00:00+00:00"}))
        trainer(tmp_path, max_steps=2, **settings).train(resume_from_checkpoint=True)
        kept = read_run(tmp_path)
        assert (kept.record["started"], kept.record["resumed_from"]) == ("2026-01-01T00:00:00+00:00", "checkpoint-1")
        assert kept.record["earlier_config"] == {"max_steps": 1}
        assert kept.record["seconds"] > record["seconds"] > 0  # both parts, not the time between
        assert kept.curve("loss")[0] == [1, 2]
        (tmp_path / RUN_FILE).write_text(json.dumps({**kept.record, "seconds": None}))  # of an earlier version
        then = {**settings, "save_steps": 2, "alignment_weight": 0.5}
        resumed = trainer(tmp_path, max_steps=3, **then)
        resumed.train(resume_from_checkpoint=True)
        resumed.create_model_card()
        kept = read_run(tmp_path)
        assert kept.record["seconds"] is None
        first = {"max_steps": 1, "alignment_weight": record["config"]["alignment_weight"]}
        assert kept.record["earlier_config"] == {**first, "save_steps": 1}
        assert f"`alignment_weight` {first['alignment_weight']}" in (tmp_path / "README.md").read_text()
        trainer(tmp_path, max_steps=4, **settings).train(resume_from_checkpoint=True)
        again = read_run(tmp_path).record["earlier_config"]  # as at first: what it was in between
        assert again == {"max_steps": 1, "alignment_weight": 0.5, "save_steps": 2}
        shown = {name: value for name, value in settings_of(kept).items() if "before it was resumed" in name}
        assert shown == {f"{name}, before it was resumed": value for name, value in first.items()}
        trainer(tmp_path, max_steps=1).train()
        assert read_run(tmp_path).record["started"] > "2026-01-02"
        assert read_run(tmp_path).curve("loss")[0] == [1]  # although `checkpoint-2` is still there

    def test_values_that_json_does_not_know(self, tmp_path):
        """SFTTrainer trains with such a callback, too, as long as it saves no checkpoint."""
        logging = Logging()
        run = logging.trainer = trainer(tmp_path, max_steps=1, callbacks=[logging])
        run.train()
        kept = read_run(tmp_path)
        assert kept.record["finished"] and kept.curve("numpy") == ([1], [0.5]) and kept.curve("tensor") == ([1], [0.25])

    def test_a_disk_that_fails(self, tmp_path, monkeypatch):
        def fail(path, write):
            raise OSError("no space left")

        monkeypatch.setattr("hera_trainer.runs.record_callback.write_atomically", fail)
        run = trainer(tmp_path, max_steps=2)
        with pytest.warns(UserWarning, match=r"could not be written \(no space left\)"):
            run.train()
        assert run.state.global_step == 2 and not (tmp_path / RUN_FILE).exists()

    def test_none_without_alignment(self, tmp_path):
        trainer(tmp_path, max_steps=1, alignment_weight=0.0).train()
        assert not (tmp_path / RUN_FILE).exists() and not (tmp_path / "trainer_state.json").exists()

    def test_a_baseline_in_the_folder_of_an_aligned_run_is_not_taken_for_it(self, tmp_path):
        lora = LoraConfig(target_modules=["q_proj", "v_proj"])
        held_out = image_dataset(n=12, with_features=8, seed=5)
        monitored = {"monitor_steps": 1, "monitor_num_samples": 12, "eval_dataset": held_out}
        run = trainer(tmp_path, max_steps=1, peft_config=lora, **monitored)
        run.train()
        run.create_model_card()
        measured = sorted(path.name for path in (tmp_path / "alignment_monitor").iterdir())
        aligned = json.loads((tmp_path / RUN_FILE).read_text())
        baseline = trainer(tmp_path, max_steps=1, peft_config=lora, alignment_weight=0.0)
        baseline.train()
        baseline.save_model()
        assert not (tmp_path / RUN_FILE).exists() and not (tmp_path / "hera").exists()
        earlier = tmp_path / "earlier-run"  # nothing is lost
        assert json.loads((earlier / RUN_FILE).read_text()) == aligned
        assert "were pulled towards" in (earlier / "README.md").read_text()
        assert sorted(path.name for path in (earlier / "alignment_monitor").iterdir()) == measured != []
        assert "were pulled towards" not in (tmp_path / "README.md").read_text()
        published = set(publishable_files(tmp_path))
        assert "adapter_model.safetensors" in published
        assert not [name for name in published if name.startswith(("hera", "trainer_state", "earlier", "alignment"))]

    @pytest.mark.parametrize("encoded", [False, True])
    def test_name_of_a_data_set_of_the_hub(self, tmp_path, encoded):
        rows = image_dataset(n=24, with_features=None if encoded else 8)
        rows.info.download_checksums = {"hf://datasets/trl-lib/captions@1a2b/data/train.parquet": {}}
        rows.info.dataset_name = "captions"
        teacher = save_tiny_dinov2(tmp_path / "teacher") if encoded else None
        run = trainer(tmp_path / "run", dataset=rows, teacher=teacher, max_steps=1)
        run.train()
        assert read_run(tmp_path / "run").record["dataset"] == "trl-lib/captions"
        run.create_model_card()
        assert "trl-lib/captions" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("/home/ada/models/base", "base"),
        ("/home/ada/models/base/", "base"),
        ("/home/ada/.cache/huggingface/hub/models--Qwen--Qwen2.5-VL-3B/snapshots/66285546/", "Qwen/Qwen2.5-VL-3B"),
        ("~/base", "base"),
        ("../secret/base", "base"),
        ("runs/one", "runs/one"),
        (r"C:\Users\ada\base", "base"),
        (r"\\server\share\base", "base"),
        ("/home/ada", "~"),
        (r"C:\Users\ada", "~"),
        ("https://ada:pw@example.com/base", "https://<hidden>@example.com/base"),
        ("hf_" + "a1" * 10, "<hidden>"),
        ("", ""),
    ],
)
def test_public_names(name, public):
    assert public_name(name) == public


def test_public_settings():
    settings = {
        "hub_token": "<HUB_TOKEN>",
        "model_init_kwargs": {"token": "abc", "cache_dir": "/home/ada/cache", "dtype": "auto"},
        "api_key": "x",
        "eos_token": "<|im_end|>",
        "push": ["hf_" + "b" * 20, 1, None, True],
        "include_num_input_tokens_seen": "no",
        "names": {"b", "a"},
        "max_new_tokens": 5,
    }
    assert public_settings(settings) == {
        "hub_token": "<HUB_TOKEN>",
        "model_init_kwargs": {"token": "<hidden>", "cache_dir": "cache", "dtype": "auto"},
        "api_key": "<hidden>",
        "eos_token": "<|im_end|>",
        "push": ["<hidden>", 1, None, True],
        "include_num_input_tokens_seen": "no",
        "names": ["a", "b"],
        "max_new_tokens": 5,
    }


# Made up; each in the format of its issuer.
SECRETS = {
    "Hugging Face": "hf_" + "aB3" * 11,
    "OpenAI": "sk-proj-" + "aB3-" * 8,
    "GitHub": "ghp_" + "aB3" * 12,
    "GitHub, fine-grained": "github_pat_" + "aB3" * 20,
    "AWS": "AKIA" + "A7" * 8,
    "Google": "AIza" + "aB3" * 11 + "xy",
    "Slack": "xoxb-" + "123456789012-aB3dE6gH9",
    "JSON web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dBjftJeZ4CVP",
    "private key": "-----BEGIN RSA PRIVATE KEY-----",
    "address with a password": "https://me:pw@example.com/data",
    "bucket with a key": "s3://AKIAKEY:se/cr+et@bucket/data",
    "a named one": '{"api_key": "0f3b9c2e7a6d41c58e92b0f7d4a3c6e1905b8d27"}',
}


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_secrets_are_known(secret):
    assert holds_secret(f"what is {secret} for?")
    shown = json.dumps(public_settings({"note": f"what is {secret} for?", "kwargs": [{secret: secret}]}))
    assert secret not in shown and json.loads(shown) == {"note": "<hidden>", "kwargs": [{"<hidden>": "<hidden>"}]}


def test_texts_that_are_no_secrets():
    for text in ("task-aware-something-longer", "disk-0123456789abcdefgh", '"image_token": "reserved_token_00000001"'):
        assert not holds_secret(text)
    commit = "9b1c2e7a6d41c58e92b0f7d4a3c6e1905b8d270f"
    shown = {
        "model_revision": commit,
        "target_modules": r"^model\.layers\.\d+\.(?:self_attn|mlp)\.(q_proj|v_proj)$",
        "optim_args": "betas=0.9,weight_decay=0.1",
        "teacher": "timm/vit_large_patch14_dinov2.lvd142m",
        "architecture": "LlavaForConditionalGeneration",
        "accelerator": "NVIDIA GeForce RTX 4090",
        "started": "2026-03-02T09:00:12+00:00",
        "torch": "2.14.0.dev20260101+cu130",
        "fsdp": "full_shard auto_wrap",
        "data": "hf://datasets/org/name/train.parquet",
        "lr_scheduler_kwargs": {"num_cycles": 1, "rate": 0.5, "on": True, "none": None},
    }
    assert public_settings(shown) == shown
    assert public_settings({"checksum": commit}) == {"checksum": "<hidden>"}


def test_settings_that_are_not_shown():
    """Of what is no word, number or name, nothing."""
    settings = {
        "command": "train --data=/home/ada/faces",
        "data": "https://intranet.example.com/faces?sig=abc",
        "server": "http://10.0.0.5:8000",
        "optim_args": "password=hunter2",
        "secret_key": 1234,
        "home": "/home/ada",
        "windows": r"C:\Users\ada\faces",
        "mail": "ada@example.com",
    }
    assert public_settings(settings) == {
        "command": "train --data=.../faces",
        "data": "<hidden>",
        "server": "<hidden>",
        "optim_args": "<hidden>",
        "secret_key": "<hidden>",
        "home": "~",
        "windows": "faces",
        "mail": "<hidden>",
    }
    assert public_settings(public_settings(settings)) == public_settings(settings)
