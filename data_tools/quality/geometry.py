"""Validation and downsampling of the depth and normal maps of samples. numpy only."""

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

#: Functions that return the member name of a view's depth or normal map.
MEMBER_NAMES = {"depth": depth_member, "normal": normal_member}

#: Maximum fraction of opaque pixels without depth or normal: a ray through a pixel center may pass between triangles.
_CRACKS = 1e-3

#: Stride of the depth pixels that are compared with other views.
_POINT_STRIDE = 7

#: Maximum ratio of points in front of the surface of another view to points on it. Edges and single-sided faces cause
#: some of them.
_MAX_IN_FRONT = 0.35

#: Maximum fraction of normals that face away from the camera. Interpolated normals do, at edges.
_MAX_FACING_AWAY = 0.5

#: Maximum absolute coordinate of a point. Objects lie in [-1, 1]^3; depth values are rounded.
_MAX_COORDINATE = 1.01


def geometry_types(sample: Sample) -> list[str]:
    """Return which of "depth" and "normal" a sample contains."""
    return [type_ for type_ in MEMBER_NAMES if any(name.startswith(type_) for name in sample.extras)]


def check_geometry(sample: Sample) -> None:
    """Check the depth and normal maps of a sample against its views and cameras.

    Raises:
        SampleError: A map is missing, inconsistent with its view, or inconsistent with another map.
    """
    key, types = sample.info.id, geometry_types(sample)
    for type_ in types:
        found = {name for name in sample.extras if name.startswith(type_)}
        if odd := sorted(found ^ {MEMBER_NAMES[type_](view) for view in range(sample.info.views)}):
            problem = "unexpected" if odd[0] in found else "missing"
            raise SampleError(
                subject=f"sample {key!r}",
                expected=f"{type_} maps of all {sample.info.views} views",
                found=f"{len(found)} ({odd[0]} is {problem})",
            )
    depths: list[npt.NDArray[np.float32]] = []
    for view, image in enumerate(sample.views if types else ()):
        alpha = decode_image(key, image)[..., 3]
        if "depth" in types:
            name = depth_member(view)
            depth = decode_depth(key, name, sample.extras[name])
            _check_holes(key, name, depth > 0, alpha)
            depths.append(depth)
            reach = np.abs(back_project(depth, sample.c2w[view], sample.fxfycxcy[view])).max(initial=0)
            if reach > _MAX_COORDINATE:
                raise SampleError(
                    subject=f"sample {key!r}",
                    expected=f"points of {name} within [-1, 1]^3",
                    found=f"a coordinate of {reach:.3g}",
                    remedy="store depth along the camera's z axis, in scene units",
                )
        if "normal" in types:
            name = normal_member(view)
            normals = decode_normals(key, name, sample.extras[name])
            _check_holes(key, name, (normals != 0).any(axis=-1), alpha)
            away = _facing_away(normals, sample.c2w[view], sample.fxfycxcy[view])
            if away > _MAX_FACING_AWAY:
                raise SampleError(
                    subject=f"sample {key!r}",
                    expected=f"normals of {name} that face the camera",
                    found=f"{away:.0%} that face away",
                )

    on, before = _compare_depths(depths, sample.c2w, sample.fxfycxcy)
    if before > _MAX_IN_FRONT * on:
        raise SampleError(
            subject=f"sample {key!r}",
            expected="depth maps of one surface",
            found=f"{before} points in front of the surface of another view and {on} on it",
            remedy="store depth along the camera's z axis, not along the ray",
        )


def back_project(
    depth: npt.NDArray[np.float32], c2w: npt.NDArray[np.float32], fxfycxcy: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Return the (N, 3) world points of an (H, W) depth map, row by row. Pixels with depth 0 are skipped."""
    rows, columns = np.nonzero(depth)
    height, width = depth.shape
    pixels = np.stack([(columns + 0.5) / width, (rows + 0.5) / height], axis=1)
    z = depth[rows, columns].astype(np.float64)[:, None]
    points = np.concatenate([(pixels - fxfycxcy[2:]) / fxfycxcy[:2] * z, z], axis=1)
    return points @ c2w[:3, :3].T.astype(np.float64) + c2w[:3, 3]


def _compare_depths(
    depths: list[npt.NDArray[np.float32]], c2w: npt.NDArray[np.float32], fxfycxcy: npt.NDArray[np.float32]
) -> tuple[int, int]:
    """Project the points of each depth map into the other views, and count those on and in front of their surface.

    The tolerance is the size of a pixel. With correct cameras, only points at edges and behind single-sided faces lie
    in front of the surface of another view.
    """
    on = before = 0
    for view, depth in enumerate(depths):
        points = back_project(depth, c2w[view], fxfycxcy[view])[::_POINT_STRIDE]
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
    """Return the fraction of the normals in an (H, W, 3) map that face away from the camera."""
    rows, columns = np.nonzero((normals != 0).any(axis=-1))
    height, width = normals.shape[:2]
    pixels = np.stack([(columns + 0.5) / width, (rows + 0.5) / height], axis=1)
    local = np.column_stack([(pixels - fxfycxcy[2:]) / fxfycxcy[:2], np.ones(len(pixels))])
    cosine = (normals[rows, columns] * (local @ c2w[:3, :3].T.astype(np.float64))).sum(axis=1)
    return float((cosine > 0).mean()) if len(cosine) else 0.0


def resize_geometry(sample: Sample, views: tuple[bytes, ...]) -> dict[str, bytes]:
    """Downsample depth and normal maps to the size of downsampled views.

    Nearest-neighbor sampling at pixel centers is used (of four pixels, the lower right one): averaging across an edge
    would create surface points in empty space. Values are 0 where the alpha of the view is 0. Other extras, and maps
    whose size does not change, keep their bytes.

    Args:
        sample: Sample in its original size.
        views: Downsampled views.

    Raises:
        SampleError: A map cannot be decoded, or its size differs from that of its view.
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
            expected=f"{name} to be 0 where alpha is 0",
            found=f"other values at {outside} pixels",
        )
    opaque = alpha == 255
    holes = int((opaque & ~seen).sum())
    if holes > _CRACKS * opaque.sum():
        raise SampleError(
            subject=f"sample {key!r}",
            expected=f"values in {name} where alpha is 255",
            found=f"0 at {holes} of {int(opaque.sum())} pixels",
        )


def _check_size(key: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise SampleError(
            subject=f"sample {key!r}", expected=f"{name} with the view's size {expected}", found=found
        )
