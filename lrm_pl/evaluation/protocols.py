"""Evaluation protocols, which define input views, target views and surface metrics.

PSNR is computed per image from RGB values in [0, 1] over white. SSIM uses a Gaussian window of size 11 with data range
1, as implemented by torchmetrics. LPIPS is computed with AlexNet and with VGG. Metrics are averaged over the images of
an object, and then over objects. The F-score of an empty reconstruction is 0. The other surface metrics are undefined
and excluded from the means, and the report states the number of objects in each mean.
"""

import dataclasses

from lrm_pl.data.manifest import Manifest, require_measurable_views
from lrm_pl.errors import InputError


@dataclasses.dataclass(frozen=True)
class SurfaceSettings:
    """Settings for the comparison of a mesh with points of the true surface (``surface.npy``).

    Attributes:
        points: Number of points of each surface.
        normalized: Whether to center each point cloud and scale the longest side of its bounding box to 2. If False,
            distances are in scene units, in which the bounding sphere of the object has radius 1.
        aligned: Whether to align the prediction with the true surface, for models that are not conditioned on the
            camera. If False, the prediction must have the pose that the input camera defines.
        resolution: Number of points along each axis of the grid for marching cubes.
        thresholds: Distance thresholds of the F-score.
    """

    points: int = 10_000
    normalized: bool = True
    aligned: bool = True
    resolution: int = 256
    thresholds: tuple[float, ...] = (0.1, 0.2, 0.5)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Input views, target views and surface metrics of an evaluation.

    Attributes:
        name: Name of the protocol.
        description: Description in one sentence.
        inputs: Indices of the input views. A separate reconstruction is computed from each input view.
        targets: Indices of the views in which each reconstruction is compared with the object.
        surface: Settings of the surface metrics. If None, surfaces are not compared.
        preset: Camera preset that the shards must have. If empty, any preset is accepted.
        preview: Indices of the views in the image strips if there are no target views.
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
        """Number of views that an object must have."""
        return max((*self.inputs, *self.rendered)) + 1

    @property
    def rendered(self) -> tuple[int, ...]:
        """Indices of the views that are rendered."""
        return self.targets or self.preview

    def check_manifest(self, manifest: Manifest, folder: str) -> None:
        """Check that a folder of shards is suitable for the protocol.

        Raises:
            InputError: There are too few views, the views are too small, or the camera preset differs.
        """
        if manifest.views < self.views:
            raise InputError(
                subject=folder,
                expected=f"at least {self.views} views per object for the protocol {self.name!r}",
                found=manifest.views,
                remedy=f"render the shards with VIEWS={self.views}",
            )
        if self.targets:
            require_measurable_views(manifest, folder)
        found = manifest.render.get("preset", "unknown")
        if self.preset and found != self.preset:
            raise InputError(
                subject=folder,
                expected=f"the camera preset {self.preset!r} for the protocol {self.name!r}",
                found=f"{found!r}",
                remedy=f'render the shards with ARGS="--preset {self.preset}" VIEWS={self.views}',
            )


_PROTOCOLS = (
    Protocol(
        "lrm",
        "5 of 15 views as single-image inputs, each compared in all 15 views (LRM, section 4.1)",
        inputs=(0, 3, 6, 9, 12),
        targets=tuple(range(15)),
    ),
    Protocol(
        "gso-orbit",
        "the front view as input, compared in 24 orbit views: 8 azimuths at elevations of 0, 30 and -30 degrees "
        "(MeshLRM, appendix I)",
        inputs=(0,),
        targets=tuple(range(24)),
        preset="gso-orbit",
    ),
    Protocol(
        "geometry",
        "the first view as input; 10,000 points of the predicted and the true surface, each normalized, aligned by a "
        "search over 6,912 rotations and ICP (TripoSR, section 4)",
        inputs=(0,),
        targets=(),
        surface=SurfaceSettings(),
    ),
    Protocol(
        "geometry-posed",
        "the first view as input; 10,000 points of the predicted and the true surface, posed by the input camera, with "
        "distances in units of the bounding sphere's radius",
        inputs=(0,),
        targets=(),
        surface=SurfaceSettings(normalized=False, aligned=False),
    ),
)

PROTOCOLS = {protocol.name: protocol for protocol in _PROTOCOLS}


def f_score_name(threshold: float) -> str:
    """Return the name of the F-score at a threshold."""
    return f"f_score@{threshold:g}"


def surface_metrics(geometry: SurfaceSettings) -> dict[str, bool]:
    """Return the names of the surface metrics, and whether higher values are better."""
    return {
        "chamfer": False,
        **{f_score_name(threshold): True for threshold in geometry.thresholds},
        "normal_consistency": True,
    }


def metrics_of(protocol: Protocol) -> dict[str, bool]:
    """Return the metric names of a protocol in the order of the table columns, and whether higher values are better."""
    metrics = dict[str, bool]()
    if protocol.targets:
        metrics |= dict.fromkeys(("psnr", "ssim"), True) | dict.fromkeys(("lpips_alex", "lpips_vgg"), False)
        metrics |= {"clip": True, "fid": False, "kid": False}
    return metrics | (surface_metrics(protocol.surface) if protocol.surface else {})
