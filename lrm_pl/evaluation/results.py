"""What the records of an evaluation come to: results, tables, pages."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lrm_pl import __version__
from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError
from lrm_pl.evaluation.page import render_page
from lrm_pl.evaluation.protocols import Protocol, metrics_of
from lrm_pl.evaluation.records import RESULTS_NAME, ObjectRecord, read_features, read_object
from lrm_pl.evaluation.set_distances import set_distances
from lrm_pl.evaluation.summary import means, table
from lrm_pl.evaluation.tensorboard import write_board
from lrm_pl.version import git_commit

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
        raise InputError(
            subject=out, expected="at least one object that can be measured", found=f"none: {reasons}"
        )
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
        "objects of the mean": count_objects(good),
        "versions": {"lrm_pl": __version__, "commit": git_commit(), "torch": torch.__version__},
    }
    step = settings["network"]["step"]
    facts = {
        "protocol": f"{protocol.name}: {protocol.description}",
        "network": settings["network"]["source"] + ("" if step is None else f", step {step}"),
        "weights, sha256": settings["network"]["sha256"],
        "shards": f"{settings['data']['folder']}, split {settings['data']['split']}, {settings['data']['ids']}",
        "objects": f"{len(good)} of {len(records)}",
        "code": f"lrm_pl {__version__}, {git_commit()}",
    }
    if short := incomplete_means(results):
        facts["means of fewer"] = short
    told = "\n".join(f"{name}: {value}  " for name, value in facts.items())
    write_atomically(out / "results.md", f"{told}\n\n{table(rows, better)}\n".encode())
    page = render_page(f"Evaluation: {protocol.name}", facts, rows, better, records, out)
    write_atomically(out / "index.html", page.encode())
    write_board(out, protocol.name, table(rows, better), rows, good, better, step or 0)
    write_atomically(out / RESULTS_NAME, (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())
    return results


def count_objects(records: list[ObjectRecord]) -> dict[str, int]:
    """Count the objects that the network's mean of each metric is of."""
    return dict(Counter(metric for record in records for metric in record.rows.get("model", {})))


def incomplete_means(results: dict[str, Any]) -> str:
    """Say which means are of fewer objects than were measured; nothing where none is."""
    fewer = {
        metric: count
        for metric, count in results["objects of the mean"].items()
        if count < results["objects"]
    }
    return ", ".join(f"{metric}: {count} of {results['objects']} objects" for metric, count in fewer.items())


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
                subject=out,
                expected=f"other processes to measure {len(keys) - len(records)} more objects",
                found=f"nothing new for {_PATIENCE_S / 60:.0f} minutes",
                remedy="start the same command again, it goes on where it was",
            )
        time.sleep(0.5)
