"""Clock that divides elapsed time into named phases, exactly one of which is active at any time."""

import itertools
import time

import torch

from lrm_pl.kernels.device import on_cuda, record_event


class PhaseClock:
    """Clock that attributes elapsed time to the active phase.

    On CUDA, device time is measured with events in the current stream, and only ``pop_totals`` synchronizes. On other
    devices, wall-clock time of the host is measured.

    Args:
        device: Device whose time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def switch(self, phase: str) -> None:
        """End the active phase and start a new phase."""
        self._marks.append((phase, self._now()))

    def rename(self, phase: str) -> None:
        """Rename the active phase, including the time that has already elapsed."""
        if self._marks:
            self._marks[-1] = (phase, self._marks[-1][1])

    def pop_totals(self) -> dict[str, float]:
        """Return the milliseconds of every phase since the last call, and continue the active phase.

        On CUDA, this method waits for all queued work.
        """
        if not self._marks:
            return {}
        active, end = self._marks[-1][0], self._now()
        if not isinstance(end, float):
            end.synchronize()
        totals: dict[str, float] = {}
        for (phase, start), (_, stop) in itertools.pairwise([*self._marks, (active, end)]):
            totals[phase] = totals.get(phase, 0.0) + _milliseconds(start, stop)
        self._marks = [(active, end)]
        return totals

    def _now(self) -> float | torch.cuda.Event:
        return record_event(self.device) if on_cuda(self.device) else time.perf_counter()


def _milliseconds(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    if isinstance(start, float) or isinstance(stop, float):
        assert isinstance(start, float), start
        assert isinstance(stop, float), stop
        return 1000 * (stop - start)
    return start.elapsed_time(stop)
