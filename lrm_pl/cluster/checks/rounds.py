"""The doctor's round: all checks of one node, and those that nodes make together."""

import socket
from collections.abc import Sequence

import torch

from lrm_pl.cluster.checks import folders, machine, training
from lrm_pl.cluster.checks.finding import Finding
from lrm_pl.cluster.checks.nodes import Crew, Meeting, crew, meeting_point
from lrm_pl.cluster.checks.table import Row, rows
from lrm_pl.cluster.checks.wanted import Wanted, read_wanted
from lrm_pl.errors import InputError
from lrm_pl.weights.resolve import cache_folder

#: A network folder may show another node's file this late.
PATIENCE_SECONDS = 30.0


def examine(arguments: list[str], versions: Sequence[Finding]) -> list[Row]:
    """Look at this node, or with the other nodes of the Slurm step at all of them.

    Args:
        arguments: Those of `lrm fit`.
        versions: What was found before.
    """
    wanted, findings = None, list(versions)
    try:
        wanted = read_wanted(arguments)
    except InputError as error:
        findings.append(Finding.from_error("config", error))
    here = crew()
    if here is None:
        alone = [] if wanted is None else [*examine_node(wanted), machine.port(0), *_alone(wanted)]
        return rows({"": [*findings, *alone]})
    try:
        meeting = Meeting(here)
        findings.append(Finding("rendezvous", f"all meet at {meeting.address}:{meeting.port}"))
        # One node without the config would keep the others waiting for its token.
        if meeting.all(wanted is not None) and wanted is not None:
            findings += look_together(meeting, wanted)
        findings += [] if wanted is None else examine_node(wanted)
        return rows(dict(zip(meeting.names(), meeting.gather(findings), strict=True)))
    except (torch.distributed.DistError, socket.gaierror) as error:
        address, port = meeting_point()
        remedy = f"nodes must reach each other at ports over 1024; see the firewall, and whether {address} is node 0"
        if isinstance(error, socket.gaierror):
            remedy = (
                f"the name {address} must stand for node 0's address on every node: see /etc/hosts or the DNS"
            )
        reason = f"{address}:{port}: {str(error).splitlines()[0]}"
        findings = [finding for finding in findings if finding.check != "rendezvous"]
        findings.append(Finding("rendezvous", reason, "missing", remedy))
        return rows({here.name: [*findings, *([] if wanted is None else examine_node(wanted))]})


def examine_node(wanted: Wanted) -> list[Finding]:
    """Make the checks that a node makes on its own."""
    return [
        machine.processors(wanted),
        machine.gpus(wanted),
        machine.bf16(wanted),
        machine.collectives(wanted),
        machine.shared_memory(wanted),
        machine.open_files(),
        folders.writable("run folder", wanted.run),
        folders.writable("cache", cache_folder()),
        *training.shards(wanted),
        training.batch(wanted),
        *(training.weights(file) for file in wanted.weights),
    ]


def look_together(meeting: Meeting, wanted: Wanted) -> list[Finding]:
    """Find whether the nodes share the run's folder and the cache: each leaves a token, all look for all."""
    here: Crew = meeting.crew
    names = meeting.names()
    places = {"run folder, shared": (wanted.run, True), "cache, shared": (cache_folder(), False)}
    for folder, _ in places.values():
        folders.write_token(folder, here.job, here.name)
    meeting.wait("tokens written")
    findings = []
    for check, (folder, needed) in places.items():
        missing = folders.unseen_tokens(folder, here.job, names, PATIENCE_SECONDS)
        findings.append(folders.shared(check, folder, missing, needed=needed))
    meeting.wait("tokens seen")
    for folder, _ in places.values():
        folders.token(folder, here.job, here.name).unlink(missing_ok=True)
    return findings


def _alone(wanted: Wanted) -> list[Finding]:
    if wanted.nodes == 1:
        return []
    remedy = "run it on each of them, or where Slurm can start it there: lrm doctor --nodes N"
    return [Finding("other nodes", f"{wanted.nodes - 1} were not looked at", "warning", remedy)]
