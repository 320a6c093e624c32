"""The render driver on a Ray cluster whose nodes join and leave, with a stand-in for Blender."""

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
from data_tools.blender.process import BlenderError
from data_tools.rendering import driver as render
from data_tools.rendering import ray_pool
from lrm_pl.data.manifest import read_manifest
from tests.builders import RENDER_SETTINGS, read_tars

pytestmark = pytest.mark.usefixtures("stand_in")


@pytest.fixture
def nodes(monkeypatch, tmp_path_factory):
    """Cluster of a head node without CPUs and two nodes with two CPUs each, started in a different working folder."""
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
    return render.render(find_assets(assets), out, ray_pool.PoolOptions(assets, RENDER_SETTINGS))


def wait_for(path):
    give_up = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < give_up, path
        time.sleep(0.01)


def test_the_number_of_nodes_does_not_change_the_bytes(assets, nodes, tmp_path, capfd):
    run(assets, tmp_path / "many")
    assert "4 Blender processes (1 CPU each) on 3 nodes" in capfd.readouterr().out
    nodes.remove_node(nodes.list_all_nodes()[-1])
    run(assets, tmp_path / "one")
    assert "2 Blender processes (1 CPU each) on 2 nodes" in capfd.readouterr().out
    assert read_tars(tmp_path / "many") == read_tars(tmp_path / "one")


def test_a_relative_assets_folder_is_relative_to_the_working_folder_of_the_driver(assets, nodes, tmp_path):
    assert run(Path(os.path.relpath(assets)), tmp_path / "out").failures == 0


def test_nodes_without_the_code_raise_an_error(assets, nodes, tmp_path, monkeypatch):
    """Ray workers import the code from the path and the working folder of the driver."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "data_tools").is_dir()])
    with pytest.raises(BlenderError, match=r"expected .* on every node, .* No module named 'data_tools'"):
        run(assets, tmp_path / "out")


def test_objects_of_a_lost_node_are_rendered_again_on_a_new_node(assets, nodes, tmp_path):
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


def test_a_missing_cluster_raises_an_error_with_a_remedy(assets, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        BlenderError, match=r"expected a Ray cluster at RAY_ADDRESS=127.0.0.1:1, .*`ray start --head`"
    ):
        run(assets, tmp_path / "out")
