"""UV unwrapping with xatlas, in a subprocess with a time limit, since xatlas can hang or crash on a bad mesh.

``python -m lrm_pl.meshing.unwrap FOLDER SIZE`` reads vertices.npy and faces.npy and writes atlas.npz.
"""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

#: Texels between charts, so that bilinear filtering of mipmaps does not mix them.
PADDING = 4


class UnwrapError(RuntimeError):
    """Unwrapping failed or timed out; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Atlas:
    """UV atlas of a mesh.

    Attributes:
        source: (N,) mesh vertex of each atlas vertex; vertices at seams are duplicated.
        faces: (M, 3) the faces, as indices of atlas vertices.
        uv: (N, 2) texture coordinates, from 0 at the left and top edge to 1 at the right and bottom.
        size: Width and height of the atlas, pixels; close to the requested size.
    """

    source: Int[np.ndarray, " N"]
    faces: Int[np.ndarray, "M 3"]
    uv: Float[np.ndarray, "N 2"]
    size: tuple[int, int]


def unwrap(
    vertices: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "M 3"], size: int, limit_s: float
) -> Atlas:
    """Compute a UV atlas of a mesh.

    Args:
        vertices: Vertex positions.
        faces: Vertex indices.
        size: Target side of the atlas, pixels.
        limit_s: Time limit, seconds.

    Raises:
        UnwrapError: xatlas failed, crashed or timed out.
    """
    with tempfile.TemporaryDirectory(prefix="lrm-unwrap-") as name:
        folder = Path(name)
        np.save(folder / "vertices.npy", vertices.astype(np.float32))
        np.save(folder / "faces.npy", faces.astype(np.uint32))
        command = [sys.executable, "-P", "-m", __name__, name, str(size)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise UnwrapError(
                f"xatlas took more than {limit_s:g} s for {len(faces)} faces. Reduce the number of faces (20,000 take "
                "seconds) or raise the time limit"
            ) from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise UnwrapError(f"xatlas failed: {lines[-1]}")
        with np.load(folder / "atlas.npz", allow_pickle=False) as atlas:
            width, height = atlas["size"].tolist()
            return Atlas(
                atlas["source"].astype(np.int64),
                atlas["faces"].astype(np.int64),
                atlas["uv"],
                (width, height),
            )


def _main(folder: Path, size: int) -> None:
    import xatlas

    atlas = xatlas.Atlas()
    atlas.add_mesh(np.load(folder / "vertices.npy"), np.load(folder / "faces.npy"))
    options = xatlas.PackOptions()
    options.resolution, options.padding, options.bilinear, options.create_image = size, PADDING, True, False
    atlas.generate(pack_options=options)
    source, faces, uv = atlas[0]
    if atlas.atlas_count != 1:
        raise SystemExit(f"the mesh needs {atlas.atlas_count} atlases of {size} x {size} pixels")
    # The packed size differs slightly from the requested one; resizing would shrink the padding.
    packed_size = np.array((atlas.width, atlas.height))
    np.savez(folder / "atlas.npz", source=source, faces=faces, uv=uv.astype(np.float32), size=packed_size)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
