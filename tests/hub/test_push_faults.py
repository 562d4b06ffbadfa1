"""Pushes that go wrong: one clear line, the result on disk as it was, and a second push that completes."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from hub_server import USER, XET, running
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig
from runs import trainer

from hera_trainer.hub.push import PushError, push_folder

REPO = f"{USER}/aligned"


@pytest.fixture
def hub(monkeypatch):
    with running(monkeypatch) as server:
        yield server


def snapshot(folder: Path) -> dict[str, str]:
    files = {path for path in folder.rglob("*") if path.is_file()}
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def finished_run(folder, **kwargs):
    lora = LoraConfig(r=4, target_modules="all-linear")
    run = trainer(folder, peft_config=lora, max_steps=1, **{"hub_model_id": REPO, **kwargs})
    run.train()
    run.save_model()
    return run


def assert_one_line(error: PushError, folder: Path, *parts: str) -> None:
    text = str(error)
    assert "\n" not in text
    for part in (*parts, repr(REPO), f"The result is complete in {str(folder)!r}", "`trainer.push_to_hub()` again"):
        assert part in text, (part, text)


# What fails, how, and what is said of it. The client itself repeats some requests, so faults last until healed.
FAULTS = [
    ("create", 401, "the Hub refused the access token (401)", "hf auth login"),
    ("create", 403, "the Hub refused the access token (403)", "hf auth login"),
    ("create", "drop", "the connection broke (", "Check the network"),
    ("validate", "drop", "the connection broke (", "Check the network"),
    ("preupload", 503, "the Hub is busy or down (503)", "Wait a little"),
    ("preupload", 404, "the Hub knows no such repository or branch (404)", "hub_revision"),
    ("batch", 500, "the Hub is busy or down (500)", "Wait a little"),
    ("upload", "drop", "the connection broke (", "Check the network"),
    ("upload", 403, "the Hub refused the access token (403)", "hf auth login"),
    ("complete", 502, "the Hub is busy or down (502)", "Wait a little"),
    ("commit", "drop", "the connection broke (", "Check the network"),
    ("commit", "drop_answer", "the connection broke (", "Check the network"),
    ("commit", 500, "the Hub is busy or down (500)", "Wait a little"),
    ("commit", 403, "the Hub refused the access token (403)", "hf auth login"),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """One finished run for all faults."""
    folder = tmp_path_factory.mktemp("run") / "out"
    return finished_run(folder), folder


@pytest.fixture
def finished(hub, result):
    """The finished run, as if it had never spoken to a Hub."""
    run, folder = result
    run.hub_model_id = None
    run.__dict__.pop("_hub", None)  # it keeps the address of an earlier server
    return run, folder


class TestFaults:
    @pytest.mark.parametrize(("kind", "fault", "reason", "cure"), FAULTS)
    def test_clear_error_then_a_push_that_completes(self, hub, finished, kind, fault, reason, cure):
        run, folder = finished
        hub.chunk_size = 10_000 if kind == "complete" else None
        before = snapshot(folder)
        hub.fail(kind, fault)
        with pytest.raises(PushError) as caught:
            run.push_to_hub()
        assert_one_line(caught.value, folder, reason, cure)
        assert snapshot(folder) == before
        assert caught.value.__cause__ is not None  # the client's own error, for who wants to know more
        if fault != "drop_answer":
            assert not hub.repos.get(REPO)  # all or nothing
        hub.heal()
        run.push_to_hub()
        assert snapshot(folder) == before
        uploaded = (folder / "adapter_model.safetensors").read_bytes()
        assert hub.repos[REPO]["adapter_model.safetensors"] == uploaded
        assert hub.commits[REPO] == ["initial commit", "End of training"]  # also if only the answer was lost

    def test_uploaded_objects_are_not_sent_again(self, hub, finished):
        run, _ = finished
        hub.fail("commit", 500)
        with pytest.raises(PushError):
            run.push_to_hub()
        sent = hub.calls["upload"]
        hub.heal()
        run.push_to_hub()
        assert sent == 2 and hub.calls["upload"] == sent  # weights and heat map

    def test_client_repeats_a_broken_upload(self, hub, finished):
        run, _ = finished
        hub.fail("upload", "drop", times=2)
        run.push_to_hub()
        assert "adapter_model.safetensors" in hub.repos[REPO]

    def test_wrong_tokens(self, hub, finished, monkeypatch):
        run, folder = finished
        for token, status in (("hf_wrong", 401), ("hf_read", 403)):
            with pytest.raises(PushError) as caught:
                run.push_to_hub(token=token)
            assert_one_line(caught.value, folder, f"the Hub refused the access token ({status})")
            assert token not in str(caught.value)
            assert isinstance(caught.value.__cause__, HfHubHTTPError)
        with monkeypatch.context() as offline, pytest.raises(PushError) as caught:
            offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            run.push_to_hub()
        assert_one_line(caught.value, folder, "offline mode is on", "Unset `HF_HUB_OFFLINE` and call")

    def test_invalid_card(self, hub, finished):
        run, _ = finished
        with pytest.raises(PushError, match=r'Invalid metadata in README.md\. - "license" must be one of'):
            run.push_to_hub(license="my own")
        run.push_to_hub(license="mit")

    def test_from_disk(self, hub, result):
        _, folder = result
        before = snapshot(folder)
        hub.fail("upload", "drop")
        with pytest.raises(PushError, match=r"connection broke .*push_folder\('.*out', 'somebody/aligned'\)"):
            push_folder(folder, REPO)
        hub.heal()
        push_folder(folder, REPO)
        assert snapshot(folder) == before
        assert "adapter_model.safetensors" in hub.repos[REPO]


@pytest.fixture
def branches(monkeypatch):
    """The branches that commits are asked for."""
    asked, commit = [], HfApi.create_commit

    def watched(self, *args, **kwargs):
        asked.append(kwargs["revision"])
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", watched)
    return asked


def test_a_folder_at_home_and_none(hub, tmp_path, monkeypatch):
    """A control's is refused there, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    run = trainer(tmp_path / "out", max_steps=1, teacher_control="permuted")
    run.train()
    run.save_model()
    with pytest.raises(ValueError, match="control run"):
        push_folder("~/out", REPO)
    with pytest.raises(ValueError, match="'~/nothing' is no folder"):
        push_folder("~/nothing", REPO)
    assert not hub.repos


class TestTheSamePushAgain:
    """What a message advises, and what is pushed from disk, is as private and goes to the branch that was asked for."""

    @pytest.mark.parametrize("configured", [True, False])
    def test_advice(self, hub, finished, branches, monkeypatch, configured):
        run, folder = finished
        asked = {} if configured else {"private": True, "revision": "dev"}
        if configured:
            for name, value in {"hub_private_repo": True, "hub_revision": "dev", "publish_control": True}.items():
                monkeypatch.setattr(run.args, name, value)
        hub.fail("create", 503)
        with pytest.raises(PushError) as caught:
            run.push_to_hub(**asked)
        hub.heal()
        advised, from_disk = re.findall(r"`(.+?)`", str(caught.value))
        assert advised == "trainer.push_to_hub(private=True, revision='dev')"
        assert from_disk.endswith(", publish_control=True)") == configured
        eval(from_disk.removeprefix("hera_trainer.hub.push."), {"push_folder": push_folder})
        assert hub.visibility[REPO] == "private" and branches == ["dev"]
        hub.fail("preupload", 503)  # the repository is there: another request, the same advice
        for push in (lambda: run.push_to_hub(**asked), lambda: push_folder(folder, REPO, private=True, revision="dev")):
            with pytest.raises(PushError, match=r"push_to_hub\(private=True, revision='dev'\)` again"):
                push()

    def test_from_disk_as_the_run_was_configured(self, hub, result, branches, tmp_path):
        folder = tmp_path / "out"
        shutil.copytree(result[1], folder)
        record = json.loads((folder / "hera_run.json").read_text())
        record["config"] |= {"hub_private_repo": True, "hub_revision": "dev"}
        (folder / "hera_run.json").write_text(json.dumps(record))
        push_folder(folder, REPO)
        assert hub.visibility[REPO] == "private"
        push_folder(folder, f"{USER}/public", private=False, revision="main")
        assert hub.visibility[f"{USER}/public"] == "public" and branches == ["dev", "main"]
        record["config"]["hub_revision"] = "<hidden>"
        (folder / "hera_run.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="Set `revision`"):
            push_folder(folder, REPO)


class TestWhileTraining:
    def test_refused_before_training(self, hub, tmp_path):
        with pytest.raises(PushError, match=r"refused the access token \(401\).*training has not begun") as caught:
            finished_run(tmp_path, push_to_hub=True, hub_token="hf_wrong")
        assert "\n" not in str(caught.value)

    def test_training_goes_on(self, hub, tmp_path, caplog):
        """A push in the background that fails is told, and neither stops training nor the push after it."""
        hub.fail("commit", 500, times=1)
        lora = LoraConfig(r=4, target_modules="all-linear")
        saving = {"save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
        run = trainer(tmp_path, peft_config=lora, max_steps=2, push_to_hub=True, hub_model_id=REPO, **saving)
        with caplog.at_level(logging.WARNING):
            run.train()
        said = [record.getMessage() for record in caplog.records if "Training is not affected" in record.getMessage()]
        assert len(said) == 1 and "the Hub is busy or down (500)" in said[0]
        assert run.state.global_step == 2
        assert hub.commits[REPO] == ["initial commit", "Training in progress, step 2"]


class TestXet:
    """The way that large files go by default."""

    @pytest.fixture
    def hub(self, monkeypatch):
        with running(monkeypatch, xet=True) as server:
            yield server

    @pytest.mark.parametrize(
        ("kind", "fault", "reason"),
        [
            ("xet_token", 403, "the Hub refused the access token (403)"),
            ("xet_token", 404, "the Hub knows no such repository or branch (404)"),
            ("xorb", 400, "Bad Request"),
            ("commit", "drop", "the connection broke ("),
        ],
    )
    def test_clear_error_then_a_push_that_completes(self, hub, finished, kind, fault, reason):
        run, folder = finished
        before = snapshot(folder)
        hub.fail(kind, fault)
        with pytest.raises(PushError) as caught:
            run.push_to_hub()
        assert_one_line(caught.value, folder, reason)
        assert not hub.repos[REPO]
        hub.heal()
        run.push_to_hub()
        assert snapshot(folder) == before
        oid = before[str(folder / "adapter_model.safetensors")]
        assert hub.repos[REPO]["adapter_model.safetensors"] == f"{XET}{oid}".encode()
        assert hub.repos[REPO]["README.md"] == (folder / "README.md").read_bytes()
        assert hub.calls["batch"] == hub.calls["upload"] == 0 and hub.calls["xorb"] > 0
