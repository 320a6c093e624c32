"""Half a million assets: how long until the first is rendered, and what the plan takes."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.soak

PROGRAM = """
import json, resource, sys, time
from pathlib import Path
from data_tools import render
from data_tools.assets import Asset, find_assets, write_list
from data_tools.settings import RenderSettings

class Reached(Exception):
    pass

def begin(*_):
    raise Reached

folder = Path(sys.argv[1])
write_list(folder, (
    Asset(f"{i:032x}", f"https://example.org/{i}.glb", "", "chair", "somebody", "a store", "CC0", ("a", "b"))
    for i in range(int(sys.argv[2]))
))
render.connected = begin  # what comes next is Blender
settings = RenderSettings(
    preset="frame", normalise="sphere", seed=0, shard_size=8, views=16, resolution=8, samples=1, held_out=8
)
found = []
for _ in range(2):
    start = time.monotonic()
    assets = find_assets(folder)
    try:
        render.render(assets, folder / "out", settings, render.Setup(folder, settings, 1))
    except Reached:
        found.append(time.monotonic() - start)
    del assets
print(json.dumps({"starts": found, "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
"""


def test_half_a_million_assets_are_planned_within_a_minute_and_a_gigabyte(tmp_path, root):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), "500000"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"\n500,000 assets: {found['starts'][0]:.0f} s, again {found['starts'][1]:.0f} s, {found['gb']:.2f} GB"
    )
    assert found["starts"][0] < 60
    assert found["starts"][1] < 30
    assert found["gb"] < 1
