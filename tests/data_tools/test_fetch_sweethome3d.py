"""Conversion of a small package with the layout of sweethome3d-furniture."""

import csv
import hashlib
import io
import json
import lzma
import os
import re
import struct
import subprocess
import tarfile
import time
import zipfile

import pytest
from PIL import Image

from data_tools.assets import furniture_package
from data_tools.assets.folder import fetch_folder
from data_tools.assets.furniture_package import (
    LIBRARIES,
    PackageError,
    open_package,
    read_catalog,
    read_license,
)
from data_tools.assets.obj_materials import read_obj_materials
from data_tools.assets.scan import find_assets
from data_tools.assets.sweethome3d import fetch_sweethome3d, plan_conversions
from data_tools.blender.conversion_pool import ConversionTask, convert_all
from lrm_pl.errors import InputError
from tests import ROOT

OBJ = """mtllib {key}.mtl
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 1
vt 0 0
vt 1 0
vt 1 1
usemtl red
f 1/1 2/2 3/3
usemtl {second}
f 1/1 3/3 4/2
"""
MTL = "newmtl red\nKd 1 0 0\nnewmtl blue\nKd 0 0 1\nnewmtl wood\nmap_Kd wood.png\n"


def image():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 60, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def library(prefix, models):
    """Return the zip file of a library. ``models`` maps keys to changes of the catalog entry and to "files"."""
    lines, files = ["id=SweetHome3D#X", "name=X"], {"LICENSE.TXT": b"LICENSE \r\n\r\nUse it.  \r\n"}
    for number, (key, changes) in enumerate(models.items(), 1):
        entry = {"id": f"{prefix}#{key}", "name": key.title(), "tags": "Seat, Old", "category": "Kitchen"}
        entry |= {"model": f"/lib/{key}/{key}.obj", "width": "50", "depth": "40.5", "height": "90"}
        entry |= {"doorOrWindow": "false", "creator": "Ann"} | changes
        own = {f"{key}.obj": OBJ.format(key=key, second="blue").encode(), f"{key}.mtl": MTL.encode()}
        own |= entry.pop("files", {})
        files |= {f"lib/{key}/{name}": content for name, content in own.items() if content is not None}
        lines += [f"{field}#{number}={value}" for field, value in entry.items()] + [""]
    files["PluginFurnitureCatalog.properties"] = "\n".join(lines).encode("latin-1")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def write_package(path, libraries):
    """Write an ar archive with three members. The last member contains the libraries."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as data:
        for name, content in libraries.items():
            member = tarfile.TarInfo(f"./usr/share/sweethome3d/furniture/{name}.sh3f")
            member.size = len(content)
            data.addfile(member, io.BytesIO(content))
    archive = b"!<arch>\n"
    for name, content in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        ("data.tar.xz", lzma.compress(tar.getvalue())),
    ):
        archive += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        archive += b"\n" * (len(content) % 2)
    path.write_bytes(archive)
    return hashlib.sha256(archive).hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with one usable model per library, and unsuitable models in Scopia."""
    textured = OBJ.format(key="table", second="wood").encode()
    plain = OBJ.format(key="plain", second="red").encode()
    scopia = {
        "chair": {"name": "Chaise d'\xe9t\xe9 10\\u20ac"},
        "table": {"files": {"table.obj": textured, "wood.png": image()}},
        "door": {"doorOrWindow": "true"},
        "frame": {"category": "Doors and windows"},
        "steps": {"staircaseCutOutShape": "M0,0"},
        "ladder": {"category": "Staircases"},
        "rug": {"height": "0.9"},
        "plain": {"files": {"plain.obj": plain}},
        "bare": {"files": {"bare.obj": OBJ.format(key="bare", second="wood").encode()}},
        "dull": {"files": {"dull.mtl": None}},
        "gone": {"files": {"gone.obj": None}},
        "../up": {"files": {"../up.obj": None}},
    }
    libraries = {name: library(name, {"cup": {}}) for name in LIBRARIES} | {
        "Scopia": library("Scopia", scopia)
    }
    license = b"Thank you for downloading this\nDownloaded from http://www.blendswap.com/blends/view/7\r\n"
    cup = {"cup": {"files": {"BLENDSWAP_LICENSE.txt": license}, "creator": "Nmn9"}}
    libraries["BlendSwap-CC-BY"] = library("Blend Swap CC-BY", cup)
    path = tmp_path / "furniture.deb"
    monkeypatch.setattr(furniture_package, "PACKAGE_SHA256", write_package(path, libraries))
    return path


def test_escape_sequences_in_the_catalog_are_decoded(package):
    with open_package(package) as folder:
        catalog = read_catalog(folder / "Scopia.sh3f")
        assert read_license(folder / "Scopia.sh3f") == "LICENSE\n\nUse it."
    assert not folder.exists()
    chair = catalog["chair"]
    assert (chair.name, chair.creator) == ("Chaise d'été 10€", "Ann")
    assert (chair.obj, chair.category, chair.tags) == ("lib/chair/chair.obj", "Kitchen", ("Seat", "Old"))
    assert chair.size == (50, 40.5, 90)


def test_unsuitable_models_are_left_out_with_a_reason(package, tmp_path):
    with open_package(package) as folder:
        found = plan_conversions(folder / "Scopia.sh3f", tmp_path)
    reasons = {asset.id.removeprefix("Scopia-"): reason for asset, _, reason in found}
    up = next(key for key in reasons if key.startswith("___up"))
    assert reasons == {
        "chair": "",
        "table": "",
        "door": "door or window",
        "frame": "door or window",
        "steps": "staircase",
        "ladder": "staircase",
        "rug": "too thin: 0.9 cm thick, longest side 50 cm",
        "plain": "single color without a texture",
        "bare": "missing file: wood.png",
        "dull": "missing file: dull.mtl",
        "gone": "missing file: lib/gone/gone.obj",
        up: "missing file: lib/../up/../up.obj",
    }
    tasks = {asset.id: task for asset, task, _ in found}
    assert tasks["Scopia-table"].members == {
        "table.obj": "lib/table/table.obj",
        "table.mtl": "lib/table/table.mtl",
        "wood.png": "lib/table/wood.png",
    }
    assert all(task.glb.parent == tmp_path / "Scopia" for task in tasks.values())


def test_models_have_the_license_of_the_library_and_one_library_is_held_out(package, tmp_path):
    with open_package(package) as folder:
        others = [folder / f"{name}.sh3f" for name in LIBRARIES if name != "Scopia"]
        cups = [plan_conversions(library, tmp_path)[0][0] for library in others]
    assert [(cup.id, cup.license, cup.split) for cup in cups] == [
        ("BlendSwap-CC-0-cup", "CC0-1.0", ""),
        ("BlendSwap-CC-BY-cup", "CC-BY-3.0", ""),
        ("Reallusion-cup", "CC-BY-3.0-US", ""),
        ("KatorLegaz-cup", "CC-BY-3.0-US", "val"),
    ]
    assert cups[1].source == (
        "cup in BlendSwap-CC-BY of the Debian package sweethome3d-furniture 1.8-1, "
        "from http://www.blendswap.com/blends/view/7"
    )
    assert (cups[1].creator, cups[1].tags) == ("Nmn9", ("Kitchen", "Seat", "Old"))


def test_a_missing_package_and_another_version_are_rejected(package, tmp_path):
    with pytest.raises(
        PackageError, match=r"found no file. Download it with `apt-get download sweethome3d-furniture`"
    ):
        open_package(tmp_path / "absent.deb").__enter__()
    package.write_bytes(b"!<arch>\n")
    with pytest.raises(PackageError, match=r"expected sha256 .* \(sweethome3d-furniture 1\.8-1\), but found"):
        open_package(package).__enter__()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "`apt-get download sweethome3d-furniture=1.8-1` failed: .*apt-get"),
        ("echo 'E: Version 1.8-1 was not found' >&2; exit 100", "failed: E: Version 1.8-1 was not found"),
        ("touch sweethome3d-furniture_1.8-1_all.deb", "expected sha256"),
    ],
)
def test_a_failed_download_of_the_package_suggests_a_remedy(tmp_path, monkeypatch, script, message):
    if script:
        (tmp_path / "apt-get").write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
        (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageError, match=message) as error:
        open_package(None).__enter__()
    assert re.search("(?i)pass --package FILE.deb|download the expected version", str(error.value))


def test_without_blender_the_error_names_the_render_environment(package, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"Blender \(bpy\) is not installed in this environment. Use \.venv-render"
    ):
        fetch_sweethome3d(tmp_path / "out", package)


def test_materials_are_limited_to_those_that_faces_use():
    files = {
        "a.mtl": b"newmtl a\nKd 1 0 0\nmap_Kd -s 2 2 1 -bm 0.03 my wood.jpg\nnewmtl b\nKd  0 0\t1\nmap_Bump no.png\n"
    }
    files["my wood.jpg"] = b""
    surface = read_obj_materials(b"mtllib ./a.mtl\r\nusemtl a\nf 1\nusemtl b\nf 2\nusemtl b\n", files.get)
    assert (surface.libraries, surface.textures, surface.missing) == (("a.mtl",), ("my wood.jpg",), ())
    assert surface.colors == {"0 0 1"}
    unused = read_obj_materials(b"mtllib a.mtl\nusemtl b\n", {"a.mtl": files["a.mtl"]}.get)
    assert (unused.textures, unused.missing) == ((), ())
    for name in ("../x.jpg", "/etc/x.jpg", "C:/x.jpg", "a\\x.jpg"):
        files["a.mtl"] = f"newmtl a\nmap_Kd {name}\n".encode()
        assert read_obj_materials(b"mtllib a.mtl\nusemtl a\n", lambda _: files["a.mtl"]).missing == (name,)
    assert read_obj_materials(b"mtllib ../a.mtl\n", lambda name: b"").missing == ("../a.mtl",)


def test_a_crash_or_timeout_of_blender_fails_only_the_current_model(package, tmp_path, monkeypatch):
    """In an environment without Blender, the other models fail with their own error."""
    monkeypatch.setattr("data_tools.blender.conversion_pool.TIME_LIMIT_S", 2.0)
    with open_package(package) as folder:
        archive = folder / "Scopia.sh3f"
        tasks = [task for _, task, reason in plan_conversions(archive, tmp_path) if not reason]
        deadly = ConversionTask("deadly", archive, _Members(os._exit, 3), "a.obj", tmp_path / "deadly.glb")
        endless = ConversionTask(
            "endless", archive, _Members(time.sleep, 60), "a.obj", tmp_path / "endless.glb"
        )
        tasks = [tasks[0], deadly, endless, tasks[1]]
        outcome = {task.id: reason for task, reason in convert_all(tasks, tmp_path / "log", 1)}
    for key in ("deadly", "endless"):
        assert outcome[key].startswith("Blender crashed or took longer than 2 s: see ")
    for key in ("Scopia-chair", "Scopia-table"):
        assert outcome[key].startswith("conversion failed: ModuleNotFoundError")
    log = (tmp_path / "log").read_text()
    assert "--- Scopia-chair" in log
    assert "Timeout (0:00:02)!" in log


class _Members:
    """Members of an archive that call a function when they are extracted."""

    def __init__(self, function, argument):
        self._call = function, argument

    def items(self):
        function, argument = self._call
        function(argument)
        return []


@pytest.mark.blender
def test_a_second_run_converts_only_incomplete_glb_files(package, render_python, tmp_path):
    out = tmp_path / "out"
    program = (
        "import sys\nfrom pathlib import Path\nfrom data_tools.assets import furniture_package\n"
        "from data_tools.assets.sweethome3d import fetch_sweethome3d\n"
        "if __name__ == '__main__':\n"
        "    furniture_package.PACKAGE_SHA256 = sys.argv[3]\n"
        "    fetch_sweethome3d(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    script = tmp_path / "fetch.py"
    script.write_text(program)

    def run():
        command = [render_python, script, out, package, hashlib.sha256(package.read_bytes()).hexdigest()]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = run()
    assert "Converting 6 models" in said
    assert "Left out 10 of 16" in said
    found = {asset.id: asset for asset in find_assets(out)}
    assert len(found) == 6
    assert {asset.split for asset in found.values()} == {"", "val"}
    table = (out / found["Scopia-table"].file).read_bytes()
    assert hashlib.sha256(table).hexdigest() == found["Scopia-table"].sha256
    length, size = struct.unpack_from("<I", table, 12)[0], struct.unpack_from("<I", table, 8)[0]
    gltf = json.loads(table[20 : 20 + length])
    assert size == len(table)
    assert (len(gltf["images"]), len(gltf["materials"])) == (1, 2)
    attribution = (out / "ATTRIBUTION.txt").read_text()
    assert "Scopia-chair | Chaise d'été 10€ | Ann | CC-BY-3.0 | chair in Scopia of the Debian" in attribution
    assert (out / "Scopia" / "LICENSE.txt").read_text() == "LICENSE\n\nUse it.\n"

    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.glb")}
    cut = out / "Reallusion" / "cup.glb"
    cut.write_bytes(cut.read_bytes()[:-10])
    assert "Converting 1 models" in run()
    again = {path: path.stat().st_mtime_ns for path in out.rglob("*.glb")}
    assert {path for path in made if again[path] != made[path]} == {cut}
    assert {asset.id: asset for asset in find_assets(out)} == found


def test_a_folder_and_its_copy_have_the_same_asset_list(tmp_path, capsys):
    mine = tmp_path / "mine"
    (mine / "chairs").mkdir(parents=True)
    (mine / "chairs" / "red.obj").write_text("v 0 0 0\n")
    (mine / "chairs" / "red.mtl").write_text("newmtl a\n")
    with open(mine / "assets.csv", "w", newline="") as file:
        csv.writer(file).writerows([
            ("id", "name", "creator", "source", "license", "sha256"),
            ("chairs_red", "Red chair", "Bo", "me", "CC0-1.0", ""),
        ])  # fmt: skip
    copy = tmp_path / "copy"
    fetch_folder(mine, copy)
    assert not (mine / "assets.parquet").exists()
    assert (copy / "chairs" / "red.mtl").is_file()
    fetch_folder(mine, None)
    assert find_assets(mine) == find_assets(copy)
    (asset,) = find_assets(mine)
    assert (asset.file, asset.name, asset.license) == ("chairs/red.obj", "Red chair", "CC0-1.0")
    assert asset.split == ""
    assert capsys.readouterr().out.splitlines()[-1] == f"next  make render-shards ASSETS={mine} OUT=data/mine"
    with pytest.raises(InputError, match="expected --out outside"):
        fetch_folder(mine, mine / "sub")
    with pytest.raises(InputError, match="expected a folder of meshes at"):
        fetch_folder(tmp_path / "absent", None)
