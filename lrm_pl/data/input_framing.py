"""Framing of the input images with which a network was trained."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from lrm_pl.data.batch import Batch
from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import InputCamera
from lrm_pl.images import object_box


@dataclasses.dataclass(frozen=True)
class InputFraming:
    """Camera, object size and background of the input images of a network, and the density threshold of the surface.

    Attributes:
        distance: Distance of the camera from the origin in scene units (LRM and OpenLRM use 2).
        fov_deg: Field of view of the square image in degrees.
        foreground: Longer side of the bounding box of the object divided by the side of the image.
        background: Gray level of the background in [0, 1] (LRM uses 1, and TripoSR uses 0.5).
        threshold: Density at the surface. If None, it is measured for each object with ``surface_density``.
    """

    distance: float = 2.0
    fov_deg: float = 50.0
    foreground: float = 0.85
    background: float = 1.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Validate the ranges of the fields."""
        _ = self.camera
        if not 0 < self.foreground <= 1 or not 0 <= self.background <= 1:
            raise InputError(expected="a foreground in (0, 1] and a background in [0, 1]", found=self)

    @property
    def camera(self) -> InputCamera:
        """Camera of the input images."""
        return InputCamera(self.distance, self.fov_deg)

    @classmethod
    def of_record(cls, record: Mapping[str, Any], where: str) -> "InputFraming":
        """Create a framing from a dictionary.

        Args:
            record: Mapping from field names to numbers. Missing fields have the default values.
            where: Name of the record for error messages.

        Raises:
            InputError: A field is unknown or is not a number.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        numbers: dict[str, Any] = {name: float(x) for name, x in record.items() if isinstance(x, int | float)}
        if "threshold" in record and record["threshold"] is None:
            numbers["threshold"] = None
        if wrong := [str(name) for name in record if name not in numbers or name not in names]:
            raise InputError(
                f"only numbers in the fields {', '.join(names)}", ", ".join(wrong), subject=where
            )
        return cls(**numbers)


def measure_framing(batches: Iterable[Batch]) -> InputFraming | None:
    """Return the median framing of the target views of evaluation batches, or None if no view shows an object."""
    distances, fovs, fractions = list[float](), list[float](), list[float]()
    for batch in batches:
        target = batch.target
        distances += target.c2w[..., :3, 3].norm(dim=-1).flatten().tolist()
        fovs += target.fxfycxcy[..., 0].reciprocal().mul(0.5).atan().mul(2).rad2deg().flatten().tolist()
        for alpha in target.alpha.flatten(0, 1).numpy():
            if (box := object_box(alpha)) is not None:
                fractions.append(max(box[2] - box[0], box[3] - box[1]) / max(alpha.shape))
    if not fractions:
        return None
    rounded = (round(statistics.median(values), 3) for values in (distances, fovs, fractions))
    return InputFraming(*rounded)
