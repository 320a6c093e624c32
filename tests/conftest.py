"""Fixtures of all folders: shards, a pretrained folder, runs, a browser, the render command."""

import os
import subprocess
from pathlib import Path

import pytest

from tests import ROOT
from tests.shapes import check_shapes

check_shapes()

from lrm_pl.data.synthetic import write_synthetic_shards  # noqa: E402
from tests.browser import chromium  # noqa: E402, F401 - a fixture
from tests.builders import tiny_pretrained  # noqa: E402
from tests.runs import Runs  # noqa: E402


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Six ellipsoids, 8 views of 32 x 32, in shards of 2. Read-only: copy before changing it."""
    folder = tmp_path_factory.mktemp("shards")
    write_synthetic_shards(folder, train=4, val=2, views=8, resolution=32)
    return folder


@pytest.fixture(scope="session")
def render_python():
    """Return the interpreter of the render environment; fail if it is missing."""
    path = Path(os.environ.get("LRM_RENDER_PYTHON", ROOT / ".venv-render" / "bin" / "python"))
    if not path.is_file():
        pytest.fail(f"expected the render environment at {path}, but found none. Run `make .venv-render`")
    return path


@pytest.fixture(scope="session")
def render_command(render_python):
    """Return a function that runs ``data_tools render`` and returns the finished process."""

    def run(assets, out, *options, check=True):
        command = [render_python, "-m", "data_tools", "render", "--assets", assets, "--out", out, *options]
        done = subprocess.run(
            [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=250
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A folder saved by ``save_pretrained``. Read-only: copy before changing it."""
    folder = tmp_path_factory.mktemp("pretrained") / "tiny"
    tiny_pretrained().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    shards = folder / "shards"
    write_synthetic_shards(shards, train=12, val=3, views=8, resolution=32, shard_size=2)
    return Runs(folder, shards)
