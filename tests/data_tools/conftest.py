import base64
import json
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]


def linear(srgb):
    srgb = np.asarray(srgb, dtype=np.float64)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def write_gltf(path, parts):
    """Write (vertices, triangles, sRGB color in [0, 1], alpha) parts, +z up, as one matt glTF file."""
    gltf = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}]}
    gltf |= {"meshes": [{"primitives": []}], "accessors": [], "bufferViews": [], "materials": []}
    gltf["extensionsUsed"] = ["KHR_materials_specular"]
    blob = b""
    for vertices, triangles, color, alpha in parts:
        x, y, z = np.asarray(vertices, dtype=np.float32).T
        points = np.stack([x, z, -y], axis=1).astype("<f4")  # glTF is +y up
        corners = np.asarray(triangles, dtype="<u4").reshape(-1)
        for data, kind, component in ((points, "VEC3", 5126), (corners, "SCALAR", 5125)):
            view = {"buffer": 0, "byteOffset": len(blob), "byteLength": data.nbytes}
            accessor = {"bufferView": len(gltf["bufferViews"]), "componentType": component, "type": kind}
            accessor["count"] = len(data)
            if kind == "VEC3":
                accessor |= {"min": points.min(0).tolist(), "max": points.max(0).tolist()}
            gltf["bufferViews"].append(view)
            gltf["accessors"].append(accessor)
            blob += data.tobytes()
        last = len(gltf["accessors"])
        primitive = {"attributes": {"POSITION": last - 2}, "indices": last - 1}
        primitive["material"] = len(gltf["materials"])
        gltf["meshes"][0]["primitives"].append(primitive)
        rgba = [*linear(color).tolist(), alpha]
        surface = {"baseColorFactor": rgba, "metallicFactor": 0.0, "roughnessFactor": 1.0}
        matt = {"KHR_materials_specular": {"specularFactor": 0.0}}
        material = {"pbrMetallicRoughness": surface, "doubleSided": True, "extensions": matt}
        gltf["materials"].append(material | ({"alphaMode": "BLEND"} if alpha < 1 else {}))
    uri = "data:application/octet-stream;base64," + base64.b64encode(blob).decode()
    gltf["buffers"] = [{"byteLength": len(blob), "uri": uri}]
    path.write_text(json.dumps(gltf))


def box(center, half):
    """Return the (8, 3) corners and (12, 3) triangles of an axis-aligned box."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    triangles = [t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))]
    return np.asarray(center) + signs * np.asarray(half), np.array(triangles)
