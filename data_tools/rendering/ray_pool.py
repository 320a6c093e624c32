"""Blender processes on one machine or many: Ray starts them, each pulls one object after another.

Without ``RAY_ADDRESS`` Ray runs on this machine, for this run alone. With it the run uses that cluster, all of it, and
nodes may come and go. Meshes must have the same path on each node (or be URLs); finished objects come back through Ray,
so that only the driver writes.
"""

import contextlib
import dataclasses
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from data_tools.assets.asset_list import Asset
from data_tools.blender import process as blender_process
from data_tools.blender.process import BlenderError, BlenderProcess, Limits, RenderResult
from data_tools.rendering.settings import RenderSettings
from lrm_pl.errors import counted
from lrm_pl.scratch import ScratchFolder

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported: it would send statistics

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

#: How often an object is tried whose process ends under it, and one whose Ray worker or node is lost.
_TRIES, _MOVES = 2, 5

#: Seconds before a Blender that did not start is started again.
_START_AGAIN_S = (0.5, 2.0)

#: Seconds between two looks at which nodes there are.
_LOOK_S = 10.0

#: Seconds that a cluster gets to answer at all.
_KNOCK_S = 10.0

#: Seconds that processes get to end in good order.
_CLOSE_S = 5.0

#: CPUs set aside for a Blender process, half a machine's at most: it has a thread more than these, so that one process
#: uses them while another imports or encodes (a sixth more views a second than one process of two threads on two CPUs).
_CPUS = 2

#: Ray's store holds finished objects for a moment only.
_STORE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class PoolOptions:
    """What all processes of a run have in common.

    Attributes:
        assets: Assets folder.
        settings: Settings of the run.
        jobs: Processes at most; None leaves it to what the cluster has.
        limits: What an object may take.
        command: What a process runs.
    """

    assets: Path
    settings: RenderSettings
    jobs: int | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)
    command: tuple[str, ...] = dataclasses.field(default_factory=lambda: blender_process.COMMAND)


@dataclasses.dataclass(frozen=True)
class WorkerResources:
    """What Ray sets aside for one process.

    Attributes:
        cpus: CPUs.
        threads: Threads that it may run on them.
        gpus: GPUs; less than 1 where processes share one.
    """

    cpus: int
    threads: int
    gpus: float = 0.0


class RenderActor:
    """A place for one Blender process, in a Ray worker; a process that is gone or worn out is replaced."""

    def __init__(self, options: PoolOptions, threads: int) -> None:
        self._options, self._threads = options, threads
        self._blender: BlenderProcess | None = None

    def start(self) -> str:
        """Start Blender; returns the name of its renderer."""
        return self._ready().renderer

    def render(self, asset: Asset) -> RenderResult:
        """Render one asset."""
        return self._ready().render(asset, self._options.limits)

    def close(self) -> None:
        """End Blender, and remove its files."""
        if self._blender is not None:
            self._blender.close()

    def _ready(self) -> BlenderProcess:
        blender = self._blender
        if blender is not None and (not blender.is_alive() or blender.served >= self._options.limits.objects):
            blender.close()
            self._blender = blender = None
        if blender is None:
            self._blender = blender = self._start()
        return blender

    def _start(self) -> BlenderProcess:
        """Start Blender; one that is killed at that is started again."""
        options = self._options
        for wait_s in _START_AGAIN_S:
            try:
                return BlenderProcess(options.assets, options.settings, self._threads, options.command)
            except BlenderError:
                time.sleep(wait_s)
        return BlenderProcess(options.assets, options.settings, self._threads, options.command)


class RenderPool:
    """All Blender processes of a run.

    Attributes:
        renderer: Name of their renderer, the same for all.
        share: What each has.
    """

    def __init__(self, options: PoolOptions) -> None:
        # Ray's workers run in the folder where their node was started.
        self._options = dataclasses.replace(options, assets=options.assets.absolute())
        self.share = _share(options.jobs)
        self._slots: set[ActorHandle] = set()
        self._starting: dict[ObjectRef, ActorHandle] = {}  # the first answer of each slot -> slot
        self._next_look = 0.0
        self._room = 0
        self.renderer = ""
        self._idle: list[ActorHandle] = []
        while not self.renderer:
            self._welcome(self._add_slot())

    def render(self, assets: Sequence[Asset]) -> Generator[RenderResult]:
        """Render assets and yield what became of each, as it happens.

        Args:
            assets: The assets, in the order in which they are handed out.

        Raises:
            BlenderError: Blender started once but not again, or elsewhere with another renderer.
        """
        waiting, busy = deque(assets), dict[ObjectRef, tuple[ActorHandle, Asset]]()
        crashes, moves = Counter[str](), Counter[str]()
        while waiting or busy:
            while waiting and self._idle:
                slot, asset = self._idle.pop(), waiting.popleft()
                busy[slot.render.remote(asset)] = slot, asset
            self._grow(len(busy), len(waiting))
            ready, _ = ray.wait([*busy, *self._starting], timeout=_LOOK_S)
            for answer in ready:
                if answer in self._starting:
                    self._welcome(answer)
                    continue
                slot, asset = busy.pop(answer)
                try:
                    outcome: RenderResult = ray.get(answer)
                except RayTaskError as error:
                    raise _cause(error) from error
                except RayError as error:  # the worker, its node, or the finished object is lost
                    self._slots.discard(slot)
                    moves[asset.id] += 1
                    if moves[asset.id] < _MOVES:
                        waiting.append(asset)
                    else:
                        yield RenderResult(
                            asset, "crashed", f"its node or Ray worker was lost {_MOVES} times: {error}"
                        )
                    continue
                self._idle.append(slot)
                crashes[asset.id] += outcome.kind == "crashed"
                if outcome.kind == "crashed" and crashes[asset.id] < _TRIES:
                    waiting.append(asset)
                else:
                    yield outcome

    @property
    def processes(self) -> int:
        """Blender processes there are now."""
        return len(self._slots)

    def describe(self) -> str:
        """Say in words how many processes there is room for."""
        nodes = sum(node["Alive"] for node in ray.nodes())
        room = min(_room(self.share), self._options.jobs or sys.maxsize)
        each = counted(self.share.cpus, "CPU") + (f" and {self.share.gpus:g} GPU" if self.share.gpus else "")
        processes = counted(room, "Blender process")
        return f"{processes} ({each}{' each' if room > 1 else ''}) on {counted(nodes, 'node')}"

    def close(self) -> None:
        """End all processes: those at rest in good order, those at work at once, those that start when they have."""
        closing = [slot.close.remote() for slot in self._idle]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_S)
        # Ray may forget the kill of an actor that it is making: the actor would then hold its CPUs for ever.
        # Without handles it ends by itself, after what it was asked for.
        starting = set(self._starting.values())
        for slot in starting:
            slot.close.remote()
        for slot in self._slots - starting:
            ray.kill(slot)
        self._starting.clear()
        self._slots.clear()
        self._idle.clear()

    def _grow(self, busy: int, waiting: int) -> None:
        """Start more processes where there is room and work."""
        if time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + _LOOK_S
            self._room = min(_room(self.share), self._options.jobs or sys.maxsize)
        for _ in range(min(self._room - busy - len(self._starting), waiting - len(self._starting))):
            self._add_slot()

    def _add_slot(self) -> ObjectRef:
        share = self.share
        slot = (
            ray.remote(RenderActor)
            .options(num_cpus=share.cpus, num_gpus=share.gpus)
            .remote(self._options, share.threads)
        )
        self._slots.add(slot)
        answer = slot.start.remote()
        self._starting[answer] = slot
        return answer

    def _welcome(self, answer: ObjectRef) -> None:
        slot = self._starting.pop(answer)
        try:
            renderer = str(ray.get(answer))
        except RayTaskError as error:
            raise _cause(error) from error
        except RayError as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise BlenderError(
                    expected=(
                        f"{blender_process.REPOSITORY} at that path on every node, with the Python {sys.prefix} "
                        "there too"
                    ),
                    found=str(error).splitlines()[-1],
                    remedy="start Ray on the nodes with that environment, or share the folder",
                ) from error
            # Its node went before it began: another one takes its place.
            self._slots.discard(slot)
            return
        if renderer != (self.renderer or renderer):
            raise BlenderError(
                expected=f"the renderer {self.renderer} on every node",
                found=renderer,
                remedy="use nodes of one kind, whose images are the same",
            )
        self.renderer = renderer
        self._idle.append(slot)


@contextlib.contextmanager
def connect_ray(jobs: int | None) -> Iterator[None]:
    """Use the cluster at ``RAY_ADDRESS``, the one that this process is connected to already, or one of this machine.

    Args:
        jobs: Processes at most, where Ray runs on this machine for this run.

    Raises:
        BlenderError: There is no cluster at that address.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address:
        try:
            host, _, port = address.rpartition(":")
            if "/" not in host and port.isdecimal():
                # Ray itself knocks for minutes.
                socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()
            with _own_signals():
                ray.init(address, **quiet)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise BlenderError(
                expected=f"a Ray cluster at RAY_ADDRESS={address}",
                found=error,
                remedy=(
                    "start one with `ray start --head`, set RAY_AUTH_MODE=token here if it has a token, or "
                    "unset RAY_ADDRESS to render on this machine alone"
                ),
            ) from error
        try:
            yield
        finally:
            ray.shutdown()
        return
    cpus = len(os.sched_getaffinity(0))
    # Else Ray writes one into the user's home, which may not be there, or not be writable.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # A folder of our own: another user's Ray may own the default one. Short, for it holds sockets.
    folder = ScratchFolder("lrm-ray-", Path("/tmp"))
    try:
        with _own_signals():
            ray.init(
                "local",
                num_cpus=max(cpus, jobs or 1),
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                _temp_dir=str(folder.path),
                **quiet,
            )
        yield
    finally:
        ray.shutdown()
        folder.remove()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: Ray sets its own, which prints the stack of its C++."""
    answer = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # Ray's answer, while it starts
        if callable(answer):
            answer(signal.SIGTERM, None)
        raise
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, answer)


def _share(jobs: int | None) -> WorkerResources:
    """Say what one process gets: a GPU where there are any (a part of one if more are asked for), else CPUs alone."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    if gpus:
        each = min(1.0, gpus / (jobs or gpus))
        fewest = min(node.get("CPU", 1.0) / node["GPU"] for node in nodes if node.get("GPU"))
        return WorkerResources(max(1, int(fewest * each)), max(1, int(fewest * each)), each)
    largest = max(int(node.get("CPU", 1.0)) for node in nodes)
    cpus = sum(int(node.get("CPU", 0.0)) for node in nodes)
    # Fewer processes than there is room for, as many as CPUs or more: whatever was asked for, no CPU is idle.
    each = max(1, min(largest, cpus // jobs) if jobs else min(_CPUS, largest // 2))
    return WorkerResources(each, min(each + 1, largest))


def _room(share: WorkerResources) -> int:
    """Count the processes that fit on the nodes there are."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        int(
            min(
                node.get("CPU", 0.0) / share.cpus,
                node.get("GPU", 0.0) / share.gpus if share.gpus else sys.maxsize,
            )
        )
        for node in nodes
    )


def _cause(error: RayTaskError) -> BaseException:
    return error.cause if isinstance(error.cause, BlenderError) else error
