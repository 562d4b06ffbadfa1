"""AlignmentMonitorCallback in other kinds of runs: two processes, 4-bit weights."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from monitor_worker import STEP, train
from peft import LoraConfig
from runs import assert_same_parameters, logged, parameters
from tiny import image_dataset, save_vlm, sft_args
from transformers import AutoProcessor, BitsAndBytesConfig
from two_processes import launched_once

from hera_trainer import AlignmentMonitorCallback, HeRAConfig, HeRATrainer, read_run

KEYS = [f"{group}/{name}" for group in ("alignment_mknn", "alignment_mknn_image") for name in ("aligned", "top", "all")]
KEYS.append("image_gain")
LOSSES = ("loss", "lm_loss", "alignment_loss", "temperature", "grad_norm")


def curve(logs, name):
    return [entry[name] for entry in logs if name in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return launched_once("monitor_worker.py", tmp_path_factory)


@pytest.fixture(scope="module")
def ranks(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


class TestTwoProcesses:
    def test_measured_as_by_one_process(self, folder, ranks, tmp_path):
        single = train(tmp_path, str(folder / "teacher"), STEP, monitor_steps=1, monitor_num_samples=13)
        for key in KEYS:
            first, second = (curve(rank["watched"]["logs"], key) for rank in ranks)
            assert len(first) == 3 and first == second
            assert first[0] == pytest.approx(curve(single["logs"], key)[0], abs=1e-6)  # before the first step
        kept, alone = read_run(folder / "watched"), read_run(tmp_path)
        for context in ("text", "image"):
            assert list(kept.monitored[context]) == [0, 1, 2]
            torch.testing.assert_close(kept.monitored[context][0].scores, alone.monitored[context][0].scores)
        assert list(kept.image_gains) == [0, 1, 2] and kept.image_gains[0].rows == 13
        assert vars(kept.image_gains[0]) == pytest.approx(vars(alone.image_gains[0]), abs=1e-6)
        assert kept.record["hardware"]["processes"] == 2

    def test_training_is_the_same(self, ranks):
        for rank in ranks:
            watched, plain = rank["watched"], rank["plain"]
            for name in LOSSES:
                assert len(curve(plain["logs"], name)) == 2
                assert curve(watched["logs"], name) == curve(plain["logs"], name)
            assert watched["parameters"] == plain["parameters"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_four_bit(tmp_path, checkpointing):
    """The weights keep the layout that training needs, and training is the same, bit for bit."""
    pytest.importorskip("bitsandbytes")
    saved = save_vlm("llava", tmp_path / "model", hidden_size=64, intermediate_size=128)
    processor = AutoProcessor.from_pretrained(saved)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )

    def run(folder, *callbacks):
        trainer = HeRATrainer(
            saved,
            HeRAConfig(
                **sft_args(
                    folder,
                    per_device_train_batch_size=6,
                    gradient_accumulation_steps=2,
                    gradient_checkpointing=checkpointing,
                    num_neighbors=3,
                    num_aligned_heads=2,
                    max_steps=3,
                    learning_rate=1e-2,
                )
            ),
            train_dataset=image_dataset(n=36, with_features=8),
            processing_class=processor,
            quantization_config=quantization,
            peft_config=LoraConfig(target_modules="all-linear", exclude_modules=".*vision_tower.*", lora_dropout=0.1),
            callbacks=list(callbacks),
        )
        trainer.train()
        return trainer

    plain = run(tmp_path / "plain")
    monitor = AlignmentMonitorCallback(image_dataset(n=16, seed=7, with_features=8), every=1)
    watched = run(tmp_path / "watched", monitor)
    assert len(logged(watched, "alignment_mknn_image/aligned")) == 4
    for name in LOSSES:
        assert logged(watched, name) == logged(plain, name)
    trained = [{n: p for n, p in parameters(t.model).items() if "lora_" in n} for t in (watched, plain)]
    assert_same_parameters(*trained)


def test_the_monitor_refuses_the_first_fsdp() -> None:
    plugin = SimpleNamespace(fsdp_version=1)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    model = torch.nn.Linear(1, 1)
    trainer = SimpleNamespace(is_fsdp_enabled=True, accelerator=accelerator, eval_dataset=None, model=model)
    with pytest.raises(ValueError, match="version 1"):
        AlignmentMonitorCallback().check(trainer)
    plugin.fsdp_version = 2
    with pytest.raises(ValueError, match="`eval_dataset`"):  # the next thing that it looks at
        AlignmentMonitorCallback().check(trainer)
