"""Options of inference and limits of the HTTP server. Imports nothing heavy: commands check them first."""

import dataclasses
import math

from lrm_pl.errors import InputError
from lrm_pl.meshing.mesh import MeshFormat

#: Default maximum of faces for texture baking; xatlas' time grows superlinearly.
TEXTURE_FACES = 20_000

#: Upper bound of ``MeshOptions.max_faces``.
MAX_FACES = 10**8

#: Lower bound of the grid resolution in HTTP requests.
MIN_SERVER_RESOLUTION = 16


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """Options of the mesh and the orbit.

    Attributes:
        resolution: Resolution of the density grid.
        threshold: Density at the surface; None uses the model's value, or estimates it per object.
        floaters: Minimum area of a connected component, as a fraction of the largest one's.
        max_faces: Maximum number of faces; None keeps all, or ``TEXTURE_FACES`` with a texture.
        texture: Approximate side of the texture, pixels; 0 stores vertex colors.
        texture_limit_s: Time limit of the UV unwrapping, seconds.
        formats: File formats of the mesh.
        frames: Frames of the orbit; 0 renders no orbit and no grid image.
        size: Side of a frame, pixels.
        elevation_deg: Elevation of the orbit.
        distance: Distance of the assumed input camera from the origin, scene units; None uses that of training.
        fov_deg: Field of view of the assumed input camera; None uses that of training.
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
            ("resolution", self.resolution, 8, 1024),
            ("floaters", self.floaters, 0, 1),
            ("faces", 4 if self.max_faces is None else self.max_faces, 4, MAX_FACES),
            ("texture", self.texture, 0, 8192),
            ("texture-limit", self.texture_limit_s, 0, 86_400),
            ("frames", self.frames, 0, 10_000),
            ("size", self.size, 8, 4096),
            ("elevation", self.elevation_deg, -89, 89),
        ):
            if not low <= value <= high:
                raise InputError(expected=f"{name} from {low} to {high}", found=f"{value:g}")
        distance = 1.0 if self.distance is None else self.distance
        fov = 90.0 if self.fov_deg is None else self.fov_deg
        if not 0 < distance < math.inf or not 0 < fov < 180:
            raise InputError(
                expected="a distance above 0 and a fov_deg between 0 and 180",
                found=f"{distance:g} and {fov:g}",
            )
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise InputError(expected="a threshold above 0", found=f"{self.threshold:g}")


@dataclasses.dataclass(frozen=True)
class ServerLimits:
    """Limits of HTTP requests.

    Attributes:
        megabytes: Maximum size of the image file.
        megapixels: Maximum number of pixels of the image.
        seconds: Time limit from the end of the upload to the response, including queueing; checked between stages.
        upload_seconds: Time limit of the upload.
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
        if self.queue < 0:
            raise InputError(expected="queue of 0 or more", found=self.queue)
        MeshOptions(resolution=self.resolution)
        if self.resolution < MIN_SERVER_RESOLUTION:
            raise InputError(expected=f"resolution of {MIN_SERVER_RESOLUTION} or more", found=self.resolution)
