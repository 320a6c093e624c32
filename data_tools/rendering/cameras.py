"""Camera presets, and sampling of the cameras of an object. This module requires only NumPy.

The radius and the height of a camera are sampled from the ranges of a preset. A camera looks at the origin with +z up.
The azimuths are stratified: the circle is divided into as many equal sectors as there are views, and one azimuth is
sampled in each sector. The order of the sectors is random, so that consecutive views show the object from different
sides.
"""

import dataclasses
import hashlib
import math

import numpy as np
import numpy.typing as npt

from lrm_pl.conventions import Normalization

DoubleArray = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.float32]

#: Maximum absolute height of a camera as a fraction of the radius. The pose of a camera on the up axis is not defined.
MAX_HEIGHT_OF_RADIUS = 0.95


@dataclasses.dataclass(frozen=True)
class CameraPreset:
    """Uniform distributions of the camera parameters.

    Attributes:
        radius_range: Range of the distance from the origin in scene units.
        height_range: Range of the z coordinate in scene units. Its magnitude is at most 0.95 times the radius.
        fov_range_deg: Range of the horizontal and vertical field of view in degrees. Images are square.
        normalize: Normalization of the objects, "sphere" or "cube".
        orbit: Whether to use the directions in ``ORBIT_DEG`` instead of random directions.
    """

    radius_range: tuple[float, float]
    height_range: tuple[float, float]
    fov_range_deg: tuple[float, float]
    normalize: Normalization
    orbit: bool = False

    def shows_whole(self, normalize: Normalization) -> bool:
        """Return whether all views contain the whole object if it is normalized with ``normalize``."""
        reach = {"sphere": 1.0, "cube": math.sqrt(3)}[normalize] / self.radius_range[0]
        return reach <= math.sin(math.radians(self.fov_range_deg[0] / 2))


#: Azimuth and elevation in degrees of the 24 views in the evaluation protocol of MeshLRM (appendix I). The first view
#: is the front view.
ORBIT_DEG = [(azimuth, elevation) for elevation in (0, 30, -30) for azimuth in range(0, 360, 45)]

#: Camera presets. With ``frame``, the unit sphere is inside the image, because the angular radius of the sphere is at
#: most asin(1 / 2.4) = 24.6 degrees and half of the field of view is 25 degrees. ``lrm``, ``openlrm`` and
#: ``instantmesh`` have the published ranges of these models. With these ranges, objects are cropped in some views.
PRESETS: dict[str, CameraPreset] = {
    "frame": CameraPreset((2.4, 2.8), (-0.75, 1.60), (50.0, 50.0), "sphere"),
    "lrm": CameraPreset((1.5, 3.0), (-0.75, 1.60), (50.0, 50.0), "cube"),
    "openlrm": CameraPreset((1.9, 2.6), (-0.75, 1.60), (67.38, 67.38), "cube"),
    "instantmesh": CameraPreset((2.0, 3.5), (-0.75, 1.60), (50.0, 50.0), "cube"),
    "gso-orbit": CameraPreset((2.5, 2.5), (0.0, 0.0), (50.0, 50.0), "sphere", orbit=True),
}


@dataclasses.dataclass(frozen=True)
class Cameras:
    """Cameras of the V views of an object.

    Attributes:
        c2w: (V, 4, 4) float32 camera-to-world matrices in the OpenCV convention.
        fxfycxcy: (V, 4) float32 intrinsics (fx, fy, cx, cy) divided by the image size.
    """

    c2w: FloatArray
    fxfycxcy: FloatArray


def derive_seed(*parts: int | str) -> int:
    """Hash numbers and names to an integer in [0, 2^31), which is the same on all machines."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def draw_cameras(preset: CameraPreset, views: int, rng: np.random.Generator) -> Cameras:
    """Sample the cameras of one object.

    Args:
        preset: Distributions of the camera parameters.
        views: Number of views V.
        rng: Random number generator.
    """
    sectors = rng.permutation(views)
    azimuth_rad = 2 * math.pi * (sectors + rng.uniform(0, 1, views)) / views
    radius = rng.uniform(*preset.radius_range, size=views)
    height = rng.uniform(*preset.height_range, size=views)
    fov_deg = rng.uniform(*preset.fov_range_deg, size=views)
    if preset.orbit:
        azimuth, elevation = np.radians([ORBIT_DEG[view % len(ORBIT_DEG)] for view in range(views)]).T
        azimuth_rad, height = azimuth - math.pi / 2, radius * np.sin(elevation)
    c2w = np.stack([look_at_origin(p) for p in camera_positions(radius, height, azimuth_rad)])
    focal = focal_from_fov(fov_deg)
    center = np.full(views, 0.5)
    return Cameras(
        c2w.astype(np.float32), np.stack([focal, focal, center, center], axis=1).astype(np.float32)
    )


def camera_positions(radius: DoubleArray, height: DoubleArray, azimuth_rad: DoubleArray) -> DoubleArray:
    """Compute camera positions.

    Args:
        radius: (V,) distances from the origin.
        height: (V,) z coordinates. Their magnitudes are clipped to ``MAX_HEIGHT_OF_RADIUS`` times the radius.
        azimuth_rad: (V,) azimuths in radians. 0 is the direction +x, and the azimuth increases toward +y.

    Returns:
        (V, 3) positions.
    """
    limit = MAX_HEIGHT_OF_RADIUS * radius
    z = np.clip(height, -limit, limit)
    ground = np.sqrt(radius**2 - z**2)
    return np.stack([ground * np.cos(azimuth_rad), ground * np.sin(azimuth_rad), z], axis=-1)


def look_at_origin(position: DoubleArray) -> DoubleArray:
    """Return the pose of a camera that looks at the origin with +z up.

    Args:
        position: (3,) position of the camera.

    Returns:
        (4, 4) camera-to-world matrix in the OpenCV convention.
    """
    forward = -position / np.linalg.norm(position)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c2w = np.eye(4)
    c2w[:3] = np.stack([right, down, forward, position], axis=1)
    return c2w


def frame_rectangle(
    c2w: FloatArray, focal: float, half_extent: DoubleArray, margin: float
) -> tuple[float, float, float, float]:
    """Compute the rectangle of the image that contains the projection of a bounding box.

    Args:
        c2w: (4, 4) camera-to-world matrix in the OpenCV convention.
        focal: Focal length divided by the image size.
        half_extent: (3,) half-extents of the box, which is centered at the origin.
        margin: Margin to add on each side, as a fraction of the image size.

    Returns:
        Left, top, right and bottom as fractions of the image size, measured from the top-left corner. If part of the
        box is behind the camera, the rectangle is the whole image.
    """
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    corners = (signs * half_extent - c2w[:3, 3]) @ c2w[:3, :3].astype(np.float64)
    if corners[:, 2].min() < 1e-3:
        return 0.0, 0.0, 1.0, 1.0
    seen = focal * corners[:, :2] / corners[:, 2:] + 0.5
    low, high = np.clip(seen.min(axis=0) - margin, 0, 1), np.clip(seen.max(axis=0) + margin, 0, 1)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def focal_from_fov(fov_deg: DoubleArray) -> DoubleArray:
    """Return the focal length divided by the image size, 0.5 / tan(fov / 2), for a field of view in degrees."""
    return 0.5 / np.tan(np.radians(fov_deg) / 2)
