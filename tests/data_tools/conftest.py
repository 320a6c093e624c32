"""Fixtures shared by the modules of this folder."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_tools.blender import process as blender_process
from data_tools.rendering import ray_pool
from lrm_pl.data.synthetic import synthetic_sample
from tests.builders import STAND_IN_WORKER
from tests.data_tools.driver_runs import patch_pool, run
from tests.data_tools.layout_folders import WRITERS
from tests.data_tools.mvimgnet_videos import FRAMES, SIDE, write_video

STAND_IN_COMMAND = (sys.executable, str(STAND_IN_WORKER))

#: Executes programs in one Blender process. A program assigns its JSON result to ``result``.
_BLENDER_SHELL = """
import json, os, sys, traceback
responses = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    names = {}
    try:
        exec(json.loads(line), names)
    except Exception:
        names["error"] = traceback.format_exc()
    print(json.dumps([names.get("result"), names.get("error", "")]), file=responses, flush=True)
"""


@pytest.fixture(scope="session")
def blender(render_python, root):
    """Return a function that executes a program in Blender and returns its ``result``."""
    with subprocess.Popen(
        [str(render_python), "-c", _BLENDER_SHELL],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:

        def execute(program):
            process.stdin.write(json.dumps(program) + "\n")
            process.stdin.flush()
            result, error = json.loads(process.stdout.readline())
            assert not error, error
            return result

        yield execute
        process.stdin.close()


@pytest.fixture
def loaded(blender):
    """Return a function that loads files and returns the half sides of each, or its error."""

    def load(*files):
        given = [(str(file), str(folder), up) for file, folder, up in files]
        return blender(f"""
from pathlib import Path
from data_tools.blender.load_asset import AssetError, load_asset
result = []
for file, root, up in {given!r}:
    try:
        result.append(load_asset(Path(file), "cube", Path(root), up)[0].tolist())
    except AssetError as error:
        result.append(str(error))
""")

    return load


@pytest.fixture
def video(tmp_path):
    """Return the folder of an MVImgNet object, and the sample from which it was created."""
    sample = synthetic_sample("a", FRAMES, SIDE, 0)
    write_video(tmp_path / "in" / "7" / "1a2b", sample, tmp_path / "in" / "7" / "1a2b" / "masks")
    return tmp_path / "in" / "7" / "1a2b", sample


@pytest.fixture(params=sorted(WRITERS))
def layout(request, monkeypatch):
    """Return the name of a layout. The cameras of synthetic samples have the field of view of the layout."""
    if request.param == "zero123":  # lens 35 mm, sensor 32 mm
        monkeypatch.setattr("lrm_pl.data.synthetic.FOV_DEG", 2 * np.degrees(np.arctan(16 / 35)))
    return request.param


@pytest.fixture
def stand_in(monkeypatch):
    """Replace Blender with ``stand_in_worker.py``."""
    monkeypatch.setattr(blender_process, "COMMAND", STAND_IN_COMMAND)


@pytest.fixture(scope="module")
def one_ray_for_all():
    """Start Ray, which takes seconds. ``render`` uses the existing connection."""
    with ray_pool.connect_ray(4):
        yield


@pytest.fixture
def in_process(monkeypatch):
    """Render in the process of the driver, without Ray."""
    patch_pool(monkeypatch)


def write_meshes(folder):
    """Write the assets a to f, which the stand-in renders."""
    folder.mkdir()
    for name in "abcdef":
        (folder / f"{name}.glb").write_text("fine")
    return folder


@pytest.fixture
def assets(tmp_path):
    return write_meshes(tmp_path / "assets")


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """Read-only folder with the assets a to f, and their shards in ``out``."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch_pool(patch)
        run(write_meshes(folder / "assets"), folder / "out")
    return folder


@pytest.fixture
def out(reference, assets, tmp_path):
    """Complete folder of the shards of ``assets``."""
    shutil.copytree(reference / "assets", assets, dirs_exist_ok=True)
    shutil.copytree(reference / "out", tmp_path / "out")
    return tmp_path / "out"
