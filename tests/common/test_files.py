"""A folder that is replaced: whatever fails, and wherever the process is killed, old or new one is whole on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hera_trainer.common.files import replacing_folder, restore_folder

# Replaces the folder `result` in `sys.argv[1]`. The call number `sys.argv[2]` that changes the disk fails, or is the
# last thing that the process comes to.
REPLACE = """
import os, shutil, signal, sys
from pathlib import Path
from hera_trainer.common.files import replacing_folder

root, fatal, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
calls = 0

def counted(original):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == fatal and kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if calls == fatal:
            raise OSError("No space left on device")
        return original(*args, **kwargs)
    return call

os.replace, os.unlink, os.rmdir = map(counted, (os.replace, os.unlink, os.rmdir))
with replacing_folder(root / "result") as folder:
    for name in ("a", "b"):
        (folder / name).write_text("new")
    counted(lambda: None)()
print(calls)
"""


def replace(root: Path, fatal: int, kind: str) -> subprocess.CompletedProcess:
    (root / "result").mkdir(parents=True)
    for name in ("a", "b"):
        (root / "result" / name).write_text("old")
    arguments = [sys.executable, "-c", REPLACE, str(root), str(fatal), kind]
    return subprocess.run(arguments, capture_output=True, text=True)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_undisturbed(tmp_path):
    assert replace(tmp_path, 0, "fail").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert content(tmp_path / "result") == {"a": "new", "b": "new"}


@pytest.mark.parametrize("kind", ["fail", "kill"])
def test_each_step_fails_in_turn(tmp_path, kind):
    steps = int(replace(tmp_path / "all", 0, kind).stdout)
    assert steps >= 6  # the writing, two changes of names, and an old folder with two files to delete
    old, new, held = {"a": "old", "b": "old"}, {"a": "new", "b": "new"}, []
    for step in range(1, steps + 1):
        root = tmp_path / str(step)
        run = replace(root, step, kind)
        assert run.returncode in ((-signal.SIGKILL,) if kind == "kill" else (0, 1)), run.stderr
        whole = [content(path) for path in root.iterdir()]
        assert old in whole or new in whole
        if kind == "kill":
            restore_folder(root / "result")
        held.append(content(root / "result"))
        with replacing_folder(root / "result") as folder:
            (folder / "a").write_text("newer")
        assert content(root / "result") == {"a": "newer"}
        assert not list(root.glob(".*.old"))
    # Up to the second change of names it is the old one, afterwards the new one.
    assert held == [old] * 3 + [new] * (steps - 3)


def test_old_one_is_kept_where_it_can_not_be_put_back(tmp_path, monkeypatch):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "a").write_text("old")
    original, calls = os.replace, []

    def failing(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError("Input/output error")
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="Input/output error"), replacing_folder(tmp_path / "result"):
            pass
    assert len(calls) == 3
    restore_folder(tmp_path / "result")
    assert content(tmp_path / "result") == {"a": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_folder_that_came_in_between_is_no_reason_to_delete(tmp_path):
    """Where somebody wrote to the name meanwhile, both stay until another one has replaced them."""
    assert replace(tmp_path, 3, "kill").returncode == -signal.SIGKILL
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "b").write_text("somebody's")
    restore_folder(tmp_path / "result")
    (aside,) = tmp_path.glob(".result.*.old")
    assert content(aside) == {"a": "old", "b": "old"}
    assert content(tmp_path / "result") == {"b": "somebody's"}


def test_what_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    with replacing_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "disk" / "real") == {"a": "new"}
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]
