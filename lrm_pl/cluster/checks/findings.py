"""Findings of the checks, and the table that merges those of all nodes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lrm_pl.errors import InputError

Verdict = Literal["ok", "warning", "missing"]
STYLES: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "missing": "red"}

#: Width of the table without a terminal.
LOG_WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of one check on one node.

    Attributes:
        check: Name of the check.
        found: What the check found.
        verdict: "missing" if the run cannot start without it.
        remedy: What to do, unless the verdict is "ok".
        uniform: Whether all nodes must find the same.
    """

    check: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""
    uniform: bool = False

    def __post_init__(self) -> None:
        """Require a remedy for every verdict except "ok"."""
        assert (self.verdict == "ok") == (not self.remedy), self

    @classmethod
    def from_error(cls, check: str, error: InputError) -> "Finding":
        """Return the finding of a check that failed with an expected error."""
        return cls(check, error.problem, "missing", error.remedy or "correct it and run again")


@dataclasses.dataclass(frozen=True)
class Row:
    """Row of the table: the finding of some nodes, or of all nodes if ``nodes`` is empty."""

    check: str
    nodes: str
    found: str
    verdict: Verdict
    remedy: str


def merge_findings(reports: Mapping[str, Sequence[Finding]]) -> list[Row]:
    """Return one row per check if all nodes agree, otherwise one per distinct finding.

    Args:
        reports: Name of a node -> its findings.
    """
    checks: dict[str, dict[Finding, list[str]]] = {}
    for node, findings in reports.items():
        for finding in findings:
            checks.setdefault(finding.check, {}).setdefault(finding, []).append(node)
    rows = []
    for check, groups in checks.items():
        differ = len(groups) > 1 and any(finding.uniform for finding in groups)
        for finding, nodes in groups.items():
            verdict, remedy = finding.verdict, finding.remedy
            if differ and verdict == "ok":
                verdict, remedy = "missing", "use the same environment and shared folder on every node"
            all_nodes = len(nodes) == len(reports)
            rows.append(Row(check, "" if all_nodes else ", ".join(nodes), finding.found, verdict, remedy))
    return rows


def print_table(rows: Sequence[Row]) -> bool:
    """Print the table and the remedies, and return whether nothing is missing."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    nodes_differ = any(row.nodes for row in rows)
    table = Table()
    for column in ("check", *(["nodes"] if nodes_differ else []), "found", "verdict"):
        table.add_column(column, overflow="fold")
    for row in rows:
        verdict = f"[{STYLES[row.verdict]}]{row.verdict}[/]"
        cells = [row.check, *([row.nodes or "all"] if nodes_differ else []), row.found]
        table.add_row(*map(escape, cells), verdict)
    console.print(table)
    for row in rows:
        if row.remedy:
            nodes = f" ({row.nodes})" if row.nodes else ""
            console.print(escape(f"{row.verdict}: {row.check}{nodes}: {row.remedy}"), soft_wrap=True)
    return all(row.verdict != "missing" for row in rows)
