"""Points and normals on the surface of an object, stored in the optional member ``surface.npy``.

They are the ground truth for the evaluation of meshes. The points are in world space and are drawn independently and
uniformly by area from all rendered surfaces, including inner surfaces. Any prefix is therefore also a uniform sample.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from lrm_pl.data.schema import SURFACE_MEMBER, SampleError, decode_array, encode_array, sample_subject

#: Number of points per object, twice the number in the evaluation protocol of TripoSR.
SURFACE_POINTS: Final = 20_000

#: Tolerance of the length of normals.
_UNIT_TOLERANCE = 1e-3

#: Maximum absolute value of coordinates, because objects are normalized to the unit sphere or to [-1, 1]^3.
_REACH = 1.001


def encode_surface(points: npt.NDArray[np.floating], normals: npt.NDArray[np.floating]) -> bytes:
    """Encode (``SURFACE_POINTS``, 3) points and their unit normals deterministically.

    Raises:
        SampleError: The number of points is unexpected, a point is outside [-1, 1]^3, or a normal does not have length
            1.
    """
    encoded = encode_array(np.concatenate([points, normals], axis=1).astype(np.float32))
    decode_surface("", encoded)  # validates the points and normals
    return encoded


def decode_surface(key: str, encoded: bytes) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Decode the surface of a sample.

    Args:
        key: Key of the sample for error messages.
        encoded: Content of the member.

    Returns:
        (``SURFACE_POINTS``, 3) points and (``SURFACE_POINTS``, 3) normals.

    Raises:
        SampleError: The array has an unexpected shape, a point is outside [-1, 1]^3, or a normal does not have length
            1.
    """
    record = decode_array(key, SURFACE_MEMBER, encoded, (SURFACE_POINTS, 6))
    reach = np.abs(record[:, :3]).max()
    length = np.linalg.norm(record[:, 3:], axis=1)
    with sample_subject(key):
        if not reach <= _REACH:
            raise SampleError(
                f"the points of {SURFACE_MEMBER} within [-1, 1]^3", f"a coordinate of magnitude {reach:.3g}"
            )
        if not (np.abs(length - 1) <= _UNIT_TOLERANCE).all():
            found = f"lengths from {length.min():.3g} to {length.max():.3g}"
            raise SampleError(f"normals of length 1 in {SURFACE_MEMBER}", found)
    return record[:, :3], record[:, 3:]
