"""Framing of input images that a network was trained with: camera, object size and background."""

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
    """What an image must be like that is given to a network.

    Attributes:
        distance: Distance of the camera, scene units (LRM and OpenLRM: 2).
        fov_deg: Field of view of the square image.
        foreground: Longer side of the object's bounding box, as a share of the image's side.
        background: Gray level of the background in [0, 1]; LRM: 1, TripoSR: 0.5.
        threshold: Density of the surface; None: measured per object (``surface_density``).
    """

    distance: float = 2.0
    fov_deg: float = 50.0
    foreground: float = 0.85
    background: float = 1.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        _ = self.camera
        if not 0 < self.foreground <= 1 or not 0 <= self.background <= 1:
            raise InputError(expected="foreground in (0, 1] and background in [0, 1]", found=self)

    @property
    def camera(self) -> InputCamera:
        """The assumed input camera."""
        return InputCamera(self.distance, self.fov_deg)

    @classmethod
    def of_record(cls, record: Mapping[str, Any], where: str) -> "InputFraming":
        """Create a framing from a config record.

        Args:
            record: Field names and numbers; missing fields take the values of LRM.
            where: Name of the record for error messages.

        Raises:
            InputError: A field is unknown or not a number.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        wrong = sorted(
            str(name)
            for name, value in record.items()
            if name not in known
            or not (
                (isinstance(value, int | float) and not isinstance(value, bool))
                or (name == "threshold" and value is None)
            )
        )
        if wrong:
            raise InputError(
                subject=where, expected=f"numbers named {', '.join(sorted(known))}", found=", ".join(wrong)
            )
        numbers: dict[str, Any] = {name: value and float(value) for name, value in record.items()}
        return cls(**numbers)


def measure_framing(batches: Iterable[Batch]) -> InputFraming | None:
    """Return the median framing over the target views of evaluation batches; None if there are none."""
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
