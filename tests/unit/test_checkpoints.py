"""Tests of checkpoints in local folders: atomic writing, validation, safe loading and retention."""

import contextlib
import hashlib
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from lrm_pl.checkpoints.index import (
    CheckpointError,
    checkpoint_path,
    finalize_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    read_index,
    remove_partial_checkpoints,
)
from lrm_pl.checkpoints.tensors import read_tensors, tensor_names, tensor_specs, write_tensors
from tests.unit.checkpoint_files import flipped, largest, some_tensors, steps, write


def read(checkpoint):
    into = {name: torch.empty_like(spec, device="cpu") for name, spec in tensor_specs(checkpoint).items()}
    read_tensors(checkpoint, into)
    return into


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name
    return True


def test_tensors_are_read_bitwise_as_they_were_written(tmp_path):
    run = {"position": 17, "guard": {"norms": [0.1, 1e-300]}, "score": None}
    written = write(tmp_path, 17, run=run)
    found = read_checkpoint(checkpoint_path(str(tmp_path), 17))
    assert found == written
    assert (found.step, found.run) == (17, run)
    assert same(read(found), some_tensors(17))
    assert tensor_names(found) == {name: tensor.shape for name, tensor in some_tensors(17).items()}
    assert os.listdir(tmp_path) == ["step-00000017"]


def test_a_checkpoint_is_incomplete_until_its_index_is_written(tmp_path):
    path = checkpoint_path(str(tmp_path), 3)
    files = write_tensors(path, some_tensors())
    assert os.listdir(tmp_path) == ["step-00000003.partial"]
    assert list_checkpoints(str(tmp_path)) == []
    assert newest_checkpoint(str(tmp_path), print) is None
    finalize_checkpoint(path, 3, {}, files)
    assert os.listdir(tmp_path) == ["step-00000003"]


def test_tensors_with_a_different_shape_are_rejected(tmp_path):
    found = write(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"found 2 missing.*network\.a\.bias.*-c RUN/config\.yaml"):
        read_tensors(found, {"network.a.bias": torch.empty(1), "other": torch.empty(2)})


def without_index(path):
    (path / "index.json").unlink()


def truncated(path):
    os.truncate(largest(path), largest(path).stat().st_size // 2)


def missing_file(path):
    largest(path).unlink()


def no_json(path):
    (path / "index.json").write_text('{"version": 1, ')


def no_text(path):
    (path / "index.json").write_bytes(b"\xff\xfe\x00")


def a_list(path):
    (path / "index.json").write_text("[]")


def sealed(record):
    """Return an index with a matching hash, as an attacker would write it."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    seal = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps(rest | {"sha256": seal})


def a_step_changed(path):
    index = path / "index.json"
    index.write_text(re.sub(r'"step": \d', '"step": 9', index.read_text()))


def changed(key, value):
    def change(path):
        index = path / "index.json"
        index.write_text(sealed(json.loads(index.read_text()) | {key: value}))

    change.__name__ = f"{key} {value}"
    return change


DAMAGES = {
    without_index: "found no index.json: the checkpoint is missing or incomplete",
    truncated: "expected .* bytes with SHA-256 .*, but found .* bytes: the checkpoint is damaged",
    flipped: "expected .* bytes with SHA-256 .*, but found a different hash: the checkpoint is damaged",
    missing_file: "but found no file: the checkpoint is damaged",
    no_json: "expected a valid checkpoint index, but found JSONDecodeError",
    no_text: "expected a valid checkpoint index, but found UnicodeDecodeError",
    a_list: "expected a valid checkpoint index, but found TypeError",
    a_step_changed: "a matching SHA-256, but found a different step or content: the index is damaged",
    changed("step", 9): "expected the step in the folder's name",
    changed(
        "version", 2
    ): "expected checkpoint version 1, but found 2. Use the version of lrm_pl that wrote the checkpoint",
    changed("files", {}): r"expected \.metadata and only names of files.*Do not trust this checkpoint",
    changed("files", {"../x": [1, "0"], ".metadata": [1, "0"]}): r"\.\./x.*Do not trust",
    changed("files", 3): "expected a valid checkpoint index, but found AttributeError",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(tmp_path, damage):
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "x").write_text("outside")
    damage(tmp_path / "step-00000002")
    said = []
    found = newest_checkpoint(str(tmp_path), said.append)
    assert found.step == 1
    assert same(read(found), some_tensors(1))
    assert len(said) == 1
    with pytest.raises(CheckpointError, match=DAMAGES[damage]):
        read_checkpoint(checkpoint_path(str(tmp_path), 2))
    damage(tmp_path / "step-00000001")
    with pytest.raises(
        CheckpointError,
        match=r"expected a valid checkpoint in .*, but found 2 invalid checkpoints.*--run.resume PATH",
    ):
        newest_checkpoint(str(tmp_path), said.append)


def test_a_damaged_checkpoint_is_replaced_at_the_same_step(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    flipped(tmp_path / "step-00000002")
    write(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]
    assert sorted(os.listdir(tmp_path / "step-00000002")) == [".metadata", "__0_0.distcp", "index.json"]
    assert newest_checkpoint(str(tmp_path), pytest.fail).step == 2


def test_a_missing_file_of_another_rank_is_an_error(tmp_path):
    path = checkpoint_path(str(tmp_path), 1)
    files = write_tensors(path, some_tensors())
    with pytest.raises(
        OSError,
        match=r"__1_0\.distcp: expected a file of 5 bytes, but found no file. Make sure that all nodes",
    ):
        finalize_checkpoint(path, 1, {}, {**files, "__1_0.distcp": (5, "0")})
    assert list_checkpoints(str(tmp_path)) == []


# --- code


class Runs:
    """Pickle to a call of os.system that creates a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def swap(path, name, content):
    """Replace a file of a checkpoint and its hash in the index."""
    (path / name).write_bytes(content)
    index = json.loads((path / "index.json").read_text())
    index["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (path / "index.json").write_text(sealed(index))


def torch_file(value, path):
    torch.save(value, path)
    return path.read_bytes()


def test_metadata_that_calls_functions_is_rejected_without_executing_code(tmp_path):
    trace = tmp_path / "trace"
    bare = pickle.dumps(Runs(trace))
    for step, content in enumerate((
        bare, pickle.dumps({"a": [Runs(trace)]}, protocol=0), b"cbuiltins\neval\n(S'1'\ntR.",
    )):  # fmt: skip
        write(tmp_path, step)
        swap(tmp_path / f"step-{step:08d}", ".metadata", content)
        found = read_checkpoint(checkpoint_path(str(tmp_path), step))
        for way in (tensor_names, read, lambda one: read_tensors(one, some_tensors())):
            with pytest.raises(
                CheckpointError, match=r"a pickle that calls (posix\.system|builtins\.eval), which was not"
            ):
                way(found)
    assert not trace.exists()
    pickle.loads(bare)
    assert trace.exists(), "the trap works"


def test_a_shard_that_calls_functions_is_rejected_without_executing_code(tmp_path):
    trace = tmp_path / "trace"
    found = write(tmp_path, 1, {"a": torch.zeros(4)})
    evil = torch_file(Runs(trace), tmp_path / "evil.pt")
    swap(tmp_path / "step-00000001", "__0_0.distcp", evil)
    metadata = tmp_path / "step-00000001" / ".metadata"
    content = pickle.loads(metadata.read_bytes())
    for entry in content.storage_data.values():
        entry.length = len(evil)
    swap(tmp_path / "step-00000001", ".metadata", pickle.dumps(content))
    found = read_checkpoint(found.path)
    with pytest.raises(CheckpointError, match=r"a pickle that calls posix\.system, which was not executed"):
        read(found)
    assert not trace.exists()


def test_metadata_with_paths_outside_of_the_folder_is_rejected(tmp_path):
    write(tmp_path, 1)
    path = tmp_path / "step-00000001"
    swap(path, ".metadata", (path / ".metadata").read_bytes().replace(b"__0_0.distcp", b"../../a/../b"))
    found = read_checkpoint(str(path))
    with pytest.raises(
        CheckpointError, match=r"references to files outside of the checkpoint: \['\.\./\.\./a/\.\./b'\]"
    ):
        tensor_names(found)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04.", b"garbage", pickle.dumps({"a": 1}), b"\x80\x04K\x01h\x05."]
)
def test_invalid_metadata_is_rejected(tmp_path, content):
    write(tmp_path, 1)
    swap(tmp_path / "step-00000001", ".metadata", content)
    with pytest.raises(CheckpointError, match=r"\.metadata: expected a dict of tensors"):
        tensor_names(read_index(str(tmp_path / "step-00000001")))


# --- being killed, and a full disk

WRITER = """
import sys, torch
from lrm_pl.checkpoints.index import checkpoint_path, finalize_checkpoint, newest_checkpoint
from lrm_pl.checkpoints.retention import Retention
from lrm_pl.checkpoints.tensors import write_tensors
folder = sys.argv[1]
newest = newest_checkpoint(folder, print)  # a restarted run continues
retention = Retention(folder, newest.step if newest else None, keep=2)
print("ready", flush=True)
for step in range((newest.step if newest else 0) + 1, 10**6):
    path = checkpoint_path(folder, step)
    tensors = {"a": torch.full((200_000,), float(step)), "b": torch.tensor(step)}
    finalize_checkpoint(path, step, {"position": 2 * step}, write_tensors(path, tensors))
    retention.add(path, None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.soak)])
def test_the_newest_checkpoint_is_valid_after_kill_9(tmp_path, root, kills):
    generator = torch.Generator().manual_seed(0)
    reached = 0
    for trial in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WRITER, str(tmp_path)],
            cwd=root, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        while process.stdout.readline() != b"ready\n":
            assert process.poll() is None
        wait = 0.2 if trial == 0 else 0.0
        time.sleep(wait + torch.rand((), generator=generator).item() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        process.stdout.close()
        remove_partial_checkpoints(str(tmp_path), print)
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
        found = newest_checkpoint(str(tmp_path), print)
        if found is None:
            assert reached == 0
            continue
        assert found.step >= reached, "what was whole before the kill is whole after it"
        reached = found.step
        tensors = read(found)
        assert (tensors["a"] == found.step).all()
        assert tensors["b"] == found.step
        assert found.run == {"position": 2 * found.step}
    assert reached > 1


@contextlib.contextmanager
def small_files():
    """Limit files to 100 kB, so that larger writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_partially_written_file_is_an_os_error(tmp_path):
    write(tmp_path, 1)
    with small_files(), pytest.raises(OSError, match="File too large"):
        write(tmp_path, 2, {"a": torch.randn(100_000)})
    assert list_checkpoints(str(tmp_path)) == [checkpoint_path(str(tmp_path), 1)]
    assert newest_checkpoint(str(tmp_path), pytest.fail).step == 1
    write(tmp_path, 2)  # on top of what was left
    assert newest_checkpoint(str(tmp_path), pytest.fail).step == 2


def test_a_full_disk_is_an_os_error(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    try:
        write(disk, 1)
        with pytest.raises(OSError, match="No space left on device"):
            write(disk, 2, {"a": torch.randn(100_000)})
        assert newest_checkpoint(str(disk), pytest.fail).step == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- retention


def test_checkpoints_are_written_and_read_concurrently(tmp_path):
    write(tmp_path, 1)
    failures = []

    def work(step):
        try:
            write(tmp_path, step)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(step,)) for step in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert same(read(newest_checkpoint(str(tmp_path), pytest.fail)), some_tensors(4))
