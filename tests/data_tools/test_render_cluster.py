"""The driver on a Ray cluster of several nodes, which come and go; a stand-in for Blender answers."""

import contextlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from data_tools.assets.scan import find_assets
from data_tools.blender import process
from data_tools.blender.process import BlenderError
from data_tools.rendering import driver as render
from data_tools.rendering import ray_pool
from lrm_pl.data.manifest import read_manifest
from tests.builders import RENDER_SETTINGS, STAND_IN_WORKER, read_tars


@pytest.fixture
def assets(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "COMMAND", (sys.executable, str(STAND_IN_WORKER)))
    folder = tmp_path / "assets"
    folder.mkdir()
    for name in "abcdef":
        (folder / f"{name}.glb").write_text("fine")
    return folder


@pytest.fixture
def nodes(monkeypatch, tmp_path_factory):
    """A head without CPUs of its own and two nodes with two CPUs each, started in another folder than the driver's."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # nodes would find the code there
    elsewhere = contextlib.chdir(tmp_path_factory.mktemp("elsewhere"))
    with elsewhere:
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        with elsewhere:
            for _ in range(2):
                nodes.add_node(num_cpus=2)
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


def run(assets, out):
    return render.render(
        find_assets(assets), out, RENDER_SETTINGS, ray_pool.PoolOptions(assets, RENDER_SETTINGS)
    )


def wait_for(path):
    give_up = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < give_up, path
        time.sleep(0.01)


def test_all_nodes_of_a_cluster_render_and_the_bytes_are_those_of_one(assets, nodes, tmp_path, capfd):
    run(assets, tmp_path / "many")
    assert "4 Blender processes (1 CPU each) on 3 nodes" in capfd.readouterr().out
    nodes.remove_node(nodes.list_all_nodes()[-1])
    run(assets, tmp_path / "one")
    assert "2 Blender processes (1 CPU each) on 2 nodes" in capfd.readouterr().out
    assert read_tars(tmp_path / "many") == read_tars(tmp_path / "one")


def test_a_relative_assets_folder_is_the_one_that_the_driver_means(assets, nodes, tmp_path):
    assert run(Path(os.path.relpath(assets)), tmp_path / "out").failures == 0


def test_nodes_that_do_not_have_this_code_are_named_instead_of_tried_for_ever(
    assets, nodes, tmp_path, monkeypatch
):
    """Ray's workers look for the code where the driver does: in its path, and in its working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "data_tools").is_dir()])
    with pytest.raises(BlenderError, match=r"expected .* on every node, .* No module named 'data_tools'"):
        run(assets, tmp_path / "out")


def test_a_node_that_dies_costs_the_objects_in_hand_one_more_try_and_a_new_one_is_used(
    assets, nodes, tmp_path
):
    run(assets, tmp_path / "whole")
    for name in "abc":
        (assets / f"{name}.glb").write_text("waits")

    with ThreadPoolExecutor(1) as pool:
        rendering = pool.submit(run, assets, tmp_path / "out")
        try:
            wait_for(assets / "a.working")
            wait_for(assets / "b.working")
            nodes.remove_node(nodes.list_all_nodes()[-1], allow_graceful=False)
            nodes.add_node(num_cpus=2)
        finally:
            (assets / "go").touch()
        manifest = rendering.result()
    assert manifest.failures == 0
    assert read_tars(tmp_path / "out") == read_tars(tmp_path / "whole")
    assert read_manifest(tmp_path / "out") == manifest


def test_no_cluster_at_the_address_is_one_clear_error(assets, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        BlenderError, match=r"expected a Ray cluster at RAY_ADDRESS=127.0.0.1:1, .*`ray start --head`"
    ):
        run(assets, tmp_path / "out")
