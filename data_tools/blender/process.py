"""Blender processes that render objects, with time and memory limits.

A process runs ``data_tools.blender.worker``, which describes the protocol. If the process crashes or exceeds a limit,
only the current object fails. The module does not require ``bpy``.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Literal

from data_tools.assets.asset_list import Asset
from data_tools.rendering.settings import RenderSettings
from lrm_pl.errors import InputError
from lrm_pl.scratch import ScratchFolder

#: Time limit for the start of Blender in seconds.
START_LIMIT_S = 300.0

#: Assumed minimum render speed in pixel samples per second. It is one tenth of the speed of a fully loaded core.
SAMPLES_PER_S = 200_000

#: Maximum number of bytes of Blender's output in a reason, and in the stored output of a failed object.
_TAIL_LENGTH, _LOG_LENGTH = 600, 100_000

#: Interval between memory checks in seconds.
_MEMORY_CHECK_S = 0.1

_PREFIX = "lrm-blender-"

#: Command that starts a process.
COMMAND = (sys.executable, "-m", "data_tools.blender.worker")

REPOSITORY = Path(__file__).resolve().parents[2]


class BlenderError(InputError):
    """Raised if Blender cannot be started."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits for a Blender process.

    Attributes:
        time_s: Maximum time per object in seconds.
        memory_gb: Maximum resident memory of the process in GB.
        objects: Number of objects after which the process is restarted. Restarts are necessary because Blender does not
            free all memory.
    """

    time_s: float = 600.0
    memory_gb: float = 8.0
    objects: int = 64


def time_limit_s(settings: RenderSettings) -> float:
    """Return the default time limit per object in seconds.

    The limit is the default of ``Limits`` plus a time that is proportional to the number of samples in all views. A
    fully loaded core computes about two million samples per second. With eight processes on two cores, 64 views of
    512 x 512 pixels with 16 samples per pixel took 130 s.
    """
    samples = settings.views * settings.resolution**2 * settings.samples
    return Limits.time_s + samples / SAMPLES_PER_S


@dataclasses.dataclass(frozen=True)
class RenderResult:
    """Result of rendering one asset.

    Attributes:
        asset: Asset that was requested.
        status: "done" if the object was rendered, "failed" if the asset is invalid and must not be retried, "crashed"
            if the process ended or exceeded a limit, "unreachable" if the download failed, or "no space" if the disk is
            full.
        reason: Reason for the failure, or "" if the status is "done".
        members: Mapping from names to contents of the members of the sample. It is empty unless the status is "done".
        log: Output of Blender, or "" if the status is "done".
        cycles_s: Render time of Cycles in seconds, or 0 unless the status is "done".
    """

    asset: Asset
    status: Literal["done", "failed", "crashed", "unreachable", "no space"]
    reason: str = ""
    members: dict[str, bytes] = dataclasses.field(default_factory=dict)
    log: str = ""
    cycles_s: float = 0.0


class BlenderProcess:
    """A running Blender process.

    Args:
        assets: Assets folder.
        settings: Settings of the run.
        threads: Number of CPU threads of the process.
        command: Command that starts the process.

    Attributes:
        renderer: Name of the renderer.
        served: Number of objects that were sent to the process.

    Raises:
        BlenderError: Blender cannot be started.
    """

    def __init__(
        self, assets: Path, settings: RenderSettings, threads: int, command: tuple[str, ...] = COMMAND
    ) -> None:
        self.served = 0
        self._folder = ScratchFolder(_PREFIX)
        scratch = self._folder.path / "scratch"
        scratch.mkdir()
        self._log = tempfile.TemporaryFile()
        self._log_start = 0
        self._responses, sender = multiprocessing.Pipe(duplex=False)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=sender.fileno(),
            stderr=self._log,
            cwd=REPOSITORY,
            # Blender does not remove its temporary folder when killed
            env=os.environ | {"TMPDIR": str(self._folder.path)},
            start_new_session=True,  # the driver handles Ctrl-C
        )
        sender.close()  # otherwise, the end of the process would not be detected
        setup = {
            "assets": str(assets.resolve()),
            "scratch": str(scratch),
            "threads": threads,
            "settings": dataclasses.asdict(settings),
        }
        response = self._request(setup, Limits(time_s=START_LIMIT_S))
        if isinstance(response, str):
            tail = self._output(_TAIL_LENGTH).strip()
            self.close()
            raise BlenderError(
                f"Blender did not start with {command[0]}: the process {response}. Last output:\n{tail}",
                remedy="run `make .venv-render` to install bpy and its system libraries, then "
                "`.venv-render/bin/python -m data_tools render`",
            )
        self.renderer = str(response["renderer"])

    def render(self, asset: Asset, limits: Limits) -> RenderResult:
        """Render one asset. Errors are returned in the result and do not raise an exception."""
        self.served += 1
        self._log_start = self._log.seek(0, os.SEEK_END)
        response = self._request(dataclasses.asdict(asset), limits)
        if isinstance(response, str):
            reason = f"Blender {response}. Last output: {self._output(_TAIL_LENGTH).strip()}"
            return RenderResult(asset, "crashed", reason, log=self._output(_LOG_LENGTH))
        if response["status"] != "done":
            reason, log = response["reason"], self._output(_LOG_LENGTH)
            return RenderResult(asset, response["status"], reason, log=log)
        return RenderResult(asset, "done", members=response["members"], cycles_s=response["cycles_s"])

    def is_alive(self) -> bool:
        """Return whether the process is running."""
        return self._process.poll() is None

    def close(self) -> None:
        """Kill the process and remove the temporary folder."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # unsent data can be discarded
            self._process.stdin.close()
        self._responses.close()
        self._log.close()
        self._folder.remove()

    def _request(self, record: dict[str, Any], limits: Limits) -> dict[str, Any] | str:
        """Send a request and return the response. If the process ends or exceeds a limit, return the reason."""
        assert self._process.stdin is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(limits.time_s, expire)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(record).encode() + b"\n")
            self._process.stdin.flush()
            while not self._responses.poll(_MEMORY_CHECK_S):
                used = self._resident_gb()
                if used > limits.memory_gb:
                    self._process.kill()
                    self._process.wait()
                    return f"used {used:.1f} GB of memory, more than {limits.memory_gb:g} GB"
            response = json.loads(self._responses.recv_bytes())
            members = {name: self._responses.recv_bytes() for name in response["members"]}
        except (OSError, EOFError):
            status = self._process.wait()
            return (
                f"took longer than {limits.time_s:g} s"
                if expired.is_set()
                else f"exited with status {status}"
            )
        finally:
            timer.cancel()
        return response | {"members": members}

    def _resident_gb(self) -> float:
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_bytes().split()[1])
        except (FileNotFoundError, ProcessLookupError):  # the process has ended, or the system has no /proc
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e9

    def _output(self, length: int) -> str:
        """Return the last ``length`` bytes that Blender has printed since the last request."""
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(self._log_start, end - length))
        return self._log.read().decode(errors="replace")
