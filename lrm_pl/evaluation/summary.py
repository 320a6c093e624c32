"""Means over objects, paired differences between two evaluations, and Markdown tables."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from lrm_pl.errors import InputError
from lrm_pl.evaluation.records import ObjectRecord


@dataclasses.dataclass(frozen=True)
class Difference:
    """Paired difference of a metric between two evaluations A and B.

    Attributes:
        mean: Mean of B - A over the objects.
        low: Lower bound of the 95% confidence interval (Student's t).
        high: Upper bound of the confidence interval.
        objects: Number of objects that have the metric in both evaluations.
    """

    mean: float
    low: float
    high: float
    objects: int


def means(records: Sequence[ObjectRecord]) -> dict[str, dict[str, float]]:
    """Average each metric of each row, such as the model or a baseline, over the objects that have the metric.

    The model comes first in the result. Objects are sorted by id, so that the result does not depend on the order of
    the records.
    """
    values = defaultdict[str, defaultdict[str, list[float]]](lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: record.id):
        for name, row in record.rows.items():
            for metric, value in row.items():
                values[name][metric].append(value)
    return {
        name: {metric: float(np.mean(v)) for metric, v in values[name].items()}
        for name in sorted(values, key="model".__ne__)
    }


def paired_differences(pairs: Sequence[ObjectRecord]) -> dict[str, Difference]:
    """Compute the paired differences B - A of each metric.

    Args:
        pairs: Records with the metrics of the first evaluation (row "A") and of the second evaluation (row "B").

    Raises:
        InputError: No metric is available for at least two objects.
    """
    from scipy import stats  # slow to import

    differences = defaultdict[str, list[float]](list)
    for pair in pairs:
        for metric, value in pair.rows["A"].items():
            differences[metric].append(pair.rows["B"][metric] - value)
    found = {}
    for metric, values in differences.items():
        if len(values) >= 2:
            mean, error = float(np.mean(values)), float(stats.sem(values))
            half_width = float(stats.t.ppf(0.975, len(values) - 1)) * error
            found[metric] = Difference(mean, mean - half_width, mean + half_width, len(values))
    if not found:
        raise InputError(expected="at least two objects in both evaluations", found="fewer")
    return found


def mean_cells(rows: Mapping[str, Mapping[str, float]], better: Mapping[str, bool]) -> list[list[str]]:
    """Return the cells of a table of means, with a header row and one row per item of ``rows``.

    Arrows show whether higher or lower values are better.

    Args:
        rows: Mean metrics by row label.
        better: Names of metrics in the order of the columns, and whether higher values are better. Columns without
            values are omitted.
    """
    columns = [metric for metric in better if any(metric in row for row in rows.values())]
    cells = [["prediction", *(f"{metric} {'↑' if better[metric] else '↓'}" for metric in columns)]]
    for name, row in rows.items():
        cells.append(
            [name, *(format_metric(metric, row[metric]) if metric in row else "-" for metric in columns)]
        )
    return cells


def difference_cells(differences: Mapping[str, Difference], better: Mapping[str, bool]) -> list[list[str]]:
    """Return the cells of a table of paired differences, with a header row and one row per metric."""
    found = [(metric, differences[metric]) for metric in better if metric in differences]
    lines = [[m, f"{d.mean:+.4f}", f"{d.low:+.4f} to {d.high:+.4f}", str(d.objects)] for m, d in found]
    return [["B - A", "mean", "95 % confidence interval", "objects"], *lines]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Format the cells of a table as Markdown. The first row of ``cells`` is the header."""
    head, *lines = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join([head, "|---|" + "---:|" * (len(cells[0]) - 1), *lines])


def format_metric(metric: str, value: float) -> str:
    """Format the value of a metric with the number of decimals that is usual for the metric."""
    decimals = 2 if metric in ("psnr", "fid") else 4 if metric in ("chamfer", "kid") else 3
    return f"{value:.{decimals}f}"
