"""A pool of Blender processes on one machine or on a Ray cluster.

Without ``RAY_ADDRESS``, Ray runs on this machine for the duration of the run. Otherwise the run uses all nodes of that
cluster, which may join and leave at any time. Meshes must have the same path on every node, or be URLs. Rendered
objects are returned through Ray's object store, so that only the driver writes files.
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

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # must be set before Ray is imported

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

#: Maximum attempts for an object whose Blender process crashes, and for one whose Ray worker or node is lost.
_MAX_CRASHES, _MAX_LOST_WORKERS = 2, 5

#: Delays before each new attempt to start Blender, in seconds.
_START_RETRY_DELAYS_S = (0.5, 2.0)

#: Interval between queries of the cluster's nodes, in seconds.
_NODE_POLL_S = 10.0

#: Timeout of the connection to a cluster, in seconds.
_CONNECT_TIMEOUT_S = 10.0

#: Timeout of the shutdown of idle processes, in seconds.
_CLOSE_TIMEOUT_S = 5.0

#: CPUs reserved per Blender process, at most half of a machine. A process runs one more thread than this, because
#: loading and encoding leave CPUs idle: on two CPUs, two such processes render a sixth more views per second than one.
_CPUS = 2

#: Size of Ray's object store, which holds each rendered object only briefly.
_STORE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class PoolOptions:
    """Options shared by all Blender processes of a run.

    Attributes:
        assets: Folder of the meshes.
        settings: Render settings.
        jobs: Maximum number of processes; None for as many as the cluster has resources for.
        limits: Time and memory limits per object.
        command: Command line of a Blender process.
    """

    assets: Path
    settings: RenderSettings
    jobs: int | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)
    command: tuple[str, ...] = dataclasses.field(default_factory=lambda: blender_process.COMMAND)


@dataclasses.dataclass(frozen=True)
class WorkerResources:
    """Resources that Ray reserves for one Blender process.

    Attributes:
        cpus: Number of CPUs.
        threads: Number of render threads.
        gpus: Number of GPUs; a fraction if several processes use one GPU.
    """

    cpus: int
    threads: int
    gpus: float = 0.0


class RenderActor:
    """Ray actor that owns one Blender process, and restarts it after a crash or when it reaches ``Limits.objects``."""

    def __init__(self, options: PoolOptions, threads: int) -> None:
        self._options, self._threads = options, threads
        self._blender: BlenderProcess | None = None

    def start(self) -> str:
        """Start Blender and return the name of its renderer."""
        return self._ready().renderer

    def render(self, asset: Asset) -> RenderResult:
        """Render one asset."""
        return self._ready().render(asset, self._options.limits)

    def close(self) -> None:
        """Stop Blender and remove its temporary files."""
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
        """Start Blender, with retries."""
        options = self._options
        for wait_s in _START_RETRY_DELAYS_S:
            try:
                return BlenderProcess(options.assets, options.settings, self._threads, options.command)
            except BlenderError:
                time.sleep(wait_s)
        return BlenderProcess(options.assets, options.settings, self._threads, options.command)


class RenderPool:
    """The Blender processes of a run.

    Attributes:
        renderer: Name of the renderer, identical for all processes.
        resources: Resources per process.
    """

    def __init__(self, options: PoolOptions) -> None:
        # The working directory of a Ray worker is the one in which its node was started.
        self._options = dataclasses.replace(options, assets=options.assets.absolute())
        self.resources = _choose_resources(options.jobs)
        self._actors: set[ActorHandle] = set()
        self._starting: dict[ObjectRef, ActorHandle] = {}  # result of ``start`` -> actor
        self._next_poll = 0.0
        self._max_processes = 0
        self.renderer = ""
        self._idle: list[ActorHandle] = []
        while not self.renderer:
            self._finish_start(self._add_actor())

    def render(self, assets: Sequence[Asset]) -> Generator[RenderResult]:
        """Render assets, and yield the result of each as soon as it is available.

        Args:
            assets: Assets, in the order in which they are scheduled.

        Raises:
            BlenderError: Blender cannot be restarted, or another node uses another renderer.
        """
        waiting, busy = deque(assets), dict[ObjectRef, tuple[ActorHandle, Asset]]()
        crashes, lost = Counter[str](), Counter[str]()
        while waiting or busy:
            while waiting and self._idle:
                actor, asset = self._idle.pop(), waiting.popleft()
                busy[actor.render.remote(asset)] = actor, asset
            self._grow(len(busy), len(waiting))
            ready, _ = ray.wait([*busy, *self._starting], timeout=_NODE_POLL_S)
            for reference in ready:
                if reference in self._starting:
                    self._finish_start(reference)
                    continue
                actor, asset = busy.pop(reference)
                try:
                    result: RenderResult = ray.get(reference)
                except RayTaskError as error:
                    raise _cause(error) from error
                except RayError as error:  # the worker, its node or the result is lost
                    self._actors.discard(actor)
                    lost[asset.id] += 1
                    if lost[asset.id] < _MAX_LOST_WORKERS:
                        waiting.append(asset)
                    else:
                        yield RenderResult(
                            asset, "crashed", f"node or Ray worker lost {_MAX_LOST_WORKERS} times: {error}"
                        )
                    continue
                self._idle.append(actor)
                crashes[asset.id] += result.status == "crashed"
                if result.status == "crashed" and crashes[asset.id] < _MAX_CRASHES:
                    waiting.append(asset)
                else:
                    yield result

    @property
    def processes(self) -> int:
        """Current number of Blender processes."""
        return len(self._actors)

    def describe(self) -> str:
        """Return a summary such as ``2 Blender processes (2 CPUs each) on 1 node``."""
        nodes = sum(node["Alive"] for node in ray.nodes())
        count = min(_capacity(self.resources), self._options.jobs or sys.maxsize)
        resources = counted(self.resources.cpus, "CPU")
        resources += f" and {self.resources.gpus:g} GPU" if self.resources.gpus else ""
        each = " each" if count > 1 else ""
        return f"{counted(count, 'Blender process')} ({resources}{each}) on {counted(nodes, 'node')}"

    def close(self) -> None:
        """Stop all processes: idle ones gracefully, busy ones immediately, starting ones once they have started."""
        closing = [actor.close.remote() for actor in self._idle]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_TIMEOUT_S)
        # Ray may lose the kill of an actor that is being created, whose CPUs would then stay reserved. An actor
        # without handles exits after its pending calls.
        starting = set(self._starting.values())
        for actor in starting:
            actor.close.remote()
        for actor in self._actors - starting:
            ray.kill(actor)
        self._starting.clear()
        self._actors.clear()
        self._idle.clear()

    def _grow(self, busy: int, waiting: int) -> None:
        """Start further processes if the cluster has capacity and assets are waiting."""
        if time.monotonic() > self._next_poll:
            self._next_poll = time.monotonic() + _NODE_POLL_S
            self._max_processes = min(_capacity(self.resources), self._options.jobs or sys.maxsize)
        for _ in range(min(self._max_processes - busy - len(self._starting), waiting - len(self._starting))):
            self._add_actor()

    def _add_actor(self) -> ObjectRef:
        resources = self.resources
        actor = (
            ray.remote(RenderActor)
            .options(num_cpus=resources.cpus, num_gpus=resources.gpus)
            .remote(self._options, resources.threads)
        )
        self._actors.add(actor)
        reference = actor.start.remote()
        self._starting[reference] = actor
        return reference

    def _finish_start(self, reference: ObjectRef) -> None:
        actor = self._starting.pop(reference)
        try:
            renderer = str(ray.get(reference))
        except RayTaskError as error:
            raise _cause(error) from error
        except RayError as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise BlenderError(
                    expected=f"{blender_process.REPOSITORY} and the Python environment {sys.prefix} on every node",
                    found=str(error).splitlines()[-1],
                    remedy="start Ray in that environment on every node, or use a shared file system",
                ) from error
            # The node was lost before the process started; ``_grow`` starts another one.
            self._actors.discard(actor)
            return
        if renderer != (self.renderer or renderer):
            raise BlenderError(
                expected=f"the renderer {self.renderer} on every node",
                found=renderer,
                remedy="use identical nodes, so that all images are rendered alike",
            )
        self.renderer = renderer
        self._idle.append(actor)


@contextlib.contextmanager
def connect_ray(jobs: int | None) -> Iterator[None]:
    """Connect to the Ray cluster at ``RAY_ADDRESS``, or start Ray on this machine. An existing connection is reused.

    Args:
        jobs: Maximum number of processes, if Ray is started here.

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
                # Ray's own connection attempt takes minutes to fail.
                socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
            with _own_signals():
                ray.init(address, **quiet)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise BlenderError(
                expected=f"a Ray cluster at RAY_ADDRESS={address}",
                found=error,
                remedy=(
                    "start one with `ray start --head`, set RAY_AUTH_MODE=token if it requires a token, or unset "
                    "RAY_ADDRESS to render on this machine only"
                ),
            ) from error
        try:
            yield
        finally:
            ray.shutdown()
        return
    cpus = len(os.sched_getaffinity(0))
    # Otherwise Ray writes a token into the home folder, which may be missing or read-only.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # The default folder may belong to another user. The path must be short, since it contains sockets.
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
    """Restore the SIGTERM handler that ``ray.init`` replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # from Ray's own handler during ``ray.init``
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _choose_resources(jobs: int | None) -> WorkerResources:
    """Choose the resources per process: a GPU, or a fraction of it for more jobs than GPUs; without GPUs, CPUs only."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    if gpus:
        each = min(1.0, gpus / (jobs or gpus))
        fewest = min(node.get("CPU", 1.0) / node["GPU"] for node in nodes if node.get("GPU"))
        return WorkerResources(max(1, int(fewest * each)), max(1, int(fewest * each)), each)
    largest = max(int(node.get("CPU", 1.0)) for node in nodes)
    cpus = sum(int(node.get("CPU", 0.0)) for node in nodes)
    # With ``jobs`` given, all CPUs are divided among the processes.
    each = max(1, min(largest, cpus // jobs) if jobs else min(_CPUS, largest // 2))
    return WorkerResources(each, min(each + 1, largest))


def _capacity(resources: WorkerResources) -> int:
    """Return how many processes fit on the current nodes."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        int(
            min(
                node.get("CPU", 0.0) / resources.cpus,
                node.get("GPU", 0.0) / resources.gpus if resources.gpus else sys.maxsize,
            )
        )
        for node in nodes
    )


def _cause(error: RayTaskError) -> BaseException:
    return error.cause if isinstance(error.cause, BlenderError) else error
