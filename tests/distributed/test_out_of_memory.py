"""Test of two processes that run out of memory."""

import pytest


@pytest.mark.soak
def test_each_process_says_what_ran_out_and_which_command_helps(runs):
    log = runs.run(
        "memory", 2, "--trainer.callbacks+=tests.distributed.faults.RunOut", layers=["ddp"], status=1
    )
    assert log.count("lrm: out of memory: 1 GB short") >= 1
    assert "lrm estimate --less-memory" in log
    assert "Traceback" not in log
