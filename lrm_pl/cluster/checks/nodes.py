"""List of all checks of a node, and checks that involve all nodes of a Slurm step.

The nodes rendezvous at the address and port that training processes would use, and exchange findings over a TCPStore.
"""

import dataclasses
import json
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not listed in __all__

from lrm_pl.cluster.checks import folders, inputs, machine
from lrm_pl.cluster.checks.findings import Finding, merge_findings
from lrm_pl.cluster.checks.requirements import RunRequirements, read_requirements
from lrm_pl.errors import InputError
from lrm_pl.paths import cache_folder
from lrm_pl.training.processes import is_srun_task

#: Time limit of the rendezvous in seconds.
RENDEZVOUS_SECONDS = 120.0

#: Time limit of the checks in seconds. The slowest check reads weights from disk and hashes them.
CHECK_SECONDS = 600.0

#: Time limit in seconds for files that other nodes write to appear on a network file system.
FILE_SECONDS = 30.0


class NodeExchange:
    """Exchange of values between the nodes of a Slurm step over a TCPStore on the first node.

    Attributes:
        names: Names of all nodes, ordered by rank.
        rank: Rank of this node.

    Raises:
        OSError: The name of the first node cannot be resolved to an address.
        torch.distributed.DistError: The rendezvous timed out.
    """

    def __init__(self) -> None:
        self.count, self.rank = int(os.environ["SLURM_STEP_NUM_NODES"]), int(os.environ["SLURM_NODEID"])
        self.address, self.port = rendezvous_address()
        socket.getaddrinfo(self.address, self.port)  # fails immediately; the store would retry for minutes
        self._store = TCPStore(
            self.address,
            self.port,
            self.count,
            is_master=self.rank == 0,
            timeout=timedelta(seconds=RENDEZVOUS_SECONDS),
        )
        self._store.set_timeout(timedelta(seconds=CHECK_SECONDS))
        self.names: list[str] = self.all_gather("name", os.environ["SLURMD_NODENAME"])

    def all_gather(self, key: str, value: object) -> list[Any]:
        """Return the values of all nodes, ordered by rank, once all nodes have called this method with the same key."""
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        return [json.loads(self._store.get(f"{key}/{rank}")) for rank in range(self.count)]

    def close(self) -> None:
        """Close the exchange. The first node, which serves the store, waits until all other nodes have closed it."""
        if self.rank:
            self._store.set(f"closed/{self.rank}", "")
        else:
            self._store.wait([f"closed/{rank}" for rank in range(1, self.count)])


def rendezvous_address() -> tuple[str, int]:
    """Return the address and port that training processes in this job would use."""
    environment = SLURMEnvironment(auto_requeue=False)
    return environment.main_address, environment.main_port


def run_checks(arguments: list[str], versions: Sequence[Finding]) -> list[tuple[str, Finding]]:
    """Run all checks on this node. Inside a Slurm step, also run the checks that involve all nodes of the step.

    Args:
        arguments: Arguments of ``lrm fit``.
        versions: Findings about versions, which are included in the result.

    Returns:
        Rows as returned by ``merge_findings``.
    """
    run, findings = None, list(versions)
    try:
        run = read_requirements(arguments)
    except InputError as error:
        findings.append(Finding.from_error("config", error))
    if not is_srun_task():
        findings += [] if run is None else [*check_node(run), *_unchecked_nodes(run)]
        return merge_findings({"": findings})
    try:
        exchange = NodeExchange()
        rendezvous = Finding("rendezvous", f"all nodes at {exchange.address}:{exchange.port}")
        mine = [*findings, rendezvous]
        # All nodes skip this check if one node has no valid config, because they would wait for the token of that node.
        if all(exchange.all_gather("config", run is not None)) and run is not None:
            mine += check_shared_folders(exchange, run)
        mine += [] if run is None else check_node(run)
        reports = exchange.all_gather("findings", [dataclasses.asdict(finding) for finding in mine])
        exchange.close()
        return merge_findings(
            {
                name: [Finding(**finding) for finding in report]
                for name, report in zip(exchange.names, reports, strict=True)
            }
        )
    except (torch.distributed.DistError, socket.gaierror) as error:
        findings += [_failed_rendezvous(error), *([] if run is None else check_node(run))]
        return merge_findings({os.environ["SLURMD_NODENAME"]: findings})


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
        *(inputs.weights(name, file, run.source) for name, file in run.weights.items()),
    ]


def check_shared_folders(exchange: NodeExchange, run: RunRequirements) -> list[Finding]:
    """Check whether all nodes share the run's folder and the cache folder.

    Each node writes a token into each folder, and checks whether the folder contains the tokens of all nodes.
    """
    job, own = os.environ["SLURM_JOB_ID"], exchange.names[exchange.rank]
    shared = {"run folder, shared": (run.run, True), "cache, shared": (cache_folder(), False)}
    for folder, _ in shared.values():
        folders.write_token(folder, job, own)
    exchange.all_gather("tokens written", None)
    findings = []
    for check, (folder, needed) in shared.items():
        missing = folders.unseen_tokens(folder, job, exchange.names, FILE_SECONDS)
        findings.append(folders.shared(check, folder, missing, needed=needed))
    exchange.all_gather("tokens read", None)
    for folder, _ in shared.values():
        folders.token(folder, job, own).unlink(missing_ok=True)
    return findings


def _failed_rendezvous(error: Exception) -> Finding:
    address, port = rendezvous_address()
    remedy = (
        f"open ports above 1024 between the nodes in the firewall, and check that {address} is the first node"
    )
    if isinstance(error, socket.gaierror):
        remedy = f"make the name {address} resolve to the first node on every node, in /etc/hosts or DNS"
    return Finding("rendezvous", f"{address}:{port}: {str(error).splitlines()[0]}", remedy)


def _unchecked_nodes(run: RunRequirements) -> list[Finding]:
    if run.nodes == 1:
        return []
    remedy = "run lrm doctor on each of them, or lrm doctor --nodes N on a machine with Slurm"
    return [Finding("other nodes", f"{run.nodes - 1} not checked", warning=remedy)]
