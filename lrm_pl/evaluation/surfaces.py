"""Metrics and alignment of point clouds with normals, computed with numpy and scipy.

The metrics are the Chamfer distance, the F-score and the normal consistency as defined by ZeroShape (Huang et al. 2024,
eval_3D.py). TripoSR and SF3D use the same definitions.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from lrm_pl.evaluation.protocols import f_score_name

Points = Float[np.ndarray, "Q 3"]

#: Number of points of each cloud in the rotation search, and number of rotations that are evaluated with all points.
_SEARCH_POINTS, _FINALISTS = 512, 8

#: Number of steps of the rotation search in azimuth, elevation and roll, each over 360 degrees (6,912 rotations).
_STEPS = (24, 24, 12)

_ICP_STEPS = 50


@dataclasses.dataclass(frozen=True)
class PointCloud:
    """Point cloud with normals.

    Attributes:
        points: Positions of shape (Q, 3).
        normals: Unit normals of shape (Q, 3).
    """

    points: Points
    normals: Points

    def transformed(
        self, rotation: Float[np.ndarray, "3 3"], shift: Float[np.ndarray, "3"] | None = None
    ) -> "PointCloud":
        """Return the point cloud after a rotation about the origin and a translation."""
        points = self.points @ rotation.T
        return PointCloud(points if shift is None else points + shift, self.normals @ rotation.T)

    def normalized(self) -> "PointCloud":
        """Return the point cloud with the mean at the origin and a bounding box with a longest side of 2."""
        return PointCloud(_normalized(self.points), self.normals)


def compare_surfaces(
    prediction: PointCloud, truth: PointCloud, thresholds: Sequence[float]
) -> dict[str, float]:
    """Compute the metrics of two point clouds without aligning them.

    Returns:
        Metrics with the names that ``protocols.surface_metrics`` returns. "chamfer" is the mean distance to the nearest
        point, averaged over both directions; distances are not squared. The F-score is 2 P R / (P + R), where P is the
        fraction of predicted points within the threshold of the true surface, and R is the fraction of true points
        within the threshold of the prediction. "normal_consistency" is the mean absolute cosine between the normals of
        nearest points, averaged over both directions.
    """
    there, near_truth = cKDTree(truth.points).query(prediction.points)
    back, near_prediction = cKDTree(prediction.points).query(truth.points)
    metrics = {"chamfer": float(there.mean() + back.mean()) / 2}
    for threshold in thresholds:
        precision, recall = float((there <= threshold).mean()), float((back <= threshold).mean())
        f_score = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        metrics[f_score_name(threshold)] = f_score
    cosines = [
        np.abs((prediction.normals * truth.normals[near_truth]).sum(axis=1)).mean(),
        np.abs((truth.normals * prediction.normals[near_prediction]).sum(axis=1)).mean(),
    ]
    return metrics | {"normal_consistency": float(np.mean(cosines))}


def chamfer(prediction: Points, truth: Points) -> float:
    """Compute the mean distance to the nearest point, averaged over both directions. Distances are not squared."""
    there, _ = cKDTree(truth).query(prediction)
    back, _ = cKDTree(prediction).query(truth)
    return float(there.mean() + back.mean()) / 2


def align(prediction: PointCloud, truth: PointCloud) -> PointCloud:
    """Align a normalized point cloud with a reference point cloud by rotation and translation (TripoSR, section 4).

    All rotations of a grid are evaluated with 512 points of each cloud. The best eight rotations are evaluated with all
    points, and the best of these is refined with the iterative closest point method. Rotated clouds are normalized.

    Args:
        prediction: Point cloud to align.
        truth: Normalized reference point cloud.
    """
    few, true_tree = prediction.points[:_SEARCH_POINTS], cKDTree(truth.points[:_SEARCH_POINTS])
    distances = np.array([_distance(few, rotation, truth, true_tree) for rotation in rotation_grid()])
    finalists = rotation_grid()[np.argsort(distances, kind="stable")[:_FINALISTS]]
    rotated = [prediction.transformed(rotation).normalized() for rotation in finalists]
    return _iterative_closest_point(_nearest_cloud(rotated, truth), truth)


@functools.cache
def rotation_grid() -> Float[np.ndarray, "N 3 3"]:
    """Return all rotations of the rotation search, starting with the identity."""
    angles = np.stack(np.meshgrid(*(np.arange(n) * 360 / n for n in _STEPS), indexing="ij"), axis=-1).reshape(
        -1, 3
    )
    return Rotation.from_euler("zxy", angles, degrees=True).as_matrix()


def _normalized(points: Points) -> Points:
    centered = points - points.mean(axis=0)
    return centered * (2 / np.ptp(centered, axis=0).max())


def _nearest_cloud(clouds: Sequence[PointCloud], truth: PointCloud) -> PointCloud:
    """Return the point cloud with the smallest Chamfer distance to the reference, or the first one in case of a tie."""
    return min(clouds, key=lambda cloud: chamfer(cloud.points, truth.points))


def _distance(points: Points, rotation: np.ndarray, truth: PointCloud, tree: cKDTree) -> float:
    turned = _normalized(points @ rotation.T)
    there, _ = tree.query(turned)
    back, _ = cKDTree(turned).query(truth.points[:_SEARCH_POINTS])
    return float(there.mean() + back.mean())


def _iterative_closest_point(prediction: PointCloud, truth: PointCloud) -> PointCloud:
    """Refine rotation and translation with the iterative closest point method (Besl and McKay 1992).

    If the result is not closer to the reference, the input is returned.
    """
    tree, moved = cKDTree(truth.points), prediction
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
    return _nearest_cloud([prediction, moved], truth)
