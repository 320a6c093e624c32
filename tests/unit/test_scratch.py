"""Temporary folders and their removal."""

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


def test_folders_of_killed_processes_are_removed_and_folders_in_use_are_kept(tmp_path, root):
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
