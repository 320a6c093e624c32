"""Test of two processes that run out of memory."""

import pytest


@pytest.mark.soak
def test_out_of_memory_errors_name_the_command_to_use(runs):
    log = runs.run(
        "memory", 2, "--trainer.callbacks+=tests.distributed.faults.RunOut", layers=["ddp"], status=1
    )
    assert log.count("lrm: out of memory: 1 GB short") >= 1
    assert "lrm estimate --less-memory" in log
    assert "Traceback" not in log
