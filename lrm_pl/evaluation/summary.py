"""Figures of many objects: means, and two evaluations side by side."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lrm_pl.errors import InputError
from lrm_pl.evaluation.records import ObjectRecord


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much B is above A in one metric, object by object.

    Attributes:
        mean: Of B - A.
        low: Lower end of its confidence interval, 95 % (Student's t).
        high: Upper end.
        objects: How many there are of both.
    """

    mean: float
    low: float
    high: float
    objects: int


def means(records: Sequence[ObjectRecord]) -> dict[str, dict[str, float]]:
    """Average each metric of each row over the objects that have it, in order of their ids."""
    values: dict[str, dict[str, list[float]]] = {"model": {}}  # it comes first
    for record in sorted(records, key=lambda record: record.id):
        for name, row in record.rows.items():
            for metric, value in row.items():
                values.setdefault(name, {}).setdefault(metric, []).append(value)
    return {name: {metric: float(np.mean(v)) for metric, v in row.items()} for name, row in values.items()}


def paired_differences(a: Sequence[ObjectRecord], b: Sequence[ObjectRecord]) -> dict[str, Difference]:
    """Compare two evaluations of one protocol and one data set, object by object.

    Raises:
        InputError: They have no two objects in common.
    """
    from scipy import stats  # a second to import, and nothing else needs it

    of_b = {record.id: record.rows.get("model", {}) for record in b}
    differences: dict[str, list[float]] = {}
    for record in sorted(a, key=lambda record: record.id):
        row, other = record.rows.get("model", {}), of_b.get(record.id, {})
        for metric in row.keys() & other.keys():
            differences.setdefault(metric, []).append(other[metric] - row[metric])
    found = {}
    for metric, values in differences.items():
        if len(values) < 2:
            continue
        mean, error = float(np.mean(values)), float(stats.sem(values))
        reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
        found[metric] = Difference(mean, mean - reach, mean + reach, len(values))
    if not found:
        raise InputError(expected="two evaluations with at least two objects in common", found="fewer")
    return found


def table(rows: Mapping[str, Mapping[str, float]], better: Mapping[str, bool]) -> str:
    """Write means as a Markdown table: a row each, arrows where better is up or down.

    Args:
        rows: Row -> metric -> figure.
        better: Metric -> whether more is better, in the order of the columns; those that nobody has are left out.
    """
    columns = [metric for metric in better if any(metric in row for row in rows.values())]
    head = [f"{metric} {'↑' if better[metric] else '↓'}" for metric in columns]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in rows.items():
        cells = [f"{row[metric]:.{digits(metric)}f}" if metric in row else "-" for metric in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def digits(metric: str) -> int:
    """Say how many decimals of a metric mean anything."""
    return 2 if metric in ("psnr", "fid") else 4 if metric in ("chamfer", "kid") else 3
