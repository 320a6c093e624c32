"""Compare converted networks with the reference implementations in ``openlrm.py`` and ``triposr.py``.

``test_goldens.py`` compares the reference implementations with the original code.
"""

import pytest
import torch

from lrm_pl.geometry.cameras import look_at, orbit
from lrm_pl.geometry.rays import pixel_rays
from lrm_pl.weights.key_map import Hyperparameters
from lrm_pl.weights.openlrm import convert_openlrm
from lrm_pl.weights.triposr import RADIUS, convert_triposr, from_triposr_world
from tests.parity.networks import built, randomized
from tests.parity.openlrm import OpenLRM
from tests.parity.triposr import TripoSR

OPENGL = torch.diag(torch.tensor([1.0, -1, -1, 1]))

#: In the third variant, encoder and transformer have equal widths, and q, k and v have one weight as in OpenLRM-base.
OPENLRM_SIZES = [
    {},
    {
        "encoder_dim": 64,
        "encoder_depth": 3,
        "encoder_heads": 4,
        "stored": 9,
        "dim": 96,
        "heads": 6,
        "channels": 5,
    },
    {"encoder_dim": 64, "encoder_heads": 2, "dim": 64, "depth": 3, "heads": 2, "side": 6, "camera_dim": 16},
]
TRIPOSR_SIZES = [
    {},
    {
        "encoder_dim": 64,
        "encoder_heads": 2,
        "stored": 5,
        "dim": 128,
        "depth": 3,
        "heads": 8,
        "side": 6,
        "width": 48,
    },
]


def images(count, side, seed):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def sizes_of(size, image_size, samples):
    return Hyperparameters(size.get("heads", 4), size.get("encoder_heads", 3), image_size, samples)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", OPENLRM_SIZES)
@torch.no_grad()
def test_planes_points_and_images_match_openlrm(size, seed):
    theirs = randomized(OpenLRM(**size), seed)
    ours, renderer = built(convert_openlrm(theirs.state_dict(), sizes_of(size, 112, 20)))
    image, c2w = images(2, 112, seed), orbit(2, 2.0, 25.0)
    fxfycxcy = torch.tensor([[0.9, 0.95, 0.5, 0.45], [0.75, 0.75, 0.5, 0.5]])
    camera = torch.cat([(c2w @ OPENGL)[:, :3].flatten(1), fxfycxcy], dim=1)
    expected = theirs.planes(image, camera)
    triplane = ours(image[:, None], c2w[:, None], fxfycxcy[:, None])
    assert expected.abs().max() > 0.5
    assert (triplane.planes - expected).abs().max() < 1e-4

    field, points = ours.field(triplane), torch.rand(2, 300, 3) * 2 - 1
    raw, color = theirs.query(expected, points)
    for index in range(2):
        our_raw, our_color = field.decode(field.sample(field.planes[index], points[index]), field.weights)
        assert (our_raw - raw[index]).abs().max() < 1e-4
        assert (our_color - color[index]).abs().max() < 1e-4

    views = orbit(3, 1.9, -10.0).expand(2, 3, 4, 4)
    fxfycxcy = torch.tensor([0.6, 0.65, 0.5, 0.5]).expand(2, 3, 4)
    origins, directions = (rays.flatten(1, 3) for rays in pixel_rays(views, fxfycxcy, 20, 20))
    rendered, opacity = theirs.render(expected, origins, directions, 10, 10, torch.full((2, 1, 3), 0.3))
    pixels = renderer(field, views, fxfycxcy, (20, 20))
    assert opacity.min() == 0, "some rays miss the box"
    assert opacity.max() > 0.4
    assert (pixels.opacity.flatten(1) - opacity).abs().max() < 1e-4
    assert (pixels.over(torch.full((3,), 0.3)).flatten(1, 3) - rendered).abs().max() < 1e-4


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", TRIPOSR_SIZES)
@torch.no_grad()
def test_planes_points_and_images_match_triposr(size, seed):
    theirs = randomized(TripoSR(**size), seed)
    ours, renderer = built(convert_triposr(theirs.state_dict(), sizes_of(size, 128, 24)))
    image = images(2, 128, seed)
    expected = theirs.planes(image)
    triplane = ours(image[:, None], torch.eye(4).expand(2, 1, 4, 4), torch.ones(2, 1, 4))
    assert (triplane.planes - expected).abs().max() < 1e-4

    field, points = ours.field(triplane), torch.rand(2, 300, 3) * 1.7 - 0.85
    sigma, color = theirs.query(expected, points)
    x, y, z = (points / RADIUS).unbind(-1)
    turned = torch.stack([y, -x, z], dim=-1)  # the +x axis of TripoSR is the -y axis of this project
    for index in range(2):
        raw, our_color = field.decode(field.sample(field.planes[index], turned[index]), field.weights)
        assert torch.allclose(field.activate(raw), sigma[index], rtol=1e-4)
        assert (our_color - color[index]).abs().max() < 1e-4

    views = look_at(torch.tensor([[1.9, 0.0, 0.0], [1.2, 1.1, 0.7], [-0.5, -1.7, -0.4]])).expand(2, 3, 4, 4)
    fxfycxcy = torch.tensor([0.6, 0.65, 0.5, 0.45]).expand(2, 3, 4)
    origins, directions = (rays.flatten(1, 3) for rays in pixel_rays(views, fxfycxcy, 20, 20))
    rendered = theirs.render(expected, origins, directions, 24)
    pixels = renderer(field, from_triposr_world(views), fxfycxcy, (20, 20))
    assert (rendered == 1).any(), "some rays miss the box"
    assert (rendered < 0.8).any()
    assert (pixels.over(torch.ones(3)).flatten(1, 3) - rendered).abs().max() < 1e-4


def test_the_input_camera_of_triposr_is_the_canonical_camera():
    theirs = look_at(torch.tensor([1.9, 0.0, 0.0]))
    expected = look_at(torch.tensor([0.0, -1.9 / RADIUS, 0.0]))
    assert torch.allclose(from_triposr_world(theirs), expected, atol=1e-6)
