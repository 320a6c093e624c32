"""Tests of a hanging rank: the job ends within the timeout and logs the stacks of every rank."""

import json
import re
import subprocess
import time

import pytest

from tests.runs import kill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

CALLBACKS = [
    {"class_path": "lrm_pl.callbacks.watchdog.HangWatchdog", "init_args": {"limit_s": 10.0}},
    {"class_path": "tests.distributed.stand_ins.HangInTrainingStep", "init_args": {"rank": 1, "step": 3}},
    {"class_path": "lrm_pl.training.checkpointing.CheckpointAndResume", "init_args": {"monitor": None}},
]


def test_a_job_with_a_hanging_rank_ends_with_the_stacks_of_all_ranks(runs):
    process = runs.start(
        "hang", 2, "--trainer.accelerator=cpu", f"--trainer.callbacks={json.dumps(CALLBACKS)}", layers=["ddp"]
    )
    folder = runs.folder / "hang"
    try:
        began = time.monotonic()
        while not list(folder.glob("events*")) and time.monotonic() - began < 100:
            time.sleep(0.2)  # until training starts
        status = process.wait(60)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert status != 0
    log = runs.log("hang")
    assert len(re.findall(r"Timeout: no progress for 10(\.25)? s", log)) == 2
    assert "in sleep_for_ever" in log
    assert re.search(r"in (all_reduce|_engine_run_backward)", log), "rank 0 waits for rank 1's gradients"
