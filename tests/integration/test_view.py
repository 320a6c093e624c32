"""Tests of `lrm view` in Chromium."""

import io
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from lrm_pl.apps.view import main
from lrm_pl.cli.main import main as train
from lrm_pl.evaluation.viewer import has_no_checkpoint
from tests.builders import spoil_first_poses
from tests.servers.lrm_server import Served

# Lightning warns about short runs; Playwright closes its pipes in its own thread.
pytestmark = pytest.mark.filterwarnings("default")


def image(page):
    """Return a screenshot without the controls and notices."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    return np.asarray(image).astype(int)[200:, :750]


def box_beside(page, label):
    """Find the checkbox on the line of a label."""
    line = page.get_by_text(label, exact=True).bounding_box()["y"]
    boxes = page.locator("input[type=checkbox]:visible").all()
    return min(boxes, key=lambda box: abs((box.bounding_box() or {"y": 1e6})["y"] - line))


def test_the_page_shows_the_field_and_the_cameras_and_loads_new_checkpoints(
    here, run, chromium, shards, tmp_path
):
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    spoil_first_poses(next(data.glob("val-*.tar")))  # the first object is unreadable
    server = Served("view", run, "--data", data, "--device", "cpu")
    try:
        page = chromium.new_page(viewport={"width": 1100, "height": 750})
        page.goto(server.address)
        page.wait_for_selector("text=step-00000002, step 2", timeout=60_000)
        page.wait_for_selector("canvas", timeout=60_000)
        page.wait_for_timeout(4000)
        before = image(page)
        assert before.min() < 200, "the page is not blank"
        box_beside(page, "cameras").uncheck(force=True)
        deadline = time.monotonic() + 30
        while (changed := (np.abs(image(page) - before) > 30).any(axis=-1).mean()) < 0.01:
            assert time.monotonic() < deadline, f"the frusta are still shown: {changed}"
            page.wait_for_timeout(500)
        assert image(page)[100:400, 200:600].min() < 250, "the field is rendered"
        train(["fit", *here, "--run.folder=run", "--trainer.max_steps=4", "--trainer.val_check_interval=4"])
        page.wait_for_selector("text=step-00000004, step 4", timeout=60_000)
        page.locator("input[role=combobox][value='step-00000004']").click()
        page.get_by_role("option", name="step-00000002").click()
        page.wait_for_selector("text=step-00000002, step 2", timeout=60_000)
        page.wait_for_timeout(4000)  # new checkpoints are checked every three seconds
        assert page.get_by_text("step-00000002, step 2").is_visible(), "the selected checkpoint stays"
        page.close()
    finally:
        output = server.kill()
    assert "Traceback" not in output


def test_a_missing_run_or_data_set_is_an_error(run):
    with pytest.raises(SystemExit, match="expected a trained model in runs/lrm, but found none"):
        main([])
    with pytest.raises(SystemExit, match="expected finished shards in nowhere"):
        main([str(run), "--data", "nowhere"])
    with pytest.raises(SystemExit, match="expected a run folder at nothing, but found none"):
        main(["nothing"])
    with pytest.raises(SystemExit, match=r"lrm: Cannot listen on 127\.0\.0\.1:99999: "):
        main([str(run), "--port", "99999"])


def test_a_run_without_checkpoints_is_waiting_for_the_first_one(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    assert not has_no_checkpoint(str(tmp_path)), "the folder has no config, so it is not a run"
    (tmp_path / "config.yaml").touch()
    assert has_no_checkpoint(str(tmp_path))
    (checkpoints / "step-00000002").mkdir()
    assert not has_no_checkpoint(str(tmp_path))
