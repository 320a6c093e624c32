"""What is made of an input image."""

import dataclasses
import math

from lrm_pl.errors import InputError
from lrm_pl.meshing.mesh import MeshFormat

#: Faces that a mesh may have before it is laid out for a texture: xatlas' time grows faster than they do.
TEXTURE_FACES = 20_000

#: Faces that may be asked for.
MOST_FACES = 10**8


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """What is made of an image.

    Attributes:
        resolution: Points of the lattice along each axis.
        threshold: Density of the surface; None: the network's own, or measured.
        floaters: Parts of less than this share of the largest one's area are left out.
        most_faces: Faces of the mesh at most; None: as many as there are, ``TEXTURE_FACES`` with a texture.
        texture: Side of the texture, about, pixels; 0: colors at the vertices.
        texture_limit_s: Seconds that laying the surface out for it may take.
        formats: Files of the mesh.
        frames: Of the orbit; 0: no orbit and no grid.
        size: Side of a frame.
        elevation_deg: Height of the orbit.
        distance: Of the camera that the image is taken to be seen by, from the object's middle, scene units; None:
            that of training.
        fov_deg: Field of view of that camera; None: that of training.
    """

    resolution: int = 256
    threshold: float | None = None
    floaters: float = 0.0
    most_faces: int | None = None
    texture: int = 0
    texture_limit_s: float = 60.0
    formats: tuple[MeshFormat, ...] = ("glb",)
    frames: int = 60
    size: int = 256
    elevation_deg: float = 15.0
    distance: float | None = None
    fov_deg: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, value, low, high in (
            ("resolution", self.resolution, 8, 1024),
            ("floaters", self.floaters, 0, 1),
            ("faces", 4 if self.most_faces is None else self.most_faces, 4, MOST_FACES),
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
