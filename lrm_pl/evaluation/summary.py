"""Means over objects, paired differences of two evaluations, and Markdown tables."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lrm_pl.errors import InputError
from lrm_pl.evaluation.records import ObjectRecord


@dataclasses.dataclass(frozen=True)
class Difference:
    """Paired difference of a metric between two evaluations A and B.

    Attributes:
        mean: Mean of B - A over the objects.
        low: Lower bound of the 95 % confidence interval (Student's t).
        high: Upper bound of the confidence interval.
        objects: Number of objects in both evaluations.
    """

    mean: float
    low: float
    high: float
    objects: int


def means(records: Sequence[ObjectRecord]) -> dict[str, dict[str, float]]:
    """Average each metric of each row over the objects that have the metric.

    Objects are sorted by id, so that the result does not depend on the order of the records.
    """
    values: dict[str, dict[str, list[float]]] = {"model": {}}  # first row
    for record in sorted(records, key=lambda record: record.id):
        for name, row in record.rows.items():
            for metric, value in row.items():
                values.setdefault(name, {}).setdefault(metric, []).append(value)
    return {name: {metric: float(np.mean(v)) for metric, v in row.items()} for name, row in values.items()}


def paired_differences(a: Sequence[ObjectRecord], b: Sequence[ObjectRecord]) -> dict[str, Difference]:
    """Compute the paired differences of two evaluations with the same protocol and data.

    Raises:
        InputError: The evaluations have fewer than two objects in common.
    """
    from scipy import stats  # slow to import

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
        half_width = float(stats.t.ppf(0.975, len(values) - 1)) * error
        found[metric] = Difference(mean, mean - half_width, mean + half_width, len(values))
    if not found:
        raise InputError(expected="at least two objects that both evaluations have", found="fewer")
    return found


def table(rows: Mapping[str, Mapping[str, float]], better: Mapping[str, bool]) -> str:
    """Format means as a Markdown table with one line per row.

    Arrows show whether higher or lower values are better.

    Args:
        rows: Metrics by row.
        better: Names of metrics in the order of the columns, and whether higher values are better. Columns without
            values are omitted.
    """
    columns = [metric for metric in better if any(metric in row for row in rows.values())]
    head = [f"{metric} {'↑' if better[metric] else '↓'}" for metric in columns]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in rows.items():
        cells = [f"{row[metric]:.{digits(metric)}f}" if metric in row else "-" for metric in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def digits(metric: str) -> int:
    """Return the number of decimals to print for a metric."""
    return 2 if metric in ("psnr", "fid") else 4 if metric in ("chamfer", "kid") else 3
