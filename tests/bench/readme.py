"""Keep the last figure of every benchmark as a table in the README."""

from collections.abc import Iterable
from pathlib import Path

BEGIN, END = "<!-- what make bench found last -->", "<!-- end of it -->"

#: (machine, benchmark) -> (what was found, what is wanted)
Rows = dict[tuple[str, str], tuple[str, str]]


def table(rows: Rows) -> str:
    """Write the figures as a markdown table, machine by machine, in the order of first appearance."""
    lines = []
    for machine in dict.fromkeys(machine for machine, _ in rows):
        lines += [f"On {machine}:", "", "| | found | wanted |", "|---|---|---|"]
        lines += [
            f"| {name} | {found} | {wanted} |"
            for (place, name), (found, wanted) in rows.items()
            if place == machine
        ]
        lines.append("")
    return "\n".join(lines)


def read_table(text: str) -> Rows:
    """Read what ``table`` wrote."""
    rows, machine = Rows(), ""
    for line in text.splitlines():
        if line.startswith("On "):
            machine = line.removeprefix("On ").removesuffix(":")
        elif line.startswith("| ") and not line.startswith("| |"):
            name, found, wanted = (cell.strip() for cell in line.strip("|").split(" | "))
            rows[machine, name] = found, wanted
    return rows


def update(readme: Path, records: Iterable[dict]) -> None:
    """Put new figures in the place of their old ones, between the marks in the README; other figures stay.

    Raises:
        ValueError: The marks are not there.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: expected the marks {BEGIN} and {END} once each")
    before, (old, after) = text.split(BEGIN)[0], text.split(BEGIN)[1].split(END)
    new = {
        (_machine(record), record["bench"]): (f"{record['value']:.3g}", record["target"])
        for record in records
    }
    readme.write_text(f"{before}{BEGIN}\n{table(read_table(old) | new)}{END}{after}")


def _machine(record: dict) -> str:
    return f"{record['cores']} cores of {record['cpu']}, torch {record['torch'].split('+')[0]}"
