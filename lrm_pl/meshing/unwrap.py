"""Lay a surface out flat with xatlas, in a process of its own: it may take for ever on a bad mesh, or crash.

python -m lrm_pl.meshing.unwrap FOLDER SIZE     reads vertices.npy and faces.npy, writes atlas.npz
"""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

#: Texels between two charts: bilinear filtering of the smaller images that viewers make must not mix them.
PADDING = 4


class UnwrapError(RuntimeError):
    """A surface could not be laid out; the message is the reason, in one line."""


@dataclasses.dataclass(frozen=True)
class Atlas:
    """A surface laid out flat.

    Attributes:
        source: (N,) which vertex of the surface each vertex of the atlas is; those at seams are there several times.
        faces: (M, 3) the same faces, in numbers of the atlas' vertices.
        uv: (N, 2) place of each vertex, from the left and top edge (0) to the right and bottom one (1).
        size: Width and height of the image that it is laid out in, pixels: about what was asked for.
    """

    source: Int[np.ndarray, " N"]
    faces: Int[np.ndarray, "M 3"]
    uv: Float[np.ndarray, "N 2"]
    size: tuple[int, int]


def unwrap(
    vertices: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "M 3"], size: int, limit_s: float
) -> Atlas:
    """Lay a surface out.

    Args:
        vertices: Places.
        faces: Numbers of vertices.
        size: Side of the image that it is laid out for, pixels.
        limit_s: Seconds that it may take.

    Raises:
        UnwrapError: It takes longer, or xatlas gives up or crashes.
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
                f"xatlas took more than {limit_s:g} s for {len(faces)} faces; make fewer (20,000 take seconds) or wait "
                "longer"
            ) from error
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
            raise UnwrapError(f"xatlas failed: {said[0]}")
        with np.load(folder / "atlas.npz", allow_pickle=False) as found:
            width, height = found["size"].tolist()
            return Atlas(
                found["source"].astype(np.int64),
                found["faces"].astype(np.int64),
                found["uv"],
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
        raise SystemExit(f"it needs {atlas.atlas_count} images of {size} x {size} pixels")
    # xatlas may need a little more or less than asked for; in another size, the space between charts would shrink
    size_found = np.array((atlas.width, atlas.height))
    np.savez(folder / "atlas.npz", source=source, faces=faces, uv=uv.astype(np.float32), size=size_found)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
