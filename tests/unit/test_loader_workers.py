"""A signal that stops a run reaches its decoding processes too: they go on until the run has no more use for them."""

import subprocess
import time

import pytest
from torch.utils.data import DataLoader

from lrm_pl.data.workers import outlive_stop_signals


@pytest.fixture
def loading():
    """An iterator over numbers with one worker, and its process."""
    iterator = iter(
        DataLoader(range(100), batch_size=None, num_workers=1, worker_init_fn=outlive_stop_signals)
    )
    assert next(iterator) == 0
    (worker,) = iterator._workers
    yield iterator, worker
    iterator._shutdown_workers()


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_signal_from_elsewhere_ends_no_worker(loading, name):
    iterator, worker = loading
    for _ in range(3):
        subprocess.run(["bash", "-c", f"kill -{name} {worker.pid}"], check=True)
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
