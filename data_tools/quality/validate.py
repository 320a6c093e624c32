"""``python -m data_tools validate``: check every byte of a folder of shards; report problems by shard and sample.

Of each shard: size, sha256, plain members only, the index. Of each sample: the schema, every image, depth, normals
and surface if it has them, and whether the cameras fit the images (``silhouettes``).
"""

import dataclasses
import shlex
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_tools.assets.asset_list import hash_file
from data_tools.layouts.registry import layout_renderer
from data_tools.quality.geometry import check_geometry
from data_tools.quality.measures import MEASURES_MEMBER, is_one_sided
from data_tools.quality.silhouettes import (
    FILMED,
    RENDERED,
    Silhouettes,
    check_coherence,
    make_silhouettes,
    uncovered_distances,
)
from data_tools.shards.pool import processes
from lrm_pl.data.manifest import (
    Manifest,
    MemberIndex,
    Shard,
    ShardError,
    read_index,
    read_manifest,
    read_samples,
)
from lrm_pl.data.schema import (
    KEY_PATTERN,
    SURFACE_MEMBER,
    Sample,
    SampleError,
    decode_image,
    decode_sample,
)
from lrm_pl.data.surface import decode_surface
from lrm_pl.errors import InputError, counted

#: Pixels that the views of one object may have in all: 64 of 2048 x 2048.
_MAX_PIXELS = 1 << 28

#: Mean distance of a view's pixels from the nearest projected point of the surface, cells of 1/128 of its side.
_MAX_UNCOVERED = 0.5

#: Error that is undetectable where surfaces are one-sided.
WRONG_CAMERAS = "wrong cameras (surfaces that are not seen from behind)"

#: Samples that are named where one line is about many.
_NAMED = 5


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


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """What was found in a shard.

    Attributes:
        problems: What is wrong.
        undetectable: Key -> errors of its cameras that its views would not show.
        kinds: Key -> number of views, and their (height, width).
    """

    problems: list[Problem]
    undetectable: dict[str, tuple[str, ...]]
    kinds: dict[str, tuple[int, tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class CheckedViews:
    """Images that are as they should be.

    Attributes:
        size: (height, width) of a view.
        silhouettes: Of the views.
        undetectable: Errors of the cameras that these views would not show.
    """

    size: tuple[int, int]
    silhouettes: Silhouettes
    undetectable: tuple[str, ...]


def validate(folder: Path, jobs: int | None = None) -> int:
    """Check a folder and print what is wrong with it.

    Args:
        folder: Folder of shards.
        jobs: Number of processes; None takes as many as there are cores.

    Returns:
        Number of problems.

    Raises:
        ShardError: There is no finished folder of shards.
        InputError: A process was killed.
    """
    manifest = read_manifest(folder)
    samples = sum(shard.samples for shard in manifest.shards)
    found: list[Problem] = []
    undetectable: dict[str, list[str]] = {}
    with tqdm(total=samples, unit="object", file=sys.stderr) as bar, processes(jobs) as pool:

        def add(problem: Problem) -> None:
            found.append(problem)
            bar.write(f"{problem.shard}: {problem.what}", file=sys.stdout)

        reports = []
        for shard, report in zip(
            manifest.shards, pool.map(partial(check_shard, folder), manifest.shards), strict=True
        ):
            reports.append(report)
            for problem in report.problems:
                add(problem)
            for key, errors in report.undetectable.items():
                for error in errors:
                    undetectable.setdefault(error, []).append(key)
            bar.update(shard.samples)
        for problem in folder_problems(manifest, reports):
            add(problem)
    bad = len({(problem.shard, problem.sample) for problem in found})
    verdict = (
        f"{counted(len(found), 'problem')}, in {bad} {'sample or shard' if bad == 1 else 'samples or shards'}"
        if found
        else "no problems"
    )
    print(f"{counted(samples, 'object')} in {counted(len(manifest.shards), 'shard')}: {verdict}")
    if unlisted := sorted(
        {path.name for path in folder.glob("*.tar")} - {one.name for one in manifest.shards}
    ):
        print(f"never read     not in the manifest: {counted(len(unlisted), 'tar')}, such as {unlisted[0]}")
    for error, keys in undetectable.items():
        print(f"not decidable  {undetectable_message(error, keys)}")
    print(
        f"next           make train DATA={shlex.quote(str(folder))}"
        if not found
        else f"next           delete these shards and {folder / 'manifest.json'}, then render again"
    )
    return len(found)


def undetectable_message(error: str, keys: Sequence[str]) -> str:
    """Describe the objects whose views would not show an error of their cameras."""
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return (
        f"{error} would not be noticed for {counted(len(keys), 'object')}: {', '.join(keys[:_NAMED])}{more}"
    )


def check_shard(folder: Path, shard: Shard) -> ShardReport:
    """Check a shard and its samples."""
    report = ShardReport([], {}, {})

    def add(sample: str, what: str) -> None:
        report.problems.append(Problem(shard.name, sample, what))

    try:
        for difference in list(find_file_problems(folder, shard)):
            add("", difference)
        for key, content in read_samples(folder, shard):
            try:
                sample = decode_sample(key, content)
                one_sided = MEASURES_MEMBER in sample.extras and is_one_sided(
                    key, sample.extras[MEASURES_MEMBER]
                )
                # Of a rejected object next to nothing may be seen.
                checked = check_views(sample, cameras=not shard.rejected, one_sided=one_sided)
                report.kinds[key] = (sample.info.views, checked.size)
                report.undetectable[key] = checked.undetectable
                check_geometry(sample)
                if SURFACE_MEMBER in sample.extras:
                    check_surface(sample, checked.silhouettes)
            except InputError as error:
                add(key, str(error))
    except (OSError, ShardError, tarfile.TarError) as error:
        add("", str(error))
    return report


def check_surface(sample: Sample, silhouettes: Silhouettes) -> None:
    """Check that the points of a sample's surface cover what its views show.

    Raises:
        SampleError: With what is wrong.
    """
    key = sample.info.id
    points, _ = decode_surface(key, sample.extras[SURFACE_MEMBER])
    distances = uncovered_distances(silhouettes, points, sample.c2w, sample.fxfycxcy)
    if distances.max() > _MAX_UNCOVERED:
        raise SampleError(
            subject=f"sample {key!r}",
            expected=f"points of {SURFACE_MEMBER} all over the object",
            found=(
                f"that the nearest to a pixel of view {distances.argmax()} is {distances.max():.1f} cells "
                "away, on average: it is the surface of another object or scale"
            ),
        )


def folder_problems(manifest: Manifest, reports: Sequence[ShardReport]) -> Iterator[Problem]:
    """Find what is wrong between samples: ids that are not unique, views of another number or size."""
    first: dict[str, str] = {}
    sizes = Counter(size for report in reports for _, size in report.kinds.values())
    usual = sizes.most_common(1)[0][0] if sizes else (0, 0)
    for shard, report in zip(manifest.shards, reports, strict=True):
        for key, (views, size) in report.kinds.items():
            for wrong, what in (
                (key in first, f"every id once, but found it in {first.get(key)} too"),
                (views != manifest.views, f"{manifest.views} views as in the manifest, but found {views}"),
                (size != usual, f"views of {usual} pixels as most objects have, but found {size}"),
            ):
                if wrong:
                    yield Problem(shard.name, key, f"sample {key!r}: expected {what}")
            first.setdefault(key, shard.name)


def find_file_problems(folder: Path, shard: Shard) -> Iterator[str]:
    """Compare a shard's file with the manifest's hash of it, and with its index.

    Raises:
        ShardError: There is no index, or it does not fit the tar.
        tarfile.TarError: It is no tar.
    """
    found = hash_file(folder / shard.name)
    if found != shard.sha256:
        yield f"expected sha256 {shard.sha256} as in the manifest, but found {found}"
    yield from find_index_problems(folder / shard.name, read_index(folder, shard))


def find_index_problems(path: Path, index: MemberIndex) -> Iterator[str]:
    """Compare the headers of a tar with its index; anything but plain files of plain names is a difference.

    Raises:
        tarfile.TarError: It is no tar.
    """
    expected = {f"{key}.{name}": span for key, members in index.items() for name, span in members.items()}
    with tarfile.open(path, "r:") as tar:
        for header in tar:
            key, _, _ = header.name.partition(".")
            if not header.isreg() or not KEY_PATTERN.fullmatch(key) or "/" in header.name:
                yield f"expected plain files of plain names, but found {header.name!r} of type {header.type!r}"
            elif expected.pop(header.name, None) != (header.offset_data, header.size):
                yield f"expected member {header.name!r} where the index says, but found it at {header.offset_data}"
    if expected:
        yield f"expected the members of the index, but found no {sorted(expected)[0]!r} and {len(expected) - 1} more"


def decode_alphas(sample: Sample) -> Iterator[npt.NDArray[np.uint8]]:
    """Decode the views one after the other and yield the alpha of each.

    Raises:
        SampleError: A view cannot be decoded, or all have more pixels than an object's views may have.
    """
    left = _MAX_PIXELS
    for view in sample.views:
        alpha = decode_image(sample.info.id, view)[..., 3].copy()  # without the colors
        left -= alpha.size
        if left < 0:
            raise SampleError(
                subject=f"sample {sample.info.id!r}",
                expected=f"at most {_MAX_PIXELS} pixels in all views",
                found="more",
                remedy="use fewer or smaller views",
            )
        yield alpha


def check_views(sample: Sample, *, cameras: bool = True, one_sided: bool = False) -> CheckedViews:
    """Check all images of a sample, and its cameras against them.

    Args:
        sample: The sample.
        cameras: Whether cameras are checked.
        one_sided: Whether views from behind do not see what others see, so that silhouettes need not agree.

    Raises:
        SampleError: With what is wrong.
    """
    key = sample.info.id
    alphas = list(decode_alphas(sample))
    if len({alpha.shape for alpha in alphas}) > 1:
        raise SampleError(
            subject=f"sample {key!r}",
            expected="views of one size",
            found=sorted({alpha.shape for alpha in alphas}),
        )
    precision = FILMED if sample.info.renderer == layout_renderer("mvimgnet") else RENDERED
    silhouettes = make_silhouettes(alphas, precision.cells)
    if not cameras:
        return CheckedViews(alphas[0].shape, silhouettes, ())
    empty = [view for view, alpha in enumerate(alphas) if not alpha.any()]
    if empty:
        raise SampleError(
            subject=f"sample {key!r}",
            expected="an object in every view",
            found=f"nothing in {len(empty)} of {len(alphas)}: view {empty[0]} is transparent",
        )
    if all((alpha == 255).all() for alpha in alphas):
        raise SampleError(
            subject=f"sample {key!r}",
            expected="a transparent background",
            found=f"none in {len(alphas)} views: the object must be cut out",
        )
    coherence = check_coherence(silhouettes, sample.c2w, sample.fxfycxcy, precision.tolerance)
    worst = int(coherence.distances.argmax())
    if coherence.distances[worst] > precision.tolerance and one_sided:
        return CheckedViews(alphas[0].shape, silhouettes, (WRONG_CAMERAS,))
    if coherence.distances[worst] > precision.tolerance:
        raise SampleError(
            subject=f"sample {key!r}",
            expected="cameras that fit the silhouettes",
            found=(
                f"that what view {worst} shows is, on average, {coherence.distances[worst]:.2f} of "
                f"{silhouettes.cells} cells away from the silhouette in other views (at most "
                f"{precision.tolerance})"
            ),
            remedy=(
                "check the order of the poses, their convention (OpenCV camera to world, +z up), the "
                "focal length, and that the object lies in [-1, 1]^3"
            ),
        )
    return CheckedViews(alphas[0].shape, silhouettes, coherence.undetectable)
