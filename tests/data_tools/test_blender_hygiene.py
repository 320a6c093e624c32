"""Hidden objects, animations and measures of prepared scenes, in the real Blender."""

import json

import pytest
from PIL import Image

pytestmark = pytest.mark.blender

#: Builds and prepares a scene; the result is the half sides of the bounding box, and the measures.
SCRIPT = """
import bpy, dataclasses
from data_tools.blender.load_asset import prepare_scene

def cube(name, at, half=1.0, parent=None, alpha=None, color=(0.8, 0.8, 0.8, 1.0)):
    bpy.ops.mesh.primitive_cube_add(size=2 * half, location=at)
    thing = bpy.context.object
    thing.name, thing.parent = name, parent
    if alpha is not None:
        material = bpy.data.materials.new(name)
        material.use_nodes = True
        shader = material.node_tree.nodes["Principled BSDF"]
        shader.inputs["Alpha"].default_value = alpha
        shader.inputs["Base Color"].default_value = color
        thing.data.materials.append(material)
    return thing

bpy.ops.wm.read_factory_settings(use_empty=True)
{scene}
extent, measures = prepare_scene("cube")
result = [extent.tolist(), dataclasses.asdict(measures)]
"""


@pytest.fixture
def prepared(blender):
    return lambda scene: blender(SCRIPT.replace("{scene}", scene))


def test_hidden_objects_are_ignored_and_their_children_keep_their_transforms(prepared):
    extent, measures = prepared("""
cube("shown", (0, 0, 0))
cube("no_render", (50, 0, 0)).hide_render = True
cube("no_viewport", (0, 50, 0)).hide_viewport = True
cube("not_for_cameras", (0, 0, 50)).visible_camera = False
cube("clear", (0, -50, 0), alpha=0.0)
bpy.ops.object.light_add(type="SUN", location=(3, 0, 0))
sun = bpy.context.object
cube("lamp", (0, 0, 0), half=1.0, parent=sun)  # at (3, 0, 0), under the light
bpy.ops.object.camera_add(location=(0, -80, 0))
""")
    # the cubes reach from -1 to 4 along x and from -1 to 1 along y and z
    assert extent == pytest.approx([1.0, 0.4, 0.4])
    assert measures["size"] == pytest.approx(5.0)
    assert measures["thinness"] == pytest.approx(0.4)
    assert (measures["triangles"], measures["degenerate"]) == (24, 0.0)
    assert (measures["hidden"], measures["cameras"], measures["lights"]) == (4, 1, 1)
    assert (measures["materials"], measures["colored"], measures["animated"]) == (0, False, False)


def test_animations_are_set_to_the_first_frame(prepared):
    extent, measures = prepared("""
still = cube("still", (0, 0, 0))
moving = cube("moving", (0, 0, 0))
for frame, x in ((7, 4.0), (20, 90.0)):
    moving.location.x = x
    moving.keyframe_insert("location", frame=frame)
bpy.context.scene.frame_set(20)
""")
    assert extent == pytest.approx([1.0, 1 / 3, 1 / 3])  # from -1 to 5
    assert measures["animated"] is True


def test_uncolored_materials_and_degenerate_triangles_are_measured(prepared):
    _, measures = prepared("""
cube("a", (0, 0, 0), alpha=1.0)
cube("b", (3, 0, 0), alpha=1.0)
flat = bpy.data.meshes.new("flat")
flat.from_pydata([(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 1, 0)], [], [(0, 1, 2), (0, 1, 3)])
bpy.context.scene.collection.objects.link(bpy.data.objects.new("flat", flat))
""")
    assert (measures["materials"], measures["colored"]) == (2, False)  # two materials, one color
    assert measures["degenerate"] == pytest.approx(1 / 26)
    _, measures = prepared("""
cube("a", (0, 0, 0), alpha=1.0)
cube("b", (3, 0, 0), alpha=1.0, color=(0.8, 0.1, 0.1, 1.0))
""")
    assert measures["colored"] is True
    _, measures = prepared("""
tree = cube("a", (0, 0, 0), alpha=1.0).data.materials[0].node_tree
shader = next(node for node in tree.nodes if node.type == "BSDF_PRINCIPLED")
shader.inputs["Emission Strength"].default_value = 1.0
tree.links.new(tree.nodes.new("ShaderNodeVertexColor").outputs["Color"], shader.inputs["Emission Color"])
""")
    assert measures["colored"] is True, "what it shines in is a color too"


def test_images_outside_the_assets_folder_are_rejected(loaded, tmp_path):
    inside, outside = tmp_path / "assets" / "chair", tmp_path / "private"
    inside.mkdir(parents=True)
    outside.mkdir()
    Image.new("RGB", (4, 4), "red").save(outside / "x.png")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "assets" / "shared.png")
    (inside / "chair.obj").write_text(
        "mtllib chair.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nusemtl m\nf 1/1 2/2 3/3\n"
    )

    def load(image):
        (inside / "chair.mtl").write_text(f"newmtl m\nKd 1 1 1\nmap_Kd {image}\n")
        (found,) = loaded((inside / "chair.obj", tmp_path / "assets", ""))
        return found

    assert isinstance(load("../shared.png"), list)
    for image in ("../../private/x.png", outside / "x.png"):
        assert "expected references to files in" in load(image)


def test_buffers_outside_the_assets_folder_are_rejected(loaded, tmp_path):
    (tmp_path / "assets").mkdir()
    (tmp_path / "private.bin").write_bytes(bytes(36))
    gltf = tmp_path / "assets" / "chair.gltf"
    buffer = {"byteLength": 36, "uri": "%2e%2e/private.bin"}
    gltf.write_text(json.dumps({"asset": {"version": "2.0"}, "buffers": [buffer]}))
    (found,) = loaded((gltf, tmp_path / "assets", ""))
    assert "expected references to files in" in found
    assert "private.bin" in found
