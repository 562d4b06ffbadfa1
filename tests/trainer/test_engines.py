"""Two processes under DeepSpeed ZeRO train as one process without it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_worker import Job, encode, result, run
from tiny import save_vlm

import hera_trainer
from hera_trainer.alignment.checks import check_loss_scaling

# Losses of two processes differ by the order of float32 sums; after five steps at a high learning rate, 4e-7 was seen.
TOLERANCE = 1e-5
TIMEOUT = 120  # seconds; about 15 on two cores
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
LANGUAGE_MODEL = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj)"
JOBS = {
    "ZeRO-2, full": {"stage": 2},
    "ZeRO-3, full": {"stage": 3},
    "ZeRO-3, LoRA, checkpointing, ranking": {"stage": 3, "lora": True, "ranking": True},
    "ZeRO-2, frozen tower": {"stage": 2, "lora": True, "targets": LANGUAGE_MODEL},
    "ZeRO-3, frozen tower": {"stage": 3, "lora": True, "targets": LANGUAGE_MODEL},
}


def launch(job: Job) -> list[dict]:
    """What each of two processes found."""
    package, tests = Path(hera_trainer.__file__).parents[1], Path(__file__).parents[1] / "support"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(package), str(tests), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "XDG_CACHE_HOME": job.folder,  # no ranking of another run
        "HF_HOME": job.folder,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    output = Path(job.folder, "output.txt")
    with output.open("w") as stream:
        process = subprocess.Popen(
            [*command, str(tests / "engine_worker.py"), encode(job)],
            env=environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    assert code == 0, output.read_text()[-8000:]
    return [json.loads(Path(job.folder, f"rank{rank}.json").read_text()) for rank in range(2)]


@needs_deepspeed
@pytest.mark.parametrize("name", JOBS)
def test_zero_trains_as_one_process_does(tmp_path, name):
    job = Job(str(tmp_path), save_vlm("llava", tmp_path / "model"), **JOBS[name])
    expected = result(run(replace(job, folder=str(tmp_path / "single"), stage=0)))
    ranks = launch(job)
    assert [rank["engine"] for rank in ranks] == ["DeepSpeedEngine"] * 2
    assert ranks[0]["heads"] == ranks[1]["heads"] == expected["heads"]
    # Five steps of two micro-batches. Where parameters are divided, both passes of a step gather and run a tower.
    once = name == "ZeRO-2, frozen tower"
    assert [rank["towers"] for rank in ranks] == [10 if once else 20] * 2
    assert len(expected["log"]) == 5
    assert all(entry["alignment_pool"] == 16 for entry in expected["log"])
    assert expected["log"][4]["loss"] < expected["log"][0]["loss"] - 1  # what is compared moves
    for ours, theirs in zip(ranks[0]["log"], expected["log"], strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE)


def test_fp16_under_deepspeed_needs_a_fixed_temperature():
    deepspeed = SimpleNamespace(mixed_precision="fp16", state=SimpleNamespace(deepspeed_plugin=object()))
    learned, fixed = SimpleNamespace(learn_temperature=True), SimpleNamespace(learn_temperature=False)
    with pytest.raises(ValueError, match="learn_temperature=False"):
        check_loss_scaling(learned, deepspeed)
    check_loss_scaling(fixed, deepspeed)
    check_loss_scaling(learned, SimpleNamespace(mixed_precision="bf16", state=deepspeed.state))
    check_loss_scaling(learned, SimpleNamespace(mixed_precision="fp16", state=SimpleNamespace(deepspeed_plugin=None)))
