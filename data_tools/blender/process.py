"""A Blender process seen from outside: start it, have objects rendered one at a time, bound what each may take.

The process is ``data_tools.blender.worker``. It speaks lines of JSON on its standard output, and an object's members
follow their line as plain bytes. A process that dies, takes too long or too much memory costs the object it was at.
Needs no bpy.
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

#: Seconds that Blender gets to start.
START_LIMIT_S = 300.0

#: Samples of pixels that any machine computes in a second: a tenth of what a busy core does.
SAMPLES_PER_S = 200_000

#: Characters of Blender's log that a reason quotes, and that are kept of each object that failed.
_TAIL_LENGTH, _LOG_LENGTH = 600, 100_000

#: Seconds between two looks at a process's memory.
_LOOK_S = 0.1

_PREFIX = "lrm-blender-"

#: What a process runs.
COMMAND = (sys.executable, "-m", "data_tools.blender.worker")

REPOSITORY = Path(__file__).resolve().parents[2]


class BlenderError(InputError):
    """Blender does not start."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one object may take.

    Attributes:
        time_s: Seconds.
        memory_gb: Resident memory of its process, GB.
        objects: Objects that a process serves before another takes its place; Blender keeps some memory of each.
    """

    time_s: float = 600.0
    memory_gb: float = 8.0
    objects: int = 64


def time_limit_s(settings: RenderSettings) -> float:
    """Return the seconds that one object may take unless the user says otherwise: those of ``Limits``, and its samples.

    A busy core computes two million samples per second (64 views of 512 x 512 pixels, 16 samples per pixel, eight
    processes on two cores: 130 s).
    """
    samples = settings.views * settings.resolution**2 * settings.samples
    return Limits.time_s + samples / SAMPLES_PER_S


@dataclasses.dataclass(frozen=True)
class RenderResult:
    """What became of one asset.

    Attributes:
        asset: The asset.
        kind: "done"; "failed": the object is at fault, and would be again; "crashed": its process ended;
            "unreachable": it could not be downloaded; "no space".
        reason: Why, where it is not done.
        members: The sample's members, where it is done.
        log: What Blender printed, where it is not done.
        cycles_s: Seconds that Cycles itself took, where it is done.
    """

    asset: Asset
    kind: Literal["done", "failed", "crashed", "unreachable", "no space"]
    reason: str = ""
    members: dict[str, bytes] = dataclasses.field(default_factory=dict)
    log: str = ""
    cycles_s: float = 0.0


class BlenderProcess:
    """One Blender process; a context manager that ends it.

    Attributes:
        renderer: Name of its renderer.
        served: Objects that it was given.
    """

    def __init__(
        self, assets: Path, settings: RenderSettings, threads: int, command: tuple[str, ...] = COMMAND
    ) -> None:
        self.served = 0
        self._folder = ScratchFolder(_PREFIX)
        scratch = self._folder.path / "scratch"
        scratch.mkdir()
        self._log = tempfile.TemporaryFile()
        self._mark = 0
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=REPOSITORY,
            env=os.environ
            | {"TMPDIR": str(self._folder.path)},  # Blender leaves a folder behind when it is killed
            start_new_session=True,  # Ctrl-C is the driver's to handle
        )
        record = {
            "assets": str(assets.resolve()),
            "scratch": str(scratch),
            "threads": threads,
            "settings": dataclasses.asdict(settings),
        }
        hello = self._ask(record, Limits(time_s=START_LIMIT_S))
        if isinstance(hello, str):
            tail = self._tail()
            self.close()
            raise BlenderError(
                expected=f"Blender to start with {command[0]}",
                found=f"that it {hello}",
                remedy=(
                    f"its last lines: {tail}\nremedy: run `make .venv-render`, which installs bpy and the "
                    "system libraries that it links, and then `.venv-render/bin/python -m data_tools render`"
                ),
            )
        self.renderer = str(hello["renderer"])

    def render(self, asset: Asset, limits: Limits) -> RenderResult:
        """Render one asset; never raises for what the asset does."""
        self.served += 1
        self._log.seek(0, os.SEEK_END)
        self._mark = self._log.tell()
        answer = self._ask(dataclasses.asdict(asset), limits)
        if isinstance(answer, str):
            return RenderResult(
                asset, "crashed", f"Blender {answer}; its last lines: {self._tail()}", log=self._printed()
            )
        if answer["outcome"] != "done":
            return RenderResult(asset, answer["outcome"], answer["reason"], log=self._printed())
        return RenderResult(asset, "done", members=answer["members"], cycles_s=answer["cycles_s"])

    def is_alive(self) -> bool:
        """Say whether the process can take another asset."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process now, and remove its folder."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # what was still to be said to it is of no use now
                continue
        self._folder.remove()

    def _ask(self, record: dict[str, Any], limits: Limits) -> dict[str, Any] | str:
        """Send a line and wait for the answer; a string says why there is none (the process is dead then)."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(record).encode() + b"\n")
            self._process.stdin.flush()
            return self._answer(limits)
        except BrokenPipeError:
            return self._ending()
        except TimeoutError:
            self._process.kill()
            self._process.wait()
            return f"took longer than {limits.time_s:g} s"
        except MemoryError as error:
            self._process.kill()
            self._process.wait()
            return f"took {error} GB of memory, more than {limits.memory_gb:g} GB"

    def _answer(self, limits: Limits) -> dict[str, Any] | str:
        """Read one answer and the members that follow it.

        Raises:
            TimeoutError: It takes too long.
            MemoryError: The process takes too much memory; the message is how much, in GB.
        """
        assert self._process.stdout is not None
        pipe, give_up, received = self._process.stdout.fileno(), time.monotonic() + limits.time_s, bytearray()
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
                if time.monotonic() > give_up:
                    raise TimeoutError
                if selector.select(_LOOK_S):
                    chunk = os.read(pipe, 1 << 20)
                    if not chunk:
                        return self._ending()
                    received += chunk
                if (used := self._resident_gb()) > limits.memory_gb:
                    raise MemoryError(f"{used:.1f}")
        at, members = 0, {}
        for name, size in header.get("members", {}).items():
            members[name] = bytes(received[at : at + size])
            at += size
        return header | {"members": members}

    def _ending(self) -> str:
        return f"ended with {self._process.wait()}"

    def _resident_gb(self) -> float:
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_bytes().split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has just ended, or this system has no /proc
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e9

    def _printed(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(self._mark, self._log.tell() - _LOG_LENGTH))
        return self._log.read().decode(errors="replace")

    def _tail(self) -> str:
        return self._printed()[-_TAIL_LENGTH:].strip()
