"""UV unwrapping with xatlas, in a subprocess with a time limit because xatlas can hang or crash on degenerate meshes.

``python -m lrm_pl.meshing.unwrap FOLDER SIZE`` reads vertices.npy and faces.npy in FOLDER, and writes atlas.npz.
"""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

#: Number of texels between charts, so that bilinear filtering of mipmaps does not mix charts.
PADDING = 4


class UnwrapError(RuntimeError):
    """Error raised if unwrapping fails or times out. The message is a single line."""


@dataclasses.dataclass(frozen=True)
class Atlas:
    """UV atlas of a mesh.

    Attributes:
        source: Index of the original vertex for each atlas vertex, of shape (N,). Vertices at seams are duplicated.
        faces: Faces as indices of atlas vertices, of shape (M, 3).
        uv: Texture coordinates of shape (N, 2). They range from 0 at the left and top edges to 1 at the right and
            bottom edges.
        size: Width and height of the atlas in pixels, which may differ from the requested size.
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
        size: Target side length of the atlas in pixels.
        limit_s: Time limit in seconds.

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
                f"xatlas took more than {limit_s:g} s for {len(faces)} faces. Reduce the number of faces (20,000 "
                "faces require a few seconds), or increase the time limit"
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
    # The packed size differs slightly from the requested size. Resizing the atlas would shrink the padding.
    packed_size = np.array((atlas.width, atlas.height))
    np.savez(folder / "atlas.npz", source=source, faces=faces, uv=uv.astype(np.float32), size=packed_size)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
