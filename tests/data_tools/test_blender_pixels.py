"""Real renders of known meshes, read back from their shards: cameras, colors, bad assets."""

import itertools

import numpy as np
import pytest

from tests.builders import box, write_gltf
from tests.data_tools.blender_renders import render_views

pytestmark = pytest.mark.blender

RESOLUTION = 256
PLANE_SRGB = (200, 100, 50)

#: The cube's corners lie at +-CORNER, each marked by a small box of half side MARK in a color of its own.
CORNER, MARK = 1.0, 0.04
SIGNS = np.array(list(itertools.product((-1, 1), repeat=3)))
COLORS = np.where(SIGNS > 0, 0.9, 0.1)


def write_ply(path, vertices, faces, color):
    """Write a PLY whose vertices share one 8-bit color, as in scans."""
    lines = ["ply", "format ascii 1.0", f"element vertex {len(vertices)}"]
    lines += [f"property float {name}" for name in "xyz"]
    lines += [f"property uchar {name}" for name in ("red", "green", "blue")]
    lines += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    lines += [" ".join(map(str, [*vertex, *color])) for vertex in vertices]
    lines += [" ".join(map(str, [len(face), *face])) for face in faces]
    path.write_text("\n".join(lines) + "\n")


def write_bad_assets(folder):
    """Write assets that cannot be rendered, next to the good ones."""
    (folder / "garbage.glb").write_bytes(b"glTF" + bytes(range(200)))
    (folder / "empty.obj").write_text("# nothing\nv 0 0 0\nv 1 0 0\nv 0 1 0\n")
    (folder / "untextured.mtl").write_text("newmtl m\nKd 1 1 1\nmap_Kd absent.png\n")
    (folder / "untextured.obj").write_text(
        "mtllib untextured.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nusemtl m\nf 1/1 2/1 3/1\n"
    )
    write_gltf(folder / "invisible.gltf", [(*box((0, 0, 0), (1, 1, 1)), (1, 1, 1), 0.0)])


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    assets = tmp_path_factory.mktemp("known")
    plane, _ = box((0, 0, 0), (1, 1, 0))
    color = np.array(PLANE_SRGB) / 255
    write_gltf(assets / "plane.gltf", [(plane[[0, 2, 6, 4]], [(0, 1, 2), (0, 2, 3)], color, 1.0)])
    write_ply(assets / "scan.ply", plane[[0, 2, 6, 4]], [(0, 1, 2, 3)], PLANE_SRGB)
    marks = [(*box(CORNER * sign, [MARK] * 3), color, 1.0) for sign, color in zip(SIGNS, COLORS, strict=True)]
    # away from the origin and large: normalizing must bring it back
    write_gltf(assets / "corners.gltf", [(5 * v + (7, -3, 2), t, c, a) for v, t, c, a in marks])
    write_bad_assets(assets)
    return render_views(assets, views=6, resolution=RESOLUTION, samples=16)


@pytest.fixture
def read(rendered):
    """Return a function that returns the sample of an object and the views (V, H, W, 4) in [0, 1]."""
    samples, views, _ = rendered
    return lambda key: (samples[key], views[key] / 255)


def project(points, c2w, fxfycxcy):
    """Project (n, 3) world points to (n, 2) pixels (x, y); pixel (row i, column j) has its center at +0.5."""
    camera = (points - c2w[:3, 3]) @ c2w[:3, :3]
    assert (camera[:, 2] > 0).all()
    return (camera[:, :2] / camera[:, 2:] * fxfycxcy[:2] + fxfycxcy[2:]) * RESOLUTION


def find_marks(rgba):
    """Find the colored marks: sign index -> (x, y) of its center of mass."""
    rows, columns = np.mgrid[:RESOLUTION, :RESOLUTION] + 0.5
    nearest = np.abs(rgba[..., None, :3] - COLORS).max(-1).argmin(-1)
    found = {}
    for corner in range(8):
        weight = rgba[..., 3] * (nearest == corner)
        if weight.sum() > 4:
            found[corner] = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
    return found


def test_projected_corners_of_a_cube_match_the_rendered_positions(read):
    sample, views = read("corners")
    radius = np.sqrt(3) * (CORNER + MARK)  # of the bounding sphere, which rendering made 1
    corners = CORNER * SIGNS / radius
    errors = []
    for c2w, fxfycxcy, rgba in zip(sample.c2w, sample.fxfycxcy, views, strict=True):
        expected, found = (
            project(corners, c2w.astype(np.float64), fxfycxcy.astype(np.float64)),
            find_marks(rgba),
        )
        for corner, place in found.items():
            others = np.delete(expected, corner, axis=0)
            if np.linalg.norm(others - expected[corner], axis=1).min() > 20:  # pixels: no other mark hides it
                errors.append(np.abs(place - expected[corner]).max())
    assert len(errors) > 30
    assert max(errors) < 0.25  # half a pixel is the promise; a shift by half a pixel must not slip through


@pytest.mark.parametrize("key", ["plane", "scan"])
def test_a_matte_plane_keeps_its_srgb_color(read, key):
    sample, views = read(key)
    seen = 0
    for c2w, rgba in zip(sample.c2w, views, strict=True):
        inside = rgba[..., 3] == 1
        for axis, shift in itertools.product((0, 1), (-2, 2)):
            inside &= np.roll(inside, shift, axis)
        if inside.sum() < 100:  # seen almost from its edge
            continue
        seen += 1
        found = rgba[inside][:, :3] * 255
        assert np.abs(found - PLANE_SRGB).max() <= 2, (c2w, found.min(0), found.max(0))
    assert seen >= 3


def test_invalid_assets_fail_with_a_reason(rendered):
    samples, _, rows = rendered
    assert rows["garbage"]["reason"].startswith("expected glTF 2.0, but found version ")
    for key in ("empty", "invisible"):
        assert rows[key]["reason"] == "expected mesh faces, but found none"
    assert rows["untextured"]["reason"] == "missing_textures 1, expected <= 0"
    assert samples.keys() == {"plane", "scan", "corners", "untextured"}
