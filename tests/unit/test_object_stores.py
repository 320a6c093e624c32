"""Tests of checkpoints in an object store, with a local S3 server and injected network failures."""

import subprocess
import sys

import pytest
import torch

from lrm_pl.checkpoints.files import require_writable
from lrm_pl.checkpoints.index import (
    CheckpointError,
    checkpoint_path,
    finalize_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    remove_checkpoint,
)
from lrm_pl.checkpoints.owner import Owner
from lrm_pl.checkpoints.retention import Retention
from lrm_pl.checkpoints.tensors import read_tensors, tensor_specs, write_tensors
from lrm_pl.errors import InputError
from lrm_pl.storage import StoreError

pytest_plugins = ["tests.servers.s3_store"]
RUN = "s3://bucket/runs/one"

# Sockets that the proxy or botocore leave to the garbage collector, on purpose or not, are no concern of these tests.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]


def some_tensors(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "network.a": torch.randn(30, 40, generator=generator),
        "network.b": torch.randn(7, generator=generator).bfloat16(),
        "adam.a.step": torch.tensor(step),
    }


def write(step, tensors=None):
    path = checkpoint_path(RUN, step)
    files = write_tensors(path, tensors or some_tensors(step))
    return finalize_checkpoint(path, step, {"position": step}, files)


def require_whole(step):
    said = []
    found = newest_checkpoint(RUN, said.append)
    assert found is not None
    assert found.step == step, said
    into = {name: torch.empty_like(spec, device="cpu") for name, spec in tensor_specs(found).items()}
    read_tensors(found, into)
    expected = some_tensors(step)
    assert into.keys() == expected.keys()
    assert all(torch.equal(into[name], expected[name]) for name in expected)
    return said


def test_checkpoints_in_a_bucket_are_written_listed_read_and_deleted(s3):
    assert newest_checkpoint(RUN, print) is None
    for step in (1, 2, 3):
        write(step)
    require_whole(3)
    Retention(RUN, 2, keep=2).add(checkpoint_path(RUN, 3), None)
    assert list_checkpoints(RUN) == [checkpoint_path(RUN, 3), checkpoint_path(RUN, 2)]
    remove_checkpoint(checkpoint_path(RUN, 3))
    require_whole(2)


def test_the_index_is_uploaded_last(s3):
    path = checkpoint_path(RUN, 1)
    files = write_tensors(path, some_tensors(1))
    with pytest.raises(CheckpointError, match="incomplete"):
        read_checkpoint(path)
    finalize_checkpoint(path, 1, {}, files)
    puts = [path.rsplit("/", 1)[-1] for method, path in s3.seen if method == "PUT"]
    assert puts[-1] == "index.json"
    require_whole(1)


def test_a_large_tensor_is_uploaded_in_parts(s3):
    large = {"large": torch.arange(30_000_000, dtype=torch.float32)}  # 120 MB; s3fs uploads parts of 50
    found = write(5, large)
    assert any("partNumber=2" in path for _, path in s3.seen)
    into = {"large": torch.empty(30_000_000)}
    read_tensors(read_checkpoint(found.path), into)
    assert torch.equal(into["large"], large["large"])


def first_times(times, fault, *, method="PUT", name):
    """Return a fault for the first ``times`` requests of an object."""
    return lambda m, path, number: fault if m == method and name in path and number < times else None


OBJECTS = ["__0_0.distcp", ".metadata", "index.json"]


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("fault", ["503", "drop", "deaf"])
def test_a_failed_upload_is_retried(s3, name, fault):
    write(1)
    s3.fault = first_times(1, fault, name=f"step-00000002/{name}")
    write(2)
    assert s3.broken
    s3.fault = first_times(0, fault, name="-")
    assert require_whole(2) == []


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        # each is tried again for seconds: one of each fault here, all others in `make soak`
        pytest.param(name, fault, marks=[] if number == (fault == "500") else pytest.mark.soak)
        for fault in ("500", "drop")
        for number, name in enumerate(OBJECTS)
    ],
)
def test_a_checkpoint_is_not_valid_after_a_failed_upload(s3, name, fault):
    write(1)
    s3.fault = first_times(1000, fault, name=f"step-00000002/{name}")
    with pytest.raises(OSError, match=r"step-00000002.*the request failed with"):
        write(2)
    s3.fault = first_times(0, fault, name="-")
    assert any("incomplete" in message for message in require_whole(1)) or name != "index.json"
    write(2)  # the run goes on and comes there again
    assert require_whole(2) == []


def test_a_failed_part_of_an_upload_leaves_no_object(s3):
    s3.fault = lambda method, path, number: "500" if method == "PUT" and "partNumber=2" in path else None
    with pytest.raises(OSError, match="the request failed with"):
        write(5, {"large": torch.zeros(30_000_000)})
    s3.fault = lambda method, path, number: None
    assert list_checkpoints(RUN) == []


def test_an_interrupted_download_is_retried(s3):
    write(1)
    s3.fault = first_times(1, "drop", method="GET", name="step-00000001")
    assert require_whole(1) == []
    assert s3.broken


def test_an_unavailable_store_is_not_reported_as_a_damaged_checkpoint(s3):
    write(1)
    write(2)
    s3.fault = first_times(1000, "drop", method="GET", name="step-00000002/index.json")
    with pytest.raises(StoreError, match="Check the bucket, the credentials and the endpoint"):
        newest_checkpoint(RUN, pytest.fail)


def test_a_checkpoint_with_a_changed_object_is_skipped(s3):
    import fsspec

    write(1)
    write(2)
    fs = fsspec.filesystem("s3")
    content = bytearray(fs.cat_file("bucket/runs/one/step-00000002/__0_0.distcp"))
    content[len(content) // 2] ^= 1
    fs.pipe_file("bucket/runs/one/step-00000002/__0_0.distcp", bytes(content))
    assert "found a different hash: the checkpoint is damaged" in require_whole(1)[0]
    fs.pipe_file("bucket/runs/one/step-00000002/__0_0.distcp", bytes(content[:-5]))
    assert " bytes: the checkpoint is damaged" in require_whole(1)[0]


def test_a_run_without_complete_uploads_starts_from_the_first_step(s3):
    path = checkpoint_path("s3://bucket/run", 5)
    write_tensors(path, {"a": torch.ones(3)})
    said = []
    assert newest_checkpoint("s3://bucket/run", said.append) is None
    assert "no checkpoint was completed; starting from the first step" in said[-1]


def test_the_older_of_two_runs_in_one_folder_is_stopped(s3):
    older = Owner("s3://bucket/run", "runs/older")
    older.require()
    newer = Owner("s3://bucket/run", "runs/newer")
    newer.require()
    with pytest.raises(
        InputError,
        match=r"expected exclusive use of .* by this run, but found a newer run: .*'run': 'runs/newer'",
    ):
        older.require()
    Owner("s3://bucket/other", "runs/other")
    newer.require()


def test_a_missing_bucket_is_rejected_and_not_created(s3):
    with pytest.raises(InputError, match="bucket does not exist"):
        require_writable("s3://buckett/run")
    require_writable(RUN)
    assert not any(method == "PUT" and path.rstrip("/") == "/buckett" for method, path in s3.seen)
    assert list_checkpoints(RUN) == []


def test_the_extra_to_install_is_named_if_s3fs_is_missing(root):
    program = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from lrm_pl.checkpoints.index import list_checkpoints\n"
        "try: list_checkpoints('s3://bucket/run')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("InputError"), done.stdout + done.stderr
    assert "pip install 'lrm_pl[s3]'" in done.stdout


def test_an_unknown_url_scheme_is_rejected():
    with pytest.raises(
        InputError, match=r"expected a folder or a URL such as s3://BUCKET/RUN, but found 'nope://x'"
    ):
        list_checkpoints("nope://x")
