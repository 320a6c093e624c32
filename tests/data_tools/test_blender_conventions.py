"""Corrections of materials: one object per row of the table in ``data_tools/blender/README.md``."""

import base64
import json

import numpy as np
import pytest
from PIL import Image

from tests.builders import write_gltf
from tests.data_tools.blender_renders import render_views
from tests.data_tools.mesh_files import (
    BLUE_PART,
    RED_PART,
    TRIANGLES,
    VERTICES,
    glb,
    write_obj,
    write_ply,
    write_scene,
)

pytestmark = pytest.mark.blender

RED, RED_SRGB = "0.588 0.1 0.1", (150, 26, 26)


def write_partly_colored(folder):
    """Write objects of two cubes with one material; only the first cube has (red) vertex colors."""
    lines = ["mtllib kd_one.mtl"]
    for part, (x, color) in enumerate(((0, "1 0 0"), (6, ""))):
        lines += [f"o part{part}", *(f"v {a + x} {b} {c} {color}" for a, b, c in VERTICES), "usemtl m"]
        lines += [f"f {a + 8 * part + 1} {b + 8 * part + 1} {c + 8 * part + 1}" for a, b, c in TRIANGLES]
    (folder / "partly.obj").write_text("\n".join(lines) + "\n")
    (folder / "kd_one.mtl").write_text("newmtl m\nKd 1 1 1\nKs 0 0 0\n")
    gray = (VERTICES + np.array([6, 0, 0]), TRIANGLES, (0.5, 0.5, 0.5), 1.0)
    write_gltf(folder / "partly_gltf.gltf", [(VERTICES, TRIANGLES, (1, 1, 1), 1.0), gray])
    record = json.loads((folder / "partly_gltf.gltf").read_text())
    colors = np.tile([1, 0, 0], (8, 1)).astype("<f4").tobytes()
    uri = "data:application/octet-stream;base64," + base64.b64encode(colors).decode()
    record["buffers"].append({"byteLength": len(colors), "uri": uri})
    record["bufferViews"].append({"buffer": 1, "byteLength": len(colors)})
    view = {"bufferView": len(record["bufferViews"]) - 1, "componentType": 5126, "type": "VEC3", "count": 8}
    record["accessors"].append(view)
    record["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"] = len(record["accessors"]) - 1
    (folder / "partly_gltf.gltf").write_text(json.dumps(record))


VEIL = (VERTICES, TRIANGLES, (1, 0, 0), 0.5)


def write_scenes(folder):
    """Write objects of several parts; return id -> visible colors, longest side, and ``doubled``."""
    red, blue = (255, 0, 0), (0, 0, 255)
    aside = [{"mesh": 0}, {"mesh": 1, "translation": [6, 0, 0]}, {"mesh": 1}]
    write_scene(folder / "instances.gltf", [RED_PART, BLUE_PART], aside)
    write_scene(folder / "same_mesh.gltf", [RED_PART], [{"mesh": 0}, {"mesh": 0}])
    named = [
        {"mesh": 0, "name": "a_low"},
        {"mesh": 1, "name": "b_high"},
        {"mesh": 2, "translation": [0, 3, 0]},
    ]
    write_scene(folder / "two_scenes.gltf", [RED_PART, BLUE_PART, BLUE_PART], named, scenes=[[0], [1, 2]])
    record = json.loads((folder / "two_scenes.gltf").read_text())
    record["images"], record["textures"] = (
        [{"uri": "not_there.png"}],
        [{"source": 0}],
    )  # only in the other scene
    record["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"] = {"index": 0}
    (folder / "two_scenes.gltf").write_text(json.dumps(record))
    white = (VERTICES, TRIANGLES, (1, 1, 1), 1.0)
    over = [{"mesh": 0, "name": "a_veil"}, {"mesh": 1, "name": "b_base"}]
    write_scene(folder / "overlay.gltf", [VEIL, white], over, one_sided=(0, 1))
    card, back = (VERTICES, TRIANGLES[:2], (1, 0, 0), 1.0), (VERTICES, TRIANGLES[:2, ::-1], (1, 0, 0), 1.0)
    write_scene(folder / "two_sides.gltf", [card, back], [{"mesh": 0}, {"mesh": 1}], one_sided=(0, 1))
    unseen = {"extensions": {"KHR_node_visibility": {"visible": False}}, "children": [2]}
    nodes = [{"mesh": 0}, unseen, {"mesh": 1, "translation": [0, 6, 0]}]
    write_scene(folder / "unseen.gltf", [RED_PART, BLUE_PART], nodes, scenes=[[0, 1]])
    write_partly_colored(folder)
    return {
        "partly": ({red, (255, 255, 255)}, 8.0, 0.0),
        "partly_gltf": ({red, (128, 128, 128)}, 8.0, 0.0),
        "unseen": ({red}, 2.0, 0.0),
        "instances": ({red, blue}, 8.0, 1 / 3),
        "same_mesh": ({red}, 2.0, 0.5),
        "two_scenes": ({blue}, 5.0, 0.0),
        "overlay": ({(255, 188, 188)}, 2.0, 0.0),  # half of linear white through half of red
        "two_sides": ({red}, 2.0, 0.0),
    }


def write_assets(folder):
    """Write the objects; return id -> expected color."""
    plain = f"newmtl m\nKd {RED}\n"
    Image.new("RGB", (8, 8), (30, 160, 90)).save(folder / "green.png")
    Image.new("P", (64, 64), 0).save(folder / "green.gif")
    with Image.open(folder / "green.gif") as image:
        image.putpalette([30, 160, 90] * 256)
        image.save(folder / "green.gif")
    write_obj(folder, "kd", plain)
    write_obj(folder, "kd_of_blender", f"# Blender 4.2.0 MTL File: 'None'\n{plain}")
    write_obj(folder, "tf", f"{plain}Tf 1.0 1.0 1.0\nKs 0 0 0\nillum 2\nd 1.0\nTr 0.0\n")
    write_obj(folder, "kd_scientific", "newmtl m\nKd 5.880000e-01 1.0E-1 +.1 # red\n")
    write_obj(folder, "kd_single", "newmtl m\nKd 0.588\n")
    write_obj(folder, "own_name", plain, library="not_there.mtl")
    write_obj(folder, "quoted", library='"my library.mtl"')
    (folder / "my library.mtl").write_text(plain)
    write_obj(folder, "several", library="kd.mtl first.mtl second.mtl")
    (folder / "first.mtl").write_text("newmtl other\nKd 0 0 1\n")
    (folder / "second.mtl").write_text("newmtl m\nKd 0.1176 0.6275 0.3529\n")
    write_obj(folder, "left_over", "newmtl m\nKd 0 0 1\n", library="kd.mtl")
    write_obj(folder, "latin", plain)
    for file in (folder / "latin.obj", folder / "latin.mtl"):
        text = (
            file.read_text().replace("usemtl m", "usemtl Gr\u00fcn").replace("newmtl m", "newmtl Gr\u00fcn")
        )
        file.write_bytes(b"\xef\xbb\xbf" * (file.suffix == ".mtl") + text.encode("latin-1"))
    write_obj(folder, "inside_out", plain)
    lines = (folder / "inside_out.obj").read_text().split("\nf ")
    corners = VERTICES[TRIANGLES]
    inwards = np.cross(corners[:, 2] - corners[:, 0], corners[:, 1] - corners[:, 0])
    normals = [f"vn {x:g} {y:g} {z:g}" for x, y, z in inwards / 4]
    faces = [line.replace("/1", f"/1/{number + 1}") for number, line in enumerate(lines[1:])]
    (folder / "inside_out.obj").write_text("\n".join([lines[0], *normals]) + "\nf " + "\nf ".join(faces))
    write_obj(folder, "ambient", "newmtl m\nKd 0.8 0.8 0.8\nmap_Ka green.png\n")
    write_obj(folder, "movie", "newmtl m\nKd 1 1 1\nmap_Kd green.gif\n")
    write_obj(folder, "colors", "newmtl m\nKd 0.8 0.8 0.8\n", color="0.1176 0.6275 0.3529")
    both = np.concatenate([TRIANGLES, TRIANGLES[:, ::-1] + 8])
    write_obj(folder, "twice", plain, triangles=both, vertices=np.concatenate([VERTICES, VERTICES]))
    write_ply(folder / "diffuse.ply", ("diffuse_red", "diffuse_green", "diffuse_blue"))
    write_ply(folder / "letters.ply", ("r", "g", "b"))
    text = (folder / "letters.ply").read_text()
    (folder / "numbers.ply").write_text(text.replace("property uchar", "property int"))
    write_ply(folder / "returns.ply", ("red", "green", "blue"), end="\r")
    write_ply(folder / "face_colors.ply", ("red", "green", "blue"), of="face")
    text = (
        (folder / "letters.ply")
        .read_text()
        .replace("uchar r\n", "float u\n")
        .replace("uchar g\n", "float v\n")
    )
    text = text.replace("property uchar b\n", "").replace(" 30 160 90", " 0.5 0.5")
    (folder / "image.ply").write_text(text.replace("1.0\n", "1.0\ncomment TextureFile green.png\n", 1))
    by_faces = (folder / "face_colors.ply").read_text().split("property uchar red")[0]
    by_faces = by_faces.replace("1.0\n", "1.0\ncomment TextureFile green.png\n", 1)
    by_faces += "property list uchar float texcoord\nend_header\n"
    by_faces += "".join(f"{x} {y} {z}\n" for x, y, z in VERTICES)
    by_faces += "".join(f"3 {a} {b} {c} 6 0 0 1 0 1 1\n" for a, b, c in TRIANGLES)
    (folder / "image_by_faces.ply").write_text(by_faces)
    inside, outside = (
        (VERTICES, TRIANGLES, (0.588, 0.1, 0.1), 1.0),
        (1.03 * VERTICES, TRIANGLES[:, ::-1], (0, 0, 0), 1),
    )
    write_gltf(folder / "outline.gltf", [inside, outside])
    record = json.loads((folder / "outline.gltf").read_text())
    for material in record["materials"]:
        material["doubleSided"] = False
    (folder / "outline.gltf").write_text(json.dumps(record))
    write_gltf(folder / "own.gltf", [(VERTICES, TRIANGLES, (0.588, 0.1, 0.1), 1.0)])
    record = json.loads((folder / "own.gltf").read_text())
    record["accessors"].append(
        {"bufferView": 0, "componentType": 5126, "type": "SCALAR", "count": len(VERTICES)}
    )
    attributes = record["meshes"][0]["primitives"][0]["attributes"]
    attributes |= {f"_{letter}": attributes["POSITION"] for letter in "ACEG"} | dict.fromkeys(
        ["_B", "_D", "_F"], 2
    )
    (folder / "own.gltf").write_text(json.dumps(record))
    (folder / "own_binary.glb").write_bytes(glb(record))
    write_obj(folder, "no_mtl")
    green = (30, 160, 90)
    return {
        "kd": RED_SRGB, "kd_scientific": RED_SRGB, "kd_single": (150, 150, 150), "own_name": RED_SRGB,
        "quoted": RED_SRGB, "several": green, "left_over": RED_SRGB, "inside_out": RED_SRGB, "latin": RED_SRGB,
        "kd_of_blender": (202, 89, 89), "tf": RED_SRGB, "ambient": green, "movie": green,
        "colors": green, "twice": RED_SRGB, "diffuse": green, "letters": green, "returns": green, "image": green,
        "face_colors": green, "image_by_faces": green, "numbers": green,
        "outline": RED_SRGB,
        "own": RED_SRGB, "own_binary": RED_SRGB,
    }  # fmt: skip


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Render all objects; return id -> measures, id -> views, expected colors, and expected scenes."""
    folder = tmp_path_factory.mktemp("conventions")
    (folder / "assets").mkdir()
    expected = write_assets(folder / "assets"), write_scenes(folder / "assets")
    write_scene(folder / "assets" / "veil.gltf", [VEIL], [{"mesh": 0}], one_sided=(0,))
    write_gltf(folder / "assets" / "no_image.gltf", [(VERTICES, TRIANGLES, (1, 1, 1), 1.0)])
    record = json.loads((folder / "assets" / "no_image.gltf").read_text())
    record["images"], record["textures"] = [{"uri": "data:,nothing"}], [{"source": 0}]
    record["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"] = {"index": 0}
    (folder / "assets" / "no_image.gltf").write_text(json.dumps(record))
    half = (VERTICES, TRIANGLES[:6], (1, 0, 0), 1.0)
    write_gltf(folder / "assets" / "two_sided.gltf", [half])
    record = json.loads((folder / "assets" / "two_sided.gltf").read_text())
    record["materials"][0]["doubleSided"] = False
    (folder / "assets" / "one_sided.gltf").write_text(json.dumps(record))
    # of these shells only the far sides are seen
    core, shell = (
        (VERTICES, TRIANGLES, (0.588, 0.1, 0.1), 1.0),
        (VERTICES, TRIANGLES[:, ::-1], (0, 0, 0), 1.0),
    )
    nodes = [{"mesh": 0}, *({"mesh": 1, "scale": [1.1 + 0.02 * number] * 3} for number in range(20))]
    write_scene(folder / "assets" / "shells.gltf", [core, shell], nodes, one_sided=(0, 1))
    nodes = [{"mesh": 0, "scale": [0.5] * 3}, {"mesh": 1}]
    write_scene(folder / "assets" / "glass.gltf", [RED_PART, (VERTICES, TRIANGLES, (1, 1, 1), 1.0)], nodes)
    record = json.loads((folder / "assets" / "glass.gltf").read_text())
    record["materials"][1]["pbrMetallicRoughness"]["roughnessFactor"] = 0.0
    record["materials"][1]["extensions"] = {"KHR_materials_transmission": {"transmissionFactor": 1.0}}
    record["extensionsUsed"] = ["KHR_materials_transmission"]
    (folder / "assets" / "glass.gltf").write_text(json.dumps(record))
    _, views, rows = render_views(folder / "assets", views=2, resolution=64, samples=8)
    return rows, views, *expected


def test_each_object_has_the_color_in_the_file(rendered):
    _, found, expected, _ = rendered
    for key, color in expected.items():
        inside = found[key][:, 24:40, 24:40].reshape(-1, 4)
        assert (inside[:, 3] == 255).all(), f"{key} is not solid"
        np.testing.assert_allclose(np.median(inside[:, :3], axis=0), color, atol=4, err_msg=key)
        assert inside[:, :3].std(axis=0).max() < 8, f"{key} is speckled"


def test_each_part_of_a_scene_has_the_expected_position_and_color(rendered):
    rows, found, _, scenes = rendered
    for key, (colors, size, doubled) in scenes.items():
        assert rows[key]["size"] == pytest.approx(size, rel=1e-3), key
        assert rows[key]["doubled"] == pytest.approx(doubled), key
        seen = found[key][found[key][..., 3] == 255][:, :3].astype(int)
        far = np.stack([np.abs(seen - color).max(axis=1) for color in colors])
        assert (far.min(axis=0) < 60).mean() > 0.9, f"{key} has other colors"
        assert (found[key][..., 3] == 255).any(axis=(1, 2)).all(), f"{key} is not seen from all sides"
        shares = np.bincount(far.argmin(axis=0), minlength=len(colors)) / len(seen)
        assert shares.min() > 0.05, (key, shares)


def test_back_faces_of_a_transparent_closed_surface_are_culled(rendered):
    inside = rendered[1]["veil"][:, 24:40, 24:40, 3]
    assert np.median(inside) == pytest.approx(128, abs=4), "one veil of 0.5, where two would be 191"


def test_open_surfaces_with_back_face_culling_are_one_sided(rendered):
    one_sided = [
        key for key in ("one_sided", "two_sided", "veil", "outline") if rendered[0][key]["one_sided"]
    ]
    assert one_sided == ["one_sided"]


def test_objects_behind_many_transparent_layers_are_visible(rendered):
    red, green, _, alpha = np.median(rendered[1]["shells"][:, 24:40, 24:40].reshape(-1, 4), axis=0)
    assert alpha == 255
    assert red > 120, "the core is (150, 26, 26), a little in the shade of its shells"
    assert green < 40


def test_objects_in_glass_are_illuminated(rendered):
    inside = rendered[1]["glass"][:, 28:36, 28:36].reshape(-1, 4).astype(int)
    is_red = (inside[:, 0] > 120) & (inside[:, 1] < inside[:, 0] - 60)
    assert is_red.mean() > 0.5, "a red core in clear glass"


def test_missing_textures_and_duplicate_faces_are_measured(rendered):
    rows = rendered[0]
    for key in ("no_image", "no_mtl"):
        assert rows[key]["reason"] == "missing_textures 1, expected <= 0"
    assert (rows["twice"]["doubled"], rows["kd"]["doubled"]) == (0.5, 0.0)
