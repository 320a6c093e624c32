"""Commands on a trained network, on the device that the user names."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from lrm_pl.apps.evaluate import main as evaluate
from lrm_pl.apps.export import main as export
from lrm_pl.apps.infer import main as infer
from lrm_pl.data.synthetic import write_synthetic_shards
from lrm_pl.evaluation import tensorboard
from lrm_pl.evaluation.protocols import PROTOCOLS
from tests.accelerator.configs import shrunk
from tests.accelerator.training import train

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def networks(lpips_networks, monkeypatch):
    """Read the networks of LPIPS once."""
    monkeypatch.setattr(
        "lrm_pl.evaluation.run.pretrained_perceptual_loss", lambda net, **_: lpips_networks[net]
    )


@pytest.fixture
def short_protocol(monkeypatch):
    """LRM's protocol with one input, three targets, and small images on the board."""
    short = dataclasses.replace(PROTOCOLS["lrm"], inputs=(0,), targets=(1, 2, 3))
    monkeypatch.setitem(PROTOCOLS, "lrm", short)
    for name, value in (("_FRAMES", 2), ("_SIDE", 32), ("_RESOLUTION", 32)):
        monkeypatch.setattr(tensorboard, name, value)


@pytest.mark.slow
def test_metrics_of_an_evaluation_match_a_cpu(device, networks, short_protocol, pretrained, tmp_path):
    write_synthetic_shards(tmp_path / "shards", train=1, val=1, views=16, resolution=32)
    found = {}
    for name, choose in ((device.name, device.to_accelerator), ("cpu", device.to_cpu)):
        choose()
        out = tmp_path / f"{choose.__name__}"
        evaluate(
            [
                "--ckpt",
                str(pretrained),
                "--data",
                str(tmp_path / "shards"),
                "--out",
                str(out),
                "--device",
                name,
            ]
        )
        found[choose.__name__] = json.loads((out / "results.json").read_text())["mean"]["model"]
    # The networks draw in bf16, whose last digit is 1/256 of a color.
    assert found["to_accelerator"] == pytest.approx(found["to_cpu"], rel=0.02)


def test_inference_of_an_exported_network_matches_a_cpu(
    device, networks, lpips_networks, tmp_path, shards, monkeypatch
):
    accelerator = "gpu" if device.is_gpu else "cpu"
    train(shrunk("small"), tmp_path / "run", shards, lpips_networks, monkeypatch, accelerator=accelerator)
    run = tmp_path / "run" / "run"
    shutil.copy(tmp_path / "run" / "config.yaml", run / "config.yaml")
    export([str(run), str(tmp_path / "exported")])
    rgba = np.zeros((60, 60, 4), dtype=np.uint8)
    rgba[10:50, 20:40] = (200, 100, 50, 255)
    Image.fromarray(rgba).save(tmp_path / "cut.png")
    frames = {}
    for name, choose in ((device.name, device.to_accelerator), ("cpu", device.to_cpu)):
        choose()
        out = tmp_path / choose.__name__
        infer(
            [str(tmp_path / "cut.png"), "--ckpt", str(tmp_path / "exported"), "--out", str(out), "--device", name,
             "--resolution", "24", "--frames", "4", "--size", "32", "--threshold", "0.3"]
        )  # fmt: skip
        frames[choose.__name__] = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert frames["to_accelerator"] == frames["to_cpu"]
    assert any(path.suffix == ".glb" for path in frames["to_cpu"])
