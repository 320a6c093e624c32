"""One table of what was found: rows that agree on all nodes become one."""

import dataclasses
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lrm_pl.cluster.checks.finding import Finding, Verdict

STYLES: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "missing": "red"}
#: Width of the table in a log, which has none of its own.
LOG_WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what some nodes (all of them: "") found."""

    check: str
    nodes: str
    found: str
    verdict: Verdict
    remedy: str


def rows(reports: Mapping[str, Sequence[Finding]]) -> list[Row]:
    """Merge the nodes' findings: one row where all agree, else one for each thing that was found.

    Args:
        reports: Node -> its findings.
    """
    checks: dict[str, dict[Finding, list[str]]] = {}
    for node, findings in reports.items():
        for finding in findings:
            checks.setdefault(finding.check, {}).setdefault(finding, []).append(node)
    table = []
    for check, groups in checks.items():
        differ = len(groups) > 1 and any(finding.alike for finding in groups)
        for finding, nodes in groups.items():
            verdict, remedy = finding.verdict, finding.remedy
            if differ and verdict == "ok":
                verdict, remedy = (
                    "missing",
                    "make it the same on every node: one environment, one shared folder",
                )
            everywhere = len(nodes) == len(reports)
            table.append(Row(check, "" if everywhere else ", ".join(nodes), finding.found, verdict, remedy))
    return table


def show(table_rows: Sequence[Row]) -> bool:
    """Print the table and the remedies; return whether nothing is missing."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    several = any(row.nodes for row in table_rows)
    table = Table()
    for column in ("check", *(["nodes"] if several else []), "found", "verdict"):
        table.add_column(column, overflow="fold")
    for row in table_rows:
        verdict = f"[{STYLES[row.verdict]}]{row.verdict}[/]"
        cells = [row.check, *([row.nodes or "all"] if several else []), row.found]
        table.add_row(*map(escape, cells), verdict)
    console.print(table)
    for row in table_rows:
        if row.remedy:
            where = f" ({row.nodes})" if row.nodes else ""
            console.print(escape(f"{row.verdict}: {row.check}{where}: {row.remedy}"), soft_wrap=True)
    return all(row.verdict != "missing" for row in table_rows)
