"""Runs of the render driver with a stand-in for Blender."""

import json

from data_tools.assets.scan import find_assets
from data_tools.blender.process import Limits
from data_tools.rendering import driver as render_module
from data_tools.rendering import ray_pool
from tests.builders import RENDER_SETTINGS


def run(assets, out, settings=RENDER_SETTINGS, jobs=1, **limits):
    options = ray_pool.PoolOptions(assets, settings, jobs, Limits(**{"time_s": 30.0} | limits))
    return render_module.render(find_assets(assets, out), out, options)


def failures(out):
    lines = (out / "failures.jsonl").read_text().splitlines()
    return {record["id"]: record["reason"] for record in map(json.loads, lines)}
