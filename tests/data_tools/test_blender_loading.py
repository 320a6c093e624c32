"""Loading of mesh files in Blender: axes, paths and reasons of failures."""

import json
import struct
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from tests.builders import write_gltf
from tests.data_tools.mesh_files import RED_PART, TRIANGLES, VERTICES, glb, write_obj, write_ply, write_scene

pytestmark = pytest.mark.blender


def test_bounding_boxes_contain_only_visible_faces(loaded, tmp_path):
    tall = VERTICES * (0.25, 1.0, 0.5)
    write_obj(tmp_path, "tall", "newmtl m\n", vertices=tall)
    write_ply(tmp_path / "cube.ply", ("red", "green", "blue"))
    text = (tmp_path / "cube.ply").read_text().replace("vertex 8", "vertex 9")
    scan = text.replace("\n3 0 1 3", "\n900 900 900 1 2 3\n3 0 1 3", 1)
    (tmp_path / "scan.ply").write_text(scan)
    utm = VERTICES * 0.5 + (500000.0, 4649776.0, 10.0)
    write_obj(tmp_path, "utm", "newmtl m\n", vertices=utm)
    joined = np.concatenate([VERTICES, [[90, 0, 0]]]), np.concatenate([TRIANGLES, [[0, 8, 8]]])
    write_obj(tmp_path, "joined", "newmtl m\n", vertices=joined[0], triangles=joined[1])
    far_off = {"mesh": 0, "translation": [90, 0, 0], "scale": [0, 0, 0]}
    write_scene(tmp_path / "scale.gltf", [RED_PART], [{"mesh": 0}, far_off], one_sided=(0,))
    clear = (VERTICES + np.array([9, 0, 0]), TRIANGLES, (1, 0, 0), 0.0)
    write_gltf(tmp_path / "clear.gltf", [(VERTICES, TRIANGLES, (1, 0, 0), 1.0), clear])
    y_up, z_up, unused, far, *cubes = loaded(
        (tmp_path / "tall.obj", tmp_path, ""), (tmp_path / "tall.obj", tmp_path, "z"),
        (tmp_path / "scan.ply", tmp_path, ""), (tmp_path / "utm.obj", tmp_path, ""),
        *((tmp_path / name, tmp_path, "") for name in ("joined.obj", "scale.gltf", "clear.gltf")),
    )  # fmt: skip
    assert cubes == [pytest.approx([1.0, 1.0, 1.0])] * 3, "what cannot be seen is no part of the object"
    assert y_up == pytest.approx([0.25, 0.5, 1.0])
    assert z_up == pytest.approx([0.25, 1.0, 0.5])
    assert unused == pytest.approx([1.0, 1.0, 1.0]), "a vertex that no face uses is no part of the object"
    assert "expected at least 4096 float32 positions across the object, but found " in far


def test_files_outside_the_assets_folder_are_rejected_in_every_notation(loaded, tmp_path):
    inside, outside = tmp_path / "assets", tmp_path / "private"
    (inside / "a").mkdir(parents=True)
    outside.mkdir()
    Image.new("RGB", (4, 4), "red").save(outside / "x.png")
    Image.new("P", (64, 64)).save(outside / "x.gif")
    (outside / "x.mtl").write_text("newmtl m\n")
    write_gltf(inside / "box.gltf", [(VERTICES, TRIANGLES, (1, 1, 1), 1.0)])
    record = json.loads((inside / "box.gltf").read_text())
    record["textures"], record["samplers"] = [{"source": 0}], [{}]
    record["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"] = {"index": 0}
    ways = ["../private/x.png", "..\\private\\x.png", "%2e%2e/private/x.png", str(outside / "x.png"),
            f"file://{outside}/x.png", "./a/../../private/x.png"]  # fmt: skip
    only_gltf = [
        "data:/../../private/x.png",
        "data:,/../../private/x.png",
        "data:image/png;base64/../../../private/x.png",
    ]
    only_libraries = [b' "../private/x.mtl"', b"\x0b../private/x.mtl", b"\\\n ../private/x.mtl",
                      b" k0.mtl ../private/x.mtl", b" ../private/x.mtl \t\r"]  # fmt: skip
    files = []
    record["images"] = [{"uri": "data:image/png;base64,"}]
    for number, way in enumerate(only_gltf):
        changed = record | {"images": [{"uri": way}]}
        (inside / f"data{number}.gltf").write_text(json.dumps(changed))
        (inside / f"data{number}.glb").write_bytes(glb(changed))
        changed = record | {"buffers": [record["buffers"][0] | {"uri": way}]}
        (inside / f"buffer{number}.gltf").write_text(json.dumps(changed))
        files += [f"data{number}.gltf", f"data{number}.glb", f"buffer{number}.gltf"]
    for number, way in enumerate(only_libraries):
        write_obj(inside, f"n{number}")
        content = (inside / f"n{number}.obj").read_bytes()
        (inside / f"n{number}.obj").write_bytes(content.replace(b" n%d.mtl" % number, way))
        files.append(f"n{number}.obj")
    for number, way in enumerate(ways):
        record["images"] = [{"uri": way}]
        (inside / f"{number}.gltf").write_text(json.dumps(record))
        (inside / f"{number}.glb").write_bytes(glb(record))
        files += [f"{number}.gltf", f"{number}.glb"]
        if "%" not in way and "file:" not in way:
            write_obj(inside, f"p{number}", f"newmtl m\nmap_Kd {way}\n")
            write_obj(inside, f"k{number}", f"newmtl m\nmap_Ka {way}\n")
            write_obj(inside, f"m{number}", f"newmtl m\nmap_Kd {way.replace('.png', '.gif')}\n")
            write_obj(inside, f"l{number}")
            text = (inside / f"l{number}.obj").read_text()
            library = way.replace(".png", ".mtl")
            (inside / f"l{number}.obj").write_text(text.replace(f"l{number}.mtl", library))
            files += [f"{kind}{number}.obj" for kind in "pkml"]
    found = loaded(*((inside / name, inside, "") for name in files))
    for name, said in zip(files, found, strict=True):
        assert "expected references to files in" in said, (name, said)
        assert "private" in said


def test_a_corrected_gltf_file_contains_the_checked_paths(blender, tmp_path):
    inline = "data:application/octet-stream;base64,AAAA"
    uris = ["a b.bin", "data:/../../x.bin", "data:,/../x.bin", inline]
    meshes = [{"primitives": [{"attributes": {"POSITION": 0, "_OWN": 1}}]}]
    (tmp_path / "scratch").mkdir()
    path = tmp_path / "own.gltf"
    path.write_text(json.dumps({"meshes": meshes, "buffers": [{"uri": uri} for uri in uris]}))
    copy = json.loads(
        blender(f"""
from pathlib import Path
from data_tools.blender.gltf import prepare_gltf
result = prepare_gltf(Path({str(path)!r}), Path({str(tmp_path / "scratch")!r})).read_text()
""")
    )
    assert copy["meshes"][0]["primitives"][0]["attributes"] == {"POSITION": 0}
    # From any other folder, what is relative, or no data to Blender's importer, would be another file.
    expected = [*(str(tmp_path / uri) for uri in uris[:3]), inline]
    assert [unquote(buffer["uri"]) for buffer in copy["buffers"]] == expected


def test_material_libraries_that_were_not_checked_are_not_read(loaded, tmp_path):
    """Blender truncates a name at a null byte or after 1024 bytes; an MTL that it read would add a texture."""
    inside, outside = tmp_path / "assets", tmp_path / "private"
    inside.mkdir()
    outside.mkdir()
    (outside / "x.mtl").write_text(f"newmtl m\nmap_Kd {outside}/x.png\n")
    Image.new("RGB", (4, 4), "red").save(outside / "x.png")
    room = 1023 - len(f"{inside}/../private/x.mtl")
    ways = [
        b"../private/x.mtl\0 n",
        b"\r../private/x.mtl",
        b"./" * (room // 2) + b"/" * (room % 2) + b"../private/x.mtl.not_there",
    ]
    for number, way in enumerate(ways):
        write_obj(inside, f"n{number}")
        content = (inside / f"n{number}.obj").read_bytes()
        (inside / f"n{number}.obj").write_bytes(content.replace(b"n%d.mtl" % number, way))
    for half_sides in loaded(*((inside / f"n{number}.obj", inside, "") for number in range(len(ways)))):
        assert half_sides == pytest.approx([1.0, 1.0, 1.0]), "an image of the MTL was found"


def test_import_errors_name_the_cause_and_the_remedy(loaded, tmp_path):
    (tmp_path / "old.gltf").write_text(
        json.dumps({"asset": {"version": "1.0"}, "buffers": {"b": {"uri": "b.bin"}}})
    )
    (tmp_path / "old.glb").write_bytes(b"glTF" + struct.pack("<IIII", 1, 24, 4, 0) + b"{}  ")
    (tmp_path / "empty.glb").write_bytes(b"")
    needs = ["EXT_meshopt_compression"]
    record = {"asset": {"version": "2.0"}, "extensionsRequired": needs, "extensionsUsed": needs}
    (tmp_path / "packed.glb").write_bytes(glb(record | {"scenes": [{"nodes": []}], "scene": 0}))
    write_gltf(tmp_path / "lost.gltf", [(VERTICES, TRIANGLES, (1, 0, 0), 1.0)])
    record = json.loads((tmp_path / "lost.gltf").read_text())
    record["buffers"][0]["uri"] = "lost.bin"
    (tmp_path / "lost.gltf").write_text(json.dumps(record))
    names = ("old.gltf", "old.glb", "empty.glb", "packed.glb", "lost.gltf")
    old, old_binary, empty, packed, lost = loaded(*((tmp_path / name, tmp_path, "") for name in names))
    assert "Missing resource, 'lost.bin'" in lost
    assert old == old_binary == "expected glTF 2.0, but found version 1.0. Convert the file to glTF 2.0"
    assert "expected a binary glTF file" in empty
    assert "gltf-transform" in packed
