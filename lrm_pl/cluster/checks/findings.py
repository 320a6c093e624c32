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
        missing: Remedy if the run cannot start, and otherwise an empty string.
        warning: Remedy if the run can start but may be slow or fail later, and otherwise an empty string.
        uniform: Whether the finding must be the same on all nodes.
    """

    check: str
    found: str
    missing: str = ""
    warning: str = ""
    uniform: bool = False

    @classmethod
    def from_error(cls, check: str, error: InputError) -> "Finding":
        """Return the finding of a check that failed with an expected error."""
        return cls(check, error.problem, error.remedy or "correct it and run the command again")

    @property
    def verdict(self) -> Verdict:
        """Verdict in the table, which is "missing", "warning" or "ok"."""
        return "missing" if self.missing else "warning" if self.warning else "ok"

    @property
    def remedy(self) -> str:
        """Instructions for the user, or an empty string if the verdict is "ok"."""
        return self.missing or self.warning


def merge_findings(reports: Mapping[str, Sequence[Finding]]) -> list[tuple[str, Finding]]:
    """Merge the findings of all nodes into the rows of a table, with one row per distinct finding of a check.

    If the findings of a check must be the same on all nodes but differ, the verdict "ok" is replaced with "missing".

    Args:
        reports: Mapping from node name to findings.

    Returns:
        One tuple per row, with the names of the nodes (empty if all nodes have the same finding) and the finding.
    """
    checks: dict[str, dict[Finding, list[str]]] = {}
    for node, findings in reports.items():
        for finding in findings:
            checks.setdefault(finding.check, {}).setdefault(finding, []).append(node)
    rows = []
    for groups in checks.values():
        differ = len(groups) > 1 and any(finding.uniform for finding in groups)
        for finding, nodes in groups.items():
            if differ and finding.verdict == "ok":
                remedy = "use the same environment and shared folder on every node"
                finding = dataclasses.replace(finding, missing=remedy)
            rows.append(("" if len(nodes) == len(reports) else ", ".join(nodes), finding))
    return rows


def print_table(rows: Sequence[tuple[str, Finding]]) -> bool:
    """Print the table and the remedies.

    Args:
        rows: Rows as returned by ``merge_findings``.

    Returns:
        False if a row has the verdict "missing", and True otherwise.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    nodes_differ = any(nodes for nodes, _ in rows)
    table = Table()
    for column in ("check", *(["nodes"] if nodes_differ else []), "found", "verdict"):
        table.add_column(column, overflow="fold")
    for nodes, row in rows:
        cells = [row.check, *([nodes or "all"] if nodes_differ else []), row.found]
        table.add_row(*map(escape, cells), f"[{STYLES[row.verdict]}]{row.verdict}[/]")
    console.print(table)
    for nodes, row in rows:
        if row.remedy:
            where = f" ({nodes})" if nodes else ""
            console.print(escape(f"{row.verdict}: {row.check}{where}: {row.remedy}"), soft_wrap=True)
    return not any(row.missing for _, row in rows)
