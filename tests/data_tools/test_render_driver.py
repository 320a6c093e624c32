"""The driver and its folder, with a stand-in for Blender that answers at once."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pyarrow.parquet
import pytest
import ray

from data_tools.__main__ import main
from data_tools.assets.asset_list import hash_file, write_list
from data_tools.assets.scan import find_assets
from data_tools.blender import process as blender_process
from data_tools.blender.process import BlenderError, Limits
from data_tools.quality.filter_table import read_infos
from data_tools.quality.validate import find_index_problems
from data_tools.rendering import driver as render_module
from data_tools.rendering import ray_pool, resume, shard_folder
from data_tools.rendering.settings import SettingsError, write_settings
from data_tools.rendering.shard_folder import FolderError
from data_tools.shards.repack import repack
from lrm_pl.data.manifest import ShardError, read_index, read_manifest, read_samples
from lrm_pl.data.schema import decode_sample
from tests.builders import RENDER_SETTINGS, STAND_IN_WORKER, read_tars


@pytest.fixture
def assets(tmp_path):
    folder = tmp_path / "assets"
    folder.mkdir()
    for name in "abcdef":
        (folder / f"{name}.glb").write_text("fine")
    return folder


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(blender_process, "COMMAND", (sys.executable, str(STAND_IN_WORKER)))


@pytest.fixture(autouse=True, scope="module")
def one_ray_for_all():
    """Starting Ray takes seconds; ``render`` uses the one that there is."""
    with ray_pool.connect_ray(4):
        yield


def run(assets, out, settings=RENDER_SETTINGS, jobs=2, **limits):
    options = ray_pool.PoolOptions(assets, settings, jobs, Limits(**{"time_s": 30.0} | limits))
    return render_module.render(find_assets(assets, out), out, settings, options)


def failures(out):
    lines = (out / "failures.jsonl").read_text().splitlines()
    return {record["id"]: record["reason"] for record in map(json.loads, lines)}


def test_a_run_makes_every_shard_and_a_second_run_renders_nothing(assets, tmp_path, capfd):
    out = tmp_path / "out"
    manifest = run(assets, out)
    # sha256 of d is the smallest of a to f
    assert [(s.name, s.samples) for s in manifest.shards] == [
        ("train-000000.tar", 2),
        ("train-000001.tar", 2),
        ("train-000002.tar", 1),
        ("val-000000.tar", 1),
    ]
    assert list(read_index(out, manifest.shards[3])) == ["d"]
    assert read_manifest(out) == manifest
    assert manifest.render["renderer"] == "stand-in"
    assert {path.name for path in out.iterdir()} >= {"contact_sheet.png", "render.json", "filter.parquet"}
    assert not (out / "parts").exists()
    assert f"make train DATA={out}" in capfd.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert run(assets, out) == manifest
    assert "Nothing to render: all 6 objects" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == before


def test_a_failure_leaves_a_hole_and_moves_nothing_else(assets, tmp_path, capfd):
    run(assets, tmp_path / "whole")
    for name, what in {"b": "bad", "c": "dies", "e": "bad"}.items():
        (assets / f"{name}.glb").write_text(what)
    out = tmp_path / "out"
    manifest = run(assets, out)
    assert manifest.failures == 3
    held = {shard.name: list(read_index(out, shard)) for shard in manifest.shards}
    # train is a b | c e | f: the second shard has no object left, it is not written and not in the manifest
    assert held == {"train-000000.tar": ["a"], "train-000002.tar": ["f"], "val-000000.tar": ["d"]}
    whole, holed = read_tars(tmp_path / "whole"), read_tars(out)
    assert all(holed[name] == whole[name] for name in ("train-000002.tar", "val-000000.tar"))
    reasons = failures(out)
    assert reasons["b"] == "is bad"
    assert "Blender ended with -6; its last lines" in reasons["c"]
    assert "about to die" in reasons["c"]  # the tail of what it printed
    logs = {path.name: path.read_text() for path in (out / "quarantine").iterdir()}
    assert logs["b.log"] == "is bad\n\nwhat Blender says\n"
    assert logs["c.log"].endswith("about to die\n")
    table = pyarrow.parquet.read_table(out / "filter.parquet").to_pylist()
    assert [row["id"] for row in table] == list("abcdef")
    assert {row["id"] for row in table if row["outcome"] == "failed" and row["triangles"] is None} == set(
        "bce"
    )
    assert "failed         3, see" in capfd.readouterr().out


def test_failures_are_tried_again_once_their_list_is_deleted(assets, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(assets, whole)
    (assets / "b.glb").write_text("bad once")  # fails while the file "mended" is absent
    run(assets, out)
    assert set(failures(out)) == {"b"}
    (tmp_path / "assets" / "mended").touch()
    assert run(assets, out).failures == 1  # remembered
    (out / "failures.jsonl").unlink()
    assert run(assets, out).failures == 0
    index = read_index(out, read_manifest(out).shards[0])
    assert list(index) == ["a", "b"]


def test_an_object_over_the_time_limit_costs_only_itself(assets, tmp_path):
    (assets / "b.glb").write_text("slow")
    out = tmp_path / "out"
    start = time.monotonic()
    assert run(assets, out, time_s=1.0).failures == 1
    assert time.monotonic() - start < 20
    assert failures(out)["b"].startswith("Blender took longer than 1 s")


def test_the_time_limit_is_ten_minutes_and_grows_with_the_samples_that_are_computed():
    def limit(views, resolution, samples):
        asked = dataclasses.replace(RENDER_SETTINGS, views=views, resolution=resolution, samples=samples)
        return blender_process.time_limit_s(asked)

    assert limit(16, 128, 16) == pytest.approx(621, abs=1)
    assert limit(2, 8, 1) == pytest.approx(600, abs=0.01)
    assert limit(64, 512, 16) == pytest.approx(600 + 64 * 2**18 * 16 / 2e5)  # half an hour; it took 130 s
    assert limit(64, 1024, 128) == pytest.approx(12 * 3600, rel=0.02)


def test_if_every_asset_fails_the_run_fails(assets, tmp_path):
    for path in assets.iterdir():
        path.write_text("bad")
    with pytest.raises(FolderError, match="at least one rendered object, but found 6 failures"):
        run(assets, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "found", "remedy"),
    [
        (
            {"views": 3},
            "views: expected 3, but found 2 in the folder",
            "Use the settings of the folder, or choose another OUT=.*merge",
        ),
        ({"rules": ("white <= 1",)}, "rules: expected", r"repack --shards .* --out \.\.\. --where"),
        ({"held_out": 2}, "held_out: expected 2", "repack .* --held-out N"),
        ({"shard_size": 3}, "shard_size: expected 3", "repack .* --shard-size N"),
        ({"resolution": 4}, "resolution: expected 4", "repack .* --res N"),
    ],
)
def test_other_settings_are_refused_with_what_needs_no_rendering(assets, tmp_path, change, found, remedy):
    out = tmp_path / "out"
    out.mkdir()
    write_settings(out, RENDER_SETTINGS, "stand-in")
    with pytest.raises(SettingsError, match=found) as refusal:
        run(assets, out, dataclasses.replace(RENDER_SETTINGS, **change))
    assert re.search(remedy, str(refusal.value))
    assert "delete" not in str(refusal.value)


@pytest.fixture
def rendered_ids(monkeypatch):
    """Notes which objects Blender processes are given."""
    given = []
    original = ray_pool.RenderPool.render

    def render(pool, assets):
        given.append([asset.id for asset in assets])
        return original(pool, assets)

    monkeypatch.setattr(ray_pool.RenderPool, "render", render)
    return given


def write_table(assets, **licenses):
    rows = "".join(f"{key},,,,{license},\n" for key, license in licenses.items())
    (assets / "assets.csv").write_text("id,name,creator,source,license,sha256\n" + rows)


def infos(out):
    return {key: info for shard in read_manifest(out).shards for key, info in read_infos(out, shard)}


def licenses(out):
    return {key: info.license for key, info in infos(out).items() if info.license != "unknown"}


def images(out):
    """Return id -> shard, and everything but the record."""
    return {
        key: (shard.name, {name: content for name, content in members.items() if name != "json"})
        for shard in read_manifest(out).shards
        for key, members in read_samples(out, shard)
    }


def test_an_added_mesh_and_a_changed_license_render_one_object(assets, tmp_path, rendered_ids, capfd):
    out = tmp_path / "out"
    before = run(assets, out)
    old, old_images = read_tars(out), images(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (assets / "0_first_by_name.glb").write_text("fine")
    write_table(assets, c="CC0-1.0")
    after = run(assets, out)
    assert rendered_ids == [list("abcefd"), ["0_first_by_name"]]
    described = [(shard.name, shard.samples) for shard in before.shards]
    assert [(shard.name, shard.samples) for shard in after.shards] == [*described, ("train-000003.tar", 1)]
    assert {name for name in old if read_tars(out)[name] != old[name]} == {"train-000001.tar"}, "where c lies"
    assert {key: images(out)[key] for key in old_images} == old_images
    assert licenses(out) == {"c": "CC0-1.0"}
    del times["train-000001.tar"]
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    for shard in after.shards:
        assert hash_file(out / shard.name) == shard.sha256
        assert not list(find_index_problems(out / shard.name, read_index(out, shard)))
    assert "updated        name, creator, source or license of 1 object," in capfd.readouterr().out
    assert run(assets, out) == after
    write_table(assets, c="CC-BY-4.0", d="CC-BY-4.0")
    run(assets, out)
    assert licenses(out) == {"c": "CC-BY-4.0", "d": "CC-BY-4.0"}
    assert len(rendered_ids) == 2, "a license alone renders nothing"
    table = pyarrow.parquet.read_table(out / "filter.parquet").to_pylist()
    assert [row["id"] for row in table] == ["0_first_by_name", *"abcdef"]
    assert {row["sha256"] for row in table} == {hashlib.sha256(b"fine").hexdigest()}


@pytest.mark.parametrize("was_copied", [False, True])
def test_a_shard_that_was_damaged_is_not_given_a_new_hash(assets, tmp_path, was_copied):
    out = tmp_path / "out"
    run(assets, out)
    shard = out / "train-000001.tar"
    content, times = bytearray(shard.read_bytes()), shard.stat()
    content[content.index(b"RIFF") + 30] ^= 1
    shard.write_bytes(content)
    if was_copied:  # every file is newer than the manifest; an added mesh rewrites no other shard
        (assets / "0_first_by_name.glb").write_text("fine")
    else:
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
        write_table(assets, c="CC0-1.0")
    with pytest.raises(
        FolderError, match=r"train-000001\.tar: expected the sha256 .*found another one.* Delete it"
    ):
        run(assets, out)
    assert shard.read_bytes() == content
    shard.unlink()
    (out / "manifest.json").unlink()
    for made in run(assets, out).shards:
        assert hash_file(out / made.name) == made.sha256


def test_a_mesh_that_is_added_beside_one_of_its_name_changes_no_id(assets, tmp_path, rendered_ids):
    out = tmp_path / "out"
    write_table(assets, b="CC0-1.0")
    run(assets, out)
    (assets / "b.ply").write_text("fine")
    (assets / "b.fbx").write_text("fine")
    run(assets, out)
    assert rendered_ids[1:] == [["b_fbx", "b_ply"]]
    assert licenses(out) == {"b": "CC0-1.0"}


def raising(*_, **__):
    raise InterruptedError


def test_an_addition_that_was_interrupted_ends_with_the_bytes_of_one_that_was_not(
    assets, tmp_path, rendered_ids
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(assets, whole)
    shutil.copytree(whole, out)
    for name in ("aa", "bb", "zz"):
        (assets / f"{name}.glb").write_text("fine")
    write_table(assets, a="CC0-1.0", zz="CC0-1.0")
    run(assets, whole)
    for module, name in (
        (resume, "write_list"),
        (render_module, "write_part"),
        (render_module, "write_planned_shard"),
        (render_module, "write_filter_table"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, raising)
            with pytest.raises(InterruptedError):
                run(assets, out)
    run(assets, out)
    assert read_tars(out) == read_tars(whole)
    assert read_manifest(out) == read_manifest(whole)
    assert not {*"abcdef"} & {key for ids in rendered_ids[1:] for key in ids}


def test_a_kill_while_records_are_updated_loses_no_image(assets, tmp_path, rendered_ids, monkeypatch):
    (assets / "a.glb").write_text("white")  # a is rejected, b kept: two files of one shard
    out = tmp_path / "out"
    run(assets, out)
    old = images(out)
    write_table(assets, a="CC0-1.0", b="CC0-1.0")
    original, left = shard_folder.write_shard, [0]

    def write_shard(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise InterruptedError
        return original(*args, **options)

    monkeypatch.setattr(shard_folder, "write_shard", write_shard)
    for writes in (0, 1, 2, 3):
        left[0] = writes
        with pytest.raises(InterruptedError):
            run(assets, out)
    write_table(assets, b="CC-BY-4.0")  # and in the middle of it, another change
    left[0] = 100
    run(assets, out)
    assert (images(out), len(rendered_ids)) == (old, 1)
    assert licenses(out) == {"b": "CC-BY-4.0"}


def test_a_mesh_that_was_changed_after_it_was_rendered_is_refused_and_one_that_was_touched_is_not(
    assets, tmp_path, rendered_ids
):
    out = tmp_path / "out"
    manifest = run(assets, out)
    for path in assets.glob("*.glb"):
        os.utime(path, (1, 1))
    assert run(assets, out) == manifest
    (assets / "a.glb").write_text("fin2")  # of the same size
    message = r"a\.glb: expected the rendered mesh with sha256 "
    with pytest.raises(SettingsError, match=message) as refusal:
        run(assets, out)
    tar = out / "train-000000.tar"
    assert f"delete {tar} and {out / 'manifest.json'}" in str(refusal.value)
    tar.unlink()
    (out / "manifest.json").unlink()
    run(assets, out)
    assert rendered_ids == [list("abcefd"), ["a", "b"]]
    assert infos(out)["a"].sha256 == hashlib.sha256(b"fin2").hexdigest()


def test_of_a_copied_terabyte_only_the_sizes_are_compared_and_that_is_said(
    assets, tmp_path, monkeypatch, capfd
):
    out = tmp_path / "out"
    manifest = run(assets, out)
    monkeypatch.setattr(resume, "MAX_HASHED_BYTES", 10)
    for path in assets.glob("*.glb"):
        os.utime(path, (1, 1))
    assert run(assets, out) == manifest
    assert "note: 6 meshes in" in capfd.readouterr().err
    assert run(assets, out) == manifest
    assert "note:" not in capfd.readouterr().err, "the times are known now"
    for path in assets.glob("*.glb"):
        os.utime(path, (2, 2))
    (assets / "a.glb").write_text("of another size")
    with pytest.raises(SettingsError, match="expected the rendered mesh"):
        run(assets, out)


def test_a_mesh_that_failed_may_be_mended_or_removed(assets, tmp_path, rendered_ids):
    out = tmp_path / "out"
    for name in "be":
        (assets / f"{name}.glb").write_text("bad")
    run(assets, out)
    (assets / "b.glb").write_text("fine")
    (assets / "e.glb").unlink()
    assert run(assets, out).failures == 1, "b is remembered"
    assert set(failures(out)) == {"b"}
    (out / "failures.jsonl").unlink()
    manifest = run(assets, out)
    assert rendered_ids[1:] == [["b"]]
    held = {shard.name: list(read_index(out, shard)) for shard in manifest.shards}
    assert held["train-000000.tar"] == ["a", "b"]
    assert held["train-000001.tar"] == ["c"]


def test_what_is_rendered_and_no_longer_listed_or_listed_otherwise_is_refused(assets, tmp_path):
    out = tmp_path / "out"
    run(assets, out)
    (assets / "a.glb").rename(tmp_path / "a.glb")
    with pytest.raises(SettingsError, match=r"found no 'a'. Check ASSETS=.* data_tools merge`"):
        run(assets, out)
    (tmp_path / "a.glb").rename(assets / "a.glb")
    header = "id,name,creator,source,license,sha256,up\n"
    listed = find_assets(assets)
    write_list(assets, [dataclasses.replace(a, up="z" if a.id == "b" else "") for a in listed])
    with pytest.raises(SettingsError, match=r"asset 'b': expected the rendered up axis 'y', but found 'z'"):
        run(assets, out)
    (assets / "assets.parquet").unlink()
    (assets / "assets.csv").write_text(header + f"b,,,,,{'0' * 64},\n")
    with pytest.raises(SettingsError, match=rf"b\.glb: expected the rendered mesh .*, but found {'0' * 64}"):
        run(assets, out)
    (assets / "assets.csv").unlink()
    for asset, split in (("d", "val"), ("a", "train")):
        write_list(assets, [dataclasses.replace(a, split=split if a.id == asset else "") for a in listed])
        run(assets, out)
    write_list(assets, [dataclasses.replace(a, split="train" if a.id == "d" else "") for a in listed])
    with pytest.raises(
        SettingsError, match=r"asset 'd': expected the planned split 'val', .* repack --shards"
    ):
        run(assets, out)


def test_new_meshes_train_unless_their_list_holds_them_out(assets, tmp_path):
    out = tmp_path / "out"
    run(assets, out)
    listed = find_assets(assets)
    new = [
        dataclasses.replace(listed[0], id=key, split=split) for key, split in {"g": "", "h": "val"}.items()
    ]
    write_list(assets, [*listed, *new])
    manifest = run(assets, out)
    held = {shard.name: list(read_index(out, shard)) for shard in manifest.shards}
    names = ("train-000003.tar", "val-000000.tar", "val-000001.tar")
    assert [held[name] for name in names] == [["g"], ["d"], ["h"]]


def test_a_number_of_held_out_objects_that_nobody_asked_for_stays_as_it_was(assets, tmp_path, capsys):
    for name in "ghijk":
        (assets / f"{name}.glb").write_text("fine")
    options = ["--views", "2", "--res", "8", "--samples", "1", "--shard-size", "2"]
    command = ["render", "--assets", str(assets), "--out", str(tmp_path / "out"), *options]
    assert main(command) == 0  # a sixth of 11 is 1
    (assets / "l.glb").write_text("fine")  # a sixth of 12 would be 2
    assert main(command) == 0
    assert "objects        12 (11 train, 1 held out)" in capsys.readouterr().out


def test_shards_of_unknown_settings_are_not_continued(assets, tmp_path):
    out = tmp_path / "out"
    run(assets, out)
    (out / "render.json").unlink()
    with pytest.raises(SettingsError, match=r"found manifest.json with unknown settings"):
        run(assets, out)


def test_another_renderer_does_not_continue_a_folder(assets, tmp_path):
    out = tmp_path / "out"
    run(assets, out)
    record = json.loads((out / "render.json").read_text())
    record["renderer"] = "blender 5.0.1 cycles cuda"
    (out / "render.json").write_text(json.dumps(record))
    for path in (out / "manifest.json", out / "train-000000.tar"):
        path.unlink()
    with pytest.raises(
        SettingsError, match=r"renderer: expected 'stand-in', but found 'blender 5.0.1 cycles cuda'"
    ):
        run(assets, out)


def test_a_lost_shard_is_made_again_and_half_written_files_are_never_taken_for_whole(assets, tmp_path):
    out = tmp_path / "out"
    run(assets, out)
    expected = read_tars(out)
    (out / "manifest.json").unlink()
    (out / "train-000001.tar").rename(out / "train-000001.tar.partial")
    (out / "parts").mkdir()
    (out / "parts" / "c.tar.partial").write_bytes(expected["train-000001.tar"][:700])
    run(assets, out)
    assert read_tars(out) == expected
    assert not list(out.rglob("*.partial"))


def test_a_damaged_shard_is_named_with_the_remedy(assets, tmp_path):
    out = tmp_path / "out"
    run(assets, out)
    tar = out / "train-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1024])
    with pytest.raises(
        ShardError, match=rf"expected {len(whole)} bytes, but found {len(whole) - 1024}.*[dD]elete it"
    ):
        run(assets, out)
    tar.unlink()
    (out / "manifest.json").unlink()
    run(assets, out)
    assert tar.read_bytes() == whole


def test_too_little_space_is_said_before_anything_is_rendered(assets, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    message = r"expected about 0\.1 MB of free disk space, but found 0\.0 MB. Free some space, then run"
    with pytest.raises(FolderError, match=message):
        run(assets, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("where", ["driver", "worker"])
def test_a_disk_that_fills_up_stops_the_run_and_the_next_run_goes_on(assets, tmp_path, monkeypatch, where):
    run(assets, tmp_path / "whole")
    out, original = tmp_path / "out", shard_folder.write_shard
    if where == "worker":
        (assets / "full").touch()  # the stand-in answers "no space" while this file is there
    else:

        def fail(folder, name, *args, **options):
            if name == "train-000001.tar":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(folder, name, *args, **options)

        monkeypatch.setattr(shard_folder, "write_shard", fail)
    with pytest.raises(FolderError, match=r"free disk space.* run the same command again to resume"):
        run(assets, out)
    assert not (out / "manifest.json").exists()
    if where == "worker":
        (assets / "full").unlink()
    else:
        monkeypatch.setattr(shard_folder, "write_shard", original)
    run(assets, out)
    assert read_tars(out) == read_tars(tmp_path / "whole")


def test_a_crash_costs_the_object_one_more_try(assets, tmp_path):
    run(assets, tmp_path / "whole")
    (assets / "b.glb").write_text("dies once")
    assert run(assets, tmp_path / "out").failures == 0
    assert read_tars(tmp_path / "out") == read_tars(tmp_path / "whole")


def test_an_object_over_the_memory_limit_costs_only_itself(assets, tmp_path):
    (assets / "b.glb").write_text("hungry")
    out = tmp_path / "out"
    assert run(assets, out, memory_gb=0.3).failures == 1
    assert re.match(r"Blender took 0\.[345] GB of memory, more than 0\.3 GB", failures(out)["b"])


def test_a_process_serves_as_many_objects_as_it_may_and_is_replaced(assets, tmp_path):
    for path in assets.iterdir():
        path.write_text("counts")
    run(assets, tmp_path / "out", jobs=1, objects=2)
    shards = read_manifest(tmp_path / "out").shards
    samples = [decode_sample(*found) for shard in shards for found in read_samples(tmp_path / "out", shard)]
    assert sorted(sample.info.seed for sample in samples) == [1, 1, 1, 2, 2, 2]


def test_objects_that_break_a_rule_go_to_shards_of_their_own(assets, tmp_path, capfd):
    run(assets, tmp_path / "whole")
    for name in "bd":
        (assets / f"{name}.glb").write_text("white")
    out = tmp_path / "out"
    manifest = run(assets, out)
    held = {shard.name: list(read_index(out, shard)) for shard in manifest.shards}
    assert held == {
        "train-000000.tar": ["a"],
        "rejected-train-000000.tar": ["b"],
        "train-000001.tar": ["c", "e"],
        "train-000002.tar": ["f"],
        "rejected-val-000000.tar": ["d"],
    }
    assert [shard.samples for shard in manifest.split("train")] == [1, 2, 1]
    assert manifest.split("val") == ()
    assert "rejected       2, see" in capfd.readouterr().out
    rows = {row["id"]: row for row in pyarrow.parquet.read_table(out / "filter.parquet").to_pylist()}
    assert (rows["b"]["outcome"], rows["b"]["reason"]) == ("rejected", "white 1, expected <= 0.95")
    assert (rows["a"]["outcome"], rows["a"]["reason"], rows["a"]["white"]) == ("kept", "", 0.0)
    assert run(assets, out) == manifest  # nothing is rendered again


@pytest.mark.parametrize("victim", ["Blender", "Ray worker"])
def test_whatever_is_killed_at_work_the_bytes_are_the_same(assets, tmp_path, victim):
    run(assets, tmp_path / "whole")
    for name in "ab":
        (assets / f"{name}.glb").write_text("waits")
    out, killed = tmp_path / "out", []

    def kill():
        while not killed:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    at_work = [str(STAND_IN_WORKER) in process.cmdline() and (assets / "a.working").exists()]
                    if any(at_work):
                        target = process if victim == "Blender" else process.parent()
                        assert victim == "Blender" or target.name().startswith("ray::")
                        target.send_signal(signal.SIGKILL)
                        killed.append(target.pid)
                        (assets / "go").touch()
                        return
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    manifest = run(assets, out, jobs=1)
    thread.join()
    assert killed
    assert manifest.failures == 0
    assert read_tars(out) == read_tars(tmp_path / "whole")


def test_blender_goes_with_its_ray_worker(assets, tmp_path):
    options = ray_pool.PoolOptions(assets, RENDER_SETTINGS, 1)
    pool = ray_pool.RenderPool(options)
    blenders = [p for p in psutil.Process().children(recursive=True) if str(STAND_IN_WORKER) in p.cmdline()]
    assert len(blenders) == 1
    pool.close()
    blenders[0].wait(timeout=20)


def test_processes_that_are_starting_when_a_run_ends_leave_their_cpus_to_the_next(assets):
    options = ray_pool.PoolOptions(assets, RENDER_SETTINGS, 4)
    for wait_s in (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6):
        pool = ray_pool.RenderPool(options)
        pool._grow(0, 4)
        time.sleep(wait_s)
        pool.close()
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 4


def test_two_runs_in_one_folder_are_refused(assets, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(shard_folder, "LOCK_TIMEOUT_S", 0.2)
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FolderError, match=r"expected no other process .*, but found one"):
            run(assets, out)


def test_blender_that_does_not_start_is_one_clear_error(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(blender_process, "COMMAND", (sys.executable, "-c", "raise SystemExit('no bpy')"))
    with pytest.raises(
        BlenderError, match=r"(?s)expected Blender to start .* no bpy.*run `make .venv-render`"
    ):
        run(assets, tmp_path / "out")


def test_errors_reach_the_user_as_one_line_and_a_status(tmp_path, capsys):
    assert main(["render", "--assets", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: expected glb, gltf, obj, ply, fbx files in ")
    with pytest.raises(SystemExit):
        main(["render", "--views", "0"])
    assert "expected a number from 1 to 999, but found 0" in capsys.readouterr().err
    (tmp_path / "a.glb").touch()
    assert main(["render", "--assets", str(tmp_path), "--out", str(tmp_path / "b" / "..")]) == 1
    assert "expected different folders for meshes and shards" in capsys.readouterr().err
    for place in (tmp_path / "a.glb", tmp_path / "a.glb" / "out"):
        assert main(["render", "--assets", str(tmp_path), "--out", str(place)]) == 1
        assert capsys.readouterr().err == (
            f"error: expected a folder at {place}, but found a file. Choose another path\n"
        )


def test_a_line_of_the_failures_that_is_none_is_named_with_the_remedy(assets, tmp_path):
    run(assets, tmp_path)
    for line in ("garbage", "[1]", '{"id": "a"}'):
        (tmp_path / "failures.jsonl").write_text(f"\n{line}\n")
        with pytest.raises(
            FolderError, match=r"failures\.jsonl, line 2: expected a record with id, .*Delete"
        ):
            run(assets, tmp_path)


def test_a_finished_folder_gets_its_table_and_contact_sheet_again(assets, tmp_path, rendered_ids):
    out = tmp_path / "out"
    run(assets, out)
    rendered_ids.clear()
    names = ("filter.parquet", "contact_sheet.png", "manifest.json")
    before = {name: (out / name).read_bytes() for name in names}
    for name in names[:2]:
        (out / name).unlink()
        run(assets, out)
        assert {name: (out / name).read_bytes() for name in names} == before
    assert rendered_ids == []


def test_a_blender_that_is_killed_while_it_starts_is_started_again(assets, tmp_path):
    (assets / "a.glb").write_text("dies")  # so that a second process has to be started
    (assets / "one start fails").touch()
    manifest = run(assets, tmp_path / "out", jobs=1)
    assert not (assets / "one start fails").exists()
    assert sum(shard.samples for shard in manifest.shards) == 5


def test_a_network_that_is_down_stops_the_run_and_blames_no_object(assets, tmp_path):
    for name in "abcdef":
        (assets / f"{name}.glb").write_text("unreachable")
    with pytest.raises(FolderError, match=r"5 consecutive download failures: .*Run the same command again"):
        run(assets, tmp_path / "out")
    assert shard_folder.read_failures(tmp_path / "out") == {}
    (assets / "mended").touch()
    manifest = run(assets, tmp_path / "out")
    assert sum(shard.samples for shard in manifest.shards) == 6
    assert manifest.failures == 0


def test_where_the_rules_reject_everything_other_rules_still_need_no_rendering(assets, tmp_path):
    for path in assets.iterdir():
        path.write_text("white")
    for _ in range(2):
        with pytest.raises(FolderError, match=r"0 failed and 6 rejected ones.* repack --shard"):
            run(assets, tmp_path / "out")
    repack([tmp_path / "out"], tmp_path / "all", rules=["white <= 1"])
    assert sum(shard.samples for shard in read_manifest(tmp_path / "all").shards) == 6


def test_a_line_of_the_failures_that_a_killed_run_began_is_not_taken_for_one(tmp_path):
    path = tmp_path / "failures.jsonl"
    for key in "ba":
        shard_folder.add_failure(path, {"id": key, "file": f"{key}.glb", "reason": "stühle \udc80"})
    path.write_bytes(path.read_bytes() + b'{"id": "c", "fi')
    found = shard_folder.read_failures(tmp_path)
    assert list(found) == ["b", "a"]
    shard_folder.write_failures(path, found)
    assert [line[:10] for line in path.read_text().splitlines()] == ['{"id": "a"', '{"id": "b"']
    assert shard_folder.read_failures(tmp_path) == found


def test_ray_on_this_machine_writes_nothing_into_the_users_home(tmp_path, root):
    home = tmp_path / "home"
    home.touch()  # not even a folder
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    code = "from data_tools.rendering.ray_pool import connect_ray\nwith connect_ray(1): print('up')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment | {"HOME": str(home), "PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "up\n", done.stderr
