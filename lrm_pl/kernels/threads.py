"""Work that is divided among threads, in each of which PyTorch uses one."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def run_threads(count: int, work: Callable[[int], None]) -> None:
    """Call ``work(0)`` to ``work(count - 1)``, each in a thread of its own.

    PyTorch's number of threads is each thread's own, but the one that was set last is what new threads begin with: it
    is set again before the work begins, so that no thread of anybody else begins with one.

    Args:
        count: Threads.
        work: Is told its number.
    """
    usual, ready = torch.get_num_threads(), threading.Barrier(count + 1)

    def run(number: int) -> None:
        torch.get_num_threads()  # a thread takes over the number at its first use of it, and not later
        torch.set_num_threads(1)
        ready.wait()
        work(number)

    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(run, number) for number in range(count)]
        ready.wait()
        torch.set_num_threads(usual)
        for one in running:
            one.result()
