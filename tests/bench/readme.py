"""Keep the last figure of every benchmark as a table in the README."""

import json
from collections.abc import Iterable
from pathlib import Path

BEGIN, END = "<!-- what make bench found last -->", "<!-- end of it -->"


def table(records: Iterable[dict]) -> str:
    """Write the last record of each name as a markdown table, machine by machine, in the order of first appearance."""
    last = {(_machine(record), record["bench"]): record for record in records}
    lines = []
    for machine in dict.fromkeys(machine for machine, _ in last):
        lines += [f"On {machine}:", "", "| | found | wanted |", "|---|---|---|"]
        lines += [
            f"| {name} | {record['value']:.3g} | {record['target']} |"
            for (place, name), record in last.items()
            if place == machine
        ]
        lines.append("")
    return "\n".join(lines)


def update(readme: Path, results: Path) -> None:
    """Put the table of a file of results between the marks in the README.

    Raises:
        ValueError: The marks are not there.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: expected the marks {BEGIN} and {END} once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    records = [json.loads(line) for line in results.read_text().splitlines()]
    readme.write_text(f"{before}{BEGIN}\n{table(records)}{END}{after}")


def _machine(record: dict) -> str:
    return f"{record['cores']} cores of {record['cpu']}, torch {record['torch'].split('+')[0]}"
