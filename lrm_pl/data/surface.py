"""Points on an object's surface, with normals: the optional member ``surface.npy``, the truth that meshes are held to.

They lie in the sample's world, uniform by area over everything that was rendered, inner surfaces too; independent of
each other, so the first n of them are n such points.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from lrm_pl.data.schema import SURFACE_MEMBER, SampleError, decode_array, encode_array

#: Points of an object: twice what TripoSR's protocol asks for.
SURFACE_POINTS: Final = 20_000

#: How far a normal's length may be from 1.
_UNIT_TOLERANCE = 1e-3

#: An object lies in the unit sphere, or in the cube of its longest side.
_REACH = 1.001


def encode_surface(points: npt.NDArray[np.floating], normals: npt.NDArray[np.floating]) -> bytes:
    """Encode (``SURFACE_POINTS``, 3) points and their unit normals; equal ones give equal bytes."""
    record = np.concatenate([points, normals], axis=1).astype(np.float32)
    _check("", record)
    return encode_array(record)


def decode_surface(key: str, encoded: bytes) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Decode the surface of a sample.

    Args:
        key: The sample's key, for messages.
        encoded: The member.

    Returns:
        Points and normals, (``SURFACE_POINTS``, 3) each.

    Raises:
        SampleError: It is no such array, a point lies outside [-1, 1]^3, or a normal is not of length 1.
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
