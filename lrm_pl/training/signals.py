"""Being told to stop: signals set a flag, and no more; the run reads it between two steps.

A handler must not talk to other processes: they may be anywhere, and would wait for one another. Lightning's own
handlers do (2.6.6 broadcasts inside SIGTERM's, and saves inside SLURM's), so these take their place, and Lightning
installs none. Nor does a handler write files, which may fail or take long: a thread does.
"""

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType

import lightning as L

logger = logging.getLogger(__name__)

#: Ctrl-C, what Slurm sends before the time is up (``--signal=USR1@120``), what every cluster sends before it kills, and
#: a terminal or an ssh connection that was closed.
SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)

#: Names a file that SIGUSR1 makes: by it a Slurm job's script knows that the time was up, and asks for another start.
#: For a SIGTERM its sender has decided what comes next. Not asked for from here: a container may have no scontrol.
REQUEUE_NOTE = "LRM_REQUEUE_NOTE"

#: What ends the thread. The end of the pipe would not: forked data workers hold its other end too, and may live on.
_END = b"\0"


class StopSignals:
    """Remember that a signal came; a second Ctrl-C ends the run at once.

    Attributes:
        received: The first that came; None as yet.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupted = False
        self._replaced: dict[signal.Signals, object] = {}

    def listen(self, trainer: L.Trainer) -> None:
        """Take the handlers' place, from before Lightning would install its own."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self._told, self._tell = os.pipe()
        self._speaker = threading.Thread(target=self._speak, name="stop signals", daemon=True)
        self._speaker.start()
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:  # nohup
                continue
            self._replaced[number] = signal.signal(number, self._remember)

    def restore(self) -> None:
        """Give the handlers back; what was to be written by then is."""
        if not self._replaced:
            return
        for number, handler in self._replaced.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._replaced = {}
        os.write(self._tell, _END)
        self._speaker.join()
        os.close(self._tell)
        os.close(self._told)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if self.received is None:
            self.received = signal.Signals(number)
        os.write(self._tell, bytes([number]))

    def _speak(self) -> None:
        """Say what a signal does, and leave the note of SIGUSR1."""
        while (told := os.read(self._told, 1)) != _END:
            if told[0] == signal.SIGINT:
                logger.warning(
                    "stopping after this step, with a checkpoint; Ctrl-C again stops at once, without one"
                )
            note = os.environ.get(REQUEUE_NOTE)
            if note and told[0] == signal.SIGUSR1:
                try:
                    Path(note).touch()
                except OSError as error:
                    logger.warning("%s: the job's script will not ask for another start: %s", note, error)
