"""Server commands of `lrm`, run as processes."""

import signal
import socket
import subprocess
import sys
import tempfile
import time

import psutil
import pytest


class Served:
    """Server command on a free port of this machine.

    Args:
        arguments: Arguments of `lrm`, except the port.
    """

    def __init__(self, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "lrm_pl", *map(str, arguments), "--port", str(self.port)]
        self._log = tempfile.TemporaryFile("w+")  # a full pipe would block the process
        self.process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        self.address = f"http://127.0.0.1:{self.port}"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None, self.said()
            time.sleep(0.1)
        self.kill()
        pytest.fail("The server does not listen")

    def memory(self):
        """Return the resident memory in megabytes."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def stop(self):
        """Send SIGTERM, wait for the process to end, and return its output."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        return self.said()

    def kill(self):
        """Kill the process and return its output."""
        self.process.kill()
        self.process.wait()
        said = self.said()
        self._log.close()
        return said

    def said(self):
        """Return the output of the process so far."""
        self._log.seek(0)
        return self._log.read()
