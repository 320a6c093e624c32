"""How fast the demo objects render; alone on the machine, like any timing."""

import re

import pytest


@pytest.mark.soak
@pytest.mark.blender
def test_the_demo_objects_render_at_12_views_a_second_and_a_second_run_renders_nothing(
    root, tmp_path, render_command
):
    assets, out = root / "data_tools" / "demo_assets", tmp_path / "demo"
    printed = render_command(assets, out).stdout
    print(printed)
    speed = re.search(r"speed +([\d.]+) views/s \(768 views", printed)
    assert speed is not None
    assert float(speed[1]) >= 12
    assert "Nothing to render: all 48 objects" in render_command(assets, out).stdout
