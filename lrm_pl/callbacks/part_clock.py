"""One time line cut into named parts: at every moment exactly one part runs, so the parts add up to the whole."""

import itertools
import time

import torch

from lrm_pl.kernels.device import on_cuda, record_event


class PartClock:
    """Give all time that passes to the part that runs.

    On a GPU the time is the GPU's own: its queue is marked with events, which nobody waits for until ``take``. A part
    is then what the GPU worked or stood still for, whenever the host asked for it. Elsewhere it is the host's.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def switch(self, part: str) -> None:
        """End the part that runs, and begin another one."""
        self._marks.append((part, self._now()))

    def rename(self, part: str) -> None:
        """Give the running part another name, from its beginning on."""
        if self._marks:
            self._marks[-1] = (part, self._marks[-1][1])

    def take(self) -> dict[str, float]:
        """Return the milliseconds of every part since the last time, and go on in the part that runs.

        On a GPU this waits for all work that was asked for.
        """
        if not self._marks:
            return {}
        running, end = self._marks[-1][0], self._now()
        if not isinstance(end, float):
            end.synchronize()
        totals: dict[str, float] = {}
        marks = [*self._marks, (running, end)]
        for (part, begin), (_, stop) in itertools.pairwise(marks):
            totals[part] = totals.get(part, 0.0) + _milliseconds(begin, stop)
        self._marks = [(running, end)]
        return totals

    def _now(self) -> float | torch.cuda.Event:
        return record_event(self.device) if on_cuda(self.device) else time.perf_counter()


def _milliseconds(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float), begin
        assert isinstance(end, float), end
        return 1000 * (end - begin)
    return begin.elapsed_time(end)
