"""Findings of the checks, and the table that shows the findings of all nodes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lrm_pl.errors import InputError

Verdict = Literal["ok", "warning", "missing"]
STYLES: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "missing": "red"}

#: Width of the table in characters if the output is not a terminal.
LOG_WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of one check on one node.

    Attributes:
        check: Name of the check.
        found: Description of what the check found.
        verdict: "ok", "warning", or "missing" if the run cannot start.
        remedy: Instructions for the user. Empty if and only if the verdict is "ok".
        uniform: Whether the finding must be the same on all nodes.
    """

    check: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""
    uniform: bool = False

    def __post_init__(self) -> None:
        """Check that there is a remedy if and only if the verdict is not "ok"."""
        assert (self.verdict == "ok") == (not self.remedy), self

    @classmethod
    def from_error(cls, check: str, error: InputError) -> "Finding":
        """Return the finding of a check that failed with an expected error."""
        return cls(check, error.problem, "missing", error.remedy or "correct it and run again")


@dataclasses.dataclass(frozen=True)
class Row:
    """Row of the table.

    Attributes:
        check: Name of the check.
        nodes: Names of the nodes with this finding. Empty if all nodes have this finding.
        found: Description of what the check found.
        verdict: Verdict of the finding.
        remedy: Instructions for the user.
    """

    check: str
    nodes: str
    found: str
    verdict: Verdict
    remedy: str


def merge_findings(reports: Mapping[str, Sequence[Finding]]) -> list[Row]:
    """Merge the findings of all nodes into rows, with one row per distinct finding of a check.

    Args:
        reports: Findings by name of the node.
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
    """Print the table and the remedies.

    Returns:
        Whether no row has the verdict "missing".
    """
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
