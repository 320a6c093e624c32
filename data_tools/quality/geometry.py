"""Depth and normals beside finished views: what they must obey, and how they are made smaller. numpy only."""

import numpy as np
import numpy.typing as npt

from lrm_pl.data.geometry_views import (
    decode_depth,
    decode_normals,
    depth_member,
    normal_member,
    read_pixels,
    write_pixels,
)
from lrm_pl.data.schema import Sample, SampleError, decode_image

#: Kind of member -> how the one of a view is called.
MEMBER_NAMES = {"depth": depth_member, "normal": normal_member}

#: Fraction of a view's opaque pixels that may be without geometry: their center may fall into a crack of the mesh.
_CRACKS = 1e-3

#: Every so-many-th point of a depth is compared with other views.
_EVERY = 7

#: Number of points before the surface of another view, per point on it; edges and single-sided faces give some.
_MOST_BEFORE = 0.35

#: Fraction of a view's normals that may point away from its camera: interpolated ones do, at edges.
_MOST_AWAY = 0.5

#: The object lies in [-1, 1]^3, and its depth is rounded.
_REACH = 1.01


def geometry_types(sample: Sample) -> list[str]:
    """Name which of depth and normal a sample has."""
    return [kind for kind in MEMBER_NAMES if any(name.startswith(kind) for name in sample.extras)]


def check_geometry(sample: Sample) -> None:
    """Check the depth and the normals of a sample, if it has any, against its views and cameras.

    Raises:
        SampleError: With what is wrong, and in which member.
    """
    key, kinds = sample.info.id, geometry_types(sample)
    for kind in kinds:
        found = {name for name in sample.extras if name.startswith(kind)}
        if odd := sorted(found ^ {MEMBER_NAMES[kind](view) for view in range(sample.info.views)}):
            raise SampleError(
                subject=f"sample {key!r}",
                expected=f"{kind} of all {sample.info.views} views or of none",
                found=len(found),
                remedy=f"{odd[0]} is {('strange' if odd[0] in found else 'missing')}",
            )
    depths: list[npt.NDArray[np.float32]] = []
    for view, image in enumerate(sample.views if kinds else ()):
        alpha = decode_image(key, image)[..., 3]
        if "depth" in kinds:
            name = depth_member(view)
            depth = decode_depth(key, name, sample.extras[name])
            _check_holes(key, name, depth > 0, alpha)
            depths.append(depth)
            reach = np.abs(back_project(depth, sample.c2w[view], sample.fxfycxcy[view])).max(initial=0)
            if reach > _REACH:
                raise SampleError(
                    subject=f"sample {key!r}",
                    expected=f"the points of {name} within [-1, 1]^3",
                    found=f"one at {reach:.3g}",
                    remedy="depth is measured along the camera's z axis, in scene units",
                )
        if "normal" in kinds:
            name = normal_member(view)
            normals = decode_normals(key, name, sample.extras[name])
            _check_holes(key, name, (normals != 0).any(axis=-1), alpha)
            away = _facing_away(normals, sample.c2w[view], sample.fxfycxcy[view])
            if away > _MOST_AWAY:
                raise SampleError(
                    subject=f"sample {key!r}",
                    expected=f"normals of {name} that face the camera",
                    found=f"that {away:.0%} face away",
                )

    on, before = _compare_depths(depths, sample.c2w, sample.fxfycxcy)
    if before > _MOST_BEFORE * on:
        raise SampleError(
            subject=f"sample {key!r}",
            expected="depths that show one surface",
            found=f"{before} points before the surface of another view and {on} on it",
            remedy="depth is measured along the camera's z axis, not along the ray",
        )


def back_project(
    depth: npt.NDArray[np.float32], c2w: npt.NDArray[np.float32], fxfycxcy: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Return the (N, 3) world points that an (H, W) depth shows, row by row; none where it is 0."""
    rows, columns = np.nonzero(depth)
    height, width = depth.shape
    pixels = np.stack([(columns + 0.5) / width, (rows + 0.5) / height], axis=1)
    z = depth[rows, columns].astype(np.float64)[:, None]
    points = np.concatenate([(pixels - fxfycxcy[2:]) / fxfycxcy[:2] * z, z], axis=1)
    return points @ c2w[:3, :3].T.astype(np.float64) + c2w[:3, 3]


def _compare_depths(
    depths: list[npt.NDArray[np.float32]], c2w: npt.NDArray[np.float32], fxfycxcy: npt.NDArray[np.float32]
) -> tuple[int, int]:
    """Project the points of each depth into the other views; return how many lie on and before their surface.

    Within the size of a pixel. No point lies before the surface that a view shows, but at edges, and where faces are
    not seen from behind.
    """
    on = before = 0
    for view, depth in enumerate(depths):
        points = back_project(depth, c2w[view], fxfycxcy[view])[::_EVERY]
        for other, (pose, camera) in enumerate(zip(c2w, fxfycxcy, strict=True)):
            local = (points - pose[:3, 3]) @ pose[:3, :3].astype(np.float64)
            local = local[(local[:, 2] > 1e-6) & (other != view)]
            height, width = depths[other].shape
            pixels = (camera[:2] * local[:, :2] / local[:, 2:] + camera[2:]) * (width, height)
            inside = ((pixels >= 0) & (pixels < (width, height))).all(axis=1)
            column, row = pixels[inside].astype(int).T
            surface = depths[other][row, column]
            behind, pixel = local[inside, 2] - surface, surface / (camera[0] * width)
            on += int(((surface > 0) & (np.abs(behind) <= pixel)).sum())
            before += int(((surface > 0) & (behind < -pixel)).sum())
    return on, before


def _facing_away(
    normals: npt.NDArray[np.float32], c2w: npt.NDArray[np.float32], fxfycxcy: npt.NDArray[np.float32]
) -> float:
    """Return the fraction of an (H, W, 3) image's normals that point away from the camera."""
    rows, columns = np.nonzero((normals != 0).any(axis=-1))
    height, width = normals.shape[:2]
    pixels = np.stack([(columns + 0.5) / width, (rows + 0.5) / height], axis=1)
    local = np.column_stack([(pixels - fxfycxcy[2:]) / fxfycxcy[:2], np.ones(len(pixels))])
    cosine = (normals[rows, columns] * (local @ c2w[:3, :3].T.astype(np.float64))).sum(axis=1)
    return float((cosine > 0).mean()) if len(cosine) else 0.0


def resize_geometry(sample: Sample, views: tuple[bytes, ...]) -> dict[str, bytes]:
    """Give depth and normals the size of smaller views; other extras, and images of that size, keep their bytes.

    Of the pixels under a smaller one that is taken which lies at its center (of four, the one below and to the right):
    a mean over an edge would be a surface where none is. It is 0 where the smaller view's alpha is.

    Args:
        sample: The sample as it was.
        views: Its views in their new size.

    Raises:
        SampleError: An image is none, or had another size than its view.
    """
    key, smaller = sample.info.id, dict(sample.extras)
    for view, (before, after) in enumerate(
        zip(sample.views, views, strict=True) if geometry_types(sample) else ()
    ):
        size, alpha = decode_image(key, before).shape[:2], decode_image(key, after)[..., 3]
        for name in (member(view) for member in MEMBER_NAMES.values()):
            if name in sample.extras and alpha.shape != size:
                pixels = read_pixels(key, name, sample.extras[name])
                _check_size(key, name, pixels.shape[:2], size)
                rows, columns = (
                    (np.arange(n) * 2 + 1) * m // (2 * n) for n, m in zip(alpha.shape, size, strict=True)
                )
                pixels = pixels[rows[:, None], columns]
                pixels[alpha == 0] = 0
                smaller[name] = write_pixels(pixels)
    return smaller


def _check_holes(key: str, name: str, seen: npt.NDArray[np.bool_], alpha: npt.NDArray[np.uint8]) -> None:
    _check_size(key, name, seen.shape, alpha.shape)
    if outside := int((seen & (alpha == 0)).sum()):
        raise SampleError(
            subject=f"sample {key!r}",
            expected=f"0 in {name} wherever alpha is 0",
            found=f"something at {outside} pixels",
        )
    opaque = alpha == 255
    holes = int((opaque & ~seen).sum())
    if holes > _CRACKS * opaque.sum():
        raise SampleError(
            subject=f"sample {key!r}",
            expected=f"something in {name} wherever alpha is 255",
            found=f"0 at {holes} of {int(opaque.sum())} pixels",
        )


def _check_size(key: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise SampleError(
            subject=f"sample {key!r}", expected=f"{name} of the view's size {expected}", found=found
        )
