"""What the records of an evaluation come to: results, tables, pages; and two evaluations side by side."""

import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lrm_pl import __version__
from lrm_pl.apps.commit import git_commit
from lrm_pl.apps.evaluation_board import write_board
from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError
from lrm_pl.evaluation.folder import (
    OBJECTS_NAME,
    RESULTS_NAME,
    SETTINGS_NAME,
    ObjectRecord,
    read_features,
    read_json,
    read_object,
    without_places,
)
from lrm_pl.evaluation.page import render_comparison, render_page
from lrm_pl.evaluation.protocols import PROTOCOLS, Protocol, image_metrics, surface_metrics
from lrm_pl.evaluation.summary import means, paired_differences, set_distances, table

#: Seconds without a new record after which other processes are taken for dead.
_PATIENCE_S = 1800.0


def finish(out: Path, keys: list[str], protocol: Protocol, settings: dict[str, Any]) -> dict[str, Any]:
    """Wait for all records, and write what they come to.

    Raises:
        InputError: Other processes do not finish, or nothing could be measured.
    """
    records = _wait_for(out, keys)
    good = [record for record in records if record.rows.get("model")]
    if not good:
        reasons = "; ".join(sorted({record.bad or "; ".join(record.notes) for record in records})[:3])
        raise InputError(f"{out}: expected at least one object that can be measured, found none: {reasons}")
    rows = means(good)
    features = read_features(out, keys)
    for name, values in (set_distances(features) if features else {}).items():
        rows[name] |= values
    better = metrics_of(protocol)
    results = {
        "protocol": settings["protocol"],
        "settings": settings,
        "objects": len(good),
        "not measured": {record.id: record.bad for record in records if record.bad},
        "notes": {record.id: list(record.notes) for record in records if record.notes},
        "mean": rows,
        "objects of the mean": of_how_many(good),
        "versions": {"lrm_pl": __version__, "commit": git_commit(), "torch": torch.__version__},
    }
    step = settings["network"]["step"]
    facts = {
        "protocol": f"{protocol.name}: {protocol.what}",
        "network": settings["network"]["source"] + ("" if step is None else f", step {step}"),
        "weights, sha256": settings["network"]["sha256"],
        "shards": f"{settings['data']['folder']}, split {settings['data']['split']}, {settings['data']['ids']}",
        "objects": f"{len(good)} of {len(records)}",
        "code": f"lrm_pl {__version__}, {git_commit()}",
    }
    if short := shortfall(results):
        facts["means of fewer"] = short
    told = "\n".join(f"{name}: {value}  " for name, value in facts.items())
    write_atomically(out / "results.md", f"{told}\n\n{table(rows, better)}\n".encode())
    page = render_page(f"Evaluation: {protocol.name}", facts, rows, better, records, out)
    write_atomically(out / "index.html", page.encode())
    write_board(out, protocol.name, table(rows, better), rows, good, better, step or 0)
    write_atomically(out / RESULTS_NAME, (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())
    return results


def of_how_many(records: list[ObjectRecord]) -> dict[str, int]:
    """Count the objects that the network's mean of each metric is of."""
    return dict(Counter(metric for record in records for metric in record.rows.get("model", {})))


def shortfall(results: dict[str, Any]) -> str:
    """Say which means are of fewer objects than were measured; nothing where none is."""
    fewer = {
        metric: count
        for metric, count in results["objects of the mean"].items()
        if count < results["objects"]
    }
    return ", ".join(f"{metric}: {count} of {results['objects']} objects" for metric, count in fewer.items())


def compare(a: Path, b: Path, out: Path) -> str:
    """Put two evaluations side by side.

    Returns:
        A Markdown table of the paired differences.

    Raises:
        InputError: They are not of one protocol and one data set, or not finished.
    """
    settings = [_finished(folder) for folder in (a, b)]
    for name in ("protocol", "data", "lpips", "clip"):
        sides: list[Any] = [without_places(found).get(name) for found in settings]
        of_a, of_b = sides
        if of_a != of_b:
            if name == "protocol" and of_a["name"] != of_b["name"]:
                of_a, of_b = of_a["name"], of_b["name"]
            raise InputError(f"expected two evaluations of one {name}, found {of_a} and {of_b}")
    protocol = PROTOCOLS[settings[0]["protocol"]["name"]]
    found = in_common(*(_records(*each) for each in zip((a, b), settings, strict=True)))
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
    out.mkdir(parents=True, exist_ok=True)
    page = render_comparison(
        f"Comparison: {protocol.name}; {names[0]}, {names[1]}",
        ("A", "B"),
        rows,
        better,
        differences,
        (a, b),
        widest,
    )
    write_atomically(out / "comparison.html", page.encode())
    lines = ["| B - A | mean | 95 % interval | objects |", "|---|---:|---:|---:|"]
    for metric in (metric for metric in better if metric in differences):
        d = differences[metric]
        lines.append(f"| {metric} | {d.mean:+.4f} | {d.low:+.4f} to {d.high:+.4f} | {d.objects} |")
    told = "\n".join([*names, "", table(rows, better), "", *lines])
    write_atomically(out / "comparison.md", (told + "\n").encode())
    return told


def metrics_of(protocol: Protocol) -> dict[str, bool]:
    """Name the metrics that a protocol may have, in the order of tables -> whether more is better."""
    images = image_metrics(["clip"]) | {"fid": False, "kid": False} if protocol.targets else {}
    return images | (surface_metrics(protocol.geometry) if protocol.geometry else {})


def in_common(a: list[ObjectRecord], b: list[ObjectRecord]) -> list[list[ObjectRecord]]:
    """Keep of two evaluations the objects, and of each the metrics, that both have."""
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


def _wait_for(out: Path, keys: list[str]) -> list[ObjectRecord]:
    records = dict[str, ObjectRecord]()
    last = time.monotonic()
    while True:
        before = len(records)
        for key in keys:
            if key not in records and (record := read_object(out, key)) is not None:
                records[key] = record
        if len(records) == len(keys):
            return [records[key] for key in keys]
        if len(records) > before:
            last = time.monotonic()
        if time.monotonic() - last > _PATIENCE_S:
            raise InputError(
                f"{out}: expected other processes to measure {len(keys) - len(records)} more objects, found nothing "
                f"new for {_PATIENCE_S / 60:.0f} minutes; start the same command again, it goes on where it was"
            )
        time.sleep(0.5)


def _finished(folder: Path) -> dict[str, Any]:
    """Read the settings of a finished evaluation."""
    if not (folder / RESULTS_NAME).is_file():
        raise InputError(
            f"expected a finished evaluation in {folder}, found none; make it: lrm evaluate --out {folder} ..."
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
            f"{folder / SETTINGS_NAME}: expected the settings of an evaluation, found others; delete {folder} and "
            "measure again"
        )
    return settings


def _records(folder: Path, settings: dict[str, Any]) -> list[ObjectRecord]:
    """Read all records of a finished evaluation."""
    paths = sorted((folder / OBJECTS_NAME).glob("*.json"))
    records = [record for path in paths if (record := read_object(folder, path.stem)) is not None]
    if len(records) != settings["data"]["objects"]:
        raise InputError(
            f"{folder}: expected {settings['data']['objects']} measured objects, found {len(records)}; measure the "
            "rest with the command that made it, it goes on where it was"
        )
    return records
