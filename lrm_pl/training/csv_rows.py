"""metrics.csv of a run that goes on: rows up to the checkpoint stay, later ones are logged again.

Lightning's own writer deletes the file at every start, and is without it for a moment whenever a new metric appears.
"""

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class AppendedRows(ExperimentWriter):
    """Write metrics.csv after the rows that are there.

    Args:
        log_dir: Folder of the file.
        step: Rows of later steps are dropped.
    """

    def __init__(self, log_dir: str, step: int) -> None:
        self._step = step
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Drop later rows; Lightning deletes the file here."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        header, rows = read_rows(path)
        kept = [row for row in rows if int(row["step"]) <= self._step]
        if kept:
            self.metrics_keys = header
            write_rows(path, header, kept)
        else:
            path.unlink()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        write_rows(path, fieldnames, read_rows(path)[1])


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read the columns and the rows of a metrics.csv; a last row that was not written to its end is left out."""
    with open(path, newline="", encoding="utf-8") as file:
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    reader = csv.DictReader(whole)
    rows = [row for row in reader if None not in row.values()]
    return list(reader.fieldnames or ()), rows


def write_rows(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Write a metrics.csv beside the old one, then put it in its place."""
    beside = path.with_suffix(".partial")
    with open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)
