"""What the trackers of `report_to` get from AlignmentMonitorCallback, read back with their own readers."""

from __future__ import annotations

import builtins
import importlib.util
import io
import json
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from runs import logged, trainer
from tiny import image_dataset

STEPS = [0, 1, 2]
GROUPS = ("alignment_mknn", "alignment_mknn_image")


def watched_run(folder, **kwargs):
    run = trainer(
        folder,
        max_steps=2,
        monitor_steps=1,
        monitor_num_samples=10,
        eval_dataset=image_dataset(n=12, seed=7, with_features=8),
        **kwargs,
    )
    run.train()
    return run


def is_heat_map(image: Image.Image) -> bool:
    """Three panels in a row, with colours."""
    values = np.asarray(image.convert("RGB"))
    return image.width > 2 * image.height and len(np.unique(values.reshape(-1, 3), axis=0)) > 20


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
class TestTensorBoard:
    def events(self, folder, monkeypatch, **kwargs):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "board"))
        run = watched_run(folder, report_to="tensorboard", **kwargs)
        (file,) = (folder / "board").iterdir()  # all went through the one writer of the trainer's callback
        accumulator = EventAccumulator(str(file), size_guidance={"images": 0})
        accumulator.Reload()
        return run, accumulator

    def test_scalars_and_images(self, tmp_path, monkeypatch):
        run, events = self.events(tmp_path, monkeypatch)
        for group in GROUPS:
            for name in ("aligned", "top", "all"):
                scalars = events.Scalars(f"train/{group}/{name}")
                assert [scalar.step for scalar in scalars] == STEPS
                assert [scalar.value for scalar in scalars] == pytest.approx(logged(run, f"{group}/{name}"))
            images = events.Images(f"train/{group}/heads")
            assert [image.step for image in images] == STEPS
            assert all(is_heat_map(Image.open(io.BytesIO(image.encoded_image_string))) for image in images)
        assert [scalar.step for scalar in events.Scalars("train/loss")] == [1, 2]

    def test_scalars_alone_without_matplotlib(self, tmp_path, monkeypatch):
        original = builtins.__import__

        def without(name, *args, **kwargs):
            if name.startswith("matplotlib"):
                raise ImportError(name)
            return original(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.warns(UserWarning, match=r"no heat map.*hera-trainer\[plot\]"):
            _, events = self.events(tmp_path, monkeypatch)
        assert not events.Tags()["images"]
        assert len(events.Scalars("train/alignment_mknn/all")) == 3


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio(tmp_path):
    """In its local database, without the network."""
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    run = watched_run(tmp_path, report_to="trackio", project="hera-test", run_name=tmp_path.name)
    logs = SQLiteStorage.get_logs("hera-test", tmp_path.name)
    for group in GROUPS:
        for name in ("aligned", "top", "all"):
            key = f"train/{group}/{name}"
            points = [(log["train/global_step"], log[key]) for log in logs if key in log]
            assert points == [(s, pytest.approx(v)) for s, v in zip(STEPS, logged(run, f"{group}/{name}"), strict=True)]
        key = f"train/{group}/heads"
        maps = [log for log in logs if key in log]
        assert [(log["train/global_step"], log[key]["_type"]) for log in maps] == [(s, "trackio.image") for s in STEPS]
        assert all(is_heat_map(Image.open(MEDIA_DIR / log[key]["file_path"])) for log in maps)


def written_records(log: bytes) -> Iterator[bytes]:
    """Records of a log in the format of LevelDB (blocks of 32 KiB; checksum, length, kind) behind a header of wandb."""
    position, parts = 7, []
    while position + 7 <= len(log):
        if 32768 - position % 32768 < 7:  # no space for a record's header: the rest of the block is empty
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(log[position + 4 : position + 6], "little"), log[position + 6]
        if position + 7 + length > len(log):  # being written
            return
        parts.append(log[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield b"".join(parts)
            parts = []


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb(tmp_path, monkeypatch):
    """In offline mode, which writes to the disk what would be uploaded."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = watched_run(tmp_path / "run", report_to="wandb", run_name="watched")
    wandb.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 60  # its own process goes on writing for a moment
    while True:
        records = [Record.FromString(data) for data in written_records(file.read_bytes())]
        if (records and records[-1].WhichOneof("record_type") == "exit") or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    rows = [
        {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    for group in GROUPS:
        for name in ("aligned", "top", "all"):
            key = f"train/{group}/{name}"
            points = [(row["train/global_step"], row[key]) for row in rows if key in row]
            assert points == [(s, pytest.approx(v)) for s, v in zip(STEPS, logged(run, f"{group}/{name}"), strict=True)]
        key = f"train/{group}/heads"
        maps = [row for row in rows if f"{key}/_type" in row]
        assert [(r["train/global_step"], r[f"{key}/_type"]) for r in maps] == [(s, "image-file") for s in STEPS]
        assert all(is_heat_map(Image.open(folder / "files" / row[f"{key}/path"])) for row in maps)
