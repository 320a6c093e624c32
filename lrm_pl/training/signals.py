"""Being told to stop: signals set a flag, and no more; the run reads it between two steps.

A handler must not talk to other processes: they may be anywhere, and would wait for one another. Lightning's own
handlers do (2.6.6 broadcasts inside SIGTERM's, and saves inside SLURM's), so these take their place, and Lightning
installs none.
"""

import os
import signal
from pathlib import Path
from types import FrameType

import lightning as L

#: What Slurm sends before the time is up (``--signal=USR1@120``), and what every cluster sends before it kills.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

#: Names a file that SIGUSR1 makes: by it a Slurm job's script knows that the time was up, and asks for another start.
#: For a SIGTERM its sender has decided what comes next. Not asked for from here: a container may have no scontrol.
REQUEUE_NOTE = "LRM_REQUEUE_NOTE"


class StopSignals:
    """Remember that a signal came.

    Attributes:
        received: The first that came; None as yet.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._replaced: dict[signal.Signals, object] = {}

    def listen(self, trainer: L.Trainer) -> None:
        """Take the handlers' place, from before Lightning would install its own."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        for number in SIGNALS:
            self._replaced[number] = signal.signal(number, self._remember)

    def restore(self) -> None:
        """Give the handlers back."""
        for number, handler in self._replaced.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._replaced = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        note = os.environ.get(REQUEUE_NOTE)
        if note and number == signal.SIGUSR1:
            Path(note).touch()
        if self.received is None:
            self.received = signal.Signals(number)
