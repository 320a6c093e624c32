"""Small mesh files whose parts have known places and colors."""

import json
import struct

from tests.builders import box, write_gltf

VERTICES, TRIANGLES = box((0, 0, 0), (1, 1, 1))


def write_obj(folder, name, mtl=None, color="", triangles=TRIANGLES, vertices=VERTICES, library=None):
    """Write a cube whose corners share one texture coordinate, and its MTL."""
    lines = [f"mtllib {library or name + '.mtl'}"] + [f"v {x} {y} {z} {color}" for x, y, z in vertices]
    lines += ["vt 0.5 0.5", "usemtl m", *(f"f {a + 1}/1 {b + 1}/1 {c + 1}/1" for a, b, c in triangles)]
    (folder / f"{name}.obj").write_text("\n".join(lines) + "\n")
    if mtl is not None:
        (folder / f"{name}.mtl").write_text(mtl)


def write_ply(path, names, of="vertex", end="\n"):
    """Write a cube with vertices or faces of color (30, 160, 90), with the given property names."""
    colors = [f"property uchar {name}" for name in names]
    lines = ["ply", "format ascii 1.0", "element vertex 8", *(f"property float {axis}" for axis in "xyz")]
    lines += colors if of == "vertex" else []
    lines += ["element face 12", "property list uchar int vertex_indices"]
    lines += [*(colors if of == "face" else []), "end_header"]
    more = " 30 160 90"
    lines += [f"{x} {y} {z}{more if of == 'vertex' else ''}" for x, y, z in VERTICES]
    lines += [f"3 {a} {b} {c}{more if of == 'face' else ''}" for a, b, c in TRIANGLES]
    path.write_bytes((end.join(lines) + end).encode())


def write_scene(path, parts, nodes, one_sided=(), scenes=None):
    """Write a glTF file with the given meshes; its last scene is the active one."""
    write_gltf(path, parts)
    record = json.loads(path.read_text())
    record["meshes"] = [{"primitives": [primitive]} for primitive in record["meshes"][0]["primitives"]]
    record["nodes"] = nodes
    record["scenes"] = [{"nodes": scene} for scene in scenes or [list(range(len(nodes)))]]
    record["scene"] = len(record["scenes"]) - 1
    for part in one_sided:
        record["materials"][part]["doubleSided"] = False
    path.write_text(json.dumps(record))


RED_PART, BLUE_PART = ((VERTICES, TRIANGLES, color, 1.0) for color in ((1, 0, 0), (0, 0, 1)))


def glb(record):
    content = json.dumps(record).encode()
    content += b" " * (-len(content) % 4)
    return b"glTF" + struct.pack("<III", 2, 20 + len(content), len(content)) + b"JSON" + content
