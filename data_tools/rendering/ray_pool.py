"""Pool of Blender processes on one machine or on a Ray cluster.

If ``RAY_ADDRESS`` is set, the pool uses all nodes of the Ray cluster at this address. Nodes can join and leave the
cluster during a run. Otherwise, Ray is started on this machine and stopped after the run. Meshes must have the same
path on all nodes, or be URLs. Rendered objects are returned through the object store of Ray, and only the driver writes
to the output folder.
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
from typing import cast

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

#: Maximum number of attempts per object if Blender crashes, and if a Ray worker or node is lost.
_MAX_CRASHES, _MAX_LOST_WORKERS = 2, 5

#: Delays between attempts to start Blender in seconds.
_START_RETRY_DELAYS_S = (0.5, 2.0)

#: Interval between queries of the nodes of the cluster in seconds.
_NODE_POLL_S = 10.0

#: Timeout of the connection to a cluster in seconds.
_CONNECT_TIMEOUT_S = 10.0

#: Timeout of the shutdown of idle processes in seconds.
_CLOSE_TIMEOUT_S = 5.0

#: Maximum number of CPUs that are reserved per Blender process. At most half of the CPUs of a machine are reserved. The
#: number of threads is larger by one, because a process does not use all CPUs during loading and encoding. On a machine
#: with two CPUs, two processes rendered 17 % more views per second than one process.
_CPUS = 2

#: Size of the object store of Ray in bytes. A rendered object stays in the store only until the driver receives it.
_STORE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class PoolOptions:
    """Options that are common to all Blender processes of a run.

    Attributes:
        assets: Folder of the meshes.
        settings: Render settings.
        jobs: Maximum number of processes. If None, it is determined by the resources of the cluster.
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
    """Resources of one Blender process.

    Attributes:
        cpus: Number of CPUs to reserve.
        threads: Number of render threads.
        gpus: Number of GPUs to reserve. It is a fraction if several processes share a GPU.
    """

    cpus: int
    threads: int
    gpus: float = 0.0


class RenderActor:
    """Ray actor with a Blender process, which is restarted after a crash or after ``Limits.objects`` objects.

    Args:
        options: Options of the Blender process.
        threads: Number of render threads.
    """

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
        if blender and (not blender.is_alive() or blender.served >= self._options.limits.objects):
            blender.close()
            self._blender = None
        if self._blender is None:
            self._blender = self._start()
        return self._blender

    def _start(self) -> BlenderProcess:
        """Start Blender, and retry if it does not start."""
        options = self._options
        for wait_s in _START_RETRY_DELAYS_S:
            try:
                return BlenderProcess(options.assets, options.settings, self._threads, options.command)
            except BlenderError:
                time.sleep(wait_s)
        return BlenderProcess(options.assets, options.settings, self._threads, options.command)


class RenderPool:
    """Pool of the Blender processes of a run.

    Args:
        options: Options of the Blender processes.

    Attributes:
        renderer: Name of the renderer, which is the same for all processes.
        resources: Resources per process.
    """

    def __init__(self, options: PoolOptions) -> None:
        # Ray workers do not have the working directory of the driver, so the path must be absolute.
        self._options = dataclasses.replace(options, assets=options.assets.absolute())
        self.resources = _choose_resources(options.jobs)
        self._actors: set[ActorHandle] = set()
        self._starting: dict[ObjectRef, ActorHandle] = {}  # mapping from results of ``start`` to actors
        self._next_poll = 0.0
        self._max_processes = 0
        self.renderer = ""
        self._idle: list[ActorHandle] = []
        while not self.renderer:
            self._finish_start(self._add_actor())

    def render(self, assets: Sequence[Asset]) -> Generator[RenderResult]:
        """Render assets, and yield each result as soon as it is available.

        Args:
            assets: Assets in the order in which they are scheduled.

        Raises:
            BlenderError: Blender cannot be started, or the nodes have different renderers.
        """
        waiting, busy = deque(assets), dict[ObjectRef, tuple[ActorHandle, Asset]]()
        failures = Counter[tuple[str, int]]()  # by id and maximum number of attempts
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
                    result = cast(RenderResult, _get(reference))
                    self._idle.append(actor)
                    attempts = _MAX_CRASHES
                except RayError as error:  # the worker, the node or the result was lost
                    self._actors.discard(actor)
                    attempts = _MAX_LOST_WORKERS
                    result = RenderResult(
                        asset, "crashed", f"node or Ray worker lost {attempts} times: {error}"
                    )
                failures[asset.id, attempts] += 1
                if result.status == "crashed" and failures[asset.id, attempts] < attempts:
                    waiting.append(asset)
                else:
                    yield result

    @property
    def processes(self) -> int:
        """Current number of Blender processes."""
        return len(self._actors)

    def describe(self) -> str:
        """Return a summary, for example ``2 Blender processes (2 CPUs each) on 1 node``."""
        nodes = len(_alive_nodes())
        count = self._count_available()
        resources = counted(self.resources.cpus, "CPU")
        resources += f" and {self.resources.gpus:g} GPU" if self.resources.gpus else ""
        each = " each" if count > 1 else ""
        return f"{counted(count, 'Blender process')} ({resources}{each}) on {counted(nodes, 'node')}"

    def close(self) -> None:
        """Stop all processes.

        Idle processes are closed, busy processes are killed, and starting processes are closed after they have started.
        """
        closing = [actor.close.remote() for actor in self._idle]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_TIMEOUT_S)
        # If an actor is killed while it is being created, Ray can ignore the kill, and the CPUs stay reserved.
        # Therefore, such an actor is not killed. It exits after the pending calls, because no handle refers to it.
        starting = set(self._starting.values())
        for actor in starting:
            actor.close.remote()
        for actor in self._actors - starting:
            ray.kill(actor)
        self._starting.clear()
        self._actors.clear()
        self._idle.clear()

    def _grow(self, busy: int, waiting: int) -> None:
        """Start additional processes if the cluster has free resources and assets are waiting."""
        if time.monotonic() > self._next_poll:
            self._next_poll = time.monotonic() + _NODE_POLL_S
            self._max_processes = self._count_available()
        for _ in range(min(self._max_processes - busy - len(self._starting), waiting - len(self._starting))):
            self._add_actor()

    def _count_available(self) -> int:
        """Return the number of processes for which the current nodes have resources, but at most ``jobs``."""
        needed = {"CPU": self.resources.cpus, "GPU": self.resources.gpus}
        counts = (
            min(int(node.get(name, 0.0) / number) for name, number in needed.items() if number)
            for node in _alive_nodes()
        )
        return min(sum(counts), self._options.jobs or sys.maxsize)

    def _add_actor(self) -> ObjectRef:
        remote = ray.remote(RenderActor).options(num_cpus=self.resources.cpus, num_gpus=self.resources.gpus)
        actor = remote.remote(self._options, self.resources.threads)
        self._actors.add(actor)
        reference = actor.start.remote()
        self._starting[reference] = actor
        return reference

    def _finish_start(self, reference: ObjectRef) -> None:
        actor = self._starting.pop(reference)
        try:
            renderer = str(_get(reference))
        except RayError as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise BlenderError(
                    expected=f"{blender_process.REPOSITORY} and the Python environment {sys.prefix} on every node",
                    found=str(error).splitlines()[-1],
                    remedy="start Ray in this environment on every node, or use a shared file system",
                ) from error
            # The node was lost before the process started. ``_grow`` starts a new process.
            self._actors.discard(actor)
            return
        if renderer != (self.renderer or renderer):
            raise BlenderError(
                expected=f"the renderer {self.renderer} on every node",
                found=renderer,
                remedy="use nodes with the same renderer, because it affects the pixels",
            )
        self.renderer = renderer
        self._idle.append(actor)


@contextlib.contextmanager
def connect_ray(jobs: int | None) -> Iterator[None]:
    """Connect to the Ray cluster at ``RAY_ADDRESS``, or start Ray on this machine if the variable is not set.

    An existing connection is reused.

    Args:
        jobs: Maximum number of processes. It is used only if Ray is started on this machine.

    Raises:
        BlenderError: There is no cluster at ``RAY_ADDRESS``.
    """
    if ray.is_initialized():
        yield
        return
    address, folder = os.environ.get("RAY_ADDRESS"), None
    try:
        if address:
            _connect(address)
        else:
            # Otherwise, Ray writes a token to the home folder, which may be missing or read-only.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            # The default folder may belong to a different user. The path must be short, because it contains sockets.
            folder = ScratchFolder("lrm-ray-", Path("/tmp"))
            _init_ray(
                "local",
                num_cpus=max(len(os.sched_getaffinity(0)), jobs or 1),
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                _temp_dir=str(folder.path),
            )
        yield
    finally:
        ray.shutdown()
        if folder:
            folder.remove()


def _connect(address: str) -> None:
    """Connect to a Ray cluster."""
    try:
        host, _, port = address.rpartition(":")
        if "/" not in host and port.isdecimal():
            # Without this check, it would take minutes until ``ray.init`` fails.
            socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        _init_ray(address)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise BlenderError(
            expected=f"a Ray cluster at RAY_ADDRESS={address}",
            found=error,
            remedy=(
                "run `ray start --head`, set RAY_AUTH_MODE=token if the cluster requires a token, or unset RAY_ADDRESS"
            ),
        ) from error


def _init_ray(address: str, **options: object) -> None:
    """Initialize Ray, and restore the SIGTERM handler, which ``ray.init`` replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level="error", **options)
    except SystemExit:  # raised by the SIGTERM handler of Ray during ``ray.init``
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _alive_nodes() -> list[dict[str, float]]:
    """Return the resources of each active node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _choose_resources(jobs: int | None) -> WorkerResources:
    """Choose the resources per process.

    A process uses one GPU, or a fraction of a GPU if there are more processes than GPUs. If no GPUs are available, it
    uses CPUs only.
    """
    nodes = _alive_nodes()
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    if gpus:
        each = min(1.0, gpus / (jobs or gpus))
        fewest = min(node.get("CPU", 1.0) / node["GPU"] for node in nodes if node.get("GPU"))
        return WorkerResources(max(1, int(fewest * each)), max(1, int(fewest * each)), each)
    largest = max(int(node.get("CPU", 1.0)) for node in nodes)
    cpus = sum(int(node.get("CPU", 0.0)) for node in nodes)
    # If ``jobs`` is set, all CPUs are divided among the processes.
    each = max(1, min(largest, cpus // jobs) if jobs else min(_CPUS, largest // 2))
    return WorkerResources(each, min(each + 1, largest))


def _get(reference: ObjectRef) -> object:
    """Return the result of a remote call. If the actor raised an exception, raise it instead of ``RayTaskError``."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
