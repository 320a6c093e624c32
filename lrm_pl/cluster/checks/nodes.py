"""The nodes of a Slurm step: they meet as training processes would, and exchange findings."""

import dataclasses
import json
import os
import socket
from collections.abc import Sequence
from datetime import timedelta

from lightning.pytorch.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not listed in __all__

from lrm_pl.cluster.checks.finding import Finding
from lrm_pl.training.processes import is_srun_task

#: Nodes that start later than this are not waited for.
MEETING_SECONDS = 120.0
#: The slowest check reads and hashes weights from a cold disk.
CHECKING_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Crew:
    """The nodes that look together, and this one among them.

    Attributes:
        count: Nodes.
        index: Number of this one.
        name: Name of this one.
        job: Id of the job.
    """

    count: int
    index: int
    name: str
    job: str


def crew() -> Crew | None:
    """Return the nodes of the Slurm step that this process is in; None outside of one."""
    if not is_srun_task():
        return None
    environment = os.environ
    return Crew(
        int(environment["SLURM_STEP_NUM_NODES"]),
        int(environment["SLURM_NODEID"]),
        environment["SLURMD_NODENAME"],
        environment["SLURM_JOB_ID"],
    )


class Meeting:
    """A store that all nodes reach, at the address and port where the processes of a run would meet.

    Args:
        crew: The nodes.

    Raises:
        OSError: The name of node 0 stands for no address.
        torch.distributed.DistError: The nodes do not find each other in time.
    """

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.address, self.port = meeting_point()
        socket.getaddrinfo(self.address, self.port)  # the store would try again for minutes
        self._store = TCPStore(
            self.address,
            self.port,
            crew.count,
            is_master=crew.index == 0,
            timeout=timedelta(seconds=MEETING_SECONDS),
        )
        self._store.set_timeout(timedelta(seconds=CHECKING_SECONDS))

    def names(self) -> list[str]:
        """Exchange the nodes' names, in their order."""
        return [name.decode() for name in self._exchanged("name", self.crew.name)]

    def all(self, good: bool) -> bool:
        """Return whether it is so on every node."""
        return all(answer == b"yes" for answer in self._exchanged("good", "yes" if good else "no"))

    def leave(self) -> None:
        """End the meeting: the store ends with node 0, which waits until no other has anything left to read."""
        if self.crew.index:
            self._store.set(f"left/{self.crew.index}", "")
        else:
            self._store.wait([f"left/{index}" for index in range(1, self.crew.count)])

    def wait(self, moment: str) -> None:
        """Wait until every node has come to the same moment, each of which has a name of its own."""
        self._exchanged(moment, "here")

    def gather(self, findings: Sequence[Finding]) -> list[list[Finding]]:
        """Exchange the findings of all nodes, in their order."""
        record = json.dumps([dataclasses.asdict(finding) for finding in findings])
        reports = self._exchanged("findings", record)
        self.leave()
        return [[Finding(**entry) for entry in json.loads(report)] for report in reports]

    def _exchanged(self, key: str, value: str) -> list[bytes]:
        self._store.set(f"{key}/{self.crew.index}", value)
        return [self._store.get(f"{key}/{index}") for index in range(self.crew.count)]


def meeting_point() -> tuple[str, int]:
    """Return the address and port at which the processes of a run in this job would meet."""
    environment = SLURMEnvironment(auto_requeue=False)
    return environment.main_address, environment.main_port
