"""Comparison of two evaluations by paired differences. This module does not import torch."""

from pathlib import Path
from typing import Any

from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError
from lrm_pl.evaluation.page import render_comparison
from lrm_pl.evaluation.protocols import PROTOCOLS, Protocol, metrics_of
from lrm_pl.evaluation.records import (
    DEFAULT_FOLDER,
    OBJECTS_NAME,
    RESULTS_NAME,
    SETTINGS_NAME,
    ObjectRecord,
    damaged_file,
    read_json,
    read_object,
    without_locations,
)
from lrm_pl.evaluation.summary import (
    difference_cells,
    markdown,
    mean_cells,
    means,
    paired_differences,
)
from lrm_pl.paths import require_out

PAGE_NAME, TABLE_NAME = "comparison.html", "comparison.md"


def compare(a: Path, b: Path, out: Path | None = None) -> tuple[str, Path]:
    """Compare two evaluations, and write an HTML page and a Markdown summary.

    Args:
        a: Folder of the first evaluation.
        b: Folder of the second evaluation.
        out: Output folder. If None, ``evaluation/A-B`` is used, where A and B are the names of the folders.

    Returns:
        Markdown summary with tables of the means and of the paired differences, and path of the HTML page.

    Raises:
        InputError: The evaluations are not finished, differ in protocol, data or metrics, or have fewer than two
            objects in common, or the output folder is not writable or contains another comparison.
    """
    (protocol, source_a, settings_a, records_a), (_, source_b, settings_b, records_b) = map(_read, (a, b))
    for name in ("protocol", "data", "lpips", "clip"):
        of_a, of_b = (without_locations(found).get(name) for found in (settings_a, settings_b))
        if of_a != of_b:
            if isinstance(of_a, dict) and isinstance(of_b, dict):
                different = [key for key in of_a | of_b if of_a.get(key) != of_b.get(key)]
                of_a, of_b = ({key: found.get(key) for key in different} for found in (of_a, of_b))
            raise InputError(expected=f"two evaluations with the same {name}", found=f"{of_a} and {of_b}")
    pairs = pair_records(records_a, records_b)
    differences = paired_differences(pairs)
    better = metrics_of(protocol)
    rows = means(pairs)
    first = next(metric for metric in better if metric in differences)
    by_difference = sorted(
        (pair for pair in pairs if first in pair.rows["A"]),
        key=lambda pair: -abs(pair.rows["B"][first] - pair.rows["A"][first]),
    )
    names = f"A: {source_a}", f"B: {source_b}"
    tables = markdown(mean_cells(rows, better)), markdown(difference_cells(differences, better))
    summary = "\n".join([*names, "", tables[0], "", tables[1]])
    text = (summary + "\n").encode()
    folder = out or DEFAULT_FOLDER / f"{a.absolute().name}-{b.absolute().name}"
    require_out(folder)
    if out is None and (folder / TABLE_NAME).is_file() and (folder / TABLE_NAME).read_bytes() != text:
        raise InputError(
            expected=f"no other comparison in {folder}", found="one", remedy="pass another folder with --out"
        )
    title = f"Comparison: {protocol.name}; {names[0]}, {names[1]}"
    page = render_comparison(title, rows, better, differences, {"A": a, "B": b}, by_difference)
    write_atomically(folder / PAGE_NAME, page.encode())
    write_atomically(folder / TABLE_NAME, text)
    return summary, folder / PAGE_NAME


def pair_records(a: list[ObjectRecord], b: list[ObjectRecord]) -> list[ObjectRecord]:
    """Return records with the metrics of the model in two evaluations (rows "A" and "B").

    Only objects and metrics that both evaluations contain are included.
    """
    of_b = {record.id: record.rows.get("model", {}) for record in b}
    pairs = []
    for record in a:
        row, other = record.rows.get("model", {}), of_b.get(record.id, {})
        if shared := [metric for metric in row if metric in other]:
            both = {"A": {m: row[m] for m in shared}, "B": {m: other[m] for m in shared}}
            pairs.append(ObjectRecord(record.id, both))
    return pairs


def _read(folder: Path) -> tuple[Protocol, str, dict[str, Any], list[ObjectRecord]]:
    """Return the protocol, the source of the model, the settings and the records of a finished evaluation."""
    if not (folder / RESULTS_NAME).is_file():
        raise InputError(
            expected=f"a finished evaluation in {folder}",
            found="none",
            remedy=f"run `lrm evaluate --out {folder} ...`",
        )
    settings = read_json(folder / SETTINGS_NAME)
    with damaged_file(folder / SETTINGS_NAME, "the settings of an evaluation"):
        protocol, source = PROTOCOLS[settings["protocol"]["name"]], str(settings["network"]["source"])
        objects = int(settings["data"]["objects"])
    paths = sorted((folder / OBJECTS_NAME).glob("*.json"))
    records = [record for path in paths if (record := read_object(folder, path.stem)) is not None]
    if len(records) != objects:
        raise InputError(
            subject=folder,
            expected=f"{objects} evaluated objects",
            found=len(records),
            remedy="run the same `lrm evaluate` command again to resume",
        )
    return protocol, source, settings, records
