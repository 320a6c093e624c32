"""Signal handlers that stop a run between two steps.

A handler sets a flag, which the run reads between two steps, and wakes a thread. It must not communicate with other
processes, because they may be executing a different collective. Lightning 2.6.6 communicates in its handlers for
SIGTERM and Slurm, so they are replaced. Files and log messages are written by the thread, because writing can block.
"""

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType

import lightning as L

logger = logging.getLogger(__name__)

#: Signals sent by Ctrl-C, by Slurm before the time limit (``--signal=USR1@120``), by clusters to terminate a job, and
#: by closing a terminal.
SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)

#: Environment variable with the path of a file that is created on SIGUSR1. If the file exists, the script of a Slurm
#: job requeues the job. The run does not call scontrol itself, because containers may not provide it.
REQUEUE_NOTE = "LRM_REQUEUE_NOTE"

#: Byte that ends the thread. Closing the pipe would not, because forked data workers hold a copy of the write end.
_END = b"\0"


class StopSignals:
    """Record the first signal. A second Ctrl-C raises ``KeyboardInterrupt``.

    Attributes:
        received: The first signal, or None if no signal was received.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupted = False
        self._replaced: dict[signal.Signals, object] = {}

    def listen(self, trainer: L.Trainer) -> None:
        """Install the handlers. Call this before Lightning installs its handlers."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self._read_end, self._write_end = os.pipe()
        self._thread = threading.Thread(target=self._handle, name="stop signals", daemon=True)
        self._thread.start()
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:  # under nohup
                continue
            self._replaced[number] = signal.signal(number, self._record)

    def restore(self) -> None:
        """Restore the previous handlers and wait until pending log messages and files are written."""
        if not self._replaced:
            return
        for number, handler in self._replaced.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._replaced = {}
        os.write(self._write_end, _END)
        self._thread.join()
        os.close(self._write_end)
        os.close(self._read_end)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if self.received is None:
            self.received = signal.Signals(number)
        os.write(self._write_end, bytes([number]))

    def _handle(self) -> None:
        """Log a message after SIGINT, and create the requeue file after SIGUSR1. This runs in the thread."""
        while (byte := os.read(self._read_end, 1)) != _END:
            if byte[0] == signal.SIGINT:
                logger.warning(
                    "Saving a checkpoint and stopping after this step. "
                    "Press Ctrl-C again to stop immediately without a checkpoint"
                )
            note = os.environ.get(REQUEUE_NOTE)
            if note and byte[0] == signal.SIGUSR1:
                try:
                    Path(note).touch()
                except OSError as error:
                    logger.warning(
                        "%s could not be created, so the job will not be requeued: %s", note, error
                    )
