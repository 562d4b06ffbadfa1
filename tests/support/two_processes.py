"""Runs a worker of the tests in two processes, once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import hera_trainer

TIMEOUT = 300  # seconds; about 40 on two cores


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(worker: str, folder: Path) -> None:
    """Runs `worker` on `folder` in two processes, with caches of their own."""
    tests, package = Path(__file__).parent, Path(hera_trainer.__file__).parents[1]
    paths = os.pathsep.join([str(package), str(tests), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home")}
    # Of a launcher that these tests may run under themselves.
    environment = {k: v for k, v in environment.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(free_port()), str(tests / worker), str(folder)]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    assert code == 0, (folder / "output.txt").read_text()[-8000:]


def launched_once(worker: str, factory: pytest.TempPathFactory) -> Path:
    """Where the two processes of `worker` left what they computed; launched once, also by a parallel pytest."""
    name = worker.removesuffix(".py")
    root = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.mktemp(name)
    path = root / f"{name} run"
    with FileLock(root / f"{name}.lock"):
        if not path.exists():
            path.mkdir()
            launch(worker, path)
    return path
