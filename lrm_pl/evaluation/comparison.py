"""Comparison of two evaluations by paired differences. This module does not import torch."""

import dataclasses
from pathlib import Path
from typing import Any

from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError
from lrm_pl.evaluation.page import render_comparison
from lrm_pl.evaluation.protocols import PROTOCOLS, metrics_of
from lrm_pl.evaluation.records import (
    DEFAULT_FOLDER,
    OBJECTS_NAME,
    RESULTS_NAME,
    SETTINGS_NAME,
    ObjectRecord,
    read_json,
    read_object,
    without_locations,
)
from lrm_pl.evaluation.summary import means, paired_differences, table
from lrm_pl.paths import require_out

PAGE_NAME, TABLE_NAME = "comparison.html", "comparison.md"


def compare(a: Path, b: Path, out: Path | None = None) -> tuple[str, Path]:
    """Compare two evaluations, and write a page and a Markdown table.

    Args:
        a: Folder of the first evaluation.
        b: Folder of the second evaluation.
        out: Output folder. If None, ``evaluation/A-B`` is used, where A and B are the names of the folders.

    Returns:
        Markdown table of the paired differences, and path of the page.

    Raises:
        InputError: The evaluations are not finished or differ in protocol, data or metrics, or the output folder is
            in use.
    """
    settings = [_finished(folder) for folder in (a, b)]
    for name in ("protocol", "data", "lpips", "clip"):
        sides: list[Any] = [without_locations(found).get(name) for found in settings]
        of_a, of_b = sides
        if of_a != of_b:
            if name == "protocol" and of_a["name"] != of_b["name"]:
                of_a, of_b = of_a["name"], of_b["name"]
            raise InputError(expected=f"two evaluations with the same {name}", found=f"{of_a} and {of_b}")
    protocol = PROTOCOLS[settings[0]["protocol"]["name"]]
    found = common_objects(*(_records(*each) for each in zip((a, b), settings, strict=True)))
    differences = paired_differences(*found)
    better = metrics_of(protocol)
    rows = {name: means(records).get("model", {}) for name, records in zip(("A", "B"), found, strict=True)}
    first = next(metric for metric in better if metric in differences)
    of_b = {
        record.id: record.rows["model"][first] for record in found[1] if first in record.rows.get("model", {})
    }
    widest = sorted(
        (record for record in found[0] if first in record.rows.get("model", {}) and record.id in of_b),
        key=lambda record: -abs(of_b[record.id] - record.rows["model"][first]),
    )
    names = f"A: {settings[0]['network']['source']}", f"B: {settings[1]['network']['source']}"
    lines = ["| B - A | mean | 95 % interval | objects |", "|---|---:|---:|---:|"]
    for metric in (metric for metric in better if metric in differences):
        d = differences[metric]
        lines.append(f"| {metric} | {d.mean:+.4f} | {d.low:+.4f} to {d.high:+.4f} | {d.objects} |")
    summary = "\n".join([*names, "", table(rows, better), "", *lines])
    text = (summary + "\n").encode()
    folder = out or DEFAULT_FOLDER / f"{a.absolute().name}-{b.absolute().name}"
    require_out(folder)
    if out is None and (folder / TABLE_NAME).is_file() and (folder / TABLE_NAME).read_bytes() != text:
        raise InputError(expected=f"no other comparison in {folder}", found="one", remedy="pass --out FOLDER")
    page = render_comparison(
        f"Comparison: {protocol.name}; {names[0]}, {names[1]}",
        ("A", "B"),
        rows,
        better,
        differences,
        (a, b),
        widest,
    )
    write_atomically(folder / PAGE_NAME, page.encode())
    write_atomically(folder / TABLE_NAME, text)
    return summary, folder / PAGE_NAME


def common_objects(a: list[ObjectRecord], b: list[ObjectRecord]) -> list[list[ObjectRecord]]:
    """Restrict the records of two evaluations to the objects and metrics that both evaluations contain."""
    metrics = [{record.id: set(record.rows.get("model", {})) for record in records} for records in (a, b)]
    both = {key: metrics[0][key] & metrics[1][key] for key in metrics[0].keys() & metrics[1].keys()}
    return [
        [
            dataclasses.replace(record, rows={"model": {m: record.rows["model"][m] for m in both[record.id]}})
            for record in records
            if both.get(record.id)
        ]
        for records in (a, b)
    ]


def _finished(folder: Path) -> dict[str, Any]:
    """Read the settings of a finished evaluation."""
    if not (folder / RESULTS_NAME).is_file():
        raise InputError(
            expected=f"a finished evaluation in {folder}",
            found="none",
            remedy=f"run `lrm evaluate --out {folder} ...`",
        )
    settings = read_json(folder / SETTINGS_NAME)
    try:
        known = settings["protocol"]["name"] in PROTOCOLS
        known &= isinstance(settings["network"]["source"], str) and isinstance(
            settings["data"]["objects"], int
        )
    except (KeyError, TypeError):
        known = False
    if not known:
        raise InputError(
            subject=folder / SETTINGS_NAME,
            expected="the settings of an evaluation",
            found="other content",
            remedy=f"delete {folder} and run `lrm evaluate` again",
        )
    return settings


def _records(folder: Path, settings: dict[str, Any]) -> list[ObjectRecord]:
    """Read all records of a finished evaluation."""
    paths = sorted((folder / OBJECTS_NAME).glob("*.json"))
    records = [record for path in paths if (record := read_object(folder, path.stem)) is not None]
    if len(records) != settings["data"]["objects"]:
        raise InputError(
            subject=folder,
            expected=f"{settings['data']['objects']} evaluated objects",
            found=len(records),
            remedy="run the same `lrm evaluate` command again to resume",
        )
    return records
