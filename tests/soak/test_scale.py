"""Time and memory to plan a run with 500,000 assets, and to add an asset."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.soak

PROGRAM = """
import json, resource, sys, time
from pathlib import Path
from data_tools.rendering import driver
from data_tools.assets.asset_list import Asset, write_list
from data_tools.assets.scan import find_assets
from data_tools.rendering.resume import plan_folder, write_plan
from data_tools.rendering.settings import RenderSettings, write_settings

class Reached(Exception):
    pass

def begin(*_):
    raise Reached

folder, what = Path(sys.argv[1]), sys.argv[3]
out = folder / "out"
settings = RenderSettings(
    preset="frame", normalize="sphere", seed=0, shard_size=8, views=16, resolution=8, samples=1, held_out=8
)
found = []
if what == "list":
    write_list(folder, (
        Asset(f"{i:032x}", f"https://example.org/{i}.glb", "", "chair", "somebody", "a store", "CC0", ("a", "b"))
        for i in range(int(sys.argv[2]))
    ))
elif what == "begin":
    assets = find_assets(folder)
    write_plan(out, plan_folder(out, settings, assets, folder), assets)
    write_settings(out, settings, "stand-in")
elif what == "add":
    write_list(folder, (*find_assets(folder), Asset("one_more", "https://example.org/1.glb", "", "", "", "", "")))
else:
    driver.connect_ray = begin  # Blender would start next
    start = time.monotonic()
    assets = find_assets(folder)
    try:
        driver.render(assets, out, driver.PoolOptions(folder, settings, 1))
    except Reached:
        found.append(time.monotonic() - start)
print(json.dumps({"starts": found, "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
"""


def test_planning_of_500000_assets_takes_less_than_one_minute_and_one_gigabyte(tmp_path, root):
    def run(what):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path), "500000", what],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    run("list")
    starts = {"first": run("start"), "again": run("start")}
    run("begin")
    starts["begun"] = run("start")
    run("add")
    starts["one added"] = run("start")
    told = (f"{name} {found['starts'][0]:.0f} s, {found['gb']:.2f} GB" for name, found in starts.items())
    print(f"\n500,000 assets: {'; '.join(told)}")
    for name, found in starts.items():
        assert found["starts"][0] < (60 if name == "first" else 30), name
        assert found["gb"] < 1, name
