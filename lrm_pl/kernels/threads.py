"""Threads that each use one PyTorch intra-op thread."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def run_threads(count: int, work: Callable[[int], None]) -> None:
    """Call ``work(0)`` to ``work(count - 1)`` in separate threads, without gradients.

    If the count is 1, ``work`` is called in the calling thread. The inference mode is thread-local, so each thread sets
    the mode of the caller. ``torch.set_num_threads`` is thread-local, but new threads inherit the value that was set
    last. The value of the caller is therefore restored before the work starts, so that threads that are started
    elsewhere inherit it.

    Args:
        count: Number of threads.
        work: Function that is called with the index of the thread.
    """
    if count == 1:
        with torch.no_grad():
            work(0)
        return
    inference = torch.is_inference_mode_enabled()
    usual, ready = torch.get_num_threads(), threading.Barrier(count + 1)

    def run(number: int) -> None:
        torch.get_num_threads()  # a thread inherits the value at its first use
        torch.set_num_threads(1)
        ready.wait()
        with torch.inference_mode(inference), torch.no_grad():
            work(number)

    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(run, number) for number in range(count)]
        ready.wait()
        torch.set_num_threads(usual)
        for future in running:
            future.result()
