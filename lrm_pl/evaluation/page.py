"""Self-contained HTML page of an evaluation, with means and images of the worst, median and best objects."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lrm_pl.evaluation.records import OBJECTS_NAME, ObjectRecord
from lrm_pl.evaluation.summary import Difference, difference_cells, format_metric, mean_cells

#: Maximum number of objects that are shown per group.
_SHOWN = 4

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}
figure{margin:0 0 1rem}img{max-width:100%;border:1px solid #ddd}figcaption{color:#555;font-size:.9rem}
.worse{color:#a33}.better{color:#273}
"""


def rank_objects(
    records: Sequence[ObjectRecord], metric: str, *, more_is_better: bool
) -> dict[str, list[ObjectRecord]]:
    """Select the worst, median and best objects by a metric of the model, without duplicates.

    Objects that lack this metric because no surface was found are ranked worst. Objects without metrics are omitted.
    """
    known = [record for record in records if record.rows.get("model")]
    missing = -math.inf if more_is_better else math.inf
    order = sorted(
        known, key=lambda r: (r.rows["model"].get(metric, missing), r.id), reverse=not more_is_better
    )  # worst first
    count = min(_SHOWN, -(-len(order) // 3))
    middle = (len(order) - count) // 2
    parts = {
        "worst": order[:count],
        "median": order[middle : middle + count],
        "best": list(reversed(order[len(order) - count :])),
    }
    for first, second in (("worst", "median"), ("worst", "best"), ("median", "best")):
        parts[second] = [record for record in parts[second] if record not in parts[first]]
    return parts


def render_page(
    title: str,
    facts: Mapping[str, str],
    rows: Mapping[str, Mapping[str, float]],
    better: Mapping[str, bool],
    records: Sequence[ObjectRecord],
    folder: Path,
) -> str:
    """Render the page of an evaluation as HTML.

    Args:
        title: Title of the page.
        facts: Description of the evaluation, with one line of text per item.
        rows: Mean metrics of the model and the baselines.
        better: Names of metrics, and whether higher values are better. Objects are ranked by the first metric that is
            available.
        records: Records of all objects.
        folder: Folder of the evaluation, which contains the images.
    """
    columns = [metric for metric in better if any(metric in row for row in rows.values())]
    lines = [html.escape(f"{name}: {value}") for name, value in facts.items()]
    parts = [f"<p>{'<br>'.join(lines)}</p>", _table(mean_cells(rows, better))]
    if columns:
        for name, chosen in rank_objects(records, columns[0], more_is_better=better[columns[0]]).items():
            if chosen:
                parts.append(f"<h2>{name.capitalize()} objects by {html.escape(columns[0])}</h2>")
            for record in chosen:
                row = record.rows["model"]
                metrics = ", ".join(f"{m} {format_metric(m, row[m])}" for m in columns if m in row)
                parts.append(_image(folder, record.id, f"{record.id}: {metrics}"))
    missing = [(record.id, record.bad or "; ".join(record.notes)) for record in records]
    if lines := [f"<li>{html.escape(f'{key}: {reason}')}</li>" for key, reason in missing if reason]:
        parts.append(f"<h2>Objects with missing metrics</h2><ul>{''.join(lines)}</ul>")
    return _document(title, parts)


def render_comparison(
    title: str, rows: Mapping[str, Mapping[str, float]], better: Mapping[str, bool],
    differences: Mapping[str, Difference], folders: Mapping[str, Path], records: Sequence[ObjectRecord],
) -> str:  # fmt: skip
    """Render the page of a comparison with means, paired differences and the objects with the largest differences.

    Args:
        title: Title of the page.
        rows: Mean metrics of both evaluations.
        better: Names of metrics, and whether higher values are better.
        differences: Paired differences by metric. Significant differences are colored.
        folders: Folders of both evaluations, which contain the images.
        records: Records in the order in which the images are shown.
    """
    colors = [""]
    for metric in (metric for metric in better if metric in differences):
        found = differences[metric]
        significant = found.low > 0 or found.high < 0
        colors.append(("better" if (found.mean > 0) == better[metric] else "worse") if significant else "")
    images = [
        _image(folder, record.id, f"{name}: {record.id}")
        for record in records[:_SHOWN]
        for name, folder in folders.items()
    ]
    tables = _table(mean_cells(rows, better)), _table(difference_cells(differences, better), colors)
    return _document(title, [tables[0], "<h2>Paired differences, B - A</h2>", tables[1], *images])


def _table(cells: Sequence[Sequence[str]], styles: Sequence[str] = ()) -> str:
    """Return an HTML table. The first row of ``cells`` is the header. ``styles`` contains a CSS class for each row."""
    lines = []
    for number, line in enumerate(cells):
        tag = "td" if number else "th"
        row = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
        lines.append(f"<tr class='{styles[number] if styles else ''}'>{row}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _image(folder: Path, key: str, caption: str) -> str:
    path = folder / OBJECTS_NAME / f"{key}.png"
    image = ""
    if path.is_file():
        data = base64.b64encode(path.read_bytes()).decode()
        image = f"<img alt='input, then target and render of each view' src='data:image/png;base64,{data}'>"
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _document(title: str, parts: Sequence[str]) -> str:
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"
    )
