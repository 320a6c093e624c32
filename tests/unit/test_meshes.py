"""Tests of the simplification, texturing and export of meshes."""

import dataclasses
import functools
import io
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import trimesh
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from lrm_pl.color_spaces import srgb_to_linear
from lrm_pl.meshing import unwrap as unwrap_file
from lrm_pl.meshing.export import encode_mesh
from lrm_pl.meshing.glb import encode_glb
from lrm_pl.meshing.mesh import Mesh, decimate, remove_floaters, vertex_normals
from lrm_pl.meshing.texture import bake_texture, texel_points
from lrm_pl.meshing.unwrap import PADDING, Atlas, UnwrapError, unwrap
from tests.builders import BALLS, is_closed, lumps, volume


def by_place(points):
    """Return a color for each position, with a gradient along x that 8 bits resolve."""
    return np.clip((points + 1) / 2, 0, 1).astype(np.float32)


@functools.cache
def ball(most=1500):
    vertices, faces = decimate(*remove_floaters(*lumps(), 0.5), most)
    return Mesh(vertices, faces, by_place(vertices))


@functools.cache
def textured_ball(size):
    return bake_texture(ball(), by_place, size)


def test_components_below_a_fraction_of_the_largest_area_are_removed():
    vertices, faces = lumps()
    share = (BALLS[1][1] / BALLS[0][1]) ** 2  # 1/16
    kept = remove_floaters(vertices, faces, share * 0.8)
    assert len(kept[1]) == len(faces)
    large, ball_faces = remove_floaters(vertices, faces, share * 1.2)
    assert np.linalg.norm(large, axis=1).max() < 0.61
    assert len(ball_faces) < len(faces)
    assert is_closed(Mesh(large, ball_faces, large))
    assert volume(Mesh(large, ball_faces, large)) == pytest.approx(4 / 3 * np.pi * 0.6**3, rel=0.01)


def test_a_decimated_ball_is_closed_and_keeps_its_volume():
    mesh = ball(1500)
    assert 1000 < len(mesh.faces) <= 1500
    assert is_closed(mesh)
    assert volume(mesh) == pytest.approx(4 / 3 * np.pi * 0.6**3, rel=0.01)
    vertices, faces = lumps(16)
    assert decimate(vertices, faces, len(faces))[1] is faces, "an unchanged mesh"


def test_vertex_normals_of_a_ball_are_radial():
    mesh = ball()
    normals = vertex_normals(mesh.vertices, mesh.faces)
    radial = mesh.vertices / np.linalg.norm(mesh.vertices, axis=1, keepdims=True)
    assert (normals * radial).sum(axis=1).min() > 0.98
    flat = vertex_normals(np.zeros((3, 3), np.float32), np.array([[0, 1, 2]]))
    np.testing.assert_array_equal(flat, np.tile((0, 0, 1), (3, 1)))


def test_texel_points_equal_values_computed_by_hand():
    # one triangle that fills half of an image of 4 x 4; the middle of a texel is at (column + .5) / 4, (row + .5) / 4
    uv = np.array([(0, 0), (1, 0), (0, 1)], dtype=np.float32)
    vertices = np.array([(0, 0, 5), (1, 0, 5), (0, 2, 5)], dtype=np.float32)
    places, covered = texel_points(vertices, Atlas(np.arange(3), np.array([[0, 1, 2]]), uv, (4, 4)))
    row, column = np.nonzero(covered)
    assert set(zip(row.tolist(), column.tolist(), strict=True)) == {
        (r, c) for r in range(4) for c in range(4 - r)
    }
    expected = np.stack([(column + 0.5) / 4, (row + 0.5) / 4 * 2, np.full(len(row), 5)], axis=1)
    np.testing.assert_allclose(places[covered], expected, atol=1e-6)


def test_charts_of_a_texture_are_separated_by_the_padding():
    mesh = ball()
    atlas = unwrap(mesh.vertices, mesh.faces, 256, 60.0)
    assert all(200 < side < 400 for side in atlas.size)  # approximately the requested size
    _, covered = texel_points(mesh.vertices[atlas.source], atlas)
    edges = np.concatenate([atlas.faces[:, [0, 1]], atlas.faces[:, [1, 2]]])
    joined = coo_array((np.ones(len(edges)), edges.T), shape=(len(atlas.uv),) * 2)
    charts, chart = connected_components(joined, directed=False)
    assert charts > 1
    texels = []
    for number in range(charts):
        of_it = dataclasses.replace(atlas, faces=atlas.faces[chart[atlas.faces[:, 0]] == number])
        texels.append(np.argwhere(texel_points(mesh.vertices[atlas.source], of_it)[1]))
    assert sum(map(len, texels)) == covered.sum()
    for number, places in enumerate(texels):
        others = cKDTree(np.concatenate([places for other, places in enumerate(texels) if other != number]))
        assert others.query(places)[0].min() >= PADDING - 1


def test_a_baked_texture_has_the_colors_of_the_surface_points():
    mesh = textured_ball(256)
    rng = np.random.default_rng(0)
    face = rng.integers(len(mesh.faces), size=4000)
    weights = rng.dirichlet((1, 1, 1), size=4000)
    corners = mesh.faces[face]
    places = (mesh.vertices[corners] * weights[:, :, None]).sum(axis=1)
    uv = (mesh.texture.uv[corners] * weights[:, :, None]).sum(axis=1)
    height, width = mesh.texture.image.shape[:2]
    column, row = np.floor(uv * (width, height)).astype(int).T
    seen = mesh.texture.image[row, column] / 255
    # a texel is about 0.01 wide, and its color changes by half of that
    assert np.abs(seen - by_place(places)).max() < 0.03
    assert volume(mesh) == pytest.approx(volume(ball()), rel=1e-5)


def test_vertex_normals_are_smooth_across_texture_seams():
    plain, mesh = ball(), textured_ball(256)
    assert len(mesh.vertices) > len(plain.vertices)
    normals = vertex_normals(mesh.vertices, mesh.faces)
    expected = dict(zip(map(bytes, plain.vertices), vertex_normals(plain.vertices, plain.faces), strict=True))
    np.testing.assert_allclose(normals, [expected[bytes(place)] for place in mesh.vertices], atol=1e-5)


def test_unwrapping_errors_and_timeouts_are_reported():
    vertices, faces = lumps()
    with pytest.raises(UnwrapError, match=f"took more than 0.01 s for {len(faces)} faces"):
        unwrap(vertices, faces, 256, 0.01)
    done = subprocess.run(
        [sys.executable, "-m", unwrap_file.__name__, "/nowhere", "64"], capture_output=True, check=False
    )
    assert done.returncode
    with pytest.raises(UnwrapError, match="xatlas failed: "):
        unwrap(vertices, np.full((1, 3), 10**6), 256, 60.0)


def _parts(glb):
    """Split a GLB into its JSON and its binary part."""
    magic, version, length = struct.unpack_from("<4sII", glb)
    assert (magic, version, length) == (b"glTF", 2, len(glb))
    size, kind = struct.unpack_from("<I4s", glb, 12)
    assert kind == b"JSON"
    return json.loads(glb[20 : 20 + size]), glb[28 + size :]


def test_a_glb_file_has_16_bit_linear_colors_y_up_and_a_matte_material():
    vertices = np.array(
        [(0, 0, 0), (1, 0, 0), (0, 0, 1)], dtype=np.float32
    )  # in the plane that faces the camera
    mesh = Mesh(vertices, np.array([[0, 1, 2]]), np.array([(0.5, 0, 1)] * 3, dtype=np.float32))
    record, data = _parts(encode_glb(mesh))
    assert record["materials"][0]["pbrMetallicRoughness"] == {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    attributes = record["meshes"][0]["primitives"][0]["attributes"]

    def values(name, dtype, width):
        view = record["bufferViews"][record["accessors"][attributes[name]]["bufferView"]]
        return np.frombuffer(data, dtype, 3 * width, view["byteOffset"]).reshape(3, width)

    np.testing.assert_array_equal(values("POSITION", "<f4", 3), [(0, 0, 0), (1, 0, 0), (0, 1, 0)])
    np.testing.assert_array_equal(values("NORMAL", "<f4", 3), [(0, 0, 1)] * 3)  # toward the viewer
    # sRGB 0.5 is 0.2140 of the light
    np.testing.assert_array_equal(
        values("COLOR_0", "<u2", 4), [(round(0.21404114 * 65535), 0, 65535, 65535)] * 3
    )
    np.testing.assert_allclose(srgb_to_linear(np.array([0.04, 1.0])), (0.04 / 12.92, 1.0))


@pytest.mark.parametrize("is_textured", [False, True], ids=["colors", "texture"])
@pytest.mark.parametrize("kind", ["glb", "obj", "ply", "stl"])
def test_trimesh_loads_all_formats_with_shape_colors_and_orientation(kind, is_textured, tmp_path):
    mesh = textured_ball(128) if is_textured else ball()
    files = encode_mesh(mesh, kind, "thing")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = trimesh.load(tmp_path / f"thing.{kind}", process=False)
    if kind == "glb":
        (found,) = found.geometry.values()
    assert len(found.faces) == len(mesh.faces)
    if kind == "stl":  # lengths in STL files are millimeters
        found.apply_scale(1 / 50)
    assert found.volume == pytest.approx(volume(mesh), rel=1e-4)
    vertices = (
        np.asarray(found.vertices)[:, [0, 2, 1]] * (1, -1, 1) if kind in ("glb", "obj") else found.vertices
    )
    if kind == "stl":  # STL files have separate vertices for each face
        np.testing.assert_allclose(
            np.sort(vertices, axis=0)[[0, -1]], np.sort(mesh.vertices, axis=0)[[0, -1]], atol=1e-6
        )
        return
    np.testing.assert_allclose(vertices, mesh.vertices, atol=1e-6)
    if is_textured and kind != "ply":
        image = np.asarray(
            (
                found.visual.material.baseColorTexture if kind == "glb" else found.visual.material.image
            ).convert("RGB")
        )
        np.testing.assert_array_equal(image, mesh.texture.image)
        up = np.stack([mesh.texture.uv[:, 0], 1 - mesh.texture.uv[:, 1]], axis=1)
        np.testing.assert_allclose(found.visual.uv, up, atol=1e-6)
    else:
        colors = (
            found.visual.vertex_attributes["color"][:, :3] / 65535
            if kind == "glb"
            else found.visual.vertex_colors[:, :3] / 255
        )
        expected = srgb_to_linear(mesh.colors) if kind == "glb" else mesh.colors
        np.testing.assert_allclose(colors, expected, atol=0.6 / 255)


def test_equal_meshes_are_encoded_as_equal_bytes():
    mesh = textured_ball(128)
    for kind in ("glb", "obj", "ply", "stl"):
        assert encode_mesh(mesh, kind) == encode_mesh(mesh, kind)
    image = Image.open(io.BytesIO(encode_mesh(mesh, "obj")["mesh.png"]))
    np.testing.assert_array_equal(np.asarray(image), mesh.texture.image)
