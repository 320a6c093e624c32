"""Signal handling and shutdown of DataLoader workers."""

import multiprocessing.forkserver
import signal
import subprocess
import sys
import time

import fsspec.asyn
import psutil
import pytest
from torch.utils.data import DataLoader

from lrm_pl.data.workers import ignore_stop_signals, start_method
from lrm_pl.errors import InputError


@pytest.fixture(params=["default", "object store"])
def loading(request, monkeypatch):
    """A DataLoader iterator over numbers, and its worker process."""
    # Independent of whether other tests of this process have used an object store.
    thread = None if request.param == "default" else "thread of an object store"
    monkeypatch.setattr(fsspec.asyn, "iothread", [thread])
    method = start_method(1)
    assert method == (None if request.param == "default" else "forkserver")
    monkeypatch.undo()
    iterator = iter(
        DataLoader(
            range(100),
            batch_size=None,
            num_workers=1,
            worker_init_fn=ignore_stop_signals,
            multiprocessing_context=method,
        )
    )
    assert next(iterator) == 0
    (worker,) = iterator._workers
    yield iterator, worker
    iterator._shutdown_workers()


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_stop_signals_of_other_processes_are_ignored(loading, name):
    iterator, worker = loading
    servers = [multiprocessing.forkserver._forkserver._forkserver_pid]  # None if no fork server is running
    for pid in [worker.pid, *filter(None, servers)] * 3:
        subprocess.run(["bash", "-c", f"kill -{name} {pid}"], check=True)
    assert list(iterator) == list(range(1, 100))


def test_terminate_stops_a_worker(loading):
    _, worker = loading
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_shutdown_stops_workers_without_a_timeout(loading):
    iterator, worker = loading
    began = time.monotonic()
    iterator._shutdown_workers()
    assert not worker.is_alive()
    assert time.monotonic() - began < 4, "the worker must exit without being killed"


TRAINING = """
import sys, torch
from torch.utils.data import DataLoader
from lrm_pl.data.workers import ignore_stop_signals, start_method
if sys.argv[1] == "process group":
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
method = start_method(2)
assert method == ("forkserver" if sys.argv[1] == "process group" else None), method
loader = DataLoader(
    torch.zeros(99, 1000), batch_size=None, num_workers=2, worker_init_fn=ignore_stop_signals,
    multiprocessing_context=method,
)
batches = iter(loader)
next(batches)
print(*(worker.pid for worker in batches._workers), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["alone", "process group"])
def test_workers_end_when_the_run_is_killed(kind, tmp_path, root):
    command = [sys.executable, "-c", TRAINING, kind, str(tmp_path / "meeting")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=root, text=True, **pipes) as training:
        workers = [int(pid) for pid in training.stdout.readline().split()]
        assert len(workers) == 2
        assert all(psutil.pid_exists(pid) for pid in workers)
        training.kill()
    give_up = time.monotonic() + 4  # the watchdog of PyTorch checks every 5 s
    while any(map(_runs, workers)):
        assert time.monotonic() < give_up, "workers must exit with the run"
        time.sleep(0.05)


def test_the_resource_tracker_ignores_stop_signals(tmp_path, root):
    command = [sys.executable, "-c", TRAINING, "process group", str(tmp_path / "meeting")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=root, text=True, **pipes) as training:
        training.stdout.readline()
        for child in psutil.Process(training.pid).children(recursive=True):
            child.send_signal(signal.SIGUSR1)
        assert training.communicate(timeout=60)[1] == "", (
            "the resource tracker must not report unknown semaphores"
        )


def _runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_temporary_folder_with_a_long_path_raises_an_error(monkeypatch):
    monkeypatch.setattr("multiprocessing.util.get_temp_dir", lambda: "/" + "t" * 100)
    with pytest.raises(InputError, match=r"at most 89 bytes .*, but found 101 bytes: .*TMPDIR=/tmp"):
        start_method(1)
    assert start_method(0) is None


def test_no_fork_server_is_started_without_workers():
    assert start_method(0) is None
