"""Runs over demo objects: identical bytes for every order, number of processes, and interruption."""

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
from lrm_pl.data.manifest import read_index, read_manifest
from lrm_pl.paths import hash_file
from tests import ROOT

pytestmark = pytest.mark.blender

OBJECTS = ("bedsideTable2", "box", "bread", "forkLift", "horse2", "outdoorLamp")
OPTIONS = ("--views", "4", "--res", "48", "--samples", "4", "--shard-size", "2", "--held-out", "1")


def tars(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


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
    assert sorted(tars(folder / "out")) == [*(f"train-00000{n}.tar" for n in range(3)), "val-000000.tar"]
    return assets, folder / "out"


def test_the_hash_of_each_mesh_is_taken_when_it_is_rendered(reference):
    assets, out = reference
    expected = {name: hash_file(assets / f"{name}.glb") for name in OBJECTS}
    infos = {key: info for shard in read_manifest(out).shards for key, info in read_infos(out, shard)}
    assert {key: info.sha256 for key, info in infos.items()} == expected
    table = pyarrow.parquet.read_table(out / "filter.parquet").to_pylist()
    assert {row["id"]: row["sha256"] for row in table} == expected


def test_a_mesh_of_another_hash_than_the_listed_one_is_left_out_with_both(render_command, tmp_path):
    assets = copy_assets(tmp_path / "assets", ("box", "bread"))
    row = f"box,Box,Ann,library,CC0-1.0,{'0' * 64}\n"
    (assets / "assets.csv").write_text("id,name,creator,source,license,sha256\n" + row)
    done = render_command(assets, tmp_path / "out", *OPTIONS, "--held-out", "0")
    assert "objects        1 (1 train, 0 held out)" in done.stdout
    found = hash_file(assets / "box.glb")
    assert (
        f"failed: box.glb: expected sha256 {'0' * 64} as in the asset list, but found {found}" in done.stderr
    )


def test_a_linked_mesh_has_its_materials_where_they_lie(render_command, tmp_path):
    real, assets = tmp_path / "real", tmp_path / "assets"
    real.mkdir()
    assets.mkdir()
    faces = "usemtl red\nf 1 2 3\nf 1 2 4\nusemtl blue\nf 1 3 4\nf 2 3 4\n"
    (real / "a.obj").write_text("mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\n" + faces)
    (real / "a.mtl").write_text("newmtl red\nKd 1 0 0\nnewmtl blue\nKd 0 0 1\n")
    (assets / "one.obj").symlink_to(real / "a.obj")
    (assets / "b").mkdir()
    for name in ("a.obj", "a.mtl"):  # and each file linked on its own, to one of another name
        blob = shutil.copy(real / name, tmp_path / f"blob_{name[2:]}")
        (assets / "b" / name).symlink_to(blob)
    render_command(assets, tmp_path / "out", *OPTIONS, "--held-out", "0")
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "filter.parquet").to_pylist()
    assert {(row["id"], row["colored"], row["missing_textures"]) for row in rows} == {
        ("one", True, 0),
        ("b_a", True, 0),
    }


def test_two_processes_give_the_same_bytes_as_one(reference, render_command, tmp_path):
    assets, expected = reference
    render_command(assets, tmp_path / "out", *OPTIONS, "--jobs", "2")
    assert tars(tmp_path / "out") == tars(expected)


def test_what_was_rendered_before_does_not_matter(reference, render_command, tmp_path):
    _, expected = reference
    assets = copy_assets(tmp_path / "assets", ("horse2", "bread"))
    (tmp_path / "assets" / "horse2.glb").rename(tmp_path / "assets" / "a.glb")  # so that bread comes second
    render_command(assets, tmp_path / "out", *OPTIONS, "--held-out", "0", "--jobs", "1")

    def bread(out):
        for shard in read_manifest(out).shards:
            spans = read_index(out, shard).get("bread")
            if spans:
                raw = (out / shard.name).read_bytes()
                return {name: raw[at : at + size] for name, (at, size) in spans.items()}
        raise AssertionError(out)

    assert bread(tmp_path / "out") == bread(expected)


def test_a_second_run_renders_nothing(reference, render_command):
    assets, out = reference
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    start = time.monotonic()
    done = render_command(assets, out, *OPTIONS)
    assert "Nothing to render: all 6 objects" in done.stdout
    assert time.monotonic() - start < 10  # Blender was not even started
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_one_more_mesh_and_another_license_render_one_object(reference, render_command, tmp_path):
    assets, out = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in reference)
    shutil.copy(ROOT / "data_tools" / "demo_assets" / "chair.glb", assets)
    header = "id,name,creator,source,license,sha256\n"
    (assets / "assets.csv").write_text(f"{header}box,Box,Ann,library,CC-BY-4.0,\n")

    def images(folder):
        found = {}
        for shard in read_manifest(folder).shards:
            raw = (folder / shard.name).read_bytes()
            for key, members in read_index(folder, shard).items():
                for name, (at, size) in members.items():
                    found[shard.name, key, name] = raw[at : at + size]
        return found

    options = OPTIONS[:-2]  # nobody says again how many are held out
    done = render_command(assets, out, *options)
    assert "Rendering 1 of 7 objects" in done.stdout
    assert "license of 1 object, without rendering" in done.stdout
    before, after = images(reference[1]), images(out)
    changed = {place for place, content in before.items() if after[place] != content}
    assert {(key, name) for _, key, name in changed} == {("box", "json")}
    assert {shard for shard, key, _ in after.keys() - before.keys()} == {"train-000003.tar"}
    done = render_command(assets, out, *options)
    assert "Nothing to render: all 7 objects" in done.stdout


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    reference, render_python, render_command, tmp_path
):
    assets, expected = reference
    out = tmp_path / "out"
    command = [render_python, "-m", "data_tools", "render", "--assets", assets, "--out", out, *OPTIONS]
    # killed with nothing, a part, and a shard finished
    for pattern in ("render.json", "parts/*.tar", "train-*.tar"):
        run = subprocess.Popen(
            [str(part) for part in [*command, "--jobs", "2"]],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        give_up = time.monotonic() + 60
        while not list(out.glob(pattern)):
            assert run.poll() is None, f"ended with {run.returncode} before {pattern} was there"
            assert time.monotonic() < give_up
            time.sleep(0.002)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        assert not (out / "manifest.json").exists()
    done = render_command(assets, out, *OPTIONS, "--jobs", "2")
    assert "Rendering 6 of 6" not in done.stdout
    assert tars(out) == tars(expected)
    assert read_manifest(out) == read_manifest(expected)
    assert not (out / "parts").exists()


def test_a_run_that_is_terminated_says_that_it_goes_on_and_leaves_nothing_behind(
    reference, render_python, render_command, tmp_path
):
    assets, expected = reference
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    command = [render_python, "-m", "data_tools", "render", "--assets", assets, "--out", out, *OPTIONS]
    run = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(out.glob("render.json")):
        assert run.poll() is None
        time.sleep(0.002)
    run.terminate()
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 143
    assert errors.endswith("interrupted; run the same command again to resume\n")
    assert not re.search(r"\*\*\*|stack|Traceback", errors)
    assert list(scratch.glob("lrm-blender-*")) == []
    render_command(assets, out, *OPTIONS)
    assert tars(out) == tars(expected)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_stops_the_run_with_one_message_and_the_next_run_goes_on(
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
        assert tars(out) == tars(expected)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
