"""A signal that stops a run reaches its decoding processes too: they go on until the run has no more use for them."""

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


@pytest.fixture(params=["usual", "beside an object store"])
def loading(request, monkeypatch):
    """An iterator over numbers with one worker, and its process."""
    # Whatever other tests of this process have talked to.
    thread = None if request.param == "usual" else "a thread that talks to a store"
    monkeypatch.setattr(fsspec.asyn, "iothread", [thread])
    method = start_method(1)
    assert method == (None if request.param == "usual" else "forkserver")
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
def test_a_signal_from_elsewhere_ends_no_worker(loading, name):
    iterator, worker = loading
    servers = [multiprocessing.forkserver._forkserver._forkserver_pid]  # None in the usual way, or before any
    for pid in [worker.pid, *filter(None, servers)] * 3:
        subprocess.run(["bash", "-c", f"kill -{name} {pid}"], check=True)
    assert list(iterator) == list(range(1, 100))


def test_the_training_process_ends_its_workers_as_ever(loading):
    _, worker = loading
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_an_iterator_that_is_let_go_leaves_no_worker(loading):
    iterator, worker = loading
    began = time.monotonic()
    iterator._shutdown_workers()
    assert not worker.is_alive()
    assert time.monotonic() - began < 4, "it did not have to be killed"


TRAINING = """
import sys, torch
from torch.utils.data import DataLoader
from lrm_pl.data.workers import ignore_stop_signals, start_method
if sys.argv[1] == "one of a group":
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
method = start_method(2)
assert method == ("forkserver" if sys.argv[1] == "one of a group" else None), method
loader = DataLoader(
    torch.zeros(99, 1000), batch_size=None, num_workers=2, worker_init_fn=ignore_stop_signals,
    multiprocessing_context=method,
)
batches = iter(loader)
next(batches)
print(*(worker.pid for worker in batches._workers), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["alone", "one of a group"])
def test_workers_end_when_the_run_is_killed(kind, tmp_path, root):
    command = [sys.executable, "-c", TRAINING, kind, str(tmp_path / "meeting")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=root, text=True, **pipes) as training:
        workers = [int(pid) for pid in training.stdout.readline().split()]
        assert len(workers) == 2
        assert all(psutil.pid_exists(pid) for pid in workers)
        training.kill()
    give_up = time.monotonic() + 4  # PyTorch's own watchdog looks every 5 s
    while any(map(_runs, workers)):
        assert time.monotonic() < give_up, "the workers outlive their run"
        time.sleep(0.05)


def test_what_keeps_count_of_semaphores_outlives_a_signal_to_every_process(tmp_path, root):
    command = [sys.executable, "-c", TRAINING, "one of a group", str(tmp_path / "meeting")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=root, text=True, **pipes) as training:
        training.stdout.readline()
        for child in psutil.Process(training.pid).children(recursive=True):
            child.send_signal(signal.SIGUSR1)
        assert training.communicate(timeout=60)[1] == "", (
            "a message for each semaphore that is not known any more"
        )


def _runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_temporary_folder_whose_name_is_too_long_for_sockets_is_refused(monkeypatch):
    monkeypatch.setattr("multiprocessing.util.get_temp_dir", lambda: "/" + "t" * 100)
    with pytest.raises(InputError, match=r"at most 89 bytes .*, but found 101: .*TMPDIR=/tmp"):
        start_method(1)
    assert start_method(0) is None


def test_without_workers_nothing_is_started():
    assert start_method(0) is None
