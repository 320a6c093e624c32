"""Stop a run on a signal: handlers only set a flag, which the run reads between two steps.

Handlers must not communicate with other processes, which may be in another collective. Lightning's own handlers do
(2.6.6 broadcasts in the SIGTERM handler and saves in the SLURM handler), so they are replaced. Handlers do not write
files either, since that may fail or block; a thread does.
"""

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType

import lightning as L

logger = logging.getLogger(__name__)

#: Ctrl-C; Slurm's warning before the time limit (``--signal=USR1@120``); termination by a cluster; a closed terminal.
SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)

#: Environment variable with the path of a file that is created on SIGUSR1. If it exists, the script of a Slurm job
#: requeues the job. The run does not requeue the job itself, because scontrol may be missing in a container.
REQUEUE_NOTE = "LRM_REQUEUE_NOTE"

#: Written to the pipe to end the thread. Closing the pipe would not: forked data workers hold a copy of its write end.
_END = b"\0"


class StopSignals:
    """Record the first signal. A second Ctrl-C raises ``KeyboardInterrupt``.

    Attributes:
        received: The first signal, None if there was none.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupted = False
        self._replaced: dict[signal.Signals, object] = {}

    def listen(self, trainer: L.Trainer) -> None:
        """Install the handlers. Call this before Lightning installs its own."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self._read_end, self._write_end = os.pipe()
        self._thread = threading.Thread(target=self._handle, name="stop signals", daemon=True)
        self._thread.start()
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:  # under nohup
                continue
            self._replaced[number] = signal.signal(number, self._record)

    def restore(self) -> None:
        """Restore the previous handlers, after pending log lines and files are written."""
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
        """Log the effect of a signal, and create the file for SIGUSR1. Runs in the thread."""
        while (byte := os.read(self._read_end, 1)) != _END:
            if byte[0] == signal.SIGINT:
                logger.warning(
                    "Stopping after this step with a checkpoint. Press Ctrl-C again to stop now, without a checkpoint"
                )
            note = os.environ.get(REQUEUE_NOTE)
            if note and byte[0] == signal.SIGUSR1:
                try:
                    Path(note).touch()
                except OSError as error:
                    logger.warning(
                        "%s could not be created, so the job will not be requeued: %s", note, error
                    )
