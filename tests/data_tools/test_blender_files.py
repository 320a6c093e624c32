"""Corrections of images, vertices and nodes that Blender's importers lose: one object for each."""

import base64
import json
import struct
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.builders import box, write_gltf
from tests.data_tools.blender_renders import render_views

pytestmark = pytest.mark.blender

VERTICES, TRIANGLES = box((0, 0, 0), (1, 1, 1))
ORANGE, GREEN, RED, BLUE, WHITE = (200, 100, 50), (30, 160, 90), (255, 0, 0), (0, 0, 255), (255, 255, 255)


def write_obj(
    folder, name, mtl="newmtl m\nKd 1 1 1\n", uv="0.25 0.25", color="", head=None, vertices=VERTICES
):
    lines = [f"mtllib {name}.mtl" if head is None else head]
    lines += [f"v {x} {y} {z} {color}" for x, y, z in vertices]
    lines += [f"vt {uv}", "usemtl m", *(f"f {a + 1}/1 {b + 1}/1 {c + 1}/1" for a, b, c in TRIANGLES)]
    (folder / f"{name}.obj").write_text("\n".join(lines) + "\n")
    (folder / f"{name}.mtl").write_text(mtl)


def write_ply(folder, name, vertices=VERTICES, triangles=TRIANGLES, color=()):
    """Write a binary PLY, big-endian."""
    lines = ["ply", "format binary_big_endian 1.0", f"element vertex {len(vertices)}"]
    lines += [f"property float {axis}" for axis in "xyz"]
    lines += [f"property float {one}" for one in ("red", "green", "blue") if color]
    lines += ["element face 12", "property list uchar int vertex_indices", "end_header"]
    rows = [struct.pack(f">{3 + len(color)}f", *vertex, *color) for vertex in vertices]
    faces = [struct.pack(">Biii", 3, *map(int, face)) for face in triangles]
    (folder / f"{name}.ply").write_bytes("\n".join(lines).encode() + b"\n" + b"".join(rows + faces))


def write_changed(folder, name, change, parts=((VERTICES, TRIANGLES, (1, 1, 1), 1.0),), extra=()):
    """Write a glTF file of parts whose JSON is changed.

    Args:
        folder: Where.
        name: Its name.
        change: Is given the JSON, and the index of an accessor for each array of ``extra``.
        parts: As in ``write_gltf``.
        extra: Arrays of float32 beside the parts.
    """
    write_gltf(folder / f"{name}.gltf", parts)
    record = json.loads((folder / f"{name}.gltf").read_text())
    accessors = []
    for array in extra:
        content = np.asarray(array, "<f4").tobytes()
        uri = "data:application/octet-stream;base64," + base64.b64encode(content).decode()
        record["buffers"].append({"byteLength": len(content), "uri": uri})
        record["bufferViews"].append({"buffer": len(record["buffers"]) - 1, "byteLength": len(content)})
        view = {"bufferView": len(record["bufferViews"]) - 1, "componentType": 5126, "count": len(array)}
        record["accessors"].append(view | {"type": f"VEC{len(array[0])}"})
        accessors.append(len(record["accessors"]) - 1)
    change(record, *accessors)
    (folder / f"{name}.gltf").write_text(json.dumps(record))


def textured(uri, **surface):
    def change(record, uv):
        record["images"], record["textures"] = [{"uri": uri}], [{"source": 0}]
        record["meshes"][0]["primitives"][0]["attributes"]["TEXCOORD_0"] = uv
        record["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"] = {"index": 0}
        record["materials"][0] |= surface

    return change


def write_images(folder):
    """Write images and objects that use them; return id -> expected color."""
    Image.new("RGB", (16, 16), ORANGE).save(folder / "orange.png")
    Image.new("RGBA", (16, 16), (*ORANGE, 60)).save(folder / "veiled.png")
    (folder / "tex").mkdir()
    Image.new("RGB", (16, 16), GREEN).save(folder / "tex" / "Wood.PNG")
    halves = Image.new("RGB", (16, 16), RED)
    halves.paste(BLUE, (8, 0, 16, 16))
    halves.save(folder / "halves.png")
    uv = [np.tile([0.75, 0.5], (8, 1))]
    occluded = {"occlusionTexture": {"index": 0}}
    write_changed(folder, "color_and_data", textured("orange.png", **occluded), extra=uv)
    write_changed(folder, "other_case", textured("TEX/wood.png"), extra=uv)

    def second_set(record, uv):
        textured("halves.png")(record, uv)
        attributes = record["meshes"][0]["primitives"][0]["attributes"]
        attributes["TEXCOORD_1"] = attributes.pop("TEXCOORD_0")
        record["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]["texCoord"] = 1

    write_changed(folder, "second_set", second_set, extra=uv)
    write_obj(folder, "veiled", "newmtl m\nKd 1 1 1\nmap_Kd veiled.png\n")
    write_obj(folder, "clamped", "newmtl m\nKd 1 1 1\nmap_Kd -clamp on halves.png\n", uv="1.25 0.5")
    write_obj(folder, "repeated", "newmtl m\nKd 1 1 1\nmap_Kd halves.png\n", uv="1.25 0.5")
    write_obj(folder, "windows", "newmtl m\nKd 1 1 1\nmap_Kd C:\\Users\\me\\Tex\\wood.png\n")
    write_obj(folder, "heights", "newmtl m\nKd 1 1 1\nmap_Kd orange.png\nmap_Bump -bm 0.5 orange.png\n")
    write_obj(folder, "matt", "newmtl m\nKd 1 1 1\nKs 1 1 1\nillum 1\nmap_Kd orange.png\n")
    Image.new("RGBA", (16, 16), (*ORANGE, 0)).save(folder / "empty.tga")
    write_obj(folder, "empty_alpha", "newmtl m\nKd 1 1 1\nmap_Kd empty.tga\nmap_d empty.tga\n")
    write_obj(folder, "no_highlight", "newmtl m\nKd 1 1 1\nillum 2\nNi 1.5\nmap_Kd orange.png\n")
    write_obj(folder, "glowing", "newmtl m\nKd 0 0 0\nKe 0.7843 0.3922 0.1961\n")
    write_obj(folder, "room", "newmtl m\nKd 1 1 1\nmap_Kd orange.png\nrefl -type sphere halves.png\n")
    write_obj(folder, "not_used", "newmtl m\nKd 1 1 1\nmap_Kd orange.png\n")
    with open(folder / "not_used.obj", "a") as file:
        file.write("usemtl other\n")
    for kind in ("ppm", "pcx", "avif"):
        Image.new("RGB", (64, 64), ORANGE).save(folder / f"orange.{kind}", quality=95)
        write_obj(folder, kind, f"newmtl m\nKd 1 1 1\nmap_Kd orange.{kind}\n")
    write_obj(folder, "library", "newmtl m\nKd 0.1176 0.6275 0.3529\n", head="mtllib LIBRARY.MTL")
    return {
        "color_and_data": ORANGE, "other_case": GREEN, "second_set": BLUE, "veiled": ORANGE, "clamped": BLUE,
        "repeated": RED, "windows": GREEN, "library": GREEN,
        "heights": ORANGE, "matt": ORANGE, "not_used": ORANGE,
        "no_highlight": ORANGE, "glowing": ORANGE, "room": ORANGE, "empty_alpha": ORANGE,
        "ppm": ORANGE, "pcx": ORANGE, "avif": ORANGE,
    }  # fmt: skip


def write_shapes(folder):
    """Write objects of other colors and shapes; return id -> expected color."""
    write_obj(folder, "bytes", color="30 160 90", head="")
    write_ply(folder, "bytes_ply", color=GREEN)

    def sheared(record):
        record["nodes"][0]["matrix"] = [*(1, 0, 0, 0), *(2, 1, 0, 0), *(0, 0, 1, 0), *(0, 0, 0, 1)]  # x + 2 y

    def one_sided(record, *_):
        record["materials"][0]["doubleSided"] = False

    def colors_alone(record, colors):
        record["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"] = colors
        del record["meshes"][0]["primitives"][0]["material"]

    red = (VERTICES, TRIANGLES, (1, 0, 0), 1.0)
    card = np.concatenate([TRIANGLES[:2], TRIANGLES[:2, ::-1]])
    write_changed(folder, "sheared", sheared, [red])
    write_changed(folder, "card", one_sided, [(VERTICES, card, (1, 0, 0), 1.0)])
    write_changed(folder, "colors_alone", colors_alone, extra=[np.tile([1, 0, 0], (8, 1))])
    return {"bytes": GREEN, "bytes_ply": GREEN, "sheared": RED, "card": RED, "colors_alone": RED}


def write_refused(folder):
    """Write objects that are rejected; return id -> reason."""
    lost = np.where(VERTICES > 0, np.nan, VERTICES)
    write_ply(folder, "nan_ply", vertices=lost)
    write_ply(folder, "beyond", triangles=np.where(TRIANGLES == 7, 8, TRIANGLES))
    write_obj(folder, "large", vertices=[[*VERTICES[0][:2], "4e38"], *VERTICES[1:]])
    write_gltf(folder / "nan_gltf.gltf", [(VERTICES, TRIANGLES, (1, 0, 0), 1.0)])
    record = json.loads((folder / "nan_gltf.gltf").read_text())
    head, _, content = record["buffers"][0]["uri"].partition(",")
    content = struct.pack("<f", np.nan) + base64.b64decode(content)[4:]
    record["buffers"][0]["uri"] = head + "," + base64.b64encode(content).decode()
    (folder / "nan_gltf.gltf").write_text(json.dumps(record))
    write_obj(folder, "cut_off")
    with open(folder / "cut_off.obj", "a") as file:
        file.write("f 1 2 9\n")
    write_obj(folder, "undefined", "newmtl M\nKd 1 0 0\n")
    write_obj(folder, "unnamed", head="")
    (folder / "unnamed.mtl").unlink()
    return {
        "nan_ply": "expected finite float32 vertex positions, but found NaN or infinity",
        "nan_gltf": "vertex positions of mesh None are not finite",
        "beyond": "expected vertex indices from 0 to 7, but found 8",
        "large": "expected finite float32 vertex positions, but found 'v -1 -1 4e38 ' in line 2",
        "cut_off": "expected valid vertex indices, but found the face 'f 1 2 9'",
        "undefined": "missing_textures 1", "unnamed": "missing_textures 1",
    }  # fmt: skip


EXPORT = """
import sys, bpy
bpy.ops.wm.read_factory_settings(use_empty=True)
bpy.ops.mesh.primitive_cube_add(size=2)
material = bpy.data.materials.new("matt")
material.use_nodes = True
shader = material.node_tree.nodes["Principled BSDF"]
shader.inputs["Base Color"].default_value = (1, 0, 0, 1)
shader.inputs["Specular IOR Level"].default_value = 0
bpy.context.object.data.materials.append(material)
bpy.ops.export_scene.fbx(filepath=sys.argv[1] + "/no_gloss.fbx")
bpy.ops.export_scene.gltf(filepath=sys.argv[1] + "/packed.glb", export_draco_mesh_compression_enable=True)
shader.inputs["Base Color"].default_value = (200 / 255, 100 / 255, 50 / 255, 1)
bpy.ops.export_scene.fbx(filepath=sys.argv[1] + "/other_program.fbx")
shader.inputs["Alpha"].default_value = 0.5
bpy.ops.export_scene.fbx(filepath=sys.argv[1] + "/pane_fbx.fbx")
"""


def write_exported(folder, render_python, root):
    """Export an FBX and a GLB with damaged compressed data from Blender; return expected colors and reasons."""
    command = [str(render_python), "-c", EXPORT, str(folder)]
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=100)
    content = bytearray((folder / "packed.glb").read_bytes())
    start = 20 + struct.unpack("<I", content[12:16])[0] + 8
    content[start + 8 : start + 40] = bytes(32)
    (folder / "packed.glb").write_bytes(content)
    for name in ("other_program.fbx", "pane_fbx.fbx"):
        content = (folder / name).read_bytes().replace(b"Blender", b"Another")
        (folder / name).write_bytes(content.replace(b"Opacity", b"Thicker"))
    return {"no_gloss": RED, "other_program": ORANGE}, {"packed": "Draco data of mesh 'Cube' are invalid"}


@pytest.fixture(scope="module")
def rendered(render_python, root, tmp_path_factory):
    """Render all objects; return id -> views, id -> measures, and the expected results."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "assets").mkdir()
    colors = write_images(folder / "assets") | write_shapes(folder / "assets")
    reasons = write_refused(folder / "assets")
    exported = write_exported(folder / "assets", render_python, root)
    colors, reasons = colors | exported[0], reasons | exported[1]
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (8, 0, 16, 16))
    mask.save(folder / "assets" / "mask.jpg", quality=95)
    for name, uv in (("masked", "0.75 0.5"), ("unmasked", "0.25 0.5")):
        write_obj(folder / "assets", name, "newmtl m\nKd 1 0 0\nmap_d mask.jpg\n", uv=uv)
    mask.save(folder / "assets" / "mask.ppm")
    write_obj(folder / "assets", "masked_ppm", "newmtl m\nKd 1 0 0\nmap_d mask.ppm\n", uv="0.75 0.5")
    write_obj(folder / "assets", "pane_obj", "newmtl m\nKd 1 0 0\nTr 0.5\n")
    write_obj(folder / "assets", "solid", "newmtl m\nKd 1 0 0\nTr 1.0\n")
    write_obj(folder / "assets", "half", "newmtl m\nKd 1 0 0\nmap_Kd orange.png\nmap_d orange.png\n")
    _, views, rows = render_views(folder / "assets", views=4, resolution=64, samples=8)
    return views, rows, colors, reasons


def test_each_file_has_the_expected_color(rendered):
    found, rows, colors, _ = rendered
    for key, color in colors.items():
        assert rows[key]["reason"] == "", key
        solid = found[key][found[key][..., 3] == 255][:, :3]
        np.testing.assert_allclose(np.median(solid, axis=0), color, atol=4, err_msg=key)
        assert np.abs(solid.astype(int) - color).max(axis=1).mean() < 20, f"{key} has other colors"


def test_invalid_files_are_rejected_with_a_reason(rendered):
    _, rows, _, reasons = rendered
    for key, reason in reasons.items():
        assert rows[key]["reason"].startswith(reason), (key, rows[key]["reason"])


def test_sheared_node_matrices_are_preserved(rendered):
    assert rendered[1]["sheared"]["size"] == pytest.approx(6.0, rel=1e-3), "x from -1 - 2 to 1 + 2"


def test_opposite_faces_with_shared_vertices_are_visible_from_both_sides(rendered):
    found, rows, _, _ = rendered
    assert rows["card"]["triangles"] == 4
    assert (found["card"][..., 3] == 255).any(axis=(1, 2)).all()


def test_opacity_textures_without_alpha_use_the_brightness(rendered):
    found, rows, _, _ = rendered
    for key in ("masked", "masked_ppm"):
        assert "expected a visible object" in rows[key]["reason"], key
    assert (found["unmasked"][:, 24:40, 24:40, 3] == 255).all()
    assert (found["half"][:, 24:40, 24:40, 3] == 255).all(), "an image of colors without alpha hides nothing"


def test_constant_transparency_is_rendered(rendered):
    found = rendered[0]
    for key in ("pane_obj", "pane_fbx"):
        assert found[key][:, 24:40, 24:40, 3].mean() == pytest.approx(191, abs=6), f"two panes of {key}"
    assert (found["solid"][:, 24:40, 24:40, 3] == 255).all(), "Tr 1 alone stands in files of opaque objects"
