"""A run may be killed at any moment: the same command again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from tiny import build_vlm, image_dataset, save_tiny_dinov2, sft_args
from transformers import TrainerState
from trl import SFTTrainer

from hera_trainer import HeRAConfig, HeRATrainer, __version__
from hera_trainer import trainer as trainer_module
from hera_trainer.runs.checkpoints import MARKER_FILE, find_checkpoint, make_room, mark_complete, rotate

ROWS, RANKING_FORWARDS = 24, 6
SAVED = [
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "hera_state.json",
    "hera_queue.safetensors",
    "head_ranking.json",
    MARKER_FILE,
]


class Worker:
    """Runs the training command in processes of their own (see `fault_worker.py`)."""

    def __init__(self, teacher: str) -> None:
        self.teacher = teacher
        path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[1] / "support")])
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "support" / "fault_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def run(self, folder: Path, resume: bool | None = None, fault: str | None = None) -> int:
        """The exit status of the command."""
        folder.mkdir(exist_ok=True)
        order = {"folder": str(folder), "teacher": self.teacher, "resume": resume, "fault": fault}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def finish(self, folder: Path, resume: bool | None = None) -> dict:
        """What the command ends with."""
        assert self.run(folder, resume) == 0, (folder / "log.txt").read_text()[-4000:]
        return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(save_tiny_dinov2(tmp_path_factory.mktemp("teacher")))
    yield worker
    worker.process.stdin.close()
    worker.process.wait(timeout=60)


@pytest.fixture(scope="module")
def undisturbed(worker, tmp_path_factory):
    """A run that nothing kills: its folder and its result."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = worker.finish(folder)
    assert (result["encoded"], result["ranked"], len(result["logs"])) == (ROWS, RANKING_FORWARDS, 4)
    assert checkpoints_of(folder) == {"checkpoint-4": True}
    return folder, result


def checkpoints_of(folder: Path) -> dict[str, bool]:
    """The checkpoints on disk, and whether they are complete."""
    return {path.name: (path / MARKER_FILE).is_file() for path in sorted((folder / "out").glob("*checkpoint-*"))}


def assert_same_end(folder: Path, result: dict, undisturbed: tuple[Path, dict]) -> None:
    """The same losses, weights, heads and temperature, and the same last checkpoint, byte by byte."""
    for name in ("logs", "heads", "log_temperature", "parameters"):
        assert result[name] == undisturbed[1][name], name
    assert checkpoints_of(folder) == {"checkpoint-4": True}
    for name in SAVED:
        files = [path / "out" / "checkpoint-4" / name for path in (folder, undisturbed[0])]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    names = [sorted(path.name for path in (f / "out" / "checkpoint-4").iterdir()) for f in (folder, undisturbed[0])]
    assert names[0] == names[1]


class TestKilled:
    @pytest.mark.parametrize(
        ("fault", "encoded", "ranked"), [("teacher", ROWS - 8, RANKING_FORWARDS), ("ranking", 0, RANKING_FORWARDS)]
    )
    def test_before_the_first_checkpoint(self, worker, undisturbed, tmp_path, fault, encoded, ranked):
        """The finished chunk of 8 teacher vectors, and after that all of them, are not computed again."""
        assert worker.run(tmp_path, fault=fault) == -signal.SIGKILL
        result = worker.finish(tmp_path)
        assert (result["encoded"], result["ranked"]) == (encoded, ranked)
        assert_same_end(tmp_path, result, undisturbed)

    @pytest.mark.parametrize(
        ("fault", "left"),
        [
            ("between the passes", {"checkpoint-2": True}),
            ("after the adapter", {"checkpoint-2": True, "checkpoint-4": False}),
            ("in the state", {"checkpoint-2": True, "checkpoint-4": False}),
            ("before the marker", {"checkpoint-2": True, "checkpoint-4": False}),
            ("in deleting", {"checkpoint-2": False, "checkpoint-4": True}),
        ],
    )
    def test_after_a_checkpoint(self, worker, undisturbed, tmp_path, fault, left):
        """There is a complete checkpoint at any moment, although only one is kept. Half of one is skipped and replaced,
        and neither teacher nor ranking runs again."""
        assert worker.run(tmp_path, fault=fault) == -signal.SIGKILL
        assert checkpoints_of(tmp_path) == left
        if fault == "before the marker":
            assert (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").is_file()
        if left.get("checkpoint-4") is False:  # as a run of more processes would leave
            (tmp_path / "out" / "checkpoint-4" / "rng_state_1.pth").touch()
        result = worker.finish(tmp_path, resume=True)
        assert (result["encoded"], result["ranked"]) == (0, 0)
        skipped = [message for message in result["warnings"] if "checkpoint-4 was interrupted" in message]
        assert len(skipped) == len(result["warnings"]) == (left.get("checkpoint-4") is False)
        if fault == "in deleting":  # nothing was left to do but that
            assert checkpoints_of(tmp_path) == left
            shutil.rmtree(tmp_path / "out" / "checkpoint-2")
        assert_same_end(tmp_path, result, undisturbed)

    def test_in_the_first_checkpoint(self, worker, undisturbed, tmp_path):
        assert worker.run(tmp_path, fault="in the first checkpoint") == -signal.SIGKILL
        assert worker.run(tmp_path, resume=True) == 1
        assert "checkpoint-2 have no `hera_complete`" in (tmp_path / "log.txt").read_text()
        result = worker.finish(tmp_path)
        assert (result["encoded"], result["ranked"]) == (0, 0)
        # What has the trainer's state, be it half of it, might be a whole checkpoint of SFTTrainer.
        assert (tmp_path / "out" / "earlier-run" / "checkpoint-2" / "trainer_state.json").is_file()
        shutil.rmtree(tmp_path / "out" / "earlier-run")
        assert_same_end(tmp_path, result, undisturbed)

    def test_twice_in_different_places(self, worker, undisturbed, tmp_path):
        """The command that resumes is killed too."""
        assert worker.run(tmp_path, fault="between the passes") == -signal.SIGKILL
        assert worker.run(tmp_path, resume=True, fault="after the adapter") == -signal.SIGKILL
        assert worker.run(tmp_path, resume=True, fault="before the marker") == -signal.SIGKILL
        assert checkpoints_of(tmp_path) == {"checkpoint-2": True, "checkpoint-4": False}
        assert_same_end(tmp_path, worker.finish(tmp_path, resume=True), undisturbed)


def folder_of(output_dir: Path, step: int, complete: bool, state: bool = True, prefix: str = "") -> Path:
    path = output_dir / f"{prefix}checkpoint-{step}"
    path.mkdir(parents=True)
    if state:
        (path / "trainer_state.json").write_text("{}")
    if complete:
        mark_complete(path, step)
    return path


class TestFindCheckpoint:
    def test_newest_complete_one(self, tmp_path):
        """By number, not by name: 10 is newer than 9."""
        folder_of(tmp_path, 9, True)
        newest = folder_of(tmp_path, 10, True)
        (tmp_path / "checkpoint-11").write_text("a file")
        (tmp_path / "checkpoint-x").mkdir()
        assert find_checkpoint(True, tmp_path) == str(newest)
        assert json.loads((newest / MARKER_FILE).read_text()) == {"step": 10, "hera_trainer": __version__}

    def test_newer_ones_are_skipped_with_a_warning(self, tmp_path):
        complete = folder_of(tmp_path, 5, True)
        for step in (3, 10, 15):
            folder_of(tmp_path, step, False)
        with pytest.warns(UserWarning, match="checkpoint-5: the writing of checkpoint-15, checkpoint-10 was"):
            assert find_checkpoint(True, tmp_path) == str(complete)

    def test_no_checkpoint(self, tmp_path):
        for output_dir in (tmp_path, tmp_path / "missing"):
            with pytest.raises(ValueError, match="No valid checkpoint"):
                find_checkpoint(True, output_dir)
        assert find_checkpoint(None, tmp_path) is None and find_checkpoint(False, tmp_path) is None

    def test_only_incomplete_ones(self, tmp_path):
        folder_of(tmp_path, 2, False)
        with pytest.raises(ValueError, match=r"checkpoint-2 have no `hera_complete`\. Train without"):
            find_checkpoint(True, tmp_path)

    def test_named_one(self, tmp_path, recwarn):
        marked = folder_of(tmp_path, 2, True)
        assert find_checkpoint(marked, tmp_path) == str(marked)
        assert not recwarn.list
        with pytest.raises(ValueError, match=r"no `trainer_state\.json`.*Name an earlier one"):
            find_checkpoint(str(folder_of(tmp_path, 3, False, state=False)), tmp_path)
        with pytest.warns(UserWarning, match="no `hera_complete`: SFTTrainer wrote it"):
            assert find_checkpoint(str(folder_of(tmp_path, 4, False)), tmp_path).endswith("checkpoint-4")


class TestReplacingAndDeleting:
    def test_complete_one_stays_until_it_is_replaced(self, tmp_path):
        checkpoint = folder_of(tmp_path, 4, True)
        (checkpoint / "stale").touch()
        make_room(checkpoint)
        aside = tmp_path / "replaced-checkpoint-4"
        assert not checkpoint.exists() and (aside / "stale").is_file()
        assert find_checkpoint(True, tmp_path) == str(aside)
        folder_of(tmp_path, 4, False)
        with pytest.warns(UserWarning, match="from replaced-checkpoint-4: the writing of checkpoint-4 was"):
            assert find_checkpoint(True, tmp_path) == str(aside)
        make_room(checkpoint)  # the run that resumes comes to the same step
        assert (aside / MARKER_FILE).is_file() and not checkpoint.exists()
        folder_of(tmp_path, 4, True)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]

    def test_one_without_a_marker_stays_too(self, tmp_path):
        """SFTTrainer's are whole without one. But it does not take the place of a complete one."""
        checkpoint, aside = folder_of(tmp_path, 4, False), tmp_path / "replaced-checkpoint-4"
        make_room(checkpoint)
        assert (aside / "trainer_state.json").is_file() and not checkpoint.exists()
        mark_complete(aside, 4)
        make_room(folder_of(tmp_path, 4, False))
        assert (aside / MARKER_FILE).is_file() and not checkpoint.exists()

    def test_rotation_keeps_the_newest_and_the_best(self, tmp_path):
        paths = {step: folder_of(tmp_path, step, complete=step != 9) for step in (1, 2, 3, 4, 9)}
        for number, path in enumerate(paths.values()):
            os.utime(path, (number * 10, number * 10))
        names = lambda: sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir())  # noqa: E731
        rotate(tmp_path, None, {paths[4]})
        assert names() == [1, 2, 3, 4, 9]
        rotate(tmp_path, 4, {paths[4]})
        assert names() == [1, 2, 3, 4]  # the interrupted one first, although it is the newest
        rotate(tmp_path, 3, {paths[4], paths[1]})
        assert names() == [1, 3, 4]
        rotate(tmp_path, 1, {paths[4], paths[1]})
        assert names() == [1, 4]


def small_trainer(path: Path, **kwargs):
    model, processor = build_vlm("llava")
    defaults = {
        "per_device_train_batch_size": 6,
        "num_neighbors": 3,
        "gradient_accumulation_steps": 1,
        "aligned_heads": ["L0H1"],
        "save_strategy": "steps",
        "save_steps": 1,
    }
    return HeRATrainer(
        model,
        HeRAConfig(**sft_args(path, **{**defaults, **kwargs})),
        train_dataset=image_dataset(n=24, with_features=8),
        processing_class=processor,
        peft_config=LoraConfig(target_modules="all-linear", r=4),
    )


def test_without_alignment_nothing_is_marked(tmp_path):
    """And checkpoints of such runs, which are SFTTrainer's, are resumed as SFTTrainer does."""
    small_trainer(tmp_path, alignment_weight=0.0, max_steps=1).train()
    assert not list(tmp_path.rglob(MARKER_FILE))
    second = small_trainer(tmp_path, alignment_weight=0.0, max_steps=2)
    assert isinstance(second, SFTTrainer)
    second.train(resume_from_checkpoint=True)
    assert len([entry for entry in second.state.log_history if "loss" in entry]) == 2
    with pytest.raises(ValueError, match="checkpoint-2, checkpoint-1 have no"):
        small_trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=True)


def test_marker_waits_for_all_processes(tmp_path, monkeypatch):
    """It is written last, after the other processes have written theirs; deleting comes after it."""
    events = []
    for owner, name in [
        (HeRATrainer, "_save_rng_state"),
        (TrainerState, "save_to_json"),
        (Accelerator, "wait_for_everyone"),
        (trainer_module, "make_room"),
        (trainer_module, "mark_complete"),
        (trainer_module, "rotate"),
    ]:
        original = getattr(owner, name)

        def recording(*args, original=original, name=name, **kwargs):
            events.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recording)
    run = small_trainer(tmp_path, max_steps=1)
    run.train()
    begin, end = events.index("make_room"), events.index("rotate")
    assert events[begin : begin + 2] == ["make_room", "wait_for_everyone"]
    order = [name for name in events[begin + 2 : end + 1] if name != "wait_for_everyone"]
    assert order == ["_save_rng_state", "save_to_json", "mark_complete", "rotate"]
    assert events[end - 2 : end + 1] == ["wait_for_everyone", "mark_complete", "rotate"]


def test_limit_is_that_of_the_user(tmp_path):
    """Deleting old checkpoints later than `Trainer` does changes no setting, in memory or in the checkpoint."""
    run = small_trainer(tmp_path, max_steps=3, save_total_limit=2)
    run.train()
    assert run.args.save_total_limit == 2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    saved = torch.load(tmp_path / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 2
