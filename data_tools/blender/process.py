"""The driver's side of a Blender process: start it, render one object at a time, enforce time and memory limits.

The process runs ``data_tools.blender.worker``. Requests and responses are lines of JSON; a response is followed by the
bytes of the sample's members. A crash or an exceeded limit fails only the current object. Does not require bpy.
"""

import dataclasses
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from data_tools.assets.asset_list import Asset
from data_tools.rendering.settings import RenderSettings
from lrm_pl.errors import InputError
from lrm_pl.scratch import ScratchFolder

#: Time limit for Blender's start in seconds.
START_LIMIT_S = 300.0

#: Assumed minimum rendering speed in pixel samples per second, a tenth of that of a loaded core.
SAMPLES_PER_S = 200_000

#: Characters of Blender's log that a reason quotes, and that are kept for each failed object.
_TAIL_LENGTH, _LOG_LENGTH = 600, 100_000

#: Interval of memory checks in seconds.
_MEMORY_CHECK_S = 0.1

_PREFIX = "lrm-blender-"

#: Command of a process.
COMMAND = (sys.executable, "-m", "data_tools.blender.worker")

REPOSITORY = Path(__file__).resolve().parents[2]


class BlenderError(InputError):
    """Blender cannot be started."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits per object.

    Attributes:
        time_s: Time in seconds.
        memory_gb: Resident memory of the process in GB.
        objects: Objects after which a process is restarted, because Blender does not free all memory.
    """

    time_s: float = 600.0
    memory_gb: float = 8.0
    objects: int = 64


def time_limit_s(settings: RenderSettings) -> float:
    """Return the default time limit per object: that of ``Limits`` plus a time proportional to its samples.

    A loaded core computes two million samples per second (64 views of 512 x 512 pixels with 16 samples per pixel take
    130 s with eight processes on two cores).
    """
    samples = settings.views * settings.resolution**2 * settings.samples
    return Limits.time_s + samples / SAMPLES_PER_S


@dataclasses.dataclass(frozen=True)
class RenderResult:
    """Result of rendering one asset.

    Attributes:
        asset: The asset.
        status: "done"; "failed": the asset is invalid, retries are useless; "crashed": the process ended;
            "unreachable": the download failed; "no space": the disk is full.
        reason: Reason, unless done.
        members: Members of the sample, if done.
        log: Blender's output, unless done.
        cycles_s: Render time of Cycles in seconds, if done.
    """

    asset: Asset
    status: Literal["done", "failed", "crashed", "unreachable", "no space"]
    reason: str = ""
    members: dict[str, bytes] = dataclasses.field(default_factory=dict)
    log: str = ""
    cycles_s: float = 0.0


class BlenderProcess:
    """A running Blender process.

    Attributes:
        renderer: Name of its renderer.
        served: Number of objects sent to it.
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
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=REPOSITORY,
            env=os.environ
            | {"TMPDIR": str(self._folder.path)},  # Blender does not remove its temporary folder when killed
            start_new_session=True,  # the driver handles Ctrl-C
        )
        record = {
            "assets": str(assets.resolve()),
            "scratch": str(scratch),
            "threads": threads,
            "settings": dataclasses.asdict(settings),
        }
        response = self._request(record, Limits(time_s=START_LIMIT_S))
        if isinstance(response, str):
            tail = self._last_output()
            self.close()
            raise BlenderError(
                f"Blender did not start with {command[0]}: it {response}. Last output:\n{tail}",
                remedy="run `make .venv-render` to install bpy and its system libraries, then "
                "`.venv-render/bin/python -m data_tools render`",
            )
        self.renderer = str(response["renderer"])

    def render(self, asset: Asset, limits: Limits) -> RenderResult:
        """Render one asset. Errors of the asset are returned, not raised."""
        self.served += 1
        self._log.seek(0, os.SEEK_END)
        self._log_start = self._log.tell()
        response = self._request(dataclasses.asdict(asset), limits)
        if isinstance(response, str):
            return RenderResult(
                asset,
                "crashed",
                f"Blender {response}. Last output: {self._last_output()}",
                log=self._output(),
            )
        if response["status"] != "done":
            return RenderResult(asset, response["status"], response["reason"], log=self._output())
        return RenderResult(asset, "done", members=response["members"], cycles_s=response["cycles_s"])

    def is_alive(self) -> bool:
        """Return whether the process is running."""
        return self._process.poll() is None

    def close(self) -> None:
        """Kill the process and remove its folder."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # unsent data can be discarded
                continue
        self._folder.remove()

    def _request(self, record: dict[str, Any], limits: Limits) -> dict[str, Any] | str:
        """Send a request and return the response; after a failure the process is dead, and the reason is returned."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(record).encode() + b"\n")
            self._process.stdin.flush()
            return self._read_response(limits)
        except BrokenPipeError:
            return self._exit_reason()
        except TimeoutError:
            self._process.kill()
            self._process.wait()
            return f"took longer than {limits.time_s:g} s"
        except MemoryError as error:
            self._process.kill()
            self._process.wait()
            return f"used {error} GB of memory, more than {limits.memory_gb:g} GB"

    def _read_response(self, limits: Limits) -> dict[str, Any] | str:
        """Read one response and the members that follow it.

        Raises:
            TimeoutError: The time limit is exceeded.
            MemoryError: The memory limit is exceeded; the message is the memory in GB.
        """
        assert self._process.stdout is not None
        pipe, deadline, received = (
            self._process.stdout.fileno(),
            time.monotonic() + limits.time_s,
            bytearray(),
        )
        header: dict[str, Any] | None = None
        needed = 0
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while True:
                if header is None and b"\n" in received:
                    line, _, rest = received.partition(b"\n")
                    header, received = json.loads(line), bytearray(rest)
                    needed = sum(header.get("members", {}).values())
                if header is not None and len(received) >= needed:
                    break
                if time.monotonic() > deadline:
                    raise TimeoutError
                if selector.select(_MEMORY_CHECK_S):
                    chunk = os.read(pipe, 1 << 20)
                    if not chunk:
                        return self._exit_reason()
                    received += chunk
                if (used := self._resident_gb()) > limits.memory_gb:
                    raise MemoryError(f"{used:.1f}")
        at, members = 0, {}
        for name, size in header.get("members", {}).items():
            members[name] = bytes(received[at : at + size])
            at += size
        return header | {"members": members}

    def _exit_reason(self) -> str:
        return f"exited with status {self._process.wait()}"

    def _resident_gb(self) -> float:
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_bytes().split()[1])
        except (FileNotFoundError, ProcessLookupError):  # the process has ended, or the system has no /proc
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e9

    def _output(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(self._log_start, self._log.tell() - _LOG_LENGTH))
        return self._log.read().decode(errors="replace")

    def _last_output(self) -> str:
        return self._output()[-_TAIL_LENGTH:].strip()
