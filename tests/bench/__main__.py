"""`make bench`: print a table of measurements and append each as a JSON line to bench/results.jsonl."""

import argparse
import datetime
import json
import tempfile
import warnings
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lrm_pl.version import git_commit
from tests.bench import (
    components,
    deferred_memory,
    inference,
    loader,
    overhead,
    rendering,
    scaling,
    stall,
    steps,
)
from tests.bench.demo_run import ROOT, machine, write_shards
from tests.bench.readme import update

BENCHES = {
    "scaling": (scaling.measure, 5), "overhead": (overhead.measure, 15), "stall": (stall.measure, 5),
    "components": (components.measure, 5), "steps": (steps.measure, 2), "deferred_memory": (deferred_memory.measure, 1),
    "rendering": (rendering.measure, 3), "loader": (loader.measure, 5), "inference": (inference.measure, 3),
}  # fmt: skip


def main() -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(BENCHES), metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--rounds", type=int, help="repetitions of each benchmark")
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
                records.append(_append(result, here, results, table))
    console = Console()
    console.print(table)
    update(ROOT / "tests" / "bench" / "README.md", records)
    console.print(f"Appended to {results}; tests/bench/README.md has the latest of each", soft_wrap=True)


def _append(result: dict[str, object], here: dict[str, object], results: Path, table: Table) -> dict:
    """Append a result to the file and to the table, and return its record."""
    record = {
        **result, **here, "commit": git_commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    with open(results, "a") as file:
        file.write(json.dumps(record) + "\n")
    shown = {"bench", "value", "target", "met", "rounds"}
    details = ", ".join(_format(k, v) for k, v in result.items() if k not in shown)
    met = "yes" if result["met"] else "NO"
    table.add_row(str(result["bench"]), f"{result['value']:.3f}", str(result["target"]), met, details)
    return record


def _format(name: str, value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(_format(f"{name} {key}", part) for key, part in value.items())
    words = name.replace("_", " ")
    return f"{words} {value:.3g}" if isinstance(value, float) else f"{words} {value}"


if __name__ == "__main__":
    main()
