"""Fixtures shared by the modules of this folder."""

import sys

import numpy as np
import pytest

from data_tools.blender import process as blender_process
from data_tools.rendering import ray_pool
from lrm_pl.data.synthetic import synthetic_sample
from tests.builders import STAND_IN_WORKER
from tests.data_tools.layout_folders import WRITERS
from tests.data_tools.mvimgnet_videos import FRAMES, SIDE, write_video


@pytest.fixture
def video(tmp_path):
    """The folder of one object, and what it was made of."""
    sample = synthetic_sample("a", FRAMES, SIDE, 0)
    write_video(tmp_path / "in" / "7" / "1a2b", sample, tmp_path / "in" / "7" / "1a2b" / "masks")
    return tmp_path / "in" / "7" / "1a2b", sample


@pytest.fixture(params=sorted(WRITERS))
def layout(request, monkeypatch):
    """A layout, and ellipsoids seen by the lens that it has."""
    if request.param == "zero123":  # lens 35 mm, sensor 32 mm
        monkeypatch.setattr("lrm_pl.data.synthetic.FOV_DEG", 2 * np.degrees(np.arctan(16 / 35)))
    return request.param


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(blender_process, "COMMAND", (sys.executable, str(STAND_IN_WORKER)))


@pytest.fixture(scope="module")
def one_ray_for_all():
    """Starting Ray takes seconds; ``render`` uses the one that there is."""
    with ray_pool.connect_ray(4):
        yield


@pytest.fixture
def assets(tmp_path):
    folder = tmp_path / "assets"
    folder.mkdir()
    for name in "abcdef":
        (folder / f"{name}.glb").write_text("fine")
    return folder
