"""What is shown of what libraries say."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import pytest

from hera_trainer.cli.chatter import leave_out_chatter

# As they are logged by torch 2.14, bitsandbytes 0.50 and DeepSpeed 0.19.
CHATTER = [
    ("torch.utils._pytree", "<enum 'KernelPreference'> is an Enum subclass and is now natively supported by"),
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: No module named"),
    ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."),
]


@pytest.mark.parametrize(("name", "message"), CHATTER)
def test_chatter_is_left_out_and_other_messages_are_not(name, message, monkeypatch):
    logger, shown = logging.getLogger(name), []
    monkeypatch.setattr(logger, "callHandlers", lambda record: shown.append(record.getMessage()))
    leave_out_chatter()
    logger.warning(message)
    logger.warning("something else")
    assert shown == ["something else"]


def test_names_that_the_user_did_not_write():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        leave_out_chatter()
        for name in ("is_gradient_checkpointing", "gradient_checkpointing", "other"):
            warnings.warn(f"`{name}` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
    assert [str(warning.message).split()[0] for warning in caught] == ["`other`"]


def test_an_error_is_the_only_line(tmp_path):
    """With all that `hera sft` imports."""
    command = [sys.executable, "-m", "hera_trainer", "sft", "--model_name_or_path", "./nowhere", "--bf16", "false"]
    command += ["--dataset_name", str(tmp_path / "nothing.jsonl"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stdout + done.stderr
    assert done.stderr.startswith("hera sft: error: ")
