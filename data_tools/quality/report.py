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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_tools.quality.contact_sheet import SHEET_NAME, write_contact_sheet
from data_tools.quality.filter_table import FILTER_NAME, count_outcomes
from data_tools.quality.geometry import geometry_types
from data_tools.quality.validate import decode_alphas
from data_tools.rendering.shard_folder import read_failures
from lrm_pl.data.manifest import Manifest, ShardError, read_manifest, read_samples, write_atomically
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
        splits: Number of objects with the keys "train", "val" and "rejected".
        geometry: Number of objects with the keys "depth", "normal" and "surface".
        distance: (N,) distances of the cameras from the origin in scene units.
        elevation_deg: (N,) elevation angles of the cameras in degrees.
        fov_deg: (N,) horizontal fields of view in degrees.
        camera_positions: (N, 3) positions of the cameras in world coordinates.
        coverage: (N,) fractions of the image that the object covers.
        side: (N,) longer sides of the images in pixels.
        view_bytes: (N,) sizes of the image files in bytes.
    """

    infos: tuple[SampleInfo, ...]
    splits: Counter[str]
    geometry: Counter[str]
    distance: npt.NDArray[np.float64]
    elevation_deg: npt.NDArray[np.float64]
    fov_deg: npt.NDArray[np.float64]
    camera_positions: npt.NDArray[np.float64]
    coverage: npt.NDArray[np.float64]
    side: npt.NDArray[np.float64]
    view_bytes: npt.NDArray[np.float64]

    def rows(self) -> list[tuple[str, npt.NDArray[np.float64], str]]:
        """Return (name, values, unit) for each quantity."""
        return [
            ("camera distance", self.distance, "scene units"),
            ("elevation", self.elevation_deg, "degrees"),
            ("field of view", self.fov_deg, "degrees"),
            ("image coverage", 100 * self.coverage, "%"),
            ("longer side", self.side, "pixels"),
            ("image file size", self.view_bytes / 1000, "kB"),
        ]


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
    train, val, rejected = (found.splits[split] for split in ("train", "val", "rejected"))
    print(
        f"objects        {train + val} ({train} train, {val} held out), {counted(manifest.views, 'view')} each"
    )
    if rejected:
        print(f"rejected       {rejected}, included in the statistics below")
    print(f"shards         {len(manifest.shards)}, {sum(s.bytes for s in manifest.shards) / 1e6:.1f} MB")
    for name, values, unit in found.rows():
        low, middle, high = np.percentile(values, (0, 50, 100))
        print(f"{name:<31}{low:.4g} / {middle:.4g} / {high:.4g} {unit} (min, median, max)")
    geometry = " / ".join(str(found.geometry[name]) for name in ("depth", "normal", "surface"))
    print(f"{'objects with geometry':<31}{geometry} (depth, normals, surface points)")
    for name, counts in count_values(folder, found).items():
        top = ", ".join(f"{value} {count}" for value, count in counts.most_common(3))
        print(f"{name:<31}{counted(len(counts), 'value')}: {top}" if counts else f"{name:<31}none")
    if not (folder / SHEET_NAME).is_file():
        write_contact_sheet(folder, manifest.shards, manifest.views)
    path = folder / PAGE_NAME
    write_atomically(path, render_page(folder, manifest, found).encode())
    print(f"page           {path}")
    return path


def collect_statistics(folder: Path, manifest: Manifest) -> Statistics:
    """Read all samples of a folder of shards, and compute the statistics.

    Raises:
        ShardError: A sample cannot be read.
    """
    infos, splits, positions, fovs, coverage, side, sizes = [], Counter[str](), [], [], [], [], []
    geometry = Counter[str]()
    with tqdm(total=sum(shard.samples for shard in manifest.shards), unit="object", file=sys.stderr) as bar:
        for shard in manifest.shards:
            for key, content in read_samples(folder, shard):
                try:
                    sample = decode_sample(key, content)
                    seen = [(float(alpha.mean()) / 255, max(alpha.shape)) for alpha in decode_alphas(sample)]
                except SampleError as error:
                    raise ShardError(
                        f"{folder / shard.name}: {error}; see `python -m data_tools validate --shards {folder}`"
                    ) from error
                infos.append(sample.info)
                splits["rejected" if shard.rejected else shard.split] += 1
                geometry.update(geometry_types(sample))
                geometry["surface"] += SURFACE_MEMBER in sample.extras
                positions.append(sample.c2w[:, :3, 3])
                fovs.append(sample.fxfycxcy[:, 0])
                coverage += [fraction for fraction, _ in seen]
                side += [longer for _, longer in seen]
                sizes += [len(view) for view in sample.views]
                bar.update()
    camera_positions = np.concatenate(positions).astype(np.float64)
    distance = np.linalg.norm(camera_positions, axis=1)
    return Statistics(
        infos=tuple(infos),
        splits=splits,
        geometry=geometry,
        distance=distance,
        elevation_deg=np.degrees(np.arcsin((camera_positions[:, 2] / distance).clip(-1, 1))),
        fov_deg=np.degrees(2 * np.arctan(0.5 / np.concatenate(fovs).astype(np.float64))),
        camera_positions=camera_positions,
        coverage=np.array(coverage),
        side=np.array(side, dtype=np.float64),
        view_bytes=np.array(sizes, dtype=np.float64),
    )


def count_values(folder: Path, found: Statistics) -> dict[str, Counter[str]]:
    """Count licenses, creators, renderers, outcomes and reasons of failures."""
    failures = read_failures(folder)
    reasons = (record["reason"].partition("\n")[0][:80] for record in failures.values())
    has_table = (folder / FILTER_NAME).is_file()  # only `render` writes this file
    rejected = found.splits["rejected"]
    known = Counter(kept=found.splits.total() - rejected, rejected=rejected, failed=len(failures))
    return {
        "licenses": Counter(info.license for info in found.infos),
        "creators": Counter(info.creator for info in found.infos),
        "renderers": Counter(info.renderer for info in found.infos),
        "outcomes": count_outcomes(folder) if has_table else +known,
        "failures": Counter(reasons),
    }


def render_page(folder: Path, manifest: Manifest, found: Statistics) -> str:
    """Return the HTML page. Text from the records of objects is escaped."""
    sheet = base64.b64encode((folder / SHEET_NAME).read_bytes()).decode()
    train, val, rejected = (found.splits[split] for split in ("train", "val", "rejected"))
    figures = "".join(
        f"<figure>{histogram(values)}<figcaption>{name}, {unit}</figcaption></figure>"
        for name, values, unit in found.rows()
    )
    caption = "camera positions from above (x, y) and from the front (x, z)"
    figures += f"<figure>{plot_cameras(found.camera_positions)}<figcaption>{caption}</figcaption></figure>"
    tables = "".join(_table(name, counts) for name, counts in count_values(folder, found).items())
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
<p>{counted(train + val, "object")} ({train} train, {val} held out) with {counted(manifest.views, "view")} each,
and {counted(rejected, "rejected object")}, in {counted(len(manifest.shards), "shard")} of
{sum(shard.bytes for shard in manifest.shards) / 1e6:.1f} MB. {counted(manifest.failures, "asset")} failed.</p>
{figures}
<div>{tables}</div>
<img alt="contact sheet" src="data:image/png;base64,{sheet}">
<details><summary>Settings</summary><pre>{settings}</pre></details>
</body></html>
"""


def histogram(values: npt.NDArray[np.float64], width: int = 300, height: int = 120) -> str:
    """Return a histogram as SVG, labeled with the minimum and the maximum."""
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
    """Return an SVG with the camera positions and the unit circle, from above (x, y) and from the front (x, z)."""
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


def _table(name: str, counted: Counter[str]) -> str:
    lines: Sequence[tuple[str, int]] = counted.most_common(_LINES)
    rows = "".join(
        f'<tr><td>{html.escape(word)}</td><td class="number">{count}</td></tr>' for word, count in lines
    )
    more = f"<tr><td>and {len(counted) - _LINES} more</td><td></td></tr>" if len(counted) > _LINES else ""
    return f"<table><tr><th>{name}</th><th></th></tr>{rows or '<tr><td>none</td></tr>'}{more}</table>"
