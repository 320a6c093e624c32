"""Options for inference, and limits of the HTTP server.

Importing this module does not import torch, so that invalid options are reported immediately.
"""

import dataclasses
import math

from lrm_pl.errors import InputError
from lrm_pl.meshing.mesh import MeshFormat

#: Default side length of a texture in pixels.
TEXTURE_SIDE = 1024

#: Default maximum number of faces for texture baking. The run time of xatlas grows superlinearly with this number.
TEXTURE_FACES = 20_000

#: Upper bound of ``MeshOptions.max_faces``.
MAX_FACES = 10**8

#: Upper bound of ``MeshOptions.resolution``.
MAX_RESOLUTION = 1024

#: Minimum grid resolution in HTTP requests.
MIN_SERVER_RESOLUTION = 16


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """Options for the mesh and the orbit.

    Attributes:
        resolution: Resolution of the density grid.
        threshold: Density at the surface. If None, the threshold of the model is used. If the model has
            no threshold, it is estimated per object.
        floaters: Minimum area of a connected component, as a fraction of the area of the largest component.
        max_faces: Maximum number of faces. If None, there is no limit for meshes with vertex colors, and the limit for
            meshes with a texture is ``TEXTURE_FACES``.
        texture: Approximate side length of the texture in pixels. If 0, the mesh has vertex colors.
        texture_limit_s: Time limit for UV unwrapping in seconds.
        formats: File formats of the mesh.
        frames: Number of frames of the orbit. If 0, neither an orbit nor a grid image is rendered.
        size: Side length of a frame in pixels.
        elevation_deg: Elevation of the orbit in degrees.
        distance: Distance of the assumed input camera from the origin in scene units. If None, the training value
            is used.
        fov_deg: Field of view of the assumed input camera in degrees. If None, the training value is used.
    """

    resolution: int = 256
    threshold: float | None = None
    floaters: float = 0.0
    max_faces: int | None = None
    texture: int = 0
    texture_limit_s: float = 60.0
    formats: tuple[MeshFormat, ...] = ("glb",)
    frames: int = 60
    size: int = 256
    elevation_deg: float = 15.0
    distance: float | None = None
    fov_deg: float | None = None

    def __post_init__(self) -> None:
        """Validate the values."""
        for name, value, low, high in (
            ("resolution", self.resolution, 8, MAX_RESOLUTION),
            ("floaters", self.floaters, 0, 1),
            ("faces", 4 if self.max_faces is None else self.max_faces, 4, MAX_FACES),
            ("texture", self.texture, 0, 8192),
            ("texture-limit", self.texture_limit_s, 0, 86_400),
            ("frames", self.frames, 0, 10_000),
            ("size", self.size, 8, 4096),
            ("elevation", self.elevation_deg, -89, 89),
        ):
            require_between(name, value, low, high)
        distance = 1.0 if self.distance is None else self.distance
        fov = 90.0 if self.fov_deg is None else self.fov_deg
        if not 0 < distance < math.inf or not 0 < fov < 180:
            raise InputError(
                expected="distance above 0 and fov_deg between 0 and 180",
                found=f"distance {distance:g} and fov_deg {fov:g}",
            )
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise InputError(expected="a threshold above 0", found=f"{self.threshold:g}")


def require_between(name: str, value: float, low: float, high: float) -> None:
    """Raise an ``InputError`` if a value is not in the closed interval from ``low`` to ``high``."""
    if not low <= value <= high:
        raise InputError(expected=f"{name} from {low} to {high}", found=f"{value:g}")


@dataclasses.dataclass(frozen=True)
class ServerLimits:
    """Limits for HTTP requests.

    Attributes:
        megabytes: Maximum size of the image file in megabytes.
        megapixels: Maximum number of pixels in the image, in millions.
        seconds: Maximum time from the end of the upload to the response in seconds, including the time in the queue. It
            is checked between stages.
        upload_seconds: Maximum duration of the upload in seconds.
        queue: Maximum number of waiting requests.
        resolution: Maximum grid resolution.
    """

    megabytes: float = 16.0
    megapixels: float = 25.0
    seconds: float = 120.0
    upload_seconds: float = 30.0
    queue: int = 8
    resolution: int = 384

    def __post_init__(self) -> None:
        """Validate the values."""
        for name in ("megabytes", "megapixels", "seconds", "upload_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(expected=f"{name} above 0", found=f"{getattr(self, name):g}")
        require_between("queue", self.queue, 0, math.inf)
        require_between("resolution", self.resolution, MIN_SERVER_RESOLUTION, MAX_RESOLUTION)
