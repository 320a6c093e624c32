"""The table of the latest results in tests/bench/README.md."""

from collections.abc import Iterable
from pathlib import Path

BEGIN, END = "<!-- latest results of make bench -->", "<!-- end of results -->"

#: (machine, benchmark) -> (value, target)
Rows = dict[tuple[str, str], tuple[str, str]]


def table(rows: Rows) -> str:
    """Format results as one Markdown table per machine, in order of first appearance."""
    lines = []
    for machine in dict.fromkeys(machine for machine, _ in rows):
        lines += [f"On {machine}:", "", "| benchmark | value | target |", "|---|---|---|"]
        lines += [
            f"| {name} | {found} | {wanted} |"
            for (owner, name), (found, wanted) in rows.items()
            if owner == machine
        ]
        lines.append("")
    return "\n".join(lines)


def read_table(text: str) -> Rows:
    """Parse the output of ``table``."""
    rows, machine = Rows(), ""
    for line in text.splitlines():
        if line.startswith("On "):
            machine = line.removeprefix("On ").removesuffix(":")
        elif line.startswith("| ") and not line.startswith("| benchmark |"):
            name, found, wanted = (cell.strip() for cell in line.strip("|").split(" | "))
            rows[machine, name] = found, wanted
    return rows


def update(readme: Path, records: Iterable[dict]) -> None:
    """Replace results between the markers of a README; results of other benchmarks stay.

    Raises:
        ValueError: The markers are missing.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: expected the markers {BEGIN} and {END} once each")
    before, (old, after) = text.split(BEGIN)[0], text.split(BEGIN)[1].split(END)
    new = {
        (_machine(record), record["bench"]): (
            f"{record['value']:.3g}",
            record["target"] + ("" if record["met"] else " **missed**"),
        )
        for record in records
    }
    readme.write_text(f"{before}{BEGIN}\n{table(read_table(old) | new)}{END}{after}")


def _machine(record: dict) -> str:
    return f"{record['cores']} cores of {record['cpu']}, torch {record['torch'].split('+')[0]}"
