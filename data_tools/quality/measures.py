"""Measures of objects and their views, and rules that compare a measure with a number.

The measures of an object are stored in the shard (``ID.measures.json``) and in ``filter.parquet``. Therefore,
``repack --where`` can apply different rules without rendering.
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

#: Name of the sample member that contains the measures.
MEASURES_MEMBER = "measures.json"

#: Rules that objects must satisfy by default.
DEFAULT_RULES = (
    "coverage >= 0.01", "white <= 0.95", "black <= 0.95", "degenerate <= 0.5", "missing_textures <= 0",
)  # fmt: skip

#: Additional default rule for presets whose views show whole objects.
CROPPED_RULE = "cropped <= 0.5"

#: A pixel is white if all channels are greater than or equal to this value, in the range [0, 255].
_WHITE = 250

#: A pixel is black if all channels are less than this value, in the range [0, 255].
_BLACK = 5

#: A pixel belongs to the object if alpha is greater than this value, in the range [0, 255].
_SOLID = 127

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclasses.dataclass(frozen=True)
class MeshMeasures:
    """Measures of a mesh file.

    Attributes:
        triangles: Number of visible triangles.
        degenerate: Fraction of triangles whose area is zero or negligible.
        doubled: Fraction of faces that were removed because they coincide with another face.
        one_sided: Whether there are open surfaces that are not visible from the back.
        size: Longest side of the bounding box in the units of the file.
        thinness: Shortest side of the bounding box divided by the longest side.
        materials: Number of materials that visible objects use.
        colored: Whether the materials have a texture, vertex colors or more than one color.
        textures: Number of textures.
        missing_textures: Number of missing or unreadable textures, material files and materials.
        animated: Whether the file contains animations. Only the first frame is rendered.
        hidden: Number of hidden objects, which are ignored.
        cameras: Number of cameras, which are ignored.
        lights: Number of lights, which are ignored.
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
    """Measures of a mesh and its views.

    Attributes:
        coverage: Mean fraction of the image that the object covers.
        coverage_min: Minimum fraction of the image that the object covers in any view.
        cropped: Fraction of views in which the object touches the image border.
        white: Fraction of white pixels among the pixels of the object in all views.
        black: Fraction of black pixels among the pixels of the object in all views.
    """

    coverage: float
    coverage_min: float
    cropped: float
    white: float
    black: float


@dataclasses.dataclass(frozen=True)
class Rule:
    """Comparison of a measure with a number.

    Attributes:
        measure: Name of a field of ``Measures``.
        sign: One of the operators <, <=, ==, >= and >.
        number: Number with which the measure is compared.
    """

    measure: str
    sign: str
    number: float

    def holds(self, measures: Measures) -> bool:
        """Return whether the measures satisfy the rule."""
        return _OPERATORS[self.sign](float(getattr(measures, self.measure)), self.number)


MEASURE_NAMES = tuple(field.name for field in dataclasses.fields(Measures))

_RULE_PATTERN = re.compile(
    rf"\s*({'|'.join(MEASURE_NAMES)})\s*(<=|>=|==|<|>)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*"
)


def parse_rule(text: str) -> Rule:
    """Parse a rule, for example, ``coverage >= 0.01``.

    Raises:
        InputError: The text is not a valid rule.
    """
    if not (found := _RULE_PATTERN.fullmatch(text)):
        raise InputError(
            expected="a rule such as 'coverage >= 0.01'",
            found=f"{text!r}",
            remedy=f"compare one of these measures with a number: {', '.join(MEASURE_NAMES)}",
        )
    return Rule(found[1], found[2], float(found[3]))


def broken_rules(measures: Measures, rules: Sequence[Rule]) -> str:
    """Describe the violated rules, for example, ``white 0.99, expected <= 0.98``, or return "" if there are none."""
    return "; ".join(
        f"{rule.measure} {float(getattr(measures, rule.measure)):.4g}, expected {rule.sign} {rule.number:g}"
        for rule in rules
        if not rule.holds(measures)
    )


def measure_views(mesh: MeshMeasures, views: Sequence[npt.NDArray[np.uint8]]) -> Measures:
    """Compute the measures of the views.

    Args:
        mesh: Measures of the mesh file.
        views: RGBA images, shape (H, W, 4) and dtype uint8.

    Returns:
        The measures of the mesh file and of the views.
    """
    coverage = [float(view[..., 3].mean()) / 255 for view in views]
    pixels = white = black = cropped = 0
    for view in views:
        solid = view[..., 3] > _SOLID
        colors = view[solid, :3]
        pixels += len(colors)
        white += int((colors >= _WHITE).all(axis=1).sum())
        black += int((colors < _BLACK).all(axis=1).sum())
        cropped += bool(solid[[0, -1]].any() or solid[:, [0, -1]].any())
    return Measures(
        **dataclasses.asdict(mesh),
        coverage=sum(coverage) / len(views),
        coverage_min=min(coverage),
        cropped=cropped / len(views),
        white=white / max(1, pixels),
        black=black / max(1, pixels),
    )


def encode_measures(measures: Measures) -> bytes:
    """Encode measures as JSON. The encoding is deterministic."""
    return json.dumps(dataclasses.asdict(measures)).encode()


def decode_measures(key: str, content: bytes) -> Measures:
    """Decode measures that were encoded by ``encode_measures``.

    Args:
        key: Key of the sample, for error messages.
        content: Encoded measures.

    Raises:
        InputError: Fields are missing or unknown, or a value has an unexpected type or is not finite.
    """
    try:
        record: Any = json.loads(content)
        types = {field.name: field.type for field in dataclasses.fields(Measures)}
        if set(record) != set(types) or any(type(record[name]) is not type_ for name, type_ in types.items()):
            raise ValueError(f"the fields {sorted(record)}")
        if infinite := [name for name, value in record.items() if not math.isfinite(value)]:
            raise ValueError(f"{infinite[0]} = {record[infinite[0]]}")
        return Measures(**record)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            subject=f"sample {key!r}",
            expected=f"finite measures {', '.join(MEASURE_NAMES)} in {key}.{MEASURES_MEMBER}",
            found=error,
        ) from error
