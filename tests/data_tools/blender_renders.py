"""Renders of many meshes in one Blender process, without the driver, Ray and shards."""

import contextlib
import dataclasses
import os
from pathlib import Path

import numpy as np

from data_tools.assets.scan import find_assets
from data_tools.blender.process import BlenderProcess, Limits
from data_tools.quality.measures import DEFAULT_RULES, broken_rules, decode_measures, parse_rule
from lrm_pl.data.schema import decode_image, decode_sample
from tests import ROOT
from tests.builders import RENDER_SETTINGS

PYTHON = os.environ.get("LRM_RENDER_PYTHON", str(ROOT / ".venv-render" / "bin" / "python"))


def render_results(folder, names=None, **settings):
    """Render the meshes of a folder, or those with the given ids; return id -> ``RenderResult``."""
    command = (PYTHON, "-m", "data_tools.blender.worker")
    settings = dataclasses.replace(RENDER_SETTINGS, **settings)
    assets = [asset for asset in find_assets(Path(folder)) if names is None or asset.id in names]
    with contextlib.closing(BlenderProcess(Path(folder), settings, 2, command)) as process:
        return {asset.id: process.render(asset, Limits(time_s=60.0)) for asset in assets}


def render_views(folder, **settings):
    """Render the meshes of a folder.

    Returns:
        id -> sample, id -> views (V, H, W, 4), and id -> measures with "reason", which is "" for accepted objects.
    """
    samples, views, rows = {}, {}, {}
    for key, result in render_results(folder, **settings).items():
        rows[key] = {"reason": result.reason}
        if result.status == "done":
            samples[key] = decode_sample(key, result.members)
            views[key] = np.stack([decode_image(key, view) for view in samples[key].views])
            measures = decode_measures(key, result.members["measures.json"])
            reason = broken_rules(measures, [parse_rule(rule) for rule in DEFAULT_RULES])
            rows[key] = dataclasses.asdict(measures) | {"reason": reason}
    return samples, views, rows
