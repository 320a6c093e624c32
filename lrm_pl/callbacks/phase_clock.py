"""Clock that divides elapsed time into named phases, exactly one of which is active at any time."""

import itertools
import time
from typing import Any

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
        self._marks: list[tuple[str, Any]] = []  # with seconds, or with events on CUDA

    def switch(self, phase: str) -> None:
        """End the active phase and start a new phase."""
        self._marks.append((phase, self._now()))

    def rename(self, phase: str) -> None:
        """Rename the active phase. The time that has already elapsed is attributed to the new name."""
        if self._marks:
            self._marks[-1] = (phase, self._marks[-1][1])

    def pop_totals(self) -> dict[str, float]:
        """Return the duration of each phase since the last call, in milliseconds. The active phase continues.

        On CUDA, this method waits for all queued work.
        """
        if not self._marks:
            return {}
        active, end = self._marks[-1][0], self._now()
        if on_cuda(self.device):
            end.synchronize()
        totals: dict[str, float] = {}
        for (phase, start), (_, stop) in itertools.pairwise([*self._marks, (active, end)]):
            spent = start.elapsed_time(stop) if on_cuda(self.device) else 1000 * (stop - start)
            totals[phase] = totals.get(phase, 0.0) + spent
        self._marks = [(active, end)]
        return totals

    def _now(self) -> Any:  # noqa: ANN401 - seconds, or an event on CUDA
        return record_event(self.device) if on_cuda(self.device) else time.perf_counter()
