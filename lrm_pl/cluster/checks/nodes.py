"""List of all checks of a node, and checks that involve all nodes of a Slurm step.

The nodes rendezvous at the address and port that training processes would use, and exchange findings over a TCPStore.
"""

import dataclasses
import json
import os
import socket
from collections.abc import Sequence
from datetime import timedelta

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not listed in __all__

from lrm_pl.cluster.checks import folders, inputs, machine
from lrm_pl.cluster.checks.findings import Finding, Row, merge_findings
from lrm_pl.cluster.checks.requirements import RunRequirements, read_requirements
from lrm_pl.errors import InputError
from lrm_pl.training.processes import is_srun_task
from lrm_pl.weights.resolve import cache_folder

#: Time limit of the rendezvous in seconds.
RENDEZVOUS_SECONDS = 120.0

#: Time limit of the checks in seconds. The slowest check reads weights from disk and hashes them.
CHECK_SECONDS = 600.0

#: Time limit in seconds for files that other nodes write to appear on a network file system.
FILE_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class NodeGroup:
    """The nodes of a Slurm step.

    Attributes:
        count: Number of nodes.
        rank: Rank of this node.
        name: Name of this node.
        job: Id of the job.
    """

    count: int
    rank: int
    name: str
    job: str


def node_group() -> NodeGroup | None:
    """Return the nodes of the Slurm step that this process belongs to, or None if there is no such step."""
    if not is_srun_task():
        return None
    environment = os.environ
    return NodeGroup(
        int(environment["SLURM_STEP_NUM_NODES"]),
        int(environment["SLURM_NODEID"]),
        environment["SLURMD_NODENAME"],
        environment["SLURM_JOB_ID"],
    )


class NodeExchange:
    """Exchange of values between nodes over a TCPStore on the first node.

    Args:
        group: The nodes.

    Raises:
        OSError: The name of the first node cannot be resolved to an address.
        torch.distributed.DistError: The rendezvous timed out.
    """

    def __init__(self, group: NodeGroup) -> None:
        self.group = group
        self.address, self.port = rendezvous_address()
        socket.getaddrinfo(self.address, self.port)  # fails immediately; the store would retry for minutes
        self._store = TCPStore(
            self.address,
            self.port,
            group.count,
            is_master=group.rank == 0,
            timeout=timedelta(seconds=RENDEZVOUS_SECONDS),
        )
        self._store.set_timeout(timedelta(seconds=CHECK_SECONDS))

    def names(self) -> list[str]:
        """Return the names of all nodes, ordered by rank."""
        return [name.decode() for name in self._all_gather("name", self.group.name)]

    def all(self, value: bool) -> bool:
        """Return whether the value is true on every node."""
        return all(answer == b"yes" for answer in self._all_gather("value", "yes" if value else "no"))

    def barrier(self, name: str) -> None:
        """Wait until all nodes have called this method. Each call must use a different name."""
        self._all_gather(name, "")

    def gather(self, findings: Sequence[Finding]) -> list[list[Finding]]:
        """Return the findings of all nodes, ordered by rank, and close the exchange."""
        record = json.dumps([dataclasses.asdict(finding) for finding in findings])
        reports = self._all_gather("findings", record)
        self.close()
        return [[Finding(**entry) for entry in json.loads(report)] for report in reports]

    def close(self) -> None:
        """Close the exchange. The first node, which serves the store, waits until all other nodes have closed it."""
        if self.group.rank:
            self._store.set(f"closed/{self.group.rank}", "")
        else:
            self._store.wait([f"closed/{rank}" for rank in range(1, self.group.count)])

    def _all_gather(self, key: str, value: str) -> list[bytes]:
        self._store.set(f"{key}/{self.group.rank}", value)
        return [self._store.get(f"{key}/{rank}") for rank in range(self.group.count)]


def rendezvous_address() -> tuple[str, int]:
    """Return the address and port that training processes in this job would use."""
    environment = SLURMEnvironment(auto_requeue=False)
    return environment.main_address, environment.main_port


def run_checks(arguments: list[str], versions: Sequence[Finding]) -> list[Row]:
    """Run all checks on this node. Inside a Slurm step, also run the checks that involve all nodes of the step.

    Args:
        arguments: Arguments of ``lrm fit``.
        versions: Findings about versions, which are included in the result.
    """
    run, findings = None, list(versions)
    try:
        run = read_requirements(arguments)
    except InputError as error:
        findings.append(Finding.from_error("config", error))
    group = node_group()
    if group is None:
        findings += [] if run is None else [*check_node(run), machine.port(0), *_unchecked_nodes(run)]
        return merge_findings({"": findings})
    try:
        exchange = NodeExchange(group)
        findings.append(Finding("rendezvous", f"all nodes at {exchange.address}:{exchange.port}"))
        # All nodes skip this check if one node has no valid config, because they would wait for the token of that node.
        if exchange.all(run is not None) and run is not None:
            findings += check_shared_folders(exchange, run)
        findings += [] if run is None else check_node(run)
        return merge_findings(dict(zip(exchange.names(), exchange.gather(findings), strict=True)))
    except (torch.distributed.DistError, socket.gaierror) as error:
        findings = [finding for finding in findings if finding.check != "rendezvous"]
        findings.append(_failed_rendezvous(error))
        return merge_findings({group.name: [*findings, *([] if run is None else check_node(run))]})


def check_node(run: RunRequirements) -> list[Finding]:
    """Run the checks that do not involve other nodes."""
    return [
        machine.processors(run),
        machine.gpus(run),
        machine.bf16(run),
        machine.collectives(run),
        machine.shared_memory(run),
        machine.open_files(),
        folders.writable("run folder", run.run),
        folders.writable("cache", cache_folder()),
        *inputs.shards(run),
        inputs.batch(run),
        *(inputs.weights(file) for file in run.weights),
    ]


def check_shared_folders(exchange: NodeExchange, run: RunRequirements) -> list[Finding]:
    """Check whether all nodes share the run's folder and the cache folder.

    Each node writes a token into each folder, and checks whether it sees the tokens of all nodes.
    """
    group, names = exchange.group, exchange.names()
    shared = {"run folder, shared": (run.run, True), "cache, shared": (cache_folder(), False)}
    for folder, _ in shared.values():
        folders.write_token(folder, group.job, group.name)
    exchange.barrier("tokens written")
    findings = []
    for check, (folder, needed) in shared.items():
        missing = folders.unseen_tokens(folder, group.job, names, FILE_SECONDS)
        findings.append(folders.shared(check, folder, missing, needed=needed))
    exchange.barrier("tokens read")
    for folder, _ in shared.values():
        folders.token(folder, group.job, group.name).unlink(missing_ok=True)
    return findings


def _failed_rendezvous(error: Exception) -> Finding:
    address, port = rendezvous_address()
    remedy = (
        f"open ports above 1024 between the nodes in the firewall, and check that {address} is the first node"
    )
    if isinstance(error, socket.gaierror):
        remedy = f"make the name {address} resolve to the first node on every node, in /etc/hosts or DNS"
    return Finding("rendezvous", f"{address}:{port}: {str(error).splitlines()[0]}", "missing", remedy)


def _unchecked_nodes(run: RunRequirements) -> list[Finding]:
    if run.nodes == 1:
        return []
    remedy = "run this on each of them, or on a machine with Slurm: lrm doctor --nodes N"
    return [Finding("other nodes", f"{run.nodes - 1} not checked", "warning", remedy)]
