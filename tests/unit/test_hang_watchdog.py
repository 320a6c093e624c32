"""The watchdog timer ends a process that hangs, also while the GIL is held, and ignores suspension."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lrm_pl.callbacks.watchdog import HangWatchdog

PROGRAM = """
import ctypes, sys, time
from lrm_pl.callbacks.watchdog import WatchdogTimer
clock = WatchdogTimer(2.0)
time.sleep(0.3)
clock.reset()
print("begun", flush=True)
def hang():
    time.sleep(60)
def hang_with_pythons_lock():
    ctypes.PyDLL(None).sleep(60)
def work():
    for _ in range(20):
        time.sleep(0.1)
        clock.reset()
    clock.stop()
globals()[sys.argv[1]]()
print("done", flush=True)
"""


def start(what, root):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, what],
        cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("what", ["hang", "hang_with_pythons_lock"])
def test_a_hanging_process_prints_the_stacks_of_all_threads(what, root):
    process = start(what, root)
    out, err = process.communicate(timeout=40)
    assert (process.returncode, out) == (1, ""), err
    assert "Timeout: no progress for 2 s" in err
    assert f"in {what}" in err


def test_the_time_of_a_suspended_process_does_not_count(root):
    process = start("work", root)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=40)
    assert (process.returncode, out) == (0, "done\n"), err


def test_batches_of_all_commands_reset_the_timer():
    resets = []
    watchdog = HangWatchdog()
    watchdog._timer = SimpleNamespace(reset=lambda: resets.append(None))
    for command in ("train", "validation", "test", "predict"):
        getattr(watchdog, f"on_{command}_batch_start")(None, None, None, 0)
    assert len(resets) == 4
