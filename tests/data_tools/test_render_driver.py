"""The render driver and its output folder, with a stand-in for Blender that responds immediately."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
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
from data_tools.blender import process as blender_process
from data_tools.blender.process import BlenderError
from data_tools.rendering import ray_pool, shard_folder
from lrm_pl.data.manifest import read_index, read_manifest, read_samples
from lrm_pl.data.schema import decode_sample
from lrm_pl.errors import InputError
from tests.builders import RENDER_SETTINGS, STAND_IN_WORKER, read_tars
from tests.data_tools.driver_runs import failures, run

pytestmark = pytest.mark.usefixtures("stand_in", "one_ray_for_all")


def test_a_run_writes_all_shards_and_a_second_run_renders_nothing(assets, tmp_path, reference, capfd):
    out = tmp_path / "out"
    manifest = run(assets, out, jobs=2)
    assert read_tars(out) == read_tars(reference / "out"), "the number of processes does not affect the bytes"
    # d has the smallest sha256 of a to f
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


def test_failed_objects_do_not_change_the_assignment_of_other_objects(assets, tmp_path, reference, capfd):
    for name, what in {"b": "bad", "c": "dies", "e": "bad"}.items():
        (assets / f"{name}.glb").write_text(what)
    out = tmp_path / "out"
    manifest = run(assets, out)
    assert manifest.failures == 3
    held = {shard.name: list(read_index(out, shard)) for shard in manifest.shards}
    # The training shards are a b | c e | f. The second shard has no objects, so it is not written.
    assert held == {"train-000000.tar": ["a"], "train-000002.tar": ["f"], "val-000000.tar": ["d"]}
    whole, holed = read_tars(reference / "out"), read_tars(out)
    assert all(holed[name] == whole[name] for name in ("train-000002.tar", "val-000000.tar"))
    reasons = failures(out)
    assert reasons["b"] == "is bad"
    assert "Blender exited with status -6. Last output" in reasons["c"]
    assert "about to die" in reasons["c"]  # the last output
    logs = {path.name: path.read_text() for path in (out / "quarantine").iterdir()}
    assert logs["b.log"] == "is bad\n\nwhat Blender says\n"
    assert logs["c.log"].endswith("about to die\n")
    table = pyarrow.parquet.read_table(out / "filter.parquet").to_pylist()
    assert [row["id"] for row in table] == list("abcdef")
    assert {row["id"] for row in table if row["outcome"] == "failed" and row["triangles"] is None} == set(
        "bce"
    )
    assert "failed         3, see" in capfd.readouterr().out


@pytest.mark.parametrize("behavior", ["slow", "stops in a response"])
def test_only_the_object_that_exceeds_the_time_limit_fails(assets, tmp_path, behavior):
    (assets / "b.glb").write_text(behavior)
    out = tmp_path / "out"
    start = time.monotonic()
    assert run(assets, out, time_s=1.0).failures == 1
    assert time.monotonic() - start < 20
    assert failures(out)["b"].startswith("Blender took longer than 1 s")


def test_the_default_time_limit_increases_with_the_number_of_samples():
    def limit(views, resolution, samples):
        settings = dataclasses.replace(RENDER_SETTINGS, views=views, resolution=resolution, samples=samples)
        return blender_process.time_limit_s(settings)

    assert limit(16, 128, 16) == pytest.approx(621, abs=1)
    assert limit(2, 8, 1) == pytest.approx(600, abs=0.01)
    assert limit(64, 512, 16) == pytest.approx(
        600 + 64 * 2**18 * 16 / 2e5
    )  # about 2000 s; rendering took 130 s
    assert limit(64, 1024, 128) == pytest.approx(12 * 3600, rel=0.02)


def test_an_error_is_raised_if_all_assets_fail(assets, tmp_path, in_process):
    for path in assets.iterdir():
        path.write_text("bad")
    with pytest.raises(InputError, match="at least one rendered object, but found 6 failures"):
        run(assets, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_insufficient_disk_space_raises_an_error_before_rendering(assets, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    message = r"expected about 0\.1 MB of free disk space, but found 0\.0 MB. Free some space, then run"
    with pytest.raises(InputError, match=message):
        run(assets, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_full_disk_of_the_driver_raises_an_error_and_the_next_run_resumes(
    assets, tmp_path, reference, monkeypatch, in_process
):
    def fail(folder, name, *args, **options):
        if name == "train-000001.tar":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(folder, name, *args, **options)

    out, original = tmp_path / "out", shard_folder.write_shard
    with monkeypatch.context() as patch:
        patch.setattr(shard_folder, "write_shard", fail)
        with pytest.raises(InputError, match=r"free disk space.* run the same command again to resume"):
            run(assets, out)
    assert not (out / "manifest.json").exists()
    run(assets, out)
    assert read_tars(out) == read_tars(reference / "out")


def test_a_full_disk_of_a_worker_raises_an_error_and_the_next_run_resumes(assets, tmp_path, reference):
    out = tmp_path / "out"
    (assets / "full").touch()  # the stand-in reports "no space" if this file exists
    with pytest.raises(InputError, match=r"free disk space.* run the same command again to resume"):
        run(assets, out)
    assert not (out / "manifest.json").exists()
    (assets / "full").unlink()
    run(assets, out)
    assert read_tars(out) == read_tars(reference / "out")


def test_an_object_is_rendered_again_after_a_crash(assets, tmp_path, reference):
    (assets / "b.glb").write_text("dies once")
    assert run(assets, tmp_path / "out").failures == 0
    assert read_tars(tmp_path / "out") == read_tars(reference / "out")


def test_only_the_object_that_exceeds_the_memory_limit_fails(assets, tmp_path):
    (assets / "b.glb").write_text("hungry")
    out = tmp_path / "out"
    assert run(assets, out, memory_gb=0.3).failures == 1
    assert re.match(r"Blender used 0\.[345] GB of memory, more than 0\.3 GB", failures(out)["b"])


def test_a_process_is_replaced_after_the_maximum_number_of_objects(assets, tmp_path):
    for path in assets.iterdir():
        path.write_text("counts")
    run(assets, tmp_path / "out", jobs=1, objects=2)
    shards = read_manifest(tmp_path / "out").shards
    samples = [decode_sample(*found) for shard in shards for found in read_samples(tmp_path / "out", shard)]
    assert sorted(sample.info.seed for sample in samples) == [1, 1, 1, 2, 2, 2]


def test_rejected_objects_are_written_to_separate_shards(assets, tmp_path, in_process, capfd):
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
def test_killed_processes_do_not_change_the_bytes(assets, tmp_path, reference, victim):
    for name in "ab":
        (assets / f"{name}.glb").write_text("waits")
    out, killed = tmp_path / "out", []

    def kill():
        while not killed:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    is_rendering = [
                        str(STAND_IN_WORKER) in process.cmdline() and (assets / "a.working").exists()
                    ]
                    if any(is_rendering):
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
    assert read_tars(out) == read_tars(reference / "out")


def test_blender_is_stopped_with_its_ray_worker(assets, tmp_path):
    options = ray_pool.PoolOptions(assets, RENDER_SETTINGS, 1)
    pool = ray_pool.RenderPool(options)
    blenders = [p for p in psutil.Process().children(recursive=True) if str(STAND_IN_WORKER) in p.cmdline()]
    assert len(blenders) == 1
    pool.close()
    blenders[0].wait(timeout=20)


@pytest.mark.parametrize(
    "waits_s", [(0.0, 0.1, 0.4), pytest.param((0.05, 0.2, 0.3, 0.6), marks=pytest.mark.soak)]
)
def test_processes_that_are_starting_when_the_pool_is_closed_release_their_cpus(assets, waits_s):
    pool = ray_pool.RenderPool(ray_pool.PoolOptions(assets, RENDER_SETTINGS, 4))
    for wait_s in waits_s:
        pool._grow(0, 4)
        time.sleep(wait_s)
        pool.close()
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 4


def test_a_locked_folder_raises_an_error(assets, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(shard_folder, "LOCK_TIMEOUT_S", 0.2)
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"expected no other process .*, but found a running process"):
            run(assets, out)


def test_blender_that_does_not_start_raises_an_error_with_its_output(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(blender_process, "COMMAND", (sys.executable, "-c", "raise SystemExit('no bpy')"))
    with pytest.raises(
        BlenderError, match=r"(?s)Blender did not start with .*no bpy\. Run `make .venv-render`"
    ):
        run(assets, tmp_path / "out")


def test_errors_are_printed_in_one_line_and_set_the_exit_status(tmp_path, capsys):
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


def test_an_invalid_line_of_the_failures_raises_an_error_with_a_remedy(assets, out):
    for line in ("garbage", "[1]", '{"id": "a"}'):
        (out / "failures.jsonl").write_text(f"\n{line}\n")
        with pytest.raises(InputError, match=r"failures\.jsonl, line 2: expected a record with id, .*Delete"):
            run(assets, out)


def test_blender_is_started_again_if_it_crashes_during_the_start(assets, tmp_path):
    (assets / "a.glb").write_text("dies")  # so that a second process is started
    (assets / "one start fails").touch()
    manifest = run(assets, tmp_path / "out", jobs=1)
    assert not (assets / "one start fails").exists()
    assert sum(shard.samples for shard in manifest.shards) == 5


def test_an_unavailable_network_raises_an_error_and_records_no_failures(assets, tmp_path):
    for name in "abcdef":
        (assets / f"{name}.glb").write_text("unreachable")
    with pytest.raises(InputError, match=r"5 consecutive download failures: .*run the same command again"):
        run(assets, tmp_path / "out")
    assert shard_folder.read_failures(tmp_path / "out") == {}
    (assets / "mended").touch()
    manifest = run(assets, tmp_path / "out")
    assert sum(shard.samples for shard in manifest.shards) == 6
    assert manifest.failures == 0


def test_an_incomplete_last_line_of_the_failures_is_ignored(tmp_path):
    path = tmp_path / "failures.jsonl"
    for key in "ba":
        shard_folder.add_failure(tmp_path, {"id": key, "file": f"{key}.glb", "reason": "stühle \udc80"}, "")
    path.write_bytes(path.read_bytes() + b'{"id": "c", "fi')
    found = shard_folder.read_failures(tmp_path)
    assert list(found) == ["b", "a"]
    assert "\\udc80" in (tmp_path / "quarantine" / "a.log").read_text()
    shard_folder.write_failures(path, found)
    assert [line[:10] for line in path.read_text().splitlines()] == ['{"id": "a"', '{"id": "b"']
    assert shard_folder.read_failures(tmp_path) == found


def test_local_ray_does_not_write_to_the_home_folder(tmp_path, root):
    home = tmp_path / "home"
    home.touch()  # not a folder, so nothing can be written to it
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    code = "from data_tools.rendering.ray_pool import connect_ray\nwith connect_ray(1): print('up')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment | {"HOME": str(home), "PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "up\n", done.stderr


def test_failed_objects_are_rendered_again_if_the_list_of_failures_is_deleted(assets, tmp_path):
    out = tmp_path / "out"
    (assets / "b.glb").write_text("bad once")  # fails while the file "mended" is absent
    run(assets, out)
    assert set(failures(out)) == {"b"}
    (tmp_path / "assets" / "mended").touch()
    assert run(assets, out).failures == 1  # the failure is recorded
    (out / "failures.jsonl").unlink()
    assert run(assets, out).failures == 0
    index = read_index(out, read_manifest(out).shards[0])
    assert list(index) == ["a", "b"]
