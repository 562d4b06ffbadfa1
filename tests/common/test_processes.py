"""Processes that work together outside of training steps."""

from __future__ import annotations

from datetime import timedelta

import hera_trainer.common.processes as processes


def test_processes_have_time_for_what_is_no_step(monkeypatch):
    """Where nothing else has connected them: ten minutes, NCCL's own, are less than a download takes."""
    asked = {}

    class State:
        process_index, num_processes = 0, 2

        def __init__(self, **kwargs):
            asked.update(kwargs)

    monkeypatch.setattr(processes, "PartialState", State)
    assert processes.Team(distributed=True).count == 2
    assert asked["timeout"] >= timedelta(hours=2)
