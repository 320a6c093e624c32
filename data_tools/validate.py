"""``python -m data_tools validate``: look at every byte of a folder of shards; name what is wrong by shard and sample.

Of each shard: size, sha256, plain members only, the index. Of each sample: the schema, every picture, depth, normals
and surface if it has them, and whether the cameras fit the pictures: points that all views show as object make up a
hull (Laurentini 1994), and that hull, seen again by each camera, must cover the object there. Poses of another
convention leave no hull at all.
"""

import dataclasses
import hashlib
import shlex
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_tools.geometry import check_geometry
from lrm_pl.data.manifest import MemberIndex, Shard, ShardError, read_index, read_manifest, read_samples
from lrm_pl.data.schema import (
    KEY_PATTERN,
    SURFACE_MEMBER,
    Sample,
    SampleError,
    decode_image,
    decode_sample,
)
from lrm_pl.data.surface import decode_surface

#: Pixels that the views of one object may have in all: 64 of 2048 x 2048.
_MAX_PIXELS = 1 << 28

#: Points of the hull along each axis, over [-1.05, 1.05].
_POINTS = 48

#: Cells along a side of a picture, in which the hull is compared.
_CELLS = 32

#: Share of the object's cells that the hull must cover in every view. Right cameras leave out next to nothing.
_COVERED = 0.8


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        shard: File name.
        sample: Key; "" where the whole shard is meant.
        what: What is wrong.
    """

    shard: str
    sample: str
    what: str


def validate(folder: Path) -> int:
    """Check a folder and print what is wrong with it.

    Returns:
        Number of problems.

    Raises:
        ShardError: There is no finished folder of shards.
    """
    manifest = read_manifest(folder)
    samples = sum(shard.samples for shard in manifest.shards)
    found: list[Problem] = []
    with tqdm(total=samples, unit="object", file=sys.stderr) as bar:
        for shard in manifest.shards:
            for problem in problems(folder, shard, bar):
                found.append(problem)
                where = f"{shard.name}: sample {problem.sample!r}" if problem.sample else shard.name
                bar.write(f"{where}: {problem.what}", file=sys.stdout)
    bad = len({(problem.shard, problem.sample) for problem in found})
    verdict = "all right" if not found else f"{len(found)} problems, in {bad} samples or shards"
    print(f"{samples} objects in {len(manifest.shards)} shards: {verdict}")
    print(
        f"next           make train DATA={shlex.quote(str(folder))}"
        if not found
        else f"next           delete these shards and {folder / 'manifest.json'}, then render again"
    )
    return len(found)


def problems(folder: Path, shard: Shard, bar: tqdm) -> Iterator[Problem]:
    """Find what is wrong with a shard and its samples."""
    path = folder / shard.name
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard.sha256:
        yield Problem(shard.name, "", f"expected sha256 {shard.sha256} as in the manifest, found {found}")
    try:
        index = read_index(folder, shard)
        differences = list(index_differences(path, index))
    except (ShardError, tarfile.TarError) as error:
        yield Problem(shard.name, "", str(error))
        bar.update(shard.samples)
        return
    for what in differences:
        yield Problem(shard.name, "", what)
    for key, content in read_samples(folder, shard):
        try:
            sample = decode_sample(key, content)
            if not shard.rejected:  # next to nothing may be seen of it
                check_pictures(sample)
            check_geometry(sample)
            if SURFACE_MEMBER in sample.extras:
                decode_surface(key, sample.extras[SURFACE_MEMBER])
        except SampleError as error:
            yield Problem(shard.name, key, str(error))
        bar.update()


def index_differences(path: Path, index: MemberIndex) -> Iterator[str]:
    """Compare the headers of a tar with its index; anything but plain files of plain names is a difference.

    Raises:
        tarfile.TarError: It is no tar.
    """
    expected = {f"{key}.{name}": span for key, members in index.items() for name, span in members.items()}
    with tarfile.open(path, "r:") as tar:
        for header in tar:
            key, _, _ = header.name.partition(".")
            if not header.isreg() or not KEY_PATTERN.fullmatch(key) or "/" in header.name:
                yield f"expected plain files of plain names, found {header.name!r} of type {header.type!r}"
            elif expected.pop(header.name, None) != (header.offset_data, header.size):
                yield f"expected member {header.name!r} where the index says, found it at {header.offset_data}"
    if expected:
        yield f"expected the members of the index, found no {sorted(expected)[0]!r} and {len(expected) - 1} more"


def decode_alphas(sample: Sample) -> Iterator[npt.NDArray[np.uint8]]:
    """Decode one view after the other and yield its alpha.

    Raises:
        SampleError: A view cannot be decoded, or all have more pixels than an object's views may have.
    """
    left = _MAX_PIXELS
    for view in sample.views:
        alpha = decode_image(sample.info.id, view)[..., 3].copy()  # without the colours
        left -= alpha.size
        if left < 0:
            raise SampleError(
                f"sample {sample.info.id!r}: expected at most {_MAX_PIXELS} pixels in all views, found more; use "
                "fewer or smaller views"
            )
        yield alpha


def check_pictures(sample: Sample) -> None:
    """Check all pictures of a sample, and its cameras against them.

    Raises:
        SampleError: With what is wrong.
    """
    key = sample.info.id
    alphas = list(decode_alphas(sample))
    if len({alpha.shape for alpha in alphas}) > 1:
        raise SampleError(
            f"sample {key!r}: expected views of one size, found {sorted({alpha.shape for alpha in alphas})}"
        )
    if not any(alpha.any() for alpha in alphas):
        raise SampleError(f"sample {key!r}: expected an object, found {len(alphas)} wholly transparent views")
    covered = hull_coverage(sample.c2w, sample.fxfycxcy, alphas)
    worst = int(covered.argmin())
    if covered[worst] < _COVERED:
        raise SampleError(
            f"sample {key!r}: expected cameras that fit the pictures, found that the hull of all views covers "
            f"{covered[worst]:.0%} of the object in view {worst}: poses are OpenCV camera to world, +z up, intrinsics "
            "divided by the picture's size"
        )


def hull_coverage(
    c2w: npt.NDArray[np.float32], fxfycxcy: npt.NDArray[np.float32], alphas: list[npt.NDArray[np.uint8]]
) -> npt.NDArray[np.float64]:
    """Carve a hull out of all views, and say how much of the object it covers in each.

    Args:
        c2w: (V, 4, 4) OpenCV poses.
        fxfycxcy: (V, 4) normalised intrinsics.
        alphas: V masks, 0 to 255.

    Returns:
        (V) shares of the object's cells; 1 where a view shows nothing.
    """
    axis = np.linspace(-1.05, 1.05, _POINTS)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    cells = [_cells(alpha) for alpha in alphas]
    for pose, camera, (seen, _) in zip(c2w, fxfycxcy, cells, strict=True):
        row, column, inside = _project(points, pose, camera)
        # What a picture does not show may still be there.
        points = points[~inside | _widened(seen)[row, column]]
    shares = []
    for pose, camera, (_, solid) in zip(c2w, fxfycxcy, cells, strict=True):
        row, column, inside = _project(points, pose, camera)
        drawn = np.zeros((_CELLS, _CELLS), dtype=bool)
        drawn[row[inside], column[inside]] = True
        shares.append(float(_widened(drawn)[solid].mean()) if solid.any() else 1.0)
    return np.array(shares)


def _cells(alpha: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Cut a mask into cells: those that show anything, and those that are mostly object."""
    rows, columns = (np.linspace(0, size, _CELLS + 1).astype(int)[:-1] for size in alpha.shape)
    most = np.maximum.reduceat(np.maximum.reduceat(alpha, rows, axis=0), columns, axis=1)
    total = np.add.reduceat(np.add.reduceat(alpha.astype(np.float64), rows, axis=0), columns, axis=1)
    ones = np.add.reduceat(np.add.reduceat(np.ones(alpha.shape), rows, axis=0), columns, axis=1)
    return most > 0, total / ones > 127


def _project(
    points: npt.NDArray[np.float64], c2w: npt.NDArray[np.float32], fxfycxcy: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the cell's row and column of each point, and whether it is in the picture."""
    local = (points - c2w[:3, 3]) @ c2w[:3, :3].astype(np.float64)
    z = np.where(local[:, 2] > 1e-6, local[:, 2], np.inf)
    place = np.floor((fxfycxcy[:2] * local[:, :2] / z[:, None] + fxfycxcy[2:]) * _CELLS).astype(np.int64)
    inside = (local[:, 2] > 1e-6) & ((place >= 0) & (place < _CELLS)).all(axis=1)
    place = place.clip(0, _CELLS - 1)
    return place[:, 1], place[:, 0], inside


def _widened(cells: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Add the neighbours of each cell."""
    padded = np.pad(cells, 1)
    return np.logical_or.reduce([
        padded[i : i + _CELLS, j : j + _CELLS] for i in range(3) for j in range(3)
    ])  # fmt: skip
