"""Resuming of rendering with added, changed and failed meshes, changed settings and missing shards."""

import dataclasses
import hashlib
import json
import os
import re
import shutil

import pyarrow.parquet
import pytest

from data_tools.__main__ import main
from data_tools.assets.asset_list import write_list
from data_tools.assets.scan import find_assets
from data_tools.quality.filter_table import read_infos
from data_tools.quality.validate import find_file_problems
from data_tools.rendering import driver as render_module
from data_tools.rendering import resume, shard_folder
from data_tools.rendering.settings import write_settings
from data_tools.shards.repack import repack
from lrm_pl.data.manifest import ShardError, read_index, read_manifest, read_samples
from lrm_pl.errors import InputError
from lrm_pl.paths import hash_file
from tests.builders import RENDER_SETTINGS, read_tars
from tests.data_tools.driver_runs import InProcessPool, failures, run

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.mark.parametrize(
    ("change", "found", "remedy"),
    [
        (
            {"views": 3},
            "views: expected 3, but found 2 in the folder",
            "Use the settings of the folder, or choose another output folder .*merge",
        ),
        ({"rules": ("white <= 1",)}, "rules: expected", r"repack --shards .* --out \.\.\. --where"),
        ({"held_out": 2}, "held_out: expected 2", "repack .* --held-out N"),
        ({"shard_size": 3}, "shard_size: expected 3", "repack .* --shard-size N"),
        ({"resolution": 4}, "resolution: expected 4", "repack .* --res N"),
        ({"depth": True}, "depth: expected True, but found False", "choose another output folder"),
    ],
)
def test_changed_settings_raise_an_error_that_suggests_repack(assets, tmp_path, change, found, remedy):
    out = tmp_path / "out"
    out.mkdir()
    write_settings(out, RENDER_SETTINGS, "stand-in")
    with pytest.raises(InputError, match=found) as refusal:
        run(assets, out, dataclasses.replace(RENDER_SETTINGS, **change))
    assert re.search(remedy, str(refusal.value))
    assert "delete" not in str(refusal.value)


@pytest.fixture
def rendered_ids(monkeypatch):
    """List of the ids that each call of ``RenderPool.render`` receives."""
    given = []
    original = InProcessPool.render

    def render(pool, assets):
        given.append([asset.id for asset in assets])
        return original(pool, assets)

    monkeypatch.setattr(InProcessPool, "render", render)
    return given


def write_table(assets, **licenses):
    rows = "".join(f"{key},,,,{license},\n" for key, license in licenses.items())
    (assets / "assets.csv").write_text("id,name,creator,source,license,sha256\n" + rows)


def infos(out):
    return {key: info for shard in read_manifest(out).shards for key, info in read_infos(out, shard)}


def licenses(out):
    return {key: info.license for key, info in infos(out).items() if info.license != "unknown"}


def images(out):
    """Return a mapping from ids to tuples (shard, members except for the record)."""
    return {
        key: (shard.name, {name: content for name, content in members.items() if name != "json"})
        for shard in read_manifest(out).shards
        for key, members in read_samples(out, shard)
    }


def test_an_added_mesh_is_rendered_and_a_changed_license_is_only_updated(assets, out, rendered_ids, capfd):
    before = read_manifest(out)
    old, old_images = read_tars(out), images(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (assets / "0_first_by_name.glb").write_text("fine")
    write_table(assets, c="CC0-1.0")
    after = run(assets, out)
    assert rendered_ids == [["0_first_by_name"]]
    described = [(shard.name, shard.samples) for shard in before.shards]
    assert [(shard.name, shard.samples) for shard in after.shards] == [*described, ("train-000003.tar", 1)]
    assert {name for name in old if read_tars(out)[name] != old[name]} == {"train-000001.tar"}, (
        "the shard that contains c"
    )
    assert {key: images(out)[key] for key in old_images} == old_images
    assert licenses(out) == {"c": "CC0-1.0"}
    del times["train-000001.tar"]
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    for shard in after.shards:
        assert not list(find_file_problems(out, shard))
    assert "updated        name, creator, source or license of 1 object," in capfd.readouterr().out
    assert run(assets, out) == after
    write_table(assets, c="CC-BY-4.0", d="CC-BY-4.0")
    run(assets, out)
    assert licenses(out) == {"c": "CC-BY-4.0", "d": "CC-BY-4.0"}
    assert len(rendered_ids) == 1, "a changed license is updated without rendering"
    table = pyarrow.parquet.read_table(out / "filter.parquet").to_pylist()
    assert [row["id"] for row in table] == ["0_first_by_name", *"abcdef"]
    assert {row["sha256"] for row in table} == {hashlib.sha256(b"fine").hexdigest()}


@pytest.mark.parametrize("was_copied", [False, True])
def test_the_hash_of_a_damaged_shard_is_not_updated(assets, out, was_copied):
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
        InputError,
        match=r"train-000001\.tar: expected the sha256 .*found a different sha256.* Delete the damaged file",
    ):
        run(assets, out)
    assert shard.read_bytes() == content
    shard.unlink()
    (out / "manifest.json").unlink()
    for made in run(assets, out).shards:
        assert hash_file(out / made.name) == made.sha256


def test_ids_do_not_change_if_a_mesh_with_the_same_name_is_added(assets, out, rendered_ids):
    write_table(assets, b="CC0-1.0")
    (assets / "b.ply").write_text("fine")
    (assets / "b.fbx").write_text("fine")
    run(assets, out)
    assert rendered_ids == [["b_fbx", "b_ply"]]
    assert licenses(out) == {"b": "CC0-1.0"}


def raising(*_, **__):
    raise InterruptedError


def test_an_interrupted_addition_resumes_to_the_same_bytes(assets, out, tmp_path, rendered_ids):
    whole = tmp_path / "whole"
    shutil.copytree(out, whole)
    for name in ("aa", "bb", "zz"):
        (assets / f"{name}.glb").write_text("fine")
    write_table(assets, a="CC0-1.0", zz="CC0-1.0")
    run(assets, whole)
    for module, name in (
        (resume, "write_list"),
        (shard_folder, "write_part"),
        (shard_folder, "write_planned_shard"),
        (render_module, "write_filter_table"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, raising)
            with pytest.raises(InterruptedError):
                run(assets, out)
    run(assets, out)
    assert read_tars(out) == read_tars(whole)
    assert read_manifest(out) == read_manifest(whole)
    assert not {*"abcdef"} & {key for ids in rendered_ids for key in ids}


def test_an_interrupted_update_of_records_loses_no_image(assets, tmp_path, rendered_ids, monkeypatch):
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
    for writes in (0, 1, 2):
        left[0] = writes
        with pytest.raises(InterruptedError):
            run(assets, out)
    write_table(assets, b="CC-BY-4.0")  # and in the middle of it, another change
    left[0] = 100
    run(assets, out)
    assert (images(out), len(rendered_ids)) == (old, 1)
    assert licenses(out) == {"b": "CC-BY-4.0"}


def test_a_changed_mesh_raises_an_error_and_a_changed_modification_time_does_not(assets, out, rendered_ids):
    manifest = read_manifest(out)
    for path in assets.glob("*.glb"):
        os.utime(path, (1, 1))
    assert run(assets, out) == manifest
    (assets / "a.glb").write_text("fin2")  # the same size
    message = r"a\.glb: expected the rendered mesh with the sha256 "
    with pytest.raises(InputError, match=message) as refusal:
        run(assets, out)
    tar = out / "train-000000.tar"
    assert f"delete {tar} and {out / 'manifest.json'} to render it again" in str(refusal.value)
    tar.unlink()
    (out / "manifest.json").unlink()
    run(assets, out)
    assert rendered_ids == [["a", "b"]]
    assert infos(out)["a"].sha256 == hashlib.sha256(b"fin2").hexdigest()


def test_only_sizes_are_compared_if_many_modification_times_have_changed(assets, out, monkeypatch, capfd):
    manifest = read_manifest(out)
    monkeypatch.setattr(resume, "MAX_HASHED_BYTES", 10)
    for path in assets.glob("*.glb"):
        os.utime(path, (1, 1))
    assert run(assets, out) == manifest
    assert "note: 6 meshes in" in capfd.readouterr().err
    assert run(assets, out) == manifest
    assert "note:" not in capfd.readouterr().err, "the new times are recorded"
    for path in assets.glob("*.glb"):
        os.utime(path, (2, 2))
    (assets / "a.glb").write_text("a different size")
    with pytest.raises(InputError, match="expected the rendered mesh"):
        run(assets, out)


def test_a_failed_mesh_can_be_corrected_or_removed(assets, tmp_path, rendered_ids):
    out = tmp_path / "out"
    for name in "be":
        (assets / f"{name}.glb").write_text("bad")
    run(assets, out)
    (assets / "b.glb").write_text("fine")
    (assets / "e.glb").unlink()
    assert run(assets, out).failures == 1, "the failure of b is recorded"
    assert set(failures(out)) == {"b"}
    (out / "failures.jsonl").unlink()
    manifest = run(assets, out)
    assert rendered_ids[1:] == [["b"]]
    held = {shard.name: list(read_index(out, shard)) for shard in manifest.shards}
    assert held["train-000000.tar"] == ["a", "b"]
    assert held["train-000001.tar"] == ["c"]


def test_removed_and_changed_list_entries_of_rendered_assets_raise_an_error(assets, out, tmp_path):
    (assets / "a.glb").rename(tmp_path / "a.glb")
    with pytest.raises(InputError, match=r"found no entry for 'a'. Restore the meshes in .* `merge`"):
        run(assets, out)
    (tmp_path / "a.glb").rename(assets / "a.glb")
    header = "id,name,creator,source,license,sha256,up\n"
    listed = find_assets(assets)
    write_list(assets, [dataclasses.replace(a, up="z" if a.id == "b" else "") for a in listed])
    with pytest.raises(
        InputError, match=r"b\.glb: expected the rendered mesh with the up axis y, but found z"
    ):
        run(assets, out)
    (assets / "assets.parquet").unlink()
    (assets / "assets.csv").write_text(header + f"b,,,,,{'0' * 64},\n")
    with pytest.raises(InputError, match=rf"b\.glb: expected the rendered mesh .*, but found {'0' * 64}"):
        run(assets, out)
    (assets / "assets.csv").unlink()
    for asset, split in (("d", "val"), ("a", "train")):
        write_list(assets, [dataclasses.replace(a, split=split if a.id == asset else "") for a in listed])
        run(assets, out)
    write_list(assets, [dataclasses.replace(a, split="train" if a.id == "d" else "") for a in listed])
    with pytest.raises(InputError, match=r"asset 'd': expected the planned split 'val', .* repack --shards"):
        run(assets, out)


def test_added_meshes_are_assigned_to_the_training_split_by_default(assets, out):
    listed = find_assets(assets)
    new = [
        dataclasses.replace(listed[0], id=key, split=split) for key, split in {"g": "", "h": "val"}.items()
    ]
    write_list(assets, [*listed, *new])
    manifest = run(assets, out)
    held = {shard.name: list(read_index(out, shard)) for shard in manifest.shards}
    names = ("train-000003.tar", "val-000000.tar", "val-000001.tar")
    assert [held[name] for name in names] == [["g"], ["d"], ["h"]]


def test_the_default_number_of_held_out_objects_does_not_change_on_resume(assets, tmp_path, capsys):
    for name in "ghijk":
        (assets / f"{name}.glb").write_text("fine")
    options = ["--views", "2", "--res", "8", "--samples", "1", "--shard-size", "2"]
    command = ["render", "--assets", str(assets), "--out", str(tmp_path / "out"), *options]
    assert main(command) == 0  # a sixth of 11 is 1
    (assets / "l.glb").write_text("fine")  # a sixth of 12 would be 2
    assert main(command) == 0
    assert "objects        12 (11 train, 1 held out)" in capsys.readouterr().out


def test_shards_without_recorded_settings_raise_an_error(assets, out):
    (out / "render.json").unlink()
    with pytest.raises(InputError, match=r"found manifest.json with unknown settings"):
        run(assets, out)


def test_a_different_renderer_raises_an_error(assets, out):
    record = json.loads((out / "render.json").read_text())
    record["renderer"] = "blender 5.0.1 cycles cuda"
    (out / "render.json").write_text(json.dumps(record))
    for path in (out / "manifest.json", out / "train-000000.tar"):
        path.unlink()
    with pytest.raises(
        InputError, match=r"renderer: expected 'stand-in', but found 'blender 5.0.1 cycles cuda'"
    ):
        run(assets, out)


def test_a_missing_shard_is_rendered_again_and_partial_files_are_ignored(assets, out):
    expected = read_tars(out)
    (out / "manifest.json").unlink()
    (out / "train-000001.tar").rename(out / "train-000001.tar.partial")
    (out / "parts").mkdir()
    (out / "parts" / "c.tar.partial").write_bytes(expected["train-000001.tar"][:700])
    run(assets, out)
    assert read_tars(out) == expected
    assert not list(out.rglob("*.partial"))


def test_a_truncated_shard_raises_an_error_with_a_remedy(assets, out):
    tar = out / "train-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1024])
    with pytest.raises(
        ShardError,
        match=rf"expected {len(whole)} bytes, but found a damaged file of {len(whole) - 1024} .*[dD]elete this file",
    ):
        run(assets, out)
    tar.unlink()
    (out / "manifest.json").unlink()
    run(assets, out)
    assert tar.read_bytes() == whole


def test_a_missing_filter_table_or_contact_sheet_is_written_again(assets, out, rendered_ids):
    names = ("filter.parquet", "contact_sheet.png", "manifest.json")
    before = {name: (out / name).read_bytes() for name in names}
    for name in names[:2]:
        (out / name).unlink()
        run(assets, out)
        assert {name: (out / name).read_bytes() for name in names} == before
    assert rendered_ids == []


def test_repack_applies_other_rules_if_all_objects_were_rejected(assets, tmp_path):
    for path in assets.iterdir():
        path.write_text("white")
    for _ in range(2):
        with pytest.raises(InputError, match=r"0 failed and 6 rejected objects.* use `repack --where`"):
            run(assets, tmp_path / "out")
    repack([tmp_path / "out"], tmp_path / "all", rules=["white <= 1"])
    assert sum(shard.samples for shard in read_manifest(tmp_path / "all").shards) == 6
