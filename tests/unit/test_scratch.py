"""Folders of temporary files: they go with their process, or with the next one."""

import os
import signal
import subprocess
import sys

from lrm_pl.scratch import ScratchFolder, remove_stale

MAKE = """
import sys, time
from pathlib import Path
from lrm_pl.scratch import ScratchFolder
folder = ScratchFolder("lrm-test-", Path(sys.argv[1]))
print(folder.path, flush=True)
time.sleep(60)
"""


def test_what_a_killed_process_left_goes_when_the_next_one_starts_and_what_is_in_use_stays(tmp_path, root):
    command = [sys.executable, "-c", MAKE, str(tmp_path)]
    first, second = (subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2))
    try:
        killed, used = (process.stdout.readline().strip() for process in (first, second))
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert os.path.isdir(killed)
        (tmp_path / "lrm-test-is-being-made").mkdir()
        (tmp_path / "lrm-test-of-long-ago").mkdir()
        os.utime(tmp_path / "lrm-test-of-long-ago", (1, 1))
        mine = ScratchFolder("lrm-test-", tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {mine.path.name, os.path.basename(used), "lrm-test-is-being-made"}
        mine.remove()
        assert not mine.path.exists()
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
            process.stdout.close()
    remove_stale("lrm-test-", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lrm-test-is-being-made"]
