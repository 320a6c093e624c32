"""Problems that `data_tools validate` reports."""

import dataclasses
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import psutil
import pytest

from data_tools.__main__ import main
from data_tools.quality.measures import encode_measures
from data_tools.quality.validate import check_views, find_file_problems
from data_tools.shards.pool import processes
from lrm_pl.data.manifest import ShardError, read_index, read_manifest, write_manifest
from lrm_pl.data.schema import SampleError, decode_image, encode_image, encode_sample
from lrm_pl.data.surface import SURFACE_POINTS, encode_surface
from lrm_pl.data.synthetic import synthetic_sample
from lrm_pl.data.tar import encode_index, write_shard
from lrm_pl.errors import InputError
from tests.data_tools.stand_in_worker import MEASURES


def replaced(folder, change):
    """Replace the shards by one shard with three samples, the first of which is changed."""
    manifest = read_manifest(folder)
    samples = [synthetic_sample(f"train-ellipsoid-{n:03d}", 8, 32, seed=n) for n in range(3)]
    content = [(sample.info.id, encode_sample(sample)) for sample in samples]
    change(content[0][1], samples[0])
    shard = write_shard(folder, "train-000000.tar", "train", content)
    write_manifest(folder, dataclasses.replace(manifest, shards=(shard,)))


@pytest.fixture
def folder(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "copy")
    return tmp_path / "copy"


def validate_output(folder, capsys, status):
    assert main(["validate", "--shards", str(folder)]) == status
    return capsys.readouterr().out


def test_valid_shards_have_no_problems(folder, capsys):
    out = validate_output(folder, capsys, 0)
    assert "6 objects in 3 shards: no problems" in out
    assert f"make train DATA={folder}" in out


def test_shards_that_are_not_in_the_manifest_are_reported(folder, capsys):
    shutil.copy(folder / "train-000000.tar", folder / "train-000007.tar")
    assert (
        "ignored        1 tar file not listed in the manifest, for example train-000007.tar"
        in validate_output(folder, capsys, 0)
    )


def test_a_flipped_byte_is_reported_for_the_shard_and_the_sample(folder, capsys):
    shard = read_manifest(folder).shards[1]
    key, members = list(read_index(folder, shard).items())[1]
    offset, size = members["view_003.webp"]
    content = bytearray((folder / shard.name).read_bytes())
    content[offset + size // 2] ^= 255
    (folder / shard.name).write_bytes(bytes(content))
    out = validate_output(folder, capsys, 1)
    assert f"{shard.name}: expected sha256 {shard.sha256} as in the manifest, but found" in out
    assert f"{shard.name}: sample {key!r}: " in out
    assert "2 problems" in out


def _opengl(members, sample):
    c2w = sample.c2w.copy()
    c2w[:, :3, 1:3] *= -1
    members.update(encode_sample(dataclasses.replace(sample, c2w=c2w)))


def _pixels(members, sample):
    fxfycxcy = sample.fxfycxcy.copy()
    fxfycxcy[:, 2:] *= 32  # in pixels instead of normalized
    members.update(encode_sample(dataclasses.replace(sample, fxfycxcy=fxfycxcy)))


def _empty(members, sample):
    nothing = encode_image(np.zeros((32, 32, 4), dtype=np.uint8))
    members.update(encode_sample(dataclasses.replace(sample, views=(nothing,) * 8)))


def _two_sizes(members, sample):
    small = encode_image(np.full((16, 16, 4), 254, dtype=np.uint8))
    members["view_005.webp"] = small


def _ball(members, sample):
    """Replace all views by the same image of a sphere."""
    rows, columns = np.meshgrid(np.arange(32) - 15.5, np.arange(32) - 15.5, indexing="ij")
    view = np.where((rows**2 + columns**2 < 100)[..., None], np.uint8([200, 100, 50, 255]), np.uint8(0))
    members.update(encode_sample(dataclasses.replace(sample, views=(encode_image(view),) * 8)))


def _opaque(members, sample):
    """Composite all views over white."""
    for view in range(8):
        rgba = decode_image("", members.pop(f"view_{view:03d}.webp"))
        rgba[rgba[..., 3] == 0] = 255
        members[f"view_{view:03d}.png"] = encode_image(rgba)


def _both_formats(members, sample):
    members["view_005.png"] = members["view_005.webp"]


def _other_surface(members, sample):
    points = np.full((SURFACE_POINTS, 3), 0.1)
    members["surface.npy"] = encode_surface(points, np.tile([1.0, 0, 0], (SURFACE_POINTS, 1)))


def _broken_measures(members, sample):
    members["measures.json"] = b'{"coverage": "lots"'


def _another_size(members, sample):
    members.update(encode_sample(synthetic_sample(sample.info.id, 8, 16, 0)))


def _fewer_views(members, sample):
    members.clear()
    members.update(encode_sample(synthetic_sample(sample.info.id, 4, 32, 0)))


def _no_view(members, sample):
    del members["view_005.webp"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_opengl, "cameras that fit the silhouettes, but found a mean distance of"),
        (_pixels, "cameras that fit the silhouettes"),
        (_empty, "expected an object in every view, but found 8 empty views, for example view 0"),
        (_two_sizes, "expected views of one size, but found 16 x 16, 32 x 32"),
        (_opaque, "expected a transparent background, but found 8 views without a transparent pixel"),
        (_both_formats, "once, but found the additional member view_005.webp"),
        (_other_surface, "expected points in surface.npy that cover the object"),
        (_broken_measures, "expected finite measures"),
        (_another_size, "expected views of (32, 32) pixels like most objects, but found (16, 16)"),
        (_fewer_views, "expected 8 views as in the manifest, but found 4"),
        (_no_view, "expected each of 8 views once, but found no view_005.webp"),
    ],
)
def test_an_invalid_sample_is_reported_with_its_shard(folder, capsys, change, message):
    replaced(folder, change)
    out = validate_output(folder, capsys, 1)
    assert "train-000000.tar: sample 'train-ellipsoid-000': " in out
    assert message in out
    assert "3 objects in 1 shard: 1 problem\n" in out


def test_a_duplicate_id_is_reported(folder, capsys):
    manifest = read_manifest(folder)
    key = next(iter(read_index(folder, manifest.shards[0])))
    again = write_shard(
        folder, "val-000009.tar", "val", [(key, encode_sample(synthetic_sample(key, 8, 32, 0)))]
    )
    write_manifest(folder, dataclasses.replace(manifest, shards=(*manifest.shards, again)))
    out = validate_output(folder, capsys, 1)
    assert (
        f"val-000009.tar: sample {key!r}: expected a unique id, but found it also in train-000000.tar" in out
    )


def test_undetectable_camera_errors_are_reported_with_the_objects(folder, capsys):
    replaced(folder, _ball)
    out = validate_output(folder, capsys, 0)
    assert "3 objects in 1 shard: no problems" in out
    assert "undetectable   swapped poses cannot be detected for" in out
    assert "train-ellipsoid-000" in out


def test_incoherent_silhouettes_of_one_sided_surfaces_are_not_a_problem(folder, capsys):
    def change(members, sample):
        _opengl(members, sample)
        members["measures.json"] = encode_measures(dataclasses.replace(MEASURES, one_sided=True))

    replaced(folder, change)
    assert "undetectable   wrong cameras (one-sided surfaces)" in validate_output(folder, capsys, 0)


def test_the_number_of_processes_does_not_change_the_problems(folder, capsys):
    replaced(folder, _opengl)
    outputs = set()
    for jobs in "12":
        assert main(["validate", "--shards", str(folder), "--jobs", jobs]) == 1
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 1


POOL = """
import os, time
from data_tools.shards.pool import processes
with processes(2) as pool:
    for task in [pool.submit(os.getpid) for _ in range(2)]:
        task.result()
    print(*pool._processes, flush=True)
    time.sleep(60)
"""


def test_worker_processes_exit_if_the_command_is_killed(root):
    with subprocess.Popen(
        [sys.executable, "-c", POOL], cwd=root, stdout=subprocess.PIPE, text=True
    ) as command:
        workers = [psutil.Process(int(pid)) for pid in command.stdout.readline().split()]
        assert workers
        command.kill()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]


def test_a_closed_output_pipe_does_not_change_the_exit_status(folder, root):
    write_manifest(folder, dataclasses.replace(read_manifest(folder), views=7))
    command = [sys.executable, "-m", "data_tools", "validate", "--shards", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=root, **pipes) as check:
        check.stdout.close()
        assert "Traceback" not in check.stderr.read()
    assert check.returncode == 1


@pytest.mark.parametrize("words", [("validate", "--shards"), ("merge", "--shards", "a", "--out")])
def test_a_url_instead_of_a_folder_raises_an_error(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([*words, "s3://bucket/shards"])
    assert "expected a path on this machine, but found the URL s3://bucket/shards" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_file_system_is_printed_in_one_line(shards, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["repack", "--shards", str(shards), "--out", str(tmp_path / "file" / "out")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: expected a folder at {tmp_path / 'file'}, but found a file")


def test_a_killed_worker_process_raises_an_error_with_a_remedy():
    with pytest.raises(InputError, match="worker process was killed"), processes(1) as pool:
        pool.submit(_die).result()


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../outside.json", tarfile.REGTYPE),
        ("/etc/passwd.json", tarfile.REGTYPE),
        ("a/b.json", tarfile.REGTYPE),
        ("link.json", tarfile.SYMTYPE),
        ("hard.json", tarfile.LNKTYPE),
        ("device.json", tarfile.CHRTYPE),
    ],
)
def test_paths_links_and_devices_in_a_tar_are_reported(tmp_path, name, kind):
    shard = write_shard(tmp_path, "bad.tar", "train", [("a", encode_sample(synthetic_sample("a", 1, 32, 0)))])
    with tarfile.open(tmp_path / "bad.tar", "a") as tar:
        header = tarfile.TarInfo(name)
        header.type, header.linkname = kind, "/etc/passwd"
        tar.addfile(header, io.BytesIO())
    problems = find_file_problems(tmp_path, dataclasses.replace(shard, bytes=1 << 20))
    assert "expected sha256" in next(problems)
    with pytest.raises(ShardError, match=re.escape(repr(name))):
        next(problems)


def test_an_index_with_a_wrong_offset_is_reported(folder):
    shard = read_manifest(folder).shards[0]
    assert not list(find_file_problems(folder, shard))
    index = read_index(folder, shard)
    key = next(iter(index))
    offset, size = index[key]["json"]
    index[key]["json"] = (offset + 512, size)
    (folder / shard.index_name).write_bytes(encode_index(index))
    (problem,) = find_file_problems(folder, shard)
    assert problem.endswith(f"but found others in 1 sample, for example {key!r}")


def test_too_many_pixels_raise_an_error_before_all_views_are_decoded(monkeypatch):
    sample = synthetic_sample("a", views=8, resolution=32, seed=0)
    monkeypatch.setattr("data_tools.quality.validate._MAX_PIXELS", 8 * 32 * 32)
    check_views(sample)
    monkeypatch.setattr("data_tools.quality.validate._MAX_PIXELS", 8 * 32 * 32 - 1)
    with pytest.raises(
        SampleError, match="sample 'a': expected a total of at most 8191 pixels in all views, but found more"
    ):
        check_views(sample)
