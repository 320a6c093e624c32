"""What is measured of each object and its images, and the rules that reject some of them.

The measures of an object lie beside its images in the shard (``ID.measures.json``), and those of all objects in
``filter.parquet``: a rule that is changed later needs no rendering, only ``repack --where``.
"""

import dataclasses
import json
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lrm_pl.errors import InputError

#: Member of a sample that holds its measures.
MEASURES_MEMBER = "measures.json"

#: Rules that an object must obey unless the user says otherwise.
DEFAULT_RULES = (
    "coverage >= 0.01", "white <= 0.95", "black <= 0.95", "degenerate <= 0.5", "missing_textures <= 0",
)  # fmt: skip

#: One more where cameras show the whole object; others crop those that are near.
CROPPED_RULE = "cropped <= 0.5"

#: Above this in all channels (of 255) a pixel counts as white.
_WHITE = 250

#: Below this in all channels a pixel counts as black.
_BLACK = 5

#: A pixel of the object: its alpha (of 255) is above this.
_SOLID = 127

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


class RuleError(InputError):
    """A rule, or measures, that cannot be understood."""


@dataclasses.dataclass(frozen=True)
class MeshMeasures:
    """What a file holds, before anything is rendered.

    Attributes:
        triangles: Triangles of everything that is visible.
        degenerate: Fraction of them without an area.
        doubled: Fraction of the faces that lay where another one does; they are left out.
        one_sided: Whether there are open surfaces that are not seen from behind.
        size: Longest side of the bounding box, in the file's units.
        thinness: Its shortest side over its longest.
        materials: Materials in use.
        colored: Whether there is a texture, a color at vertices, or more than one color.
        textures: Images that the materials use.
        missing_textures: Those of them that are not there or cannot be opened, and other files of colors.
        animated: Whether something moves; its first frame is shown.
        hidden: Objects that the file hides; they are left out.
        cameras: Cameras in the file; they are not used.
        lights: Lights in the file; they are left out.
    """

    triangles: int
    degenerate: float
    doubled: float
    one_sided: bool
    size: float
    thinness: float
    materials: int
    colored: bool
    textures: int
    missing_textures: int
    animated: bool
    hidden: int
    cameras: int
    lights: int


@dataclasses.dataclass(frozen=True)
class Measures(MeshMeasures):
    """All that is measured of an object.

    Attributes:
        coverage: Fraction of the images that the object covers, mean over the views.
        coverage_min: The same of the view that shows least of it.
        cropped: Fraction of views in which it touches the image's edge.
        white: Fraction of its pixels that are as good as white, over all views.
        black: The same of black.
    """

    coverage: float
    coverage_min: float
    cropped: float
    white: float
    black: float


@dataclasses.dataclass(frozen=True)
class Rule:
    """A measure compared with a number.

    Attributes:
        measure: Field of ``Measures``.
        sign: One of < <= == >= >.
        number: What it is compared with.
    """

    measure: str
    sign: str
    number: float

    def holds(self, measures: Measures) -> bool:
        """Say whether an object obeys."""
        return _OPERATORS[self.sign](float(getattr(measures, self.measure)), self.number)


MEASURE_NAMES = tuple(field.name for field in dataclasses.fields(Measures))


def parse_rule(text: str) -> Rule:
    """Read a rule such as ``coverage >= 0.01``.

    Raises:
        RuleError: It is none.
    """
    found = re.fullmatch(r"\s*(\w+)\s*(<=|>=|==|<|>)\s*([0-9.eE+-]+)\s*", text)
    try:
        if found and found[1] in MEASURE_NAMES:
            return Rule(found[1], found[2], float(found[3]))
    except ValueError:  # "1.2.3": refused below like any other text
        pass
    raise RuleError(
        expected=f"a rule such as 'coverage >= 0.01', one of {', '.join(MEASURE_NAMES)} compared with a number",
        found=f"{text!r}",
    )


def broken_rules(measures: Measures, rules: Sequence[Rule]) -> str:
    """Say what an object breaks: ``white 0.99, expected <= 0.98``; "" where it obeys."""
    return "; ".join(
        f"{rule.measure} {float(getattr(measures, rule.measure)):.4g}, expected {rule.sign} {rule.number:g}"
        for rule in rules
        if not rule.holds(measures)
    )


def measure_views(mesh: MeshMeasures, views: Sequence[npt.NDArray[np.uint8]]) -> Measures:
    """Add what the images show, (H, W, 4) uint8 each, to what the file holds."""
    solid = [np.asarray(view[..., 3] > _SOLID) for view in views]
    white = [np.asarray((view[..., :3] >= _WHITE).all(axis=-1)) for view in views]
    black = [np.asarray((view[..., :3] < _BLACK).all(axis=-1)) for view in views]
    coverage = [float(view[..., 3].mean()) / 255 for view in views]
    cropped = [bool(s[0].any() or s[-1].any() or s[:, 0].any() or s[:, -1].any()) for s in solid]
    pixels = sum(int(s.sum()) for s in solid)
    return Measures(
        **dataclasses.asdict(mesh),
        coverage=sum(coverage) / len(views),
        coverage_min=min(coverage),
        cropped=sum(cropped) / len(views),
        white=sum(int((w & s).sum()) for w, s in zip(white, solid, strict=True)) / max(1, pixels),
        black=sum(int((b & s).sum()) for b, s in zip(black, solid, strict=True)) / max(1, pixels),
    )


def encode_measures(measures: Measures) -> bytes:
    """Write measures as JSON; equal ones give equal bytes."""
    return json.dumps(dataclasses.asdict(measures)).encode()


def decode_measures(key: str, content: bytes) -> Measures:
    """Read what ``encode_measures`` wrote.

    Raises:
        RuleError: Other fields, or not numbers.
    """
    try:
        record: Any = json.loads(content)
        kinds = {field.name: field.type for field in dataclasses.fields(Measures)}
        if set(record) != set(kinds) or any(type(record[name]) is not kind for name, kind in kinds.items()):
            raise ValueError(f"the fields {sorted(record)}")
        return Measures(**record)
    except (ValueError, TypeError) as error:
        raise RuleError(
            subject=f"sample {key!r}",
            expected=f"the measures {', '.join(MEASURE_NAMES)} in {key}.{MEASURES_MEMBER}",
            found=error,
        ) from error


def is_one_sided(key: str, content: bytes) -> bool:
    """Read one measure; false in measures that were taken before there was this one.

    Raises:
        RuleError: They are no numbers by name.
    """
    try:
        record = json.loads(content)
        wrong = [name for name, value in record.items() if not math.isfinite(value)]
    except (ValueError, RecursionError, AttributeError, TypeError, OverflowError) as error:
        raise RuleError(
            subject=f"sample {key!r}",
            expected=f"the measures as numbers in {key}.{MEASURES_MEMBER}",
            found=error,
        ) from error
    if wrong:
        raise RuleError(
            subject=f"sample {key!r}", expected="finite measures", found=f"{wrong[0]} = {record[wrong[0]]}"
        )
    return bool(record.get("one_sided", False))
