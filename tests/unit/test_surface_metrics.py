"""Chamfer distance, F-score, normal consistency and alignment of surfaces."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from lrm_pl.data.synthetic import ellipsoid_surface, synthetic_sample
from lrm_pl.evaluation.objects import true_surface
from lrm_pl.evaluation.protocols import SurfaceSettings
from lrm_pl.evaluation.surfaces import PointCloud, align, chamfer, compare_surfaces, rotation_grid

RNG = np.random.default_rng


def ball(radius=1.0, center=(0, 0, 0), count=40_000, seed=0):
    points, normals = ellipsoid_surface(np.full(3, 1.0), count, RNG(seed))
    return PointCloud(points * radius + center, normals)


@pytest.fixture
def coarse_rotations(monkeypatch):
    """Search 864 instead of 6,912 rotations."""
    monkeypatch.setattr("lrm_pl.evaluation.surfaces._STEPS", (12, 12, 6))
    rotation_grid.cache_clear()
    yield
    rotation_grid.cache_clear()


@pytest.mark.parametrize(
    "shift",
    [pytest.param(0.1, marks=pytest.mark.soak), 0.5, pytest.param(0.9, marks=pytest.mark.soak)],
)
def test_the_chamfer_distance_of_two_shifted_spheres_is_its_closed_form(shift):
    # From a point of one unit sphere at angle theta to the shift d: s = sqrt(1 + d^2 - 2 d cos theta) to the other's
    # middle, |s - 1| to its surface. Uniform in cos theta, ds s / d: 1/(2d) int |s - 1| s ds from 1 - d to 1 + d.
    low, high = 1 - shift, 1 + shift

    def integral(s):  # of (s - 1) s
        return s**3 / 3 - s**2 / 2

    expected = ((integral(low) - integral(1)) + (integral(high) - integral(1))) / (2 * shift)
    found = chamfer(ball().points, ball(center=(0, 0, shift), seed=1).points)
    assert found == pytest.approx(
        expected, abs=0.004
    )  # points are 0.018 apart, which adds to small distances
    assert found == pytest.approx(expected, rel=0.08)


def test_the_distance_of_concentric_spheres_is_the_difference_of_their_radii():
    scores = compare_surfaces(ball(0.8), ball(1.0, seed=1), (0.1, 0.199, 0.21))
    assert scores["chamfer"] == pytest.approx(0.2, abs=0.001)
    assert [scores[f"f_score@{threshold}"] for threshold in (0.1, 0.199, 0.21)] == [0, 0, 1]
    assert scores["normal_consistency"] == pytest.approx(1, abs=0.001)


def test_metrics_equal_values_computed_by_hand():
    # Three of four predicted points are within 0.1 of the truth; one of two true points is within 0.1 of a prediction.
    points = np.array([(0, 0, 0), (0.05, 0, 0), (0, 0.05, 0), (9, 0, 0)], dtype=float)
    truth = np.array([(0, 0, 0), (-5, 0, 0)], dtype=float)
    up, side = np.tile((0.0, 0, 1), (4, 1)), np.tile((1.0, 0, 0), (2, 1))
    scores = compare_surfaces(PointCloud(points, up), PointCloud(truth, side), (0.1,))
    assert scores["f_score@0.1"] == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert scores["chamfer"] == pytest.approx(((0 + 0.05 + 0.05 + 9) / 4 + (0 + 5) / 2) / 2)
    assert scores["normal_consistency"] == 0
    assert compare_surfaces(PointCloud(points, up), PointCloud(truth + 100, side), (0.1,))["f_score@0.1"] == 0


def test_the_sign_of_normals_does_not_change_the_normal_consistency():
    flipped = PointCloud(ball().points, -ball().normals)
    assert compare_surfaces(ball(), flipped, (0.1,))["normal_consistency"] == 1


def test_normalized_clouds_have_mean_zero_and_a_longest_side_of_2():
    found = PointCloud(RNG(0).uniform((5, 0, 0), (9, 1, 2), (5000, 3)), np.zeros((5000, 3))).normalized()
    np.testing.assert_allclose(found.points.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(np.ptp(found.points, axis=0), (2, 0.5, 1), rtol=0.01)


def lopsided(count, seed):
    """A surface that looks the same in one position only: three ellipsoids of different sizes."""
    parts = [
        (np.array((0.9, 0.3, 0.2)), (0, 0, 0)), (np.array((0.2, 0.5, 0.2)), (0.6, 0.4, 0)),
        (np.array((0.15, 0.15, 0.4)), (-0.5, 0, 0.5)),
    ]  # fmt: skip
    clouds = [ellipsoid_surface(radii, count, RNG(seed + k)) for k, (radii, _) in enumerate(parts)]
    points = np.concatenate([p + c for (p, _), (_, c) in zip(clouds, parts, strict=True)])
    order = RNG(seed).permutation(len(points))
    return PointCloud(points[order], np.concatenate([n for _, n in clouds])[order])


def test_alignment_recovers_a_rotated_and_translated_shape(coarse_rotations):
    truth = lopsided(1500, 0).normalized()
    turn = Rotation.from_euler("zxy", (100, -50, 20), degrees=True).as_matrix()
    away = lopsided(1500, 10).transformed(turn, np.array((0.3, -0.2, 0.1))).normalized()
    same = chamfer(lopsided(1500, 10).normalized().points, truth.points)
    assert chamfer(away.points, truth.points) > 4 * same
    found = align(away, truth)
    assert chamfer(found.points, truth.points) < 1.15 * same
    assert compare_surfaces(found, truth, (0.1,))["normal_consistency"] > 0.9


def test_the_rotation_grid_has_6912_rotations_and_begins_with_the_identity():
    assert len(rotation_grid()) == 24 * 24 * 12
    np.testing.assert_allclose(rotation_grid()[0], np.eye(3), atol=1e-15)


def test_alignment_never_increases_the_distance(coarse_rotations):
    truth, prediction = ball(count=600).normalized(), ball(count=600, seed=3).normalized()
    assert chamfer(align(prediction, truth).points, truth.points) <= chamfer(prediction.points, truth.points)


def test_true_surface_points_are_in_the_canonical_frame_of_the_input_view():
    sample = synthetic_sample("a", 4, 32, 0, surface=True)
    radii = np.abs(
        true_points := np.frombuffer(sample.extras["surface.npy"][128:], np.float32).reshape(-1, 6)[:, :3]
    ).max(axis=0)
    assert np.abs(((true_points / radii) ** 2).sum(axis=1) - 1).max() < 0.01
    geometry = SurfaceSettings(normalized=False, aligned=False)
    truth = true_surface(sample, 2, geometry)
    assert len(truth.points) == 10_000
    # the input camera stands on -y: what it sees nearest has the smallest y
    c2w = sample.c2w[2].astype(float)
    depth = (true_points[:10_000] - c2w[:3, 3]) @ c2w[:3, 2]
    distance = np.linalg.norm(c2w[:3, 3])
    np.testing.assert_allclose(truth.points[:, 1], depth - distance, atol=1e-5)
