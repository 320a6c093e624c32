"""Distances of surfaces, as points with normals: Chamfer distance, F-score, normal consistency, alignment. numpy only.

Definitions are those of ZeroShape (Huang et al. 2024, eval_3D.py), whose procedure TripoSR and SF3D report too.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

Points = Float[np.ndarray, "Q 3"]

#: Points of each cloud with which rotations are looked through, and how many of the best are looked at again in full.
_SEARCH_POINTS, _FINALISTS = 512, 8

#: Steps of the rotation search: azimuth, elevation, roll, evenly over the whole circle each (6,912 in all).
_STEPS = (24, 24, 12)

_ICP_STEPS = 50


@dataclasses.dataclass(frozen=True)
class PointCloud:
    """Points on a surface.

    Attributes:
        points: Places.
        normals: Unit normals there.
    """

    points: Points
    normals: Points

    def transformed(
        self, rotation: Float[np.ndarray, "3 3"], shift: Float[np.ndarray, "3"] | None = None
    ) -> "PointCloud":
        """Turn about the origin, then shift."""
        points = self.points @ rotation.T
        return PointCloud(points if shift is None else points + shift, self.normals @ rotation.T)

    def normalized(self) -> "PointCloud":
        """Move the mean to the origin, and scale so that the longest side of the bounding box is 2."""
        points = self.points - self.points.mean(axis=0)
        return PointCloud(points * (2 / np.ptp(points, axis=0).max()), self.normals)


@dataclasses.dataclass(frozen=True)
class SurfaceScores:
    """How near two surfaces are.

    Attributes:
        chamfer: Mean distance to the nearest point, averaged over both directions; not squared.
        f_scores: Threshold -> 2 P R / (P + R); P: share of predicted points within it of the truth, R the converse.
        normal_consistency: Mean |cosine| between normals at nearest points, averaged over both directions.
    """

    chamfer: float
    f_scores: dict[float, float]
    normal_consistency: float


def compare_surfaces(prediction: PointCloud, truth: PointCloud, thresholds: Sequence[float]) -> SurfaceScores:
    """Measure two clouds as they lie."""
    there, near_truth = cKDTree(truth.points).query(prediction.points)
    back, near_prediction = cKDTree(prediction.points).query(truth.points)
    f_scores = {}
    for threshold in thresholds:
        precision, recall = float((there <= threshold).mean()), float((back <= threshold).mean())
        f_scores[threshold] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    cosines = [
        np.abs((prediction.normals * truth.normals[near_truth]).sum(axis=1)).mean(),
        np.abs((truth.normals * prediction.normals[near_prediction]).sum(axis=1)).mean(),
    ]
    return SurfaceScores(float(there.mean() + back.mean()) / 2, f_scores, float(np.mean(cosines)))


def chamfer(prediction: Points, truth: Points) -> float:
    """Average, over both directions, the mean distance to the nearest point; not squared."""
    there, _ = cKDTree(truth).query(prediction)
    back, _ = cKDTree(prediction).query(truth)
    return float(there.mean() + back.mean()) / 2


def align(prediction: PointCloud, truth: PointCloud) -> PointCloud:
    """Turn and shift a normalized cloud to where it is nearest to another one (TripoSR, section 4).

    All rotations of a grid are looked through, the best refined by the iterative closest point method; each is
    normalized again after it was turned. The grid is searched with 512 points of each cloud, the best eight with all.

    Args:
        prediction: The cloud that is moved.
        truth: The cloud that stays, normalized.
    """
    few, true_tree = prediction.points[:_SEARCH_POINTS], cKDTree(truth.points[:_SEARCH_POINTS])
    distances = np.array([_distance(few, rotation, truth, true_tree) for rotation in rotation_grid()])
    best, best_distance = prediction, np.inf
    for number in np.argsort(distances, kind="stable")[:_FINALISTS]:
        turned = prediction.transformed(rotation_grid()[number]).normalized()
        distance = chamfer(turned.points, truth.points)
        if distance < best_distance:
            best, best_distance = turned, distance
    return _iterative_closest_point(best, truth)


@functools.cache
def rotation_grid() -> Float[np.ndarray, "N 3 3"]:
    """Return all rotations of the search; the first is none."""
    angles = np.stack(np.meshgrid(*(np.arange(n) * 360 / n for n in _STEPS), indexing="ij"), axis=-1).reshape(
        -1, 3
    )
    return Rotation.from_euler("zxy", angles, degrees=True).as_matrix()


def _distance(points: Points, rotation: np.ndarray, truth: PointCloud, tree: cKDTree) -> float:
    turned = points @ rotation.T
    turned = (turned - turned.mean(axis=0)) * (2 / np.ptp(turned, axis=0).max())
    there, _ = tree.query(turned)
    back, _ = cKDTree(turned).query(truth.points[:_SEARCH_POINTS])
    return float(there.mean() + back.mean())


def _iterative_closest_point(prediction: PointCloud, truth: PointCloud) -> PointCloud:
    """Refine rotation and place (Besl and McKay 1992); what comes out is never farther than what went in."""
    tree, best, best_distance = cKDTree(truth.points), prediction, chamfer(prediction.points, truth.points)
    moved = prediction
    for _ in range(_ICP_STEPS):
        _, nearest = tree.query(moved.points)
        target = truth.points[nearest]
        middle, target_middle = moved.points.mean(axis=0), target.mean(axis=0)
        u, _, vt = np.linalg.svd((moved.points - middle).T @ (target - target_middle))
        turn = vt.T @ np.diag((1, 1, np.sign(np.linalg.det(vt.T @ u.T)))) @ u.T
        shift = target_middle - turn @ middle
        moved = moved.transformed(turn, shift)
        if np.abs(turn - np.eye(3)).max() < 1e-6 and np.abs(shift).max() < 1e-6:
            break
    distance = chamfer(moved.points, truth.points)
    return moved if distance < best_distance else best
