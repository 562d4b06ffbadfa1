"""Two processes under DDP, DeepSpeed ZeRO-2 and ZeRO-3, and FSDP2 do what one process does without an engine: train,
measure, evaluate, save, and go on after they were killed. `make engines` installs DeepSpeed and runs these tests.

What upstream does not do on a CPU is done in `engine_worker.start`, with the reason; what it does not do at all is
beside `WHOLE`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_worker import HELD_OUT, MEASURED, Job, encode
from peft import PeftModel
from tiny import image_dataset, save_tiny_dinov2, save_vlm
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import hera_trainer
from hera_trainer import HeadRanking, rank_heads
from hera_trainer.runs.checkpoints import is_complete
from hera_trainer.runs.record import measurement_path

pytestmark = pytest.mark.engines

# Losses of two processes differ by the order of float32 sums; after five steps at a high learning rate, 4e-7 was seen.
TOLERANCE = 1e-5
TIMEOUT = 900  # seconds for one job, which ends a hang; about 10 on two cores
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
NAMES = {
    "ddp": "DistributedDataParallel",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
    "fsdp2": "FSDPModule",
}
LANGUAGE_MODEL = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj)"


def skip_without_deepspeed(engine: str) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: `make engines`, or the extra `engines`")


class Worker:
    """A process that runs jobs, each in processes that it forks. See `engine_worker`."""

    def __init__(self, folder: Path) -> None:
        package, support = Path(hera_trainer.__file__).parents[1], Path(__file__).parents[1] / "support"
        paths = os.pathsep.join([str(package), str(support), os.environ.get("PYTHONPATH", "")])
        # Of a launcher that these tests may run under themselves.
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HOME": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, str(support / "engine_worker.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def statuses(self, job: Job) -> list[int]:
        """Exit statuses of the job's processes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(encode(job), file=self.process.stdin, flush=True)
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT)
        assert ready, f"no end after {TIMEOUT} s: {output(job)}"
        return json.loads(self.process.stdout.readline())

    def ranks(self, job: Job) -> list[dict[str, Any]]:
        """What each process found."""
        statuses = self.statuses(job)
        assert not any(statuses), output(job)
        return [json.loads(Path(job.folder, f"rank{rank}.json").read_text()) for rank in range(len(statuses))]


def output(job: Job) -> str:
    return Path(job.folder, "output.txt").read_text()[-8000:]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("home"))
    yield worker
    worker.process.kill()  # it may be in the middle of a job
    worker.process.communicate()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("parts")
    save_tiny_dinov2(folder / "teacher")
    return save_vlm("llava", folder / "model")


# Training


JOBS = {
    "ZeRO-3, LoRA, checkpointing, ranking": {"engine": "zero3", "lora": True, "checkpointing": True, "ranking": True},
    "ZeRO-3, a teacher that encodes": {"engine": "zero3", "lora": True, "ranking": True, "encodes": True},
    "ZeRO-2, frozen tower": {"engine": "zero2", "lora": True, "checkpointing": True, "targets": LANGUAGE_MODEL},
    "ZeRO-3, frozen tower": {"engine": "zero3", "lora": True, "checkpointing": True, "targets": LANGUAGE_MODEL},
    "FSDP2, frozen tower, ranking": {"engine": "fsdp2", "lora": True, "targets": LANGUAGE_MODEL, "ranking": True},
    "FSDP2, LoRA, checkpointing": {"engine": "fsdp2", "lora": True, "checkpointing": True},
}


@pytest.mark.parametrize("name", JOBS)
def test_trains_as_one_process_does(tmp_path: Path, worker: Worker, model: str, name: str) -> None:
    job = Job(str(tmp_path / "two"), model, **JOBS[name])
    skip_without_deepspeed(job.engine)
    (expected,) = worker.ranks(replace(job, folder=str(tmp_path / "one"), engine=""))
    ranks = worker.ranks(job)
    assert [rank["engine"] for rank in ranks] == [NAMES[job.engine]] * 2
    assert ranks[0]["heads"] == ranks[1]["heads"] == expected["heads"]
    # Five steps of two micro-batches. Where parameters are divided, both passes of a step gather and run a tower.
    once = name == "ZeRO-2, frozen tower"
    assert [rank["towers"] for rank in ranks] == [10 if once else 20] * 2
    assert len(expected["log"]) == 5
    assert all(entry["alignment_pool"] == 16 for entry in expected["log"])
    first, *_, last = (entry["loss"] for entry in expected["log"])
    assert last != pytest.approx(first, abs=0.05)  # what is compared moves, far more than it may differ
    for ours, theirs in zip(ranks[0]["log"], expected["log"], strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE)


# Whole runs: with a monitor, evaluation, checkpoints, a queue and a learned temperature; killed, and resumed


@dataclass(frozen=True)
class Trained:
    """What is trained.

    Args:
        settings: Of the `Job`.
        under_fsdp2: What is different there.
    """

    settings: dict[str, Any]
    under_fsdp2: dict[str, Any]


# LLaVA reads the last layer but one of its tower, so that the last one gets no gradient: torch 2.14 refuses to load
# FSDP2's optimizer without states of all trained parameters. And TRL's fused LM head does not average the gradient of a
# divided LM head over the processes (TRL 1.16).
REACHED = r".*(language_model|encoder\.layers\.0)\..*(proj|fc1|fc2)"
UNREACHED = ("model.vision_tower.encoder.layers.1", "model.vision_tower.post_layernorm")
WHOLE = {
    "LoRA": Trained({"lora": True}, {"targets": REACHED}),
    "all weights": Trained({}, {"frozen": ("lm_head", *UNREACHED)}),
}


@dataclass
class Run:
    """The same job in one process, in two, and in two that are killed and begin again.

    Args:
        one: What the single process found.
        two: What each of two processes found.
        statuses: How the killed ones ended.
        left: Checkpoints that they left, those that are complete.
        resumed: What the resumed ones found.
        folders: `one`, `two` and `killed`: their output folders.
    """

    one: dict[str, Any]
    two: list[dict[str, Any]]
    statuses: list[int]
    left: list[str]
    resumed: list[dict[str, Any]]
    folders: dict[str, Path]


@pytest.fixture(scope="module")
def singles() -> dict[Any, Any]:
    """Single runs by what they trained."""
    return {}


@pytest.fixture(scope="module", params=[(engine, trained) for trained in WHOLE for engine in ENGINES], ids=" ".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    skip_without_deepspeed(request.param[0])
    return request.param


@pytest.fixture(scope="module")
def run(
    case: tuple[str, str],
    worker: Worker,
    model: str,
    singles: dict[Any, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    engine, trained = case
    folder = tmp_path_factory.mktemp("run")
    settings = WHOLE[trained].settings | (WHOLE[trained].under_fsdp2 if engine == "fsdp2" else {})
    job = Job(str(folder / "two"), model, engine, steps=6, watched=True, **settings)
    key = json.dumps(settings)
    if key not in singles:
        single = replace(job, folder=str(folder / "one"), engine="")
        singles[key] = worker.ranks(single)[0], folder / "one" / "out"
    one, one_folder = singles[key]
    killed = replace(job, folder=str(folder / "killed"), output=str(folder / "killed" / "out"))
    two = worker.ranks(job)
    statuses = worker.statuses(replace(killed, dies=3))
    left = [path.name for path in sorted(Path(killed.output).glob("checkpoint-*")) if is_complete(path)]
    resumed = worker.ranks(replace(killed, folder=str(folder / "resumed"), resume=True))
    folders = {"one": one_folder, "two": folder / "two" / "out", "killed": Path(killed.output)}
    return Run(one, two, statuses, left, resumed, folders)


def test_a_whole_run_is_that_of_one_process(case: tuple[str, str], run: Run) -> None:
    assert [rank["engine"] for rank in run.two] == [NAMES[case[0]]] * 2
    assert run.one["log"][-1]["temperature"] != run.one["log"][0]["temperature"]  # it is learned
    assert [entry["alignment_pool"] for entry in run.one["log"]] == [16, 32, 40, 40, 40, 40]  # the queue fills
    for rank in run.two:
        for ours, theirs in zip(rank["log"], run.one["log"], strict=True):
            assert ours == pytest.approx(theirs, rel=TOLERANCE)
        assert rank["queue"]["teacher"] == run.one["queue"]["teacher"]  # the same samples in the same order
        torch.testing.assert_close(*(torch.tensor(found["queue"]["heads"]) for found in (rank, run.one)))


def test_the_monitor_and_evaluation_find_what_one_process_finds(run: Run) -> None:
    """Five batches for two processes: one of them has nothing to do in the last turn."""
    measured = [entry for entry in run.one["watched"] if "alignment_mknn/all" in entry]
    assert [entry["step"] for entry in measured] == [0, 2, 4, 6]
    assert [entry["step"] for entry in run.one["watched"] if "eval_alignment_loss" in entry] == [2, 4, 6, 6]
    for name in ("alignment_mknn/all", "alignment_mknn_image/all", "image_gain"):
        assert len({entry[name] for entry in measured}) > 1, name  # what is compared moves
    for rank in run.two:
        for ours, theirs in zip(rank["watched"], run.one["watched"], strict=True):
            assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)


def loaded(folder: Path, model: str) -> torch.nn.Module:
    """The saved result, by PEFT or transformers alone."""
    kind = transformers.AutoModelForImageTextToText
    if Path(folder, "adapter_config.json").is_file():
        return PeftModel.from_pretrained(kind.from_pretrained(model, dtype="float32"), folder)
    result, report = kind.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert not any(report.values()), report
    return result


def weights(folder: Path, model: str) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in loaded(folder, model).named_parameters()}


def test_what_is_saved_loads_alone_and_is_that_of_one_process(run: Run, model: str) -> None:
    ours, theirs = weights(run.folders["two"], model), weights(run.folders["one"], model)
    assert ours.keys() == theirs.keys()
    # The biases of keys have a gradient of zero but for rounding, of which Adam makes whole steps.
    compared = [name for name in ours if not name.endswith("k_proj.bias")]
    for name in compared:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_what_was_measured_last_is_what_the_saved_result_scores(run: Run, model: str) -> None:
    """By `rank_heads` in this process, of the model that `from_pretrained` gives."""
    folder = run.folders["two"]
    processor = transformers.AutoProcessor.from_pretrained(model)
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    collators: dict[str, Callable | None] = {
        "text": None,
        "image": lambda rows: collator([{k: v for k, v in row.items() if k != "teacher_features"} for row in rows]),
    }
    for context, data_collator in collators.items():
        kept = HeadRanking.load(measurement_path(folder, 6, context))
        ranking = rank_heads(
            loaded(folder, model).eval(),
            processor,
            image_dataset(**HELD_OUT),
            data_collator=data_collator,
            progress=False,
            **MEASURED,
        )
        torch.testing.assert_close(kept.scores, ranking.scores, rtol=0, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(kept.layer_scores, ranking.layer_scores, rtol=0, atol=1e-6, equal_nan=True)
        assert kept.null_p95 == pytest.approx(ranking.null_p95)


def test_killed_and_resumed_it_ends_as_if_nothing_had_happened(run: Run, model: str) -> None:
    assert run.statuses == [-9, -9]
    assert run.left == ["checkpoint-2"]
    for resumed, whole in zip(run.resumed, run.two, strict=True):
        assert 0 < resumed["towers"] < whole["towers"]  # it went on, and did not begin again
        for name in ("log", "watched", "queue", "heads"):
            assert resumed[name] == whole[name], name
    ours, theirs = weights(run.folders["killed"], model), weights(run.folders["two"], model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
