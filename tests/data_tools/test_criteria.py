"""Measures of images, and rules."""

import dataclasses
import json

import numpy as np
import pytest

from data_tools.quality.measures import (
    CROPPED_RULE,
    DEFAULT_RULES,
    MeshMeasures,
    broken_rules,
    decode_measures,
    encode_measures,
    measure_views,
    parse_rule,
)
from lrm_pl.errors import InputError

MESH = MeshMeasures(
    triangles=12,
    degenerate=0.0,
    doubled=0.0,
    one_sided=False,
    size=2.0,
    thinness=0.5,
    materials=1,
    colored=True,
    textures=1,
    missing_textures=0,
    animated=False,
    hidden=0,
    cameras=0,
    lights=0,
)


def image(box, color, side=10):
    top, left, bottom, right = box
    rgba = np.zeros((side, side, 4), dtype=np.uint8)
    rgba[top:bottom, left:right] = (*color, 255)
    return rgba


def test_measures_of_views_match_known_values():
    red_inside = image((2, 2, 6, 7), (200, 0, 0))  # 20 of 100 pixels
    red_inside[5, 2:7, :3] = 4  # 5 of them are black
    white_at_the_edge = image((0, 0, 2, 5), (250, 255, 251))  # 10 of 100, at the top and the left
    found = measure_views(MESH, [red_inside, white_at_the_edge])
    assert found.coverage == pytest.approx(0.15)
    assert found.coverage_min == pytest.approx(0.1)
    assert found.cropped == 0.5
    assert (found.white, found.black) == pytest.approx((10 / 30, 5 / 30))
    assert dataclasses.asdict(found) | dataclasses.asdict(MESH) == dataclasses.asdict(found)
    assert decode_measures("a", encode_measures(found)) == found


def test_violated_rules_are_described():
    white = measure_views(MESH, [image((0, 0, 10, 10), (255, 255, 255))])
    said = broken_rules(white, [parse_rule(rule) for rule in (*DEFAULT_RULES, CROPPED_RULE)])
    assert said == "white 1, expected <= 0.95; cropped 1, expected <= 0.5"
    assert broken_rules(white, [parse_rule("white == 1"), parse_rule("colored>0")]) == ""
    assert broken_rules(white, [parse_rule("triangles > 12")]) == "triangles 12, expected > 12"


@pytest.mark.parametrize(
    "text", ["color > 1", "white", "white > x", "white > 1.2.3", "__class__ == 1", "white =< 1"]
)
def test_an_invalid_rule_raises_an_error_with_an_example(text):
    with pytest.raises(
        match=r"expected a rule such as 'coverage >= 0\.01', but found .*measures .*triangles, ",
    ):
        parse_rule(text)


def test_damaged_measures_raise_an_error():
    record = json.loads(encode_measures(measure_views(MESH, [image((0, 0, 9, 9), (9, 9, 9))])))
    for wrong in (
        b"{",
        b"[]",
        json.dumps(record | {"white": "1"}).encode(),
        json.dumps(record | {"x": 1}).encode(),
    ):
        with pytest.raises(
            InputError, match=r"sample 'a': expected finite measures triangles, .* in a\.measures\.json"
        ):
            decode_measures("a", wrong)
