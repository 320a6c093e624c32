"""Draw the cameras of one object: presets and pure functions, numpy only.

A camera stands at a radius and a height drawn from a preset's ranges and looks at the origin with +z up.
Azimuths are stratified: the circle is cut into V equal sectors, each holds one view, and a random permutation
orders them, so that any few consecutive views still see the object from different sides.
"""

import dataclasses
import hashlib
import math

import numpy as np
import numpy.typing as npt

from lrm_pl.conventions import Normalization

#: A camera higher than this part of its radius would look along the up axis, where "up" means nothing.
MAX_HEIGHT_OF_RADIUS = 0.95


@dataclasses.dataclass(frozen=True)
class CameraPreset:
    """Ranges that cameras are drawn from, uniformly.

    Attributes:
        radius_range: Distance of the camera from the origin, scene units.
        height_range: World z of the camera, scene units; kept within 0.95 of the radius.
        fov_range_deg: Full field of view, the same in both directions (images are square), degrees.
        normalize: How the object is scaled before it is rendered.
        orbit: Whether cameras stand where ``ORBIT_DEG`` says instead, turn after turn; heights are not drawn then.
    """

    radius_range: tuple[float, float]
    height_range: tuple[float, float]
    fov_range_deg: tuple[float, float]
    normalize: Normalization
    orbit: bool = False

    def shows_whole(self, normalize: Normalization) -> bool:
        """Say whether every image shows all of any object."""
        reach = {"sphere": 1.0, "cube": math.sqrt(3)}[normalize] / self.radius_range[0]
        return reach <= math.sin(math.radians(self.fov_range_deg[0] / 2))


#: The 24 views of MeshLRM's protocol (appendix I): polar angles of 90, 60 and 120 degrees, the front first.
ORBIT_DEG = [(azimuth, elevation) for elevation in (0, 30, -30) for azimuth in range(0, 360, 45)]

#: ``frame`` keeps the unit sphere wholly inside the image: it reaches asin(1 / 2.4) = 24.6 of 25 degrees.
#: The others follow the published ranges of their models and may crop an object that is near.
PRESETS: dict[str, CameraPreset] = {
    "frame": CameraPreset((2.4, 2.8), (-0.75, 1.60), (50.0, 50.0), "sphere"),
    "lrm": CameraPreset((1.5, 3.0), (-0.75, 1.60), (50.0, 50.0), "cube"),
    "openlrm": CameraPreset((1.9, 2.6), (-0.75, 1.60), (67.38, 67.38), "cube"),
    "instantmesh": CameraPreset((2.0, 3.5), (-0.75, 1.60), (50.0, 50.0), "cube"),
    "gso-orbit": CameraPreset((2.5, 2.5), (0.0, 0.0), (50.0, 50.0), "sphere", orbit=True),
}


@dataclasses.dataclass(frozen=True)
class Cameras:
    """The cameras of one object.

    Attributes:
        c2w: (V, 4, 4) float32, OpenCV camera to world.
        fxfycxcy: (V, 4) float32, divided by the image's side.
    """

    c2w: npt.NDArray[np.float32]
    fxfycxcy: npt.NDArray[np.float32]


def derive_seed(*parts: int | str) -> int:
    """Hash numbers and names to a seed in [0, 2^31), the same on every machine and in every order."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def draw_cameras(preset: CameraPreset, views: int, rng: np.random.Generator) -> Cameras:
    """Draw the cameras of one object.

    Args:
        preset: The ranges.
        views: Number of views V.
        rng: Generator seeded for this object alone.
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


def camera_positions(
    radius: npt.NDArray[np.float64], height: npt.NDArray[np.float64], azimuth_rad: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """SampleLocation cameras: (V, 3) points at distance ``radius`` from the origin and (clipped) world z ``height``.

    Azimuth 0 is +x and grows toward +y.
    """
    limit = MAX_HEIGHT_OF_RADIUS * radius
    z = np.clip(height, -limit, limit)
    ground = np.sqrt(radius**2 - z**2)
    return np.stack([ground * np.cos(azimuth_rad), ground * np.sin(azimuth_rad), z], axis=-1)


def look_at_origin(position: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Build the (4, 4) OpenCV pose of a camera at ``position`` (3,) that looks at the origin, +z up."""
    forward = -position / np.linalg.norm(position)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c2w = np.eye(4)
    c2w[:3] = np.stack([right, down, forward, position], axis=1)
    return c2w


def frame_rectangle(
    c2w: npt.NDArray[np.float32], focal: float, half_extent: npt.NDArray[np.float64], margin: float
) -> tuple[float, float, float, float]:
    """Bound where an object can be seen, so that the rest of the image need not be rendered.

    Args:
        c2w: (4, 4) OpenCV pose.
        focal: Focal length in image sides.
        half_extent: (3,) half sides of the object's bounding box, whose center is the origin.
        margin: What is added on each side, in image sides.

    Returns:
        Left, top, right, bottom in image sides from the top left corner; 0, 0, 1, 1 where a part of the box
        is beside or behind the camera.
    """
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    corners = (signs * half_extent - c2w[:3, 3]) @ c2w[:3, :3].astype(np.float64)
    if corners[:, 2].min() < 1e-3:
        return 0.0, 0.0, 1.0, 1.0
    seen = focal * corners[:, :2] / corners[:, 2:] + 0.5
    low, high = np.clip(seen.min(axis=0) - margin, 0, 1), np.clip(seen.max(axis=0) + margin, 0, 1)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def focal_from_fov(fov_deg: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Focal length in image sides of a full field of view: f = 0.5 / tan(fov / 2)."""
    return 0.5 / np.tan(np.radians(fov_deg) / 2)
