"""Both processes of a run out of memory: one says what would help, the other waits for it."""

import re

import pytest


@pytest.mark.soak
def test_one_of_two_processes_says_what_would_help_before_the_launcher_stops_them(runs):
    log = runs.run(
        "memory", 2, "--trainer.callbacks+=tests.distributed.faults.RunOut", layers=["ddp"], status=1
    )
    assert log.count("lrm: out of memory: 1 GB short") == 2
    # The network is so small that the answer is: nothing.
    assert len(re.findall(r"^estimated: [\d.]+ GB a process\. No setting", log, re.MULTILINE)) == 1
    assert "lrm: see what another process says" in log
