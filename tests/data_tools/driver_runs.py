"""Runs of the render driver with stand-ins for Blender."""

import contextlib
import dataclasses
import json

from data_tools.assets.scan import find_assets
from data_tools.blender.process import Limits, RenderResult
from data_tools.rendering import driver as render_module
from data_tools.rendering import ray_pool
from tests.builders import RENDER_SETTINGS
from tests.data_tools.stand_in_worker import sample_members


class InProcessPool:
    """Stand-in for ``RenderPool`` that uses neither Ray nor processes."""

    renderer = "stand-in"
    processes = 1

    def __init__(self, options):
        self.options = options

    def render(self, assets):
        for asset in assets:
            text = (self.options.assets / asset.file).read_text()
            if text == "bad":
                yield RenderResult(asset, "failed", "is bad")
            else:
                views = self.options.settings.views
                yield RenderResult(
                    asset, "done", members=sample_members(dataclasses.asdict(asset), text, views)
                )

    def describe(self):
        return "1 stand-in"

    def close(self):
        pass


def patch_pool(monkeypatch):
    """Replace ``RenderPool`` by ``InProcessPool``."""
    monkeypatch.setattr(render_module, "RenderPool", InProcessPool)
    monkeypatch.setattr(render_module, "connect_ray", lambda jobs: contextlib.nullcontext())


def run(assets, out, settings=RENDER_SETTINGS, jobs=1, **limits):
    options = ray_pool.PoolOptions(assets, settings, jobs, Limits(**{"time_s": 30.0} | limits))
    return render_module.render(find_assets(assets, out), out, options)


def failures(out):
    lines = (out / "failures.jsonl").read_text().splitlines()
    return {record["id"]: record["reason"] for record in map(json.loads, lines)}
