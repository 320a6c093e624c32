"""Driver side: long-lived Blender processes that pull assets, one at a time. Needs no bpy.

A process that dies or takes too long costs only the object it was at; another process takes its place. What
Blender prints is kept in ``OUT/logs/``.
"""

import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Literal

from data_tools.assets import Asset
from data_tools.settings import RenderSettings
from lrm_pl.errors import InputError

LOGS_NAME = "logs"

#: Seconds that Blender gets to start.
START_LIMIT_S = 300.0

#: Characters of Blender's log that a failure's reason quotes.
TAIL_LENGTH = 600

#: What a worker process runs.
COMMAND = (sys.executable, "-m", "data_tools.blender_worker")

REPOSITORY = Path(__file__).resolve().parent.parent


class WorkerError(InputError):
    """Blender does not start."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one asset.

    Attributes:
        asset: The asset.
        kind: "done" (its part is on disk), "failed" or "no space".
        reason: Why, where it is not done.
    """

    asset: Asset
    kind: Literal["done", "failed", "no space"]
    reason: str


@dataclasses.dataclass(frozen=True)
class PoolSetup:
    """What all workers of a run have in common.

    Attributes:
        assets: Assets folder.
        out: Folder of shards.
        settings: Settings of the run.
        jobs: Number of processes.
        threads: CPU threads of each.
        time_limit_s: Seconds that one object may take.
        lock: Descriptor of the folder's lock, inherited.
    """

    assets: Path
    out: Path
    settings: RenderSettings
    jobs: int
    threads: int
    time_limit_s: float
    lock: int


class Worker:
    """One Blender process.

    Attributes:
        renderer: Name of its renderer, once it has started.
    """

    def __init__(self, setup: PoolSetup, slot: int) -> None:
        logs, scratch = setup.out / LOGS_NAME, setup.out / "scratch" / str(slot)
        logs.mkdir(exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)
        self._log = logs / f"worker-{slot}.log"
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=REPOSITORY,
                text=True,
                pass_fds=(setup.lock,),
                start_new_session=True,  # Ctrl-C is the driver's to handle
            )
        record = {
            "assets": str(setup.assets.resolve()),
            "out": str(setup.out.resolve()),
            "scratch": str(scratch.resolve()),
            "threads": setup.threads,
            "settings": dataclasses.asdict(setup.settings),
        }
        self._mark = self._log.stat().st_size
        hello = self._ask(record, START_LIMIT_S)
        if isinstance(hello, str):
            raise WorkerError(
                f"expected Blender to start with {sys.executable}, found: {hello}\n"
                "remedy: run `make .venv-render`, which installs bpy and the system libraries that it links"
            )
        self.renderer = str(hello["renderer"])

    def render(self, asset: Asset, time_limit_s: float) -> Outcome:
        """Render one asset; never raises for what the asset does."""
        self._mark = self._log.stat().st_size
        answer = self._ask(dataclasses.asdict(asset), time_limit_s)
        if isinstance(answer, str):
            return Outcome(asset, "failed", answer)
        return Outcome(asset, answer["outcome"], answer["reason"])

    def is_alive(self) -> bool:
        """Say whether the process can take another asset."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End the process now; who waits for its answer gets none."""
        self._process.kill()

    def kill(self) -> None:
        """End the process now and close its pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # what was still to be said to it is of no use now
                continue

    def _ask(self, record: dict[str, Any], limit_s: float) -> dict[str, Any] | str:
        """Send a line and wait for the answer; a string says why there is none (the process is dead then)."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(limit_s, stop)
        timer.start()
        try:
            stdin.write(json.dumps(record) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
            timer.join()
        if line.endswith("\n"):
            return json.loads(line)
        self.kill()
        ending = (
            f"took longer than {limit_s:g} s" if late.is_set() else f"ended with {self._process.returncode}"
        )
        return f"Blender {ending}; its last lines: {self._tail()}"

    def _tail(self) -> str:
        with open(self._log, "rb") as log:
            log.seek(self._mark)
            return log.read().decode(errors="replace")[-TAIL_LENGTH:].strip()


def run_workers(setup: PoolSetup, first: Worker, assets: Sequence[Asset]) -> Generator[Outcome]:
    """Render assets on ``setup.jobs`` processes and yield what became of each, as it happens.

    Args:
        setup: What the workers have in common.
        first: A worker that has started already, slot 0.
        assets: The assets, in the order in which they are handed out.

    Raises:
        WorkerError: Blender started once but not again.
    """
    waiting: queue.SimpleQueue[Asset] = queue.SimpleQueue()
    for asset in assets:
        waiting.put(asset)
    outcomes: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
    workers: list[Worker | None] = [first, *[None] * (setup.jobs - 1)]
    stopping = threading.Event()

    def serve(slot: int) -> None:
        try:
            while not stopping.is_set():
                asset = waiting.get_nowait()
                worker = workers[slot]
                if worker is not None and not worker.is_alive():
                    worker.kill()  # it died between two objects, or was stopped: its pipes are still open
                    worker = None
                if worker is None:
                    worker = workers[slot] = Worker(setup, slot)
                if stopping.is_set():
                    return
                outcomes.put(worker.render(asset, setup.time_limit_s))
        except queue.Empty:
            return
        except BaseException as error:  # handed to the main thread, which raises it
            outcomes.put(error)

    threads = [threading.Thread(target=serve, args=(slot,), daemon=True) for slot in range(setup.jobs)]
    try:
        for thread in threads:
            thread.start()
        for _ in assets:
            outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        stopping.set()
        for worker in filter(None, workers):
            worker.stop()
        for thread in threads:  # one that is just starting a process must be done with it
            thread.join()
        for worker in filter(None, workers):
            worker.kill()


def default_jobs() -> int:
    """One process for two CPU cores that this process may use, at most 16.

    Two threads in one process took a fifth less CPU time an object than two processes of one thread.
    """
    return max(1, min(16, len(os.sched_getaffinity(0)) // 2))
