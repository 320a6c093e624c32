"""Tests of density grids, meshes, empty-space skipping and reconstruction."""

import contextlib
import math

import numpy as np
import pytest
import torch

from lrm_pl.geometry.cameras import InputCamera, canonicalize, look_at, orbit
from lrm_pl.inference.scene import reconstruct
from lrm_pl.kernels import device
from lrm_pl.meshing.surface import NoSurfaceError, extract_mesh, surface_density
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.triplane import Triplane
from lrm_pl.rendering.density_grid import density_grid, query_color, query_density
from lrm_pl.rendering.empty_space import Occupancy, measure_occupancy, render_skipping
from lrm_pl.rendering.renderer import Renderer
from tests.builders import CAMERA, Operators, is_closed, tiny_lrm, volume

CENTER, RADIUS = torch.tensor([0.2, -0.1, 0.15]), 0.45


class Ball:
    """An off-center ball of density 40 with a soft rim of width 0.1, colored by position."""

    reduce = "sum"
    planes, weights = torch.zeros(1, 3, 1, 1, 1), ()

    def __init__(self):
        self.queries = 0

    def sample(self, planes, points):
        return points

    def accumulate(self, total, points, grad):
        raise AssertionError("nothing to differentiate")

    def decode(self, points, weights):
        self.queries += len(points)
        return (RADIUS - (points - CENTER).norm(dim=-1)) / 0.05, (points + 1) / 2

    def activate(self, raw):
        return 40 * torch.sigmoid(raw * 4) * (raw > -4)


def test_a_coarse_to_fine_grid_has_the_same_surface_as_a_full_grid():
    ball = Ball()
    full = density_grid(ball, 0, 97)
    ball.queries = 0
    coarse = density_grid(ball, 0, 97, threshold=20.0)
    assert full.shape == (97, 97, 97)
    assert ball.queries < 0.3 * full.numel()
    assert torch.equal(full > 20, coarse > 20)
    near = (full - 20).abs() < 10
    assert torch.allclose(full[near], coarse[near], rtol=1e-5)
    step = 2 / 96
    point = torch.tensor([[10 * step - 1, 50 * step - 1, 70 * step - 1]])
    assert full[10, 50, 70] == query_density(ball, 0, point).item()


def test_the_mesh_of_a_ball_has_correct_colors_and_orientation():
    mesh = extract_mesh(Ball(), 0, 20.0, resolution=96)
    distance = np.linalg.norm(mesh.vertices - CENTER.numpy(), axis=-1)
    assert np.abs(distance - RADIUS).max() < 2 / 95
    np.testing.assert_allclose(mesh.colors, (mesh.vertices + 1) / 2, atol=1e-5)
    assert volume(mesh) == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.02)
    assert is_closed(mesh)


def test_the_mesh_contains_only_the_region_inside_the_bounds():
    ball = Ball()
    ball.activate = lambda raw: torch.full_like(raw, 40.0)  # dense everywhere, in the corners too
    mesh = extract_mesh(ball, 0, 20.0, resolution=48, bounds="sphere")
    assert np.abs(np.linalg.norm(mesh.vertices, axis=-1) - 1).max() < 2 / 47
    assert is_closed(mesh)
    with pytest.raises(NoSurfaceError):
        extract_mesh(ball, 0, 20.0, resolution=48)


def test_the_threshold_is_the_density_at_the_rendered_surface():
    # In the middle of the soft rim the density is 20; rays end a little inside of it, and never at its outer edge.
    ball = Ball()
    camera = InputCamera(2.6, 50.0)
    found = surface_density(
        ball, 0, Renderer(256, chunk=4096), measure_occupancy(ball, 0), camera.distance, camera.fxfycxcy
    )
    mesh = extract_mesh(ball, 0, found, resolution=96)
    radius = np.linalg.norm(mesh.vertices - CENTER.numpy(), axis=-1)
    assert np.abs(radius - RADIUS).max() < 0.05, "within the rim"
    ball.activate = lambda raw: 0.1 * torch.sigmoid(raw * 4)  # no ray is opaque
    with pytest.raises(
        NoSurfaceError, match=r"found no opaque pixels in any view, and densities from 0 to 0\.1\."
    ):
        surface_density(ball, 0, Renderer(64), measure_occupancy(ball, 0), camera.distance, camera.fxfycxcy)


@pytest.mark.parametrize("threshold", [41.0, -1.0])
def test_the_error_for_a_field_without_a_surface_contains_the_densities(threshold):
    with pytest.raises(NoSurfaceError, match=r"above the threshold -?\d+, but found densities from 0 to 40"):
        extract_mesh(Ball(), 0, threshold, resolution=32)


def test_the_surface_is_closed_at_the_faces_of_the_box():
    ball = Ball()
    ball.decode = lambda points, weights: ((0.45 - points[:, :2].norm(dim=-1)) / 0.05, (points + 1) / 2)
    mesh = extract_mesh(ball, 0, 20.0, resolution=64)  # a column through two faces
    assert is_closed(mesh)
    assert np.abs(mesh.vertices).max() <= 1
    assert volume(mesh) == pytest.approx(math.pi * 0.45**2 * 2, rel=0.04)


def test_density_only_on_the_faces_of_the_box_is_not_a_surface():
    ball = Ball()
    ball.decode = lambda points, weights: ((points.abs().amax(dim=-1) - 0.99) * 100, points)
    with pytest.raises(NoSurfaceError, match="above the threshold 20, but found densities from 0 to"):
        extract_mesh(ball, 0, 20.0, resolution=64)


def test_a_surface_with_too_few_faces_is_an_error(monkeypatch):
    monkeypatch.setattr(
        "lrm_pl.meshing.surface.decimate", lambda vertices, faces, most: (vertices[:0], faces[:0])
    )
    with pytest.raises(NoSurfaceError, match="at most 4 faces, but found no faces after decimation"):
        extract_mesh(Ball(), 0, 20.0, resolution=32, max_faces=4)


RENDERERS = {
    "bins": Renderer(64, chunk=4096),
    "importance": Renderer(64, 32, chunk=4096),
    "midpoints": Renderer(48, 24, "box", "midpoints", chunk=4096),
}


@pytest.mark.parametrize("kind", RENDERERS)
def test_empty_space_skipping_does_not_change_the_image(kind):
    ball, renderer = Ball(), RENDERERS[kind]
    cameras = orbit(3, 2.6, 20.0)[None], CAMERA.expand(1, 3, 4)
    whole = renderer(ball, *cameras, (32, 32))
    queries, ball.queries = ball.queries, 0
    occupancy = measure_occupancy(ball, 0, 32)
    assert occupancy.fraction < 0.25
    ball.queries = 0
    skipped = renderer.draw(ball, [occupancy], *cameras, (32, 32))
    assert ball.queries < 0.4 * queries
    assert whole.opacity.max() > 0.99
    assert (skipped.rgb - whole.rgb).abs().max() < 1 / 255
    assert (skipped.opacity - whole.opacity).abs().max() < 1 / 255
    seen = whole.opacity > 0.5
    assert (skipped.depth - whole.depth)[seen].abs().max() < 0.01


@pytest.mark.parametrize("kind", RENDERERS)
def test_skipping_on_an_accelerator_matches_a_cpu_and_synchronizes_once_per_segment(kind):
    ball, renderer = Ball(), RENDERERS[kind]
    rays = renderer.rays(orbit(1, 2.6, 20.0)[None], CAMERA.expand(1, 1, 4), (16, 16))
    occupancy = measure_occupancy(ball, 0, 32)
    drawn, queries = [], []
    for choose in (contextlib.nullcontext, device.as_accelerator):
        ball.queries = 0
        with choose(), Operators() as operators:
            drawn.append(render_skipping(ball, [occupancy], rays, renderer.march, 10**9))
        queries.append(ball.queries)
    assert queries[1] == queries[0]
    for a, b in zip(vars(drawn[1]).values(), vars(drawn[0]).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    reads = 4 if kind == "bins" else 2  # 64 samples in segments of 16; before and after importance
    assert operators.calls["aten::nonzero"] == 1 + reads  # the rays that hit, then the points of each read
    assert not operators.calls["aten::_local_scalar_dense"]


def test_a_coarse_to_fine_grid_synchronizes_once():
    with device.as_accelerator(), Operators() as operators:
        density_grid(Ball(), 0, 33, threshold=20.0)
    assert operators.calls["aten::nonzero"] == 1
    assert not operators.calls["aten::_local_scalar_dense"]


def test_a_random_triplane_is_rendered_equally_with_and_without_skipping():
    torch.manual_seed(0)
    decoder = NeRFDecoder(4, 8, 3, density_bias=-6.0)
    field = decoder.field(Triplane(20 * torch.randn(2, 3, 4, 8, 8)))
    cameras = orbit(2, 2.6, 20.0).expand(2, 2, 4, 4), CAMERA.expand(2, 2, 4)
    renderer = Renderer(32, chunk=1000)
    with torch.no_grad():
        whole = renderer(field, *cameras, (24, 24))
        skipped = renderer.draw(field, [measure_occupancy(field, b) for b in range(2)], *cameras, (24, 24))
    assert whole.opacity.max() > 0.5
    assert (skipped.over(torch.ones(3)) - whole.over(torch.ones(3))).abs().max() < 1 / 255


def test_queries_are_independent_of_chunks_and_threads():
    torch.manual_seed(0)
    field = NeRFDecoder(4, 8, 3).field(Triplane(torch.randn(1, 3, 4, 8, 8)))
    points = torch.rand(40_000, 3) * 2 - 1
    with torch.no_grad():
        raw, color = field.decode(field.sample(field.planes[0], points), field.weights)
        assert torch.allclose(query_density(field, 0, points), field.activate(raw), atol=1e-6)
        assert torch.allclose(query_color(field, 0, points), color, atol=1e-6)


def test_an_image_is_reconstructed_as_a_mesh_and_frames_from_the_input_camera():
    network = tiny_lrm(depth=1).eval()
    with torch.no_grad():
        network.decoder.layers[-1].weight[0] *= 30
    image = torch.rand(3, 40, 40)
    scene = reconstruct(network, Renderer(24), image, InputCamera(2.6, 40.0))
    frames = list(scene.orbit(frames=3, size=20))
    assert len(frames) == 3
    assert frames[0].shape == (20, 20, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = Renderer(24)(
            scene.field, scene.camera.c2w[None, None], scene.camera.fxfycxcy[None, None], (20, 20)
        ).over(torch.ones(3))[0, 0]  # fmt: skip
    assert (frames[0] - expected).abs().max() < 1 / 255
    low, high = (
        query_density(scene.field, 0, torch.rand(1000, 3) * 2 - 1).quantile(q).item() for q in (0.2, 0.8)
    )
    mesh = scene.mesh((low + high) / 2, resolution=32)
    assert len(mesh.faces) > 10
    assert np.abs(mesh.vertices).max() <= 1


def test_the_input_camera_is_canonical():
    camera = InputCamera(1.7, 60.0)
    seen = look_at(torch.tensor([[0.9, -1.2, 0.8]]) / torch.tensor([0.9, -1.2, 0.8]).norm() * 1.7)
    assert torch.allclose(canonicalize(seen)[0], camera.c2w, atol=1e-5)
    assert camera.fxfycxcy[0].item() == pytest.approx(0.5 / math.tan(math.radians(30)))


def test_alpha_is_composited_over_white_and_invalid_images_are_errors():
    network = tiny_lrm(depth=1).eval()
    rgba = torch.rand(4, 28, 28)
    over = rgba[:3] * rgba[3:] + 1 - rgba[3:]
    assert torch.equal(
        reconstruct(network, Renderer(24), rgba).field.planes,
        reconstruct(network, Renderer(24), over).field.planes,
    )
    for wrong, message in (
        (torch.rand(2, 28, 28), "found 2 x 28 x 28. Crop the image, or convert it to RGBA"),
        (torch.rand(3, 28, 30), "expected a square image"),
        (torch.rand(3, 28, 28) * 255, "Divide 8-bit values by 255"),
        (torch.zeros(3, 28, 28, dtype=torch.uint8), "expected an image of floats"),
        (torch.zeros(28, 28), "found 28 x 28. Crop the image"),
        (torch.zeros(3, 0, 0), "found 3 x 0 x 0"),
        (torch.zeros(4, 28, 28), "only transparent pixels"),
        (torch.full((3, 28, 28), torch.nan), r"expected an image of floats in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            reconstruct(network, Renderer(24), wrong)
    with pytest.raises(ValueError, match="fov_deg between 0 and 180"):
        InputCamera(fov_deg=190.0)


def test_a_fully_occupied_box_is_rendered_equally_with_and_without_skipping():
    # Importance samples lie on the faces themselves, where rounding may put them outside by an ulp.
    torch.manual_seed(0)
    field = NeRFDecoder(4, 8, 3, density_bias=2.0).field(Triplane(5 * torch.randn(1, 3, 4, 8, 8)))
    cameras = orbit(2, 2.6, 20.0)[None], CAMERA.expand(1, 2, 4)
    for renderer in (Renderer(32, 16, "box"), Renderer(32, 0, "box")):
        with torch.inference_mode():
            whole = renderer(field, *cameras, (24, 24))
            occupancy = measure_occupancy(field, 0, 16)
            skipped = renderer.draw(field, [occupancy], *cameras, (24, 24))
        assert occupancy.fraction == 1
        assert (skipped.rgb - whole.rgb).abs().max() < 1 / 255


def test_the_occupancy_lookup_with_and_without_numba():
    torch.manual_seed(0)
    cells, points = torch.rand(5, 5, 5) > 0.5, torch.rand(500, 3) * 2.2 - 1.1
    size = len(cells)
    x, y, z = ((points + 1) * (size / 2)).long().clamp(0, size - 1).unbind(-1)
    expected = cells[x, y, z].nonzero().squeeze(-1)
    assert torch.equal(Occupancy(cells).occupied(points), expected)
    with device.as_accelerator():
        assert torch.equal(Occupancy(cells).occupied(points), expected)
        among = torch.arange(500) % 3 == 0
        assert torch.equal(Occupancy(cells).occupied(points, among), expected[expected % 3 == 0])


class Sheet(Ball):
    """A wall of density 40 at x = 0.3, 0.06 thick, surrounded by density 1 for two coarse cells."""

    def decode(self, points, weights):
        self.queries += len(points)
        return 1 - (points[:, 0] - 0.3).abs() / 0.03, points

    def activate(self, raw):
        return 40.0 * (raw > 0) + 1.0 * (raw > -4)


def test_a_coarse_to_fine_grid_resolves_a_thin_wall():
    sheet = Sheet()
    full, coarse = density_grid(Sheet(), 0, 65), density_grid(sheet, 0, 65, threshold=20.0)
    assert (full > 20).sum() > 4000
    assert torch.equal(full > 20, coarse > 20)
    assert sheet.queries < 0.5 * full.numel()
