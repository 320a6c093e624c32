"""Points and normals on the surface of an object: the optional member ``surface.npy``, ground truth for meshes.

Points are in world space, independent and uniform by area over all rendered surfaces, inner surfaces included. So any
prefix is a uniform sample too.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from lrm_pl.data.schema import SURFACE_MEMBER, SampleError, decode_array, encode_array

#: Points per object: twice the number in TripoSR's protocol.
SURFACE_POINTS: Final = 20_000

#: Tolerance of the length of normals.
_UNIT_TOLERANCE = 1e-3

#: Bound on coordinates: objects are normalized to the unit sphere or the cube [-1, 1]^3.
_REACH = 1.001


def encode_surface(points: npt.NDArray[np.floating], normals: npt.NDArray[np.floating]) -> bytes:
    """Encode (``SURFACE_POINTS``, 3) points and their unit normals; deterministic."""
    record = np.concatenate([points, normals], axis=1).astype(np.float32)
    _check("", record)
    return encode_array(record)


def decode_surface(key: str, encoded: bytes) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Decode the surface of a sample.

    Args:
        key: The sample's key, for messages.
        encoded: Content of the member.

    Returns:
        Points and normals, (``SURFACE_POINTS``, 3) each.

    Raises:
        SampleError: The array has another shape, a point is outside [-1, 1]^3, or a normal is not of unit length.
    """
    record = decode_array(key, SURFACE_MEMBER, encoded, (SURFACE_POINTS, 6))
    _check(key, record)
    return record[:, :3], record[:, 3:]


def _check(key: str, record: npt.NDArray[np.float32]) -> None:
    if record.shape != (SURFACE_POINTS, 6):
        raise SampleError(expected=f"{SURFACE_POINTS} points and normals", found=record.shape)
    reach = np.abs(record[:, :3]).max()
    length = np.linalg.norm(record[:, 3:], axis=1)
    if not reach <= _REACH:
        raise SampleError(
            subject=f"sample {key!r}",
            expected=f"the points of {SURFACE_MEMBER} within [-1, 1]^3",
            found=f"{reach:.3g}",
        )
    if not (np.abs(length - 1) <= _UNIT_TOLERANCE).all():
        raise SampleError(
            subject=f"sample {key!r}",
            expected=f"normals of length 1 in {SURFACE_MEMBER}",
            found=f"lengths from {length.min():.3g} to {length.max():.3g}",
        )
