"""Validation and downsampling of depth and normal maps. The module requires only NumPy."""

from functools import partial

import numpy as np
import numpy.typing as npt

from data_tools.quality.silhouettes import ByteArray, FloatArray, MaskArray
from lrm_pl.data.geometry_views import (
    decode_depth,
    decode_normals,
    depth_member,
    normal_member,
    read_pixels,
    write_pixels,
)
from lrm_pl.data.schema import Sample, SampleError, decode_image

#: Functions that return the name of the member that contains the depth or normal map of a view.
MEMBER_NAMES = {"depth": depth_member, "normal": normal_member}

#: Maximum fraction of opaque pixels without a depth or normal. Such pixels occur if the ray through the center of the
#: pixel passes between triangles.
_CRACKS = 1e-3

#: Stride of the sequence of depth pixels that are compared with different views.
_POINT_STRIDE = 7

#: Maximum number of points in front of the surface of a different view, divided by the number of points on the surface.
#: Edges and single-sided faces can cause points in front of the surface.
_MAX_IN_FRONT = 0.35

#: Maximum fraction of normals that point away from the camera. Interpolated normals at edges can point away.
_MAX_FACING_AWAY = 0.5

#: Maximum absolute coordinate of a point. Objects are inside [-1, 1]^3, and depth values are rounded.
_MAX_COORDINATE = 1.01


def geometry_types(sample: Sample) -> list[str]:
    """Return the types of maps ("depth", "normal") that a sample contains."""
    return [type_ for type_ in MEMBER_NAMES if any(name.startswith(type_) for name in sample.extras)]


def check_geometry(sample: Sample) -> None:
    """Check whether the depth and normal maps of a sample are consistent with the views and cameras.

    Raises:
        SampleError: A map is missing, or inconsistent with a view or with another map.
    """
    key, types = sample.info.id, geometry_types(sample)
    invalid = partial(SampleError, subject=f"sample {key!r}")
    for type_ in types:
        found = {name for name in sample.extras if name.startswith(type_)}
        if odd := sorted(found ^ {MEMBER_NAMES[type_](view) for view in range(sample.info.views)}):
            problem = "unexpected" if odd[0] in found else "missing"
            raise invalid(
                expected=f"{type_} maps of all {sample.info.views} views",
                found=f"{len(found)} ({odd[0]} is {problem})",
            )
    depths: list[FloatArray] = []
    for view, image in enumerate(sample.views if types else ()):
        alpha = decode_image(key, image)[..., 3]
        c2w, fxfycxcy = sample.c2w[view], sample.fxfycxcy[view]
        if "depth" in types:
            name = depth_member(view)
            depth = decode_depth(key, name, sample.extras[name])
            _check_holes(key, name, depth > 0, alpha)
            depths.append(depth)
            reach = np.abs(back_project(depth, c2w, fxfycxcy)).max(initial=0)
            if reach > _MAX_COORDINATE:
                raise invalid(
                    expected=f"points of {name} within [-1, 1]^3",
                    found=f"a coordinate of {reach:.3g}",
                    remedy="store depth along the camera's z axis, in scene units",
                )
        if "normal" in types:
            name = normal_member(view)
            normals = decode_normals(key, name, sample.extras[name])
            seen = (normals != 0).any(axis=-1)
            _check_holes(key, name, seen, alpha)
            away = (normals[seen] * (_camera_rays(seen, fxfycxcy) @ c2w[:3, :3].T)).sum(axis=1) > 0
            if away.sum() > _MAX_FACING_AWAY * len(away):
                raise invalid(
                    expected=f"normals of {name} that face the camera",
                    found=f"{away.mean():.0%} that face away",
                )

    on, before = _compare_depths(depths, sample.c2w, sample.fxfycxcy)
    if before > _MAX_IN_FRONT * on:
        raise invalid(
            expected="depth maps of one surface",
            found=f"{before} points in front of the surface of another view and {on} on it",
            remedy="store depth along the camera's z axis, not along the ray",
        )


def back_project(depth: FloatArray, c2w: FloatArray, fxfycxcy: FloatArray) -> npt.NDArray[np.float64]:
    """Back-project the pixels of a depth map to points. Pixels with depth 0 are skipped.

    Args:
        depth: (H, W) depth map.
        c2w: (4, 4) camera-to-world matrix in the OpenCV convention.
        fxfycxcy: (4,) normalized intrinsics.

    Returns:
        (N, 3) points in world coordinates, in row-major order of the pixels.
    """
    seen = depth > 0
    points = _camera_rays(seen, fxfycxcy) * depth[seen].astype(np.float64)[:, None]
    return points @ c2w[:3, :3].T.astype(np.float64) + c2w[:3, 3]


def _camera_rays(seen: MaskArray, fxfycxcy: FloatArray) -> npt.NDArray[np.float64]:
    """Return the rays through the N pixels in a mask, as an (N, 3) array of camera coordinates with z = 1."""
    pixels = (np.argwhere(seen)[:, ::-1] + 0.5) / seen.shape[::-1]
    return np.column_stack([(pixels - fxfycxcy[2:]) / fxfycxcy[:2], np.ones(len(pixels))])


def _compare_depths(depths: list[FloatArray], c2w: FloatArray, fxfycxcy: FloatArray) -> tuple[int, int]:
    """Project the points of each depth map into all other views, and compare the depths.

    If the cameras are correct, only points at edges and behind single-sided faces are in front of the surface in
    another view. The tolerance is the size of a pixel on the surface.

    Args:
        depths: V depth maps, shape (H, W).
        c2w: (V, 4, 4) camera-to-world matrices in the OpenCV convention.
        fxfycxcy: (V, 4) normalized intrinsics.

    Returns:
        Number of points on the surface in another view, and number of points in front of it.
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


def resize_geometry(sample: Sample, views: tuple[bytes, ...]) -> dict[str, bytes]:
    """Downsample depth and normal maps to the size of downsampled views.

    The maps are downsampled by nearest-neighbor sampling, because averaging across an edge would create surface points
    in empty space. If four pixels are reduced to one, the lower right pixel is used. Values are 0 where the alpha of
    the view is 0. All other extras, and maps whose size does not change, are copied unchanged.

    Args:
        sample: Sample in the original size.
        views: Downsampled views.

    Returns:
        Mapping from names to contents of all extras.

    Raises:
        SampleError: A map cannot be decoded, or a map and the view do not have the same size.
    """
    key, smaller = sample.info.id, dict(sample.extras)
    if not geometry_types(sample):
        return smaller
    for view, (before, after) in enumerate(zip(sample.views, views, strict=True)):
        size, alpha = decode_image(key, before).shape[:2], decode_image(key, after)[..., 3]
        if alpha.shape == size:
            continue
        rows, columns = (
            (np.arange(n) * 2 + 1) * m // (2 * n) for n, m in zip(alpha.shape, size, strict=True)
        )
        for name in sorted({member(view) for member in MEMBER_NAMES.values()} & smaller.keys()):
            pixels = read_pixels(key, name, sample.extras[name])
            _check_size(key, name, pixels.shape[:2], size)
            pixels = pixels[rows[:, None], columns]
            pixels[alpha == 0] = 0
            smaller[name] = write_pixels(pixels)
    return smaller


def _check_holes(key: str, name: str, seen: MaskArray, alpha: ByteArray) -> None:
    _check_size(key, name, seen.shape, alpha.shape)
    invalid = partial(SampleError, subject=f"sample {key!r}")
    if outside := int((seen & (alpha == 0)).sum()):
        raise invalid(expected=f"{name} to be 0 where alpha is 0", found=f"other values at {outside} pixels")
    opaque = alpha == 255
    holes, total = int((opaque & ~seen).sum()), int(opaque.sum())
    if holes > _CRACKS * total:
        raise invalid(
            expected=f"values in {name} where alpha is 255", found=f"0 at {holes} of {total} pixels"
        )


def _check_size(key: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise SampleError(
            subject=f"sample {key!r}", expected=f"{name} with the size {expected} of the view", found=found
        )
