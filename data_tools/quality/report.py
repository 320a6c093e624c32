"""The command ``python -m data_tools inspect``, which prints statistics and writes an HTML page.

The statistics describe the cameras (distance, elevation, field of view, position), image coverage and sizes, licenses,
creators and failures. The page is a single file that contains all images.
"""

import base64
import dataclasses
import html
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_tools.quality.contact_sheet import SHEET_NAME, write_contact_sheet
from data_tools.quality.filter_table import count_rejections
from data_tools.quality.geometry import geometry_types
from data_tools.quality.validate import decode_alphas
from data_tools.rendering.shard_folder import read_failures
from lrm_pl.data.manifest import SPLITS, Manifest, ShardError, read_manifest, read_samples, write_atomically
from lrm_pl.data.schema import SURFACE_MEMBER, SampleError, SampleInfo, decode_sample
from lrm_pl.errors import counted

PAGE_NAME = "inspect.html"

#: Number of bins in a histogram, and maximum number of rows in a table.
_BARS, _LINES = 24, 20

#: Maximum number of points in the plot of camera positions.
_DOTS = 2000


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of a folder of shards, where N is the total number of views.

    Attributes:
        infos: Records of all objects.
        geometry: Mapping from "depth", "normal" and "surface" to the number of objects that contain this data.
        camera_positions: (N, 3) positions of the cameras in world coordinates.
        quantities: Mapping from tuples (name, unit) to the (N,) values of all views.
    """

    infos: tuple[SampleInfo, ...]
    geometry: Counter[str]
    camera_positions: npt.NDArray[np.float64]
    quantities: dict[tuple[str, str], npt.NDArray[np.float64]]


def describe_objects(manifest: Manifest) -> str:
    """Return the number of objects per split and the number of views per object."""
    train, val = (sum(shard.samples for shard in manifest.split(split)) for split in SPLITS)
    return f"{train + val} ({train} train, {val} held out), {counted(manifest.views, 'view')} each"


def count_rejected(manifest: Manifest) -> int:
    """Return the number of rejected objects."""
    return sum(shard.samples for shard in manifest.shards if shard.rejected)


def inspect(folder: Path) -> Path:
    """Print the statistics of a folder of shards, and write the HTML page.

    Args:
        folder: Folder of shards.

    Returns:
        Path of the page.

    Raises:
        ShardError: The folder is not a complete folder of shards, or a shard is damaged.
    """
    manifest = read_manifest(folder)
    found = collect_statistics(folder, manifest)
    print(f"objects        {describe_objects(manifest)}")
    if rejected := count_rejected(manifest):
        print(f"rejected       {rejected}, included in the statistics below")
    print(f"shards         {_describe_shards(manifest)}")
    for (name, unit), values in found.quantities.items():
        low, middle, high = np.percentile(values, (0, 50, 100))
        print(f"{name:<31}{low:.4g} / {middle:.4g} / {high:.4g} {unit} (min, median, max)")
    geometry = " / ".join(str(found.geometry[name]) for name in ("depth", "normal", "surface"))
    print(f"{'objects with geometry':<31}{geometry} (depth, normals, surface points)")
    tables = count_values(folder, manifest, found.infos)
    for name, counts in tables.items():
        top = ", ".join(f"{value} {count}" for value, count in counts.most_common(3))
        print(f"{name:<31}{counted(len(counts), 'value')}: {top}" if counts else f"{name:<31}none")
    if not (folder / SHEET_NAME).is_file():
        write_contact_sheet(folder, manifest.shards, manifest.views)
    path = folder / PAGE_NAME
    write_atomically(path, render_page(folder, manifest, found, tables).encode())
    print(f"page           {path}")
    return path


def _describe_shards(manifest: Manifest) -> str:
    return f"{len(manifest.shards)}, {sum(shard.bytes for shard in manifest.shards) / 1e6:.1f} MB"


def collect_statistics(folder: Path, manifest: Manifest) -> Statistics:
    """Read all samples of a folder of shards, and compute the statistics.

    Raises:
        ShardError: A sample cannot be read.
    """
    infos, geometry = list[SampleInfo](), Counter[str]()
    columns = []  # position, focal length, coverage, longer side and file size of the views of each sample
    with tqdm(total=sum(shard.samples for shard in manifest.shards), unit="object", file=sys.stderr) as bar:
        for shard in manifest.shards:
            for key, content in read_samples(folder, shard):
                try:
                    sample = decode_sample(key, content)
                    views = [
                        (float(alpha.mean()) / 255, max(alpha.shape), len(view))
                        for alpha, view in zip(decode_alphas(sample), sample.views, strict=True)
                    ]
                except SampleError as error:
                    raise ShardError(
                        subject=folder / shard.name,
                        expected=error.problem,
                        remedy=f"run `python -m data_tools validate --shards {folder}` to list all problems",
                    ) from error
                infos.append(sample.info)
                geometry.update(geometry_types(sample))
                geometry["surface"] += SURFACE_MEMBER in sample.extras
                columns.append(np.column_stack([sample.c2w[:, :3, 3], sample.fxfycxcy[:, 0], views]).T)
                bar.update()
    *position, focal, coverage, side, size = np.concatenate(columns, axis=1)
    camera_positions = np.stack(position, axis=1)
    distance = np.linalg.norm(camera_positions, axis=1)
    quantities = {
        ("camera distance", "scene units"): distance,
        ("elevation", "degrees"): np.degrees(np.arcsin((camera_positions[:, 2] / distance).clip(-1, 1))),
        ("field of view", "degrees"): np.degrees(2 * np.arctan(0.5 / focal)),
        ("image coverage", "%"): 100 * coverage,
        ("longer side", "pixels"): side,
        ("image file size", "kB"): size / 1000,
    }
    return Statistics(tuple(infos), geometry, camera_positions, quantities)


def count_values(folder: Path, manifest: Manifest, infos: Sequence[SampleInfo]) -> dict[str, Counter[str]]:
    """Count licenses, creators, renderers, outcomes and reasons for failures.

    Args:
        folder: Folder of shards.
        manifest: Manifest of the folder.
        infos: Records of all objects.

    Returns:
        Mapping from titles of tables to counts of values.
    """
    failures = read_failures(folder)
    reasons = (record["reason"].partition("\n")[0][:80] for record in failures.values())
    rejected = count_rejected(manifest)
    outcomes = +Counter(kept=len(infos) - rejected, rejected=rejected, failed=len(failures))
    outcomes.update({f"rejected: {name}": count for name, count in count_rejections(folder).items()})
    return {
        "licenses": Counter(info.license for info in infos),
        "creators": Counter(info.creator for info in infos),
        "renderers": Counter(info.renderer for info in infos),
        "outcomes": outcomes,
        "failures": Counter(reasons),
    }


def render_page(
    folder: Path, manifest: Manifest, found: Statistics, tables: Mapping[str, Counter[str]]
) -> str:
    """Return the HTML page. Text from the records of objects is escaped.

    Args:
        folder: Folder of shards, which contains the contact sheet.
        manifest: Manifest of the folder.
        found: Statistics of the folder.
        tables: Mapping from titles to counts of values.
    """
    sheet = base64.b64encode((folder / SHEET_NAME).read_bytes()).decode()
    figures = [(histogram(values), f"{name}, {unit}") for (name, unit), values in found.quantities.items()]
    caption = "camera positions from above (x, y) and from the front (x, z)"
    figures.append((plot_cameras(found.camera_positions), caption))
    drawn = "".join(f"<figure>{svg}<figcaption>{text}</figcaption></figure>" for svg, text in figures)
    settings = html.escape(json.dumps(manifest.render, indent=1, ensure_ascii=False))
    title = html.escape(folder.resolve().name)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1340px; padding: 0 1em; color: #222; }}
figure {{ display: inline-block; margin: 0 1.5em 1.5em 0; }} figcaption {{ text-align: center; color: #555; }}
table {{ display: inline-block; vertical-align: top; margin: 0 2em 1em 0; border-spacing: 0; }}
td, th {{ text-align: left; padding: .1em .8em .1em 0; }} td.number {{ text-align: right; }} img {{ max-width: 100%; }}
</style></head><body>
<h1>{title}</h1>
<p>Objects: {describe_objects(manifest)}. Rejected: {count_rejected(manifest)}. Failed: {manifest.failures}.
Shards: {_describe_shards(manifest)}.</p>
{drawn}
<div>{"".join(_table(name, counts) for name, counts in tables.items())}</div>
<img alt="contact sheet" src="data:image/png;base64,{sheet}">
<details><summary>Settings</summary><pre>{settings}</pre></details>
</body></html>
"""


def histogram(values: npt.NDArray[np.float64], width: int = 300, height: int = 120) -> str:
    """Return a histogram as an SVG image, labeled with the minimum and the maximum."""
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, bins=_BARS, range=(low, high if high > low else low + 1))
    step, top = width / _BARS, height / counts.max()
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - n * top:.1f}" width="{step - 1:.1f}" height="{n * top:.1f}" '
        'fill="#4a7db5"/>'
        for i, n in enumerate(counts)
    )
    return (
        f'<svg width="{width}" height="{height + 16}">{bars}'
        f'<text x="0" y="{height + 13}" font-size="12">{low:.3g}</text>'
        f'<text x="{width}" y="{height + 13}" font-size="12" text-anchor="end">{high:.3g}</text></svg>'
    )


def plot_cameras(positions: npt.NDArray[np.float64], side: int = 220) -> str:
    """Return an SVG image of the camera positions and the unit circle, from above (x, y) and from the front (x, z)."""
    shown = positions[:: max(1, -(-len(positions) // _DOTS))]
    scale = side / 2 / (1.05 * max(1.0, float(np.abs(positions).max())))
    parts = []
    for number, axes in enumerate(((0, 1), (0, 2))):
        center = side / 2 + number * (side + 20)
        parts.append(f'<circle cx="{center:.1f}" cy="{side / 2:.1f}" r="{scale:.1f}" fill="#ddd"/>')
        parts += [
            f'<circle cx="{center + scale * a:.1f}" cy="{side / 2 - scale * b:.1f}" r="1.3" fill="#b5484a"/>'
            for a, b in shown[:, axes]
        ]
    return f'<svg width="{2 * side + 20}" height="{side}">{"".join(parts)}</svg>'


def _table(name: str, counts: Counter[str]) -> str:
    rows = [(html.escape(word), str(count)) for word, count in counts.most_common(_LINES)]
    if len(counts) > _LINES:
        rows.append((f"and {len(counts) - _LINES} more", ""))
    cells = "".join(f'<tr><td>{word}</td><td class="number">{count}</td></tr>' for word, count in rows)
    return f"<table><tr><th>{name}</th><th></th></tr>{cells or '<tr><td>none</td></tr>'}</table>"
