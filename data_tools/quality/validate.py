"""The command ``python -m data_tools validate``, which validates all shards in a folder.

The size, sha256, tar members and index of each shard are checked. For each sample, the schema, the images, the depth
and normal maps, the surface points and the cameras (see ``silhouettes``) are checked.
"""

import dataclasses
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_tools.layouts.registry import layout_renderer
from data_tools.quality.geometry import check_geometry
from data_tools.quality.measures import MEASURES_MEMBER, decode_measures
from data_tools.quality.silhouettes import (
    FILMED,
    RENDERED,
    Silhouettes,
    check_coherence,
    make_silhouettes,
    uncovered_distances,
)
from data_tools.shards.pool import processes
from lrm_pl.data.manifest import MANIFEST_NAME, Manifest, Shard, read_index, read_manifest, read_samples
from lrm_pl.data.schema import SURFACE_MEMBER, Sample, SampleError, decode_image, decode_sample
from lrm_pl.data.surface import decode_surface
from lrm_pl.data.tar import scan_tar
from lrm_pl.errors import InputError, counted
from lrm_pl.paths import hash_file

#: Maximum number of pixels in all views of an object, which is 64 views of 2048 x 2048 pixels.
_MAX_PIXELS = 1 << 28

#: Maximum mean distance between the pixels of a view and the nearest projected surface point, in grid cells.
_MAX_UNCOVERED = 0.5

#: Camera error that cannot be detected if surfaces are one-sided.
WRONG_CAMERAS = "wrong cameras (one-sided surfaces)"

#: Maximum number of samples that are listed in a line.
_MAX_LISTED = 5


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """Result of checking a shard.

    Attributes:
        problems: Tuples (key, message), where the key is "" if the problem does not belong to a sample.
        undetectable: Mapping from sample keys to camera errors that cannot be detected from the views.
        shapes: Mapping from sample keys to (number of views, (height, width) of the images).
    """

    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    undetectable: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    shapes: dict[str, tuple[int, tuple[int, int]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CheckedViews:
    """Result of checking the views of a sample.

    Attributes:
        size: Height and width of the images.
        silhouettes: Silhouettes of the views.
        undetectable: Camera errors that cannot be detected from the views.
    """

    size: tuple[int, int]
    silhouettes: Silhouettes
    undetectable: tuple[str, ...] = ()


def validate(folder: Path, jobs: int | None = None) -> int:
    """Validate a folder of shards and print all problems.

    Args:
        folder: Folder of shards.
        jobs: Number of processes. If None, the number of available CPU cores is used.

    Returns:
        Number of problems.

    Raises:
        ShardError: The folder is not a complete folder of shards.
        InputError: A process was killed.
    """
    manifest = read_manifest(folder)
    samples = sum(shard.samples for shard in manifest.shards)
    problems = 0
    reports: list[ShardReport] = []
    undetectable = defaultdict[str, list[str]](list)
    with tqdm(total=samples, unit="object", file=sys.stderr) as bar, processes(jobs) as pool:
        for shard, report in zip(
            manifest.shards, pool.map(partial(check_shard, folder), manifest.shards), strict=True
        ):
            reports.append(report)
            for _, message in report.problems:
                bar.write(f"{shard.name}: {message}", file=sys.stdout)
            for key, errors in report.undetectable.items():
                for error in errors:
                    undetectable[error].append(key)
            problems += len(report.problems)
            bar.update(shard.samples)
        for name, message in find_folder_problems(manifest, reports):
            bar.write(f"{name}: {message}", file=sys.stdout)
            problems += 1
    verdict = counted(problems, "problem") if problems else "no problems"
    print(f"{counted(samples, 'object')} in {counted(len(manifest.shards), 'shard')}: {verdict}")
    listed = {shard.name for shard in manifest.shards}
    if unlisted := sorted(path.name for path in folder.glob("*.tar") if path.name not in listed):
        print(
            f"ignored        {counted(len(unlisted), 'tar file')} not listed in the manifest, for example {unlisted[0]}"
        )
    for error, keys in undetectable.items():
        print(f"undetectable   {undetectable_message(error, keys)}")
    if problems:
        print(
            f"next           delete the damaged shards and {folder / MANIFEST_NAME}, then run `render` again"
        )
    else:
        print(f"next           make train DATA={shlex.quote(str(folder))}")
    return problems


def undetectable_message(error: str, keys: Sequence[str]) -> str:
    """Return a message that lists the objects for which a camera error cannot be detected.

    Args:
        error: Name of the camera error.
        keys: Keys of the samples.
    """
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return f"{error} cannot be detected for {counted(len(keys), 'object')}: {', '.join(keys[:_MAX_LISTED])}{more}"


def check_shard(folder: Path, shard: Shard) -> ShardReport:
    """Check a shard and all samples in the shard."""
    report = ShardReport()
    try:
        for problem in find_file_problems(folder, shard):
            report.problems.append(("", problem))
        for key, content in read_samples(folder, shard):
            try:
                sample = decode_sample(key, content)
                encoded = sample.extras.get(MEASURES_MEMBER)
                one_sided = encoded is not None and decode_measures(key, encoded).one_sided
                # The cameras of rejected objects are not checked, because the objects may be almost invisible.
                checked = check_views(sample, cameras=not shard.rejected, one_sided=one_sided)
                report.shapes[key] = (sample.info.views, checked.size)
                report.undetectable[key] = checked.undetectable
                check_geometry(sample)
                if SURFACE_MEMBER in sample.extras:
                    check_surface(sample, checked.silhouettes)
            except InputError as error:
                report.problems.append((key, str(error)))
    except (OSError, InputError) as error:
        report.problems.append(("", str(error)))
    return report


def check_surface(sample: Sample, silhouettes: Silhouettes) -> None:
    """Check that the surface points of a sample cover the object in all views.

    Args:
        sample: Sample with surface points.
        silhouettes: Silhouettes of the views of the sample.

    Raises:
        SampleError: The points are invalid or do not cover the object.
    """
    key = sample.info.id
    points, _ = decode_surface(key, sample.extras[SURFACE_MEMBER])
    distances = uncovered_distances(silhouettes, points, sample.c2w, sample.fxfycxcy)
    if distances.max() > _MAX_UNCOVERED:
        raise SampleError(
            subject=f"sample {key!r}",
            expected=f"points in {SURFACE_MEMBER} that cover the object",
            found=f"a mean distance of {distances.max():.1f} grid cells to the pixels of view {distances.argmax()}",
            remedy="use the surface of the rendered object, at the same scale",
        )


def find_folder_problems(manifest: Manifest, reports: Sequence[ShardReport]) -> Iterator[tuple[str, str]]:
    """Find duplicate ids and samples with an unexpected number or size of views.

    The number of views is compared with the manifest, and the size of the views with the most common size.

    Args:
        manifest: Manifest of the folder.
        reports: Reports of all shards, in the order of the manifest.

    Yields:
        The name of the shard and a message.
    """
    first: dict[str, str] = {}
    sizes = Counter(size for report in reports for _, size in report.shapes.values())
    usual = sizes.most_common(1)[0][0] if sizes else (0, 0)
    for shard, report in zip(manifest.shards, reports, strict=True):
        for key, (views, size) in report.shapes.items():
            for is_wrong, message in (
                (key in first, f"a unique id, but found it also in {first.get(key)}"),
                (views != manifest.views, f"{manifest.views} views as in the manifest, but found {views}"),
                (size != usual, f"views of {usual} pixels like most objects, but found {size}"),
            ):
                if is_wrong:
                    yield shard.name, f"sample {key!r}: expected {message}"
            first.setdefault(key, shard.name)


def find_file_problems(folder: Path, shard: Shard) -> Iterator[str]:
    """Compare the hash of a shard with the manifest, and the tar headers with the index.

    Yields:
        Descriptions of the differences.

    Raises:
        ShardError: The index is missing, or the file is not a tar of regular files with valid names.
    """
    path = folder / shard.name
    if (found := hash_file(path)) != shard.sha256:
        yield f"expected sha256 {shard.sha256} as in the manifest, but found {found}"
    index, members = read_index(folder, shard), scan_tar(path)
    if different := sorted(key for key in index | members if index.get(key) != members.get(key)):
        yield (
            f"expected the members and offsets in {shard.index_name}, but found others in "
            f"{counted(len(different), 'sample')}, for example {different[0]!r}"
        )


def decode_alphas(sample: Sample) -> Iterator[npt.NDArray[np.uint8]]:
    """Decode the views of a sample one at a time.

    Yields:
        The alpha channel of each view, shape (H, W).

    Raises:
        SampleError: A view cannot be decoded, or the views have too many pixels.
    """
    left = _MAX_PIXELS
    for view in sample.views:
        alpha = decode_image(sample.info.id, view)[..., 3].copy()  # the copy releases the color channels
        left -= alpha.size
        if left < 0:
            raise SampleError(
                subject=f"sample {sample.info.id!r}",
                expected=f"a total of at most {_MAX_PIXELS} pixels in all views",
                found="more",
                remedy="use fewer or smaller views",
            )
        yield alpha


def check_views(sample: Sample, *, cameras: bool = True, one_sided: bool = False) -> CheckedViews:
    """Check that the images of a sample are valid and consistent with the cameras.

    Args:
        sample: Sample to check.
        cameras: Whether to check the cameras.
        one_sided: Whether surfaces are visible from one side only. The silhouettes of such surfaces can be inconsistent
            even if the cameras are correct, so inconsistent cameras are not an error.

    Raises:
        SampleError: An image or a camera is invalid.
    """
    invalid = partial(SampleError, subject=f"sample {sample.info.id!r}")
    alphas = list(decode_alphas(sample))
    size, *others = sorted({alpha.shape for alpha in alphas})
    if others:
        found = ", ".join(f"{height} x {width}" for height, width in (size, *others))
        raise invalid(expected="views of one size", found=found)
    is_filmed = sample.info.renderer == layout_renderer("mvimgnet")
    silhouettes = make_silhouettes(alphas, FILMED if is_filmed else RENDERED)
    if not cameras:
        return CheckedViews(size, silhouettes)
    if empty := [view for view, alpha in enumerate(alphas) if not alpha.any()]:
        found = f"{counted(len(empty), 'empty view')}, for example view {empty[0]}"
        raise invalid(expected="an object in every view", found=found)
    if all((alpha == 255).all() for alpha in alphas):
        raise invalid(
            expected="a transparent background",
            found=f"{counted(len(alphas), 'view')} without a transparent pixel",
            remedy="make the background of the views transparent",
        )
    coherence = check_coherence(silhouettes, sample.c2w, sample.fxfycxcy)
    worst = int(coherence.distances.argmax())
    if coherence.distances[worst] <= silhouettes.tolerance:
        return CheckedViews(size, silhouettes, coherence.undetectable)
    if one_sided:
        return CheckedViews(size, silhouettes, (WRONG_CAMERAS,))
    raise invalid(
        expected="cameras that fit the silhouettes",
        found=(
            f"a mean distance of {coherence.distances[worst]:.2f} cells between view {worst} and the other views "
            f"(at most {silhouettes.tolerance} of {silhouettes.cells} cells)"
        ),
        remedy="check the order and convention (OpenCV, +z up) of the poses, the focal length and the scale",
    )
