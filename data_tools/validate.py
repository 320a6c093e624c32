"""``python -m data_tools validate``: check every byte of a folder of shards; report problems by shard and sample.

Of each shard: size, sha256, plain members only, the index. Of each sample: the schema, every picture, depth, normals
and surface if it has them, and whether the cameras fit the pictures (``silhouettes``).
"""

import dataclasses
import hashlib
import shlex
import sys
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_tools.geometry import check_geometry
from data_tools.layouts.choice import renderer_name
from data_tools.shard_pool import processes
from data_tools.silhouettes import FILMED, RENDERED, check_coherence
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
        samples: Number of samples.
        problems: What is wrong.
        undecided: Key -> errors of its cameras that its views would not show.
    """

    samples: int
    problems: list[Problem]
    undecided: dict[str, tuple[str, ...]]


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
    undecided: dict[str, list[str]] = {}
    with tqdm(total=samples, unit="object", file=sys.stderr) as bar, processes(jobs) as pool:
        for shard, report in zip(
            manifest.shards, pool.map(partial(check_shard, folder), manifest.shards), strict=True
        ):
            for problem in report.problems:
                found.append(problem)
                where = f"{shard.name}: sample {problem.sample!r}" if problem.sample else shard.name
                bar.write(f"{where}: {problem.what}", file=sys.stdout)
            for key, errors in report.undecided.items():
                for error in errors:
                    undecided.setdefault(error, []).append(key)
            bar.update(shard.samples)
    bad = len({(problem.shard, problem.sample) for problem in found})
    verdict = f"{len(found)} problems, in {bad} samples or shards" if found else "no problems"
    print(f"{samples} objects in {len(manifest.shards)} shards: {verdict}")
    for error, keys in undecided.items():
        print(f"not decidable  {undecided_line(error, keys)}")
    print(
        f"next           make train DATA={shlex.quote(str(folder))}"
        if not found
        else f"next           delete these shards and {folder / 'manifest.json'}, then render again"
    )
    return len(found)


def undecided_line(error: str, keys: Sequence[str]) -> str:
    """Describe the objects whose views would not show an error of their cameras."""
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return f"{error}, of {len(keys)} objects that look alike that way: {', '.join(keys[:_NAMED])}{more}"


def check_shard(folder: Path, shard: Shard) -> ShardReport:
    """Check a shard and its samples."""
    path = folder / shard.name
    report = ShardReport(shard.samples, [], {})

    def add(sample: str, what: str) -> None:
        report.problems.append(Problem(shard.name, sample, what))

    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            add("", f"expected sha256 {shard.sha256} as in the manifest, found {found}")
        index = read_index(folder, shard)
        for difference in list(index_differences(path, index)):
            add("", difference)
        for key, content in read_samples(folder, shard):
            try:
                sample = decode_sample(key, content)
                if not shard.rejected:  # next to nothing may be seen of it
                    report.undecided[key] = check_pictures(sample)
                check_geometry(sample)
                if SURFACE_MEMBER in sample.extras:
                    decode_surface(key, sample.extras[SURFACE_MEMBER])
            except SampleError as error:
                add(key, str(error))
    except (OSError, ShardError, tarfile.TarError) as error:
        add("", str(error))
    return report


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
                f"sample {sample.info.id!r}: expected at most {_MAX_PIXELS} pixels in all views, found more; use "
                "fewer or smaller views"
            )
        yield alpha


def check_pictures(sample: Sample) -> tuple[str, ...]:
    """Check all pictures of a sample, and its cameras against them.

    Returns:
        Errors of the cameras that these views would not show.

    Raises:
        SampleError: With what is wrong.
    """
    key = sample.info.id
    alphas = list(decode_alphas(sample))
    if len({alpha.shape for alpha in alphas}) > 1:
        raise SampleError(
            f"sample {key!r}: expected views of one size, found {sorted({alpha.shape for alpha in alphas})}"
        )
    empty = [view for view, alpha in enumerate(alphas) if not alpha.any()]
    if empty:
        raise SampleError(
            f"sample {key!r}: expected an object in every view, found nothing in {len(empty)} of {len(alphas)}: view "
            f"{empty[0]} is transparent"
        )
    precision = FILMED if sample.info.renderer == renderer_name("mvimgnet") else RENDERED
    coherence = check_coherence(alphas, sample.c2w, sample.fxfycxcy, precision)
    worst = int(coherence.distances.argmax())
    if coherence.distances[worst] > precision.tolerance:
        raise SampleError(
            f"sample {key!r}: expected cameras that fit the silhouettes, found that what view {worst} shows is, on "
            f"average, {coherence.distances[worst]:.2f} of {precision.cells} cells away from the silhouette in other "
            f"views (at most {precision.tolerance}); check the order of the poses, their convention (OpenCV camera to "
            "world, +z up), the focal length, and that the object lies in [-1, 1]^3"
        )
    return coherence.undecided
