"""Self-contained HTML page of an evaluation, with means and images of the worst, median and best objects."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lrm_pl.evaluation.records import OBJECTS_NAME, ObjectRecord
from lrm_pl.evaluation.summary import Difference, digits

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

    Objects that have other metrics but not this metric, because no surface was found, rank as the worst objects.
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
    seen = set[str]()
    chosen = {}
    for name, part in parts.items():
        chosen[name] = [record for record in part if record.id not in seen]
        seen |= {record.id for record in part}
    return chosen


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
        facts: Description of the evaluation, with one table row per item.
        rows: Mean metrics of the model and the baselines.
        better: Names of metrics, and whether higher values are better. Objects are ranked by the first metric that is
            available.
        records: Records of all objects.
        folder: Folder of the evaluation, which contains the images.
    """
    columns = [metric for metric in better if any(metric in row for row in rows.values())]
    parts = [f"<h1>{html.escape(title)}</h1>", _facts(facts), _means(rows, better, columns)]
    if columns:
        for name, chosen in rank_objects(records, columns[0], more_is_better=better[columns[0]]).items():
            if not chosen:
                continue
            figures = "".join(_figure(record, columns, folder) for record in chosen)
            parts.append(f"<h2>{name.capitalize()} objects by {html.escape(columns[0])}</h2>{figures}")
    missing = [record for record in records if record.bad or record.notes]
    if missing:
        lines = "".join(
            f"<li>{html.escape(record.id)}: {html.escape(record.bad or '; '.join(record.notes))}</li>"
            for record in missing
        )
        parts.append(f"<h2>Objects with missing metrics</h2><ul>{lines}</ul>")
    return _document(title, "".join(parts))


def render_comparison(
    title: str, names: tuple[str, str], rows: Mapping[str, Mapping[str, float]], better: Mapping[str, bool],
    differences: Mapping[str, Difference], folders: tuple[Path, Path], records: Sequence[ObjectRecord],
) -> str:  # fmt: skip
    """Render the page of a comparison with means, paired differences and the objects with the largest differences."""
    columns = [metric for metric in better if metric in differences]
    lines = []
    for metric in columns:
        found = differences[metric]
        significant = found.low > 0 or found.high < 0
        style = ("better" if (found.mean > 0) == better[metric] else "worse") if significant else ""
        decimals = digits(metric)
        lines.append(
            f"<tr><td>{html.escape(metric)}</td><td class='{style}'>{found.mean:+.{decimals}f}</td>"
            f"<td>{found.low:+.{decimals}f} to {found.high:+.{decimals}f}</td><td>{found.objects}</td></tr>"
        )
    table = (
        "<h2>Paired differences, B - A</h2><table><tr><th></th><th>mean</th><th>95 % confidence interval</th>"
        "<th>objects</th></tr>" + "".join(lines) + "</table>"
    )
    images = []
    for record in records[:_SHOWN]:
        for name, folder in zip(names, folders, strict=True):
            images.append(_image(folder, record.id, f"{name}: {record.id}"))
    parts = [f"<h1>{html.escape(title)}</h1>", _means(rows, better, columns), table, *images]
    return _document(title, "".join(parts))


def _facts(facts: Mapping[str, str]) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(name)}</td><td style='text-align:left'>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table>{lines}</table>"


def _means(
    rows: Mapping[str, Mapping[str, float]], better: Mapping[str, bool], columns: Sequence[str]
) -> str:
    head = "".join(f"<th>{html.escape(metric)} {'↑' if better[metric] else '↓'}</th>" for metric in columns)
    lines = []
    for name, row in rows.items():
        cells = "".join(
            f"<td>{row[metric]:.{digits(metric)}f}</td>" if metric in row else "<td>-</td>"
            for metric in columns
        )
        lines.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def _figure(record: ObjectRecord, columns: Sequence[str], folder: Path) -> str:
    row = record.rows.get("model", {})
    metrics = ", ".join(f"{metric} {row[metric]:.{digits(metric)}f}" for metric in columns if metric in row)
    return _image(folder, record.id, f"{record.id}: {metrics}")


def _image(folder: Path, key: str, caption: str) -> str:
    path = folder / OBJECTS_NAME / f"{key}.png"
    image = ""
    if path.is_file():
        data = base64.b64encode(path.read_bytes()).decode()
        image = f"<img alt='input, then target and render of each view' src='data:image/png;base64,{data}'>"
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _document(title: str, body: str) -> str:
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style>{body}</html>\n"
    )
