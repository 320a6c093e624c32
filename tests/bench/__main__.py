"""`make bench`: a table, and a JSON line for each figure in bench/results.jsonl."""

import argparse
import datetime
import json
import tempfile
import warnings
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lrm_pl.version import git_commit
from tests.bench import deferred_memory, inference, loader, overhead, parts, rendering, scaling, stall, steps
from tests.bench.demo_run import ROOT, machine, write_shards
from tests.bench.readme import update

BENCHES = {
    "scaling": (scaling.measure, 5), "overhead": (overhead.measure, 15), "stall": (stall.measure, 5),
    "parts": (parts.measure, 5), "steps": (steps.measure, 2), "deferred_memory": (deferred_memory.measure, 1),
    "rendering": (rendering.measure, 3), "loader": (loader.measure, 5), "inference": (inference.measure, 3),
}  # fmt: skip


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(BENCHES), metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--rounds", type=int, help="turns of both sides")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    here = machine()
    results = ROOT / "bench" / "results.jsonl"
    results.parent.mkdir(exist_ok=True)
    table = Table(title=", ".join(f"{key} {value}" for key, value in here.items()))
    for column in ("", "value", "target", "met", "details"):
        table.add_column(column)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder))
        for name in arguments.names:
            measure, rounds = BENCHES[name]
            found = measure(shards, arguments.rounds or rounds)
            for result in found if isinstance(found, list) else [found]:
                records.append(_keep(result, here, results, table))
    console = Console()
    console.print(table)
    update(ROOT / "README.md", records)
    console.print(f"Appended to {results}; README.md has the last of each", soft_wrap=True)


def _keep(result: dict[str, object], here: dict[str, object], results: Path, table: Table) -> dict:
    """Append a figure to the file and to the table; returns its record."""
    record = {
        **result, **here, "commit": git_commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    with open(results, "a") as file:
        file.write(json.dumps(record) + "\n")
    shown = {"bench", "value", "target", "met", "rounds"}
    details = ", ".join(_said(k, v) for k, v in result.items() if k not in shown)
    met = "yes" if result["met"] else "NO"
    table.add_row(str(result["bench"]), f"{result['value']:.3f}", str(result["target"]), met, details)
    return record


def _said(name: str, value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(_said(f"{name} {key}", part) for key, part in value.items())
    words = name.replace("_", " ")
    return f"{words} {value:.3g}" if isinstance(value, float) else f"{words} {value}"


if __name__ == "__main__":
    main()
