"""Aggregation of the records of an evaluation into results, tables and pages."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lrm_pl import __version__
from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError
from lrm_pl.evaluation.features import set_distances
from lrm_pl.evaluation.page import render_page
from lrm_pl.evaluation.protocols import Protocol, metrics_of
from lrm_pl.evaluation.records import RESULTS_NAME, ObjectRecord, read_features, read_object, write_json
from lrm_pl.evaluation.summary import markdown, mean_cells, means
from lrm_pl.evaluation.tensorboard import write_board
from lrm_pl.version import git_commit

#: Time in seconds without new records after which the remaining processes are considered dead.
_TIMEOUT_S = 1800.0


def write_results(out: Path, keys: list[str], protocol: Protocol, settings: dict[str, Any]) -> dict[str, Any]:
    """Wait for the records of all objects, and write the results.

    Args:
        out: Folder of the evaluation.
        keys: Ids of the objects.
        protocol: Evaluation protocol.
        settings: Settings of the evaluation.

    Returns:
        Content of results.json.

    Raises:
        InputError: Other processes have stopped, or no object could be evaluated.
    """
    records = _wait_for(out, keys)
    good = [record for record in records if record.rows.get("model")]
    if not good:
        reasons = "; ".join(sorted({record.bad or "; ".join(record.notes) for record in records})[:3])
        raise InputError(subject=out, expected="at least one evaluated object", found=f"none: {reasons}")
    rows = means(good)
    features = read_features(out, keys)
    for name, values in (set_distances(features) if features else {}).items():
        rows[name] |= values
    better = metrics_of(protocol)
    results = {
        "protocol": settings["protocol"],
        "settings": settings,
        "objects": len(good),
        "failed": {record.id: record.bad for record in records if record.bad},
        "notes": {record.id: list(record.notes) for record in records if record.notes},
        "mean": rows,
        "objects of the mean": Counter(metric for record in good for metric in record.rows["model"]),
        "versions": {"lrm_pl": __version__, "commit": git_commit(), "torch": torch.__version__},
    }
    step = settings["network"]["step"]
    facts = {
        "protocol": f"{protocol.name}: {protocol.description}",
        "model": settings["network"]["source"] + ("" if step is None else f", step {step}"),
        "weights, sha256": settings["network"]["sha256"],
        "shards": f"{settings['data']['folder']}, split {settings['data']['split']}, {settings['data']['ids']}",
        "objects": f"{len(good)} of {len(records)}",
        "code": f"lrm_pl {__version__}, {git_commit()}",
    }
    if short := incomplete_means(results):
        facts["means over fewer objects"] = short
    header = "\n".join(f"{name}: {value}  " for name, value in facts.items())
    table = markdown(mean_cells(rows, better))
    write_atomically(out / "results.md", f"{header}\n\n{table}\n".encode())
    page = render_page(f"Evaluation: {protocol.name}", facts, rows, better, records, out)
    write_atomically(out / "index.html", page.encode())
    write_board(out, protocol.name, table, rows, good, better, step or 0)
    write_json(out / RESULTS_NAME, results)
    return results


def incomplete_means(results: dict[str, Any]) -> str:
    """List the metrics that are missing for some of the evaluated objects, or return "" if there are none."""
    objects = results["objects"]
    counts = results["objects of the mean"].items()
    return ", ".join(f"{metric}: {count} of {objects} objects" for metric, count in counts if count < objects)


def _wait_for(out: Path, keys: list[str]) -> list[ObjectRecord]:
    records = dict[str, ObjectRecord]()
    last = time.monotonic()
    while missing := [key for key in keys if key not in records]:
        found = {key: record for key in missing if (record := read_object(out, key)) is not None}
        records |= found
        if found:
            last = time.monotonic()
        elif time.monotonic() - last > _TIMEOUT_S:
            raise InputError(
                subject=out,
                expected=f"records of {len(missing)} more objects from other processes",
                found=f"none within {_TIMEOUT_S / 60:.0f} minutes",
                remedy="run the same command again to resume",
            )
        else:
            time.sleep(0.5)
    return [records[key] for key in keys]
