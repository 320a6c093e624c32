"""What is measured, by name: which views go in, which are compared, how surfaces are held against the truth.

PSNR is of each image, on [0, 1] RGB over white; SSIM has data_range 1 (torchmetrics: Gaussian window of 11); LPIPS is
measured with both networks. A metric's figure is the mean over an object's images, then the mean over objects. An
object of which nothing is opaque has an F-score of 0; its distances are not defined and left out, and counted.
"""

import dataclasses
from collections.abc import Sequence

from lrm_pl.data.manifest import Manifest, require_measurable_views
from lrm_pl.errors import InputError


@dataclasses.dataclass(frozen=True)
class SurfaceSettings:
    """How a mesh is held against the points of the true surface (``surface.npy``).

    Attributes:
        points: Drawn on either surface.
        normalized: Whether either cloud's mean comes to the origin and its longest side becomes 2; else distances are
            in scene units, where the object's bounding sphere has radius 1.
        aligned: Whether the prediction is turned and shifted to where it fits best, as for networks that do not know
            the camera; else it must stand where the input camera says.
        resolution: Points of the lattice that the mesh is cut out of, along each axis.
        thresholds: Of the F-score.
    """

    points: int = 10_000
    normalized: bool = True
    aligned: bool = True
    resolution: int = 256
    thresholds: tuple[float, ...] = (0.1, 0.2, 0.5)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is measured.

    Attributes:
        name: How it is called.
        what: In a sentence.
        inputs: Views that go in, one at a time; each is a reconstruction of its own.
        targets: Views that each reconstruction is compared in.
        geometry: How its mesh is measured; None: it is not.
        preset: Cameras that the shards must have been rendered with; "" takes any.
        shown: Views in the images, where none are compared.
    """

    name: str
    description: str
    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    surface: SurfaceSettings | None = None
    preset: str = ""
    preview: tuple[int, ...] = (1, 4, 7, 10)

    @property
    def views(self) -> int:
        """Views that an object must have."""
        return max((*self.inputs, *self.rendered)) + 1

    @property
    def rendered(self) -> tuple[int, ...]:
        """Views that are rendered."""
        return self.targets or self.preview

    def check_manifest(self, manifest: Manifest, where: str) -> None:
        """Check that shards can serve it.

        Raises:
            InputError: Too few views, too small ones, or other cameras.
        """
        if manifest.views < self.views:
            raise InputError(
                subject=where,
                expected=f"at least {self.views} views an object for the protocol {self.name!r}",
                found=manifest.views,
                remedy=f"render with VIEWS={self.views}",
            )
        if self.targets:
            require_measurable_views(manifest, where)
        found = manifest.render.get("preset", "unknown")
        if self.preset and found != self.preset:
            raise InputError(
                subject=where,
                expected=f"the cameras {self.preset!r} for the protocol {self.name!r}",
                found=f"{found!r}",
                remedy=f'render with ARGS="--preset {self.preset}" VIEWS={self.views}',
            )


_PROTOCOLS = (
    Protocol(
        "lrm",
        "15 reference views an object, 5 of them go in one at a time, all 15 are compared (LRM, section 4.1)",
        inputs=(0, 3, 6, 9, 12),
        targets=tuple(range(15)),
    ),
    Protocol(
        "gso-orbit",
        "the front view goes in, 24 views of an orbit are compared: 8 azimuths at elevations 0, 30 and -30 degrees "
        "(MeshLRM, appendix I)",
        inputs=(0,),
        targets=tuple(range(24)),
        preset="gso-orbit",
    ),
    Protocol(
        "geometry",
        "the first view goes in; 10,000 points of mesh and truth, normalized each, after a search over 6,912 rotations "
        "and ICP (TripoSR, section 4)",
        inputs=(0,),
        targets=(),
        surface=SurfaceSettings(),
    ),
    Protocol(
        "geometry-posed",
        "the first view goes in; 10,000 points of mesh and truth where the input camera says that they are, in units "
        "of the object's bounding sphere",
        inputs=(0,),
        targets=(),
        surface=SurfaceSettings(normalized=False, aligned=False),
    ),
)

PROTOCOLS = {protocol.name: protocol for protocol in _PROTOCOLS}


def image_metrics(extras: Sequence[str] = ()) -> dict[str, bool]:
    """Name the metrics of images -> whether more is better."""
    usual = {"psnr": True, "ssim": True, "lpips_alex": False, "lpips_vgg": False}
    return usual | dict.fromkeys(extras, True)


def f_score_name(threshold: float) -> str:
    """Name the F-score at a threshold."""
    return f"f_score@{threshold:g}"


def surface_metrics(geometry: SurfaceSettings) -> dict[str, bool]:
    """Name the metrics of surfaces -> whether more is better."""
    return {
        "chamfer": False,
        **{f_score_name(threshold): True for threshold in geometry.thresholds},
        "normal_consistency": True,
    }


def metrics_of(protocol: Protocol) -> dict[str, bool]:
    """Name the metrics that a protocol may have, in the order of tables -> whether more is better."""
    images = image_metrics(["clip"]) | {"fid": False, "kid": False} if protocol.targets else {}
    return images | (surface_metrics(protocol.surface) if protocol.surface else {})
