"""Runs over demo objects, with identical bytes for any order, number of processes and interruption."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from data_tools.quality.filter_table import read_infos
from lrm_pl.data.manifest import read_manifest, read_samples
from lrm_pl.paths import hash_file
from tests import ROOT
from tests.builders import members, read_tars

pytestmark = pytest.mark.blender

OBJECTS = ("bedsideTable2", "box", "bread", "forkLift", "horse2", "outdoorLamp")
OPTIONS = ("--views", "4", "--res", "48", "--samples", "4", "--shard-size", "2", "--held-out", "1")


def copy_assets(folder, objects=OBJECTS):
    folder.mkdir()
    for name in objects:
        shutil.copy(ROOT / "data_tools" / "demo_assets" / f"{name}.glb", folder)
    return folder


@pytest.fixture(scope="module")
def reference(render_command, tmp_path_factory):
    """One uninterrupted run with one process."""
    folder = tmp_path_factory.mktemp("reference")
    assets = copy_assets(folder / "assets")
    done = render_command(assets, folder / "out", *OPTIONS, "--jobs", "1")
    assert "objects        6 (5 train, 1 held out), 4 views each" in done.stdout
    assert sorted(read_tars(folder / "out")) == [*(f"train-00000{n}.tar" for n in range(3)), "val-000000.tar"]
    return assets, folder / "out"


def test_the_hash_of_each_mesh_is_recorded(reference):
    assets, out = reference
    expected = {name: hash_file(assets / f"{name}.glb") for name in OBJECTS}
    infos = {key: info for shard in read_manifest(out).shards for key, info in read_infos(out, shard)}
    assert {key: info.sha256 for key, info in infos.items()} == expected
    table = pyarrow.parquet.read_table(out / "filter.parquet").to_pylist()
    assert {row["id"]: row["sha256"] for row in table} == expected


@pytest.fixture(scope="module")
def other_assets(render_command, tmp_path_factory):
    """A run with other objects, a mesh with an unexpected hash, and symbolic links; return the process and OUT."""
    folder = tmp_path_factory.mktemp("other")
    real, assets = folder / "real", copy_assets(folder / "assets", ("box", "bread", "horse2"))
    (assets / "horse2.glb").rename(assets / "a.glb")  # so that it is rendered before bread
    row = f"box,Box,Ann,library,CC0-1.0,{'0' * 64}\n"
    (assets / "assets.csv").write_text("id,name,creator,source,license,sha256\n" + row)
    real.mkdir()
    faces = "usemtl red\nf 1 2 3\nf 1 2 4\nusemtl blue\nf 1 3 4\nf 2 3 4\n"
    (real / "a.obj").write_text("mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\n" + faces)
    (real / "a.mtl").write_text("newmtl red\nKd 1 0 0\nnewmtl blue\nKd 0 0 1\n")
    (assets / "one.obj").symlink_to(real / "a.obj")
    (assets / "b").mkdir()
    for name in ("a.obj", "a.mtl"):  # each file is a link to a file with a different name
        blob = shutil.copy(real / name, folder / f"blob_{name[2:]}")
        (assets / "b" / name).symlink_to(blob)
    return render_command(assets, folder / "out", *OPTIONS, "--held-out", "0", "--jobs", "1"), folder


def test_a_mesh_with_an_unexpected_hash_fails_and_the_others_are_rendered(other_assets):
    done, folder = other_assets
    assert "objects        4 (4 train, 0 held out)" in done.stdout
    expected = f"expected sha256 {'0' * 64} as in the asset list, but found "
    assert f"failed: box.glb: {expected}{hash_file(folder / 'assets' / 'box.glb')}" in done.stderr


def test_materials_of_a_symbolic_link_are_read_from_the_target(other_assets):
    rows = pyarrow.parquet.read_table(other_assets[1] / "out" / "filter.parquet").to_pylist()
    found = {(row["id"], row["colored"], row["missing_textures"]) for row in rows}
    assert found >= {("one", True, 0), ("b_a", True, 0)}


def test_images_do_not_depend_on_previously_rendered_objects(reference, other_assets):
    found, expected = (members(out)["bread"][1] for out in (other_assets[1] / "out", reference[1]))
    assert found == expected


def test_a_second_run_renders_nothing(reference, render_command):
    assets, out = reference
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    start = time.monotonic()
    done = render_command(assets, out, *OPTIONS)
    assert "Nothing to render: all 6 objects" in done.stdout
    assert time.monotonic() - start < 10  # Blender was not even started
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_added_mesh_and_a_changed_license_render_one_object(reference, render_command, tmp_path):
    assets, out = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in reference)
    shutil.copy(ROOT / "data_tools" / "demo_assets" / "chair.glb", assets)
    header = "id,name,creator,source,license,sha256\n"
    (assets / "assets.csv").write_text(f"{header}box,Box,Ann,library,CC-BY-4.0,\n")

    def images(folder):
        found = {}
        for shard in read_manifest(folder).shards:
            for key, content in read_samples(folder, shard):
                found |= {(shard.name, key, name): member for name, member in content.items()}
        return found

    options = OPTIONS[:-2]  # --held-out is read from the folder
    done = render_command(assets, out, *options)
    assert "Rendering 1 of 7 objects" in done.stdout
    assert "license of 1 object, without rendering" in done.stdout
    before, after = images(reference[1]), images(out)
    changed = {place for place, content in before.items() if after[place] != content}
    assert {(key, name) for _, key, name in changed} == {("box", "json")}
    assert {shard for shard, key, _ in after.keys() - before.keys()} == {"train-000003.tar"}
    done = render_command(assets, out, *options)
    assert "Nothing to render: all 7 objects" in done.stdout


def test_an_interrupted_run_with_two_processes_resumes_with_the_same_bytes(
    reference, render_python, render_command, tmp_path
):
    """Terminate a run before the first object, and kill it after the first object and after the first shard."""
    assets, expected = reference
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    options = (*OPTIONS, "--jobs", "2")
    command = [render_python, "-m", "data_tools", "render", "--assets", assets, "--out", out, *options]
    for stop, pattern in (
        (signal.SIGTERM, "render.json"),
        (signal.SIGKILL, "parts/*.tar"),
        (signal.SIGKILL, "train-*.tar"),
    ):
        run = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(scratch)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if stop == signal.SIGTERM else subprocess.DEVNULL,
            text=True,
        )
        deadline = time.monotonic() + 60
        while not list(out.glob(pattern)):
            assert run.poll() is None, f"exited with {run.returncode} before {pattern} existed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        run.send_signal(stop)
        _, errors = run.communicate(timeout=60)
        if stop == signal.SIGTERM:
            assert run.returncode == 143
            assert errors.endswith("interrupted; run the same command again to resume\n")
            assert not re.search(r"\*\*\*|stack|Traceback", errors)
            assert list(scratch.glob("lrm-blender-*")) == []
        assert not (out / "manifest.json").exists()
    done = render_command(assets, out, *options)
    assert "Rendering 6 of 6" not in done.stdout
    assert read_tars(out) == read_tars(expected)
    assert read_manifest(out) == read_manifest(expected)
    assert not (out / "parts").exists()


@pytest.mark.soak
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_run_stops_when_the_disk_is_full_and_resumes_afterwards(
    reference, render_python, render_command, tmp_path
):
    assets, expected = reference
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let root mount a small disk")
    try:
        out, filler = disk / "out", disk / "filler"
        command = [render_python, "-m", "data_tools", "render", "--assets", assets, "--out", out, *OPTIONS]
        run = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not list(out.glob("render.json")):
            assert run.poll() is None
            time.sleep(0.002)
        free = os.statvfs(disk)
        filler.write_bytes(
            bytes(max(0, free.f_bavail * free.f_bsize - 24_000))
        )  # somebody else fills the disk
        _, errors = run.communicate(timeout=60)
        assert run.returncode == 1
        assert "error: " in errors
        assert "Free some space, then run the same command again to resume" in errors
        assert "Traceback" not in errors
        assert not (out / "manifest.json").exists()
        filler.unlink()
        render_command(assets, out, *OPTIONS)
        assert read_tars(out) == read_tars(expected)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
