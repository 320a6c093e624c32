"""Slurm job that renders with Ray and Blender. The test is skipped if Slurm is not installed."""

import os
import re
import shutil
import subprocess
import tempfile
import time

import pytest

from lrm_pl.data.manifest import read_manifest
from tests.servers.slurm import idle_nodes

pytestmark = [pytest.mark.slow, pytest.mark.blender]

#: `ray symmetric-run` fails if Ray is already running on the machine, and stops all Ray processes at the end. It is run
#: in a separate process namespace, so that it does not affect other tests on the same node.
ALONE = "unshare --map-root-user --pid --fork --kill-child --mount-proc"


@pytest.fixture
def here(tmp_path, root, monkeypatch):
    """Working folder with the job template and two meshes. An idle node is required."""
    if not (idle := idle_nodes()):
        pytest.skip(f"requires Slurm with an idle node, but found {idle}")
    if subprocess.run([*ALONE.split(), "true"], capture_output=True, check=False).returncode:
        pytest.skip(
            "requires process namespaces, so that other Ray processes on this machine are not affected"
        )
    template = (root / "configs" / "cluster" / "render.sbatch").read_text()
    (tmp_path / "configs" / "cluster").mkdir(parents=True)
    alone, lines = re.subn(
        r"^(  ray symmetric-run |srun .* sh -c 'ray stop)", "ALONE\\1", template, flags=re.M
    )
    assert lines == 2
    alone = alone.replace("ALONE  ray", f"  {ALONE} ray")
    alone = re.sub("ALONE(srun .*) sh -c", rf"\1 {ALONE} sh -c", alone)
    (tmp_path / "configs" / "cluster" / "render.sbatch").write_text(alone)
    for name in ("bread", "horse2"):
        (tmp_path / "meshes").mkdir(exist_ok=True)
        shutil.copy(root / "data_tools" / "demo_assets" / f"{name}.glb", tmp_path / "meshes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    return tmp_path


def launch(python, *options):
    arguments = ("--assets", "meshes", "--out", "out", "--views", "3", "--res", "32", "--samples", "4")
    command = [str(python), "-m", "data_tools", "launch", *options, "--", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_job_renders_and_completes_with_status_0(here, render_python):
    assert "found only the partitions" in launch(render_python, "--partition=no-such").stderr
    done = launch(render_python, "--nodes=1", "--gpus=0", "--time=5")
    job = re.search(r"^Submitted job (\d+)\.", done.stdout, re.MULTILINE)
    assert job, done.stdout + done.stderr
    log = here / "out" / f"slurm-{job[1]}.log"
    try:
        until = time.monotonic() + 100
        while subprocess.run(["squeue", "-h", "-j", job[1]], capture_output=True, text=True).stdout.strip():
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
    finally:
        subprocess.run(["scancel", job[1]], check=False, capture_output=True)
    said = log.read_text()
    assert "Rendering 2 of 2 objects" in said, said[-3000:]
    assert "the rendering ended with status 0" in said
    state = subprocess.run(["scontrol", "show", "job", job[1]], capture_output=True, text=True).stdout
    assert re.search(r"JobState=COMPLETED .*ExitCode=0:0$", state, re.DOTALL | re.MULTILINE), state
    manifest = read_manifest(here / "out")
    assert (manifest.failures, sum(shard.samples for shard in manifest.shards)) == (0, 2)
    assert not os.path.exists(f"{tempfile.gettempdir()}/lrm-ray-{job[1]}"), (
        "the temporary folder of Ray is removed"
    )
