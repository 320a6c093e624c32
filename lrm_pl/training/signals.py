"""Being told to stop: signals set a flag, nothing else; the run reads it between two steps.

A handler must not talk to other processes: they may be anywhere, and would wait for one another. Lightning's own
handlers do (2.6.6 broadcasts inside SIGTERM's, and saves inside SLURM's), so these take their place.
"""

import signal
from types import FrameType

#: What Slurm sends before the time is up (``--signal=USR1@120``), and what every cluster sends before it kills.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopSignals:
    """Remember that a signal came.

    Attributes:
        received: The first that came; None as yet.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._replaced: dict[signal.Signals, object] = {}

    def listen(self) -> None:
        """Take the handlers' place."""
        for number in SIGNALS:
            self._replaced[number] = signal.signal(number, self._remember)

    def restore(self) -> None:
        """Give the handlers back."""
        for number, handler in self._replaced.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._replaced = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
