"""CSV writer that appends to the ``metrics.csv`` file of a resumed run.

Lightning's writer deletes an existing file on construction, and rewrites the file in place when a metric is added.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lrm_pl.data.manifest import write_atomically


class AppendingCSVWriter(ExperimentWriter):
    """Append rows to an existing ``metrics.csv`` file.

    Args:
        log_dir: Folder that contains the file.
        step: Last step whose rows are kept. Rows of later steps are dropped.
    """

    def __init__(self, log_dir: str, step: int) -> None:
        self._step = step
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Drop the rows of later steps from an existing file, which Lightning's implementation would delete."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        self.metrics_keys, rows = read_rows(path)
        write_rows(path, self.metrics_keys, [row for row in rows if int(row["step"]) <= self._step])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        write_rows(path, fieldnames, read_rows(path)[1])


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read the column names and rows of a ``metrics.csv`` file. An incomplete last row is ignored."""
    with open(path, newline="", encoding="utf-8") as file:
        lines = file.read().splitlines(keepends=True)
    reader = csv.DictReader(line for line in lines if line.endswith("\n"))
    rows = [row for row in reader if None not in row.values()]
    return list(reader.fieldnames or ()), rows


def write_rows(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Write a ``metrics.csv`` file atomically."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(columns))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
