"""Overfitting of one rendered object, which tests rendering, shards, cameras and the model together."""

import shutil
import time

import pytest
import torch

from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.data.batch import collate
from lrm_pl.data.stream import EvaluationSet
from lrm_pl.metrics import ImageMetrics

OBJECT = "lockedLocker"


def pooled_psnr(images, truth):
    metrics = ImageMetrics()
    metrics.update(images, truth)
    return metrics.compute().psnr_pooled


@pytest.mark.soak
@pytest.mark.blender
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")
def test_overfitting_one_object_reaches_27_db_in_three_minutes(root, tmp_path, render_command):
    assets = tmp_path / "assets"
    assets.mkdir()
    shutil.copy(root / "data_tools" / "demo_assets" / f"{OBJECT}.glb", assets)
    render_command(assets, tmp_path / "shards", "--res", "64", "--views", "16")
    cli = LRMCLI("fit", [
        "-c", str(root / "configs/experiment/demo.yaml"), "-c", str(root / "configs/experiment/overfit.yaml"),
        "--data.folder", str(tmp_path / "shards"),
        "--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.limit_val_batches", "0",
    ], records=False)  # fmt: skip
    cli.before_fit()
    start = time.perf_counter()
    cli.trainer.fit(cli.model, cli.datamodule)
    seconds = time.perf_counter() - start
    items = EvaluationSet(cli.datamodule.mixture, "train", 1, slice(12))
    batch = collate([next(iter(items))]).to("cpu")
    with torch.inference_mode():
        images = cli.model.eval().validation_step(batch, 0).images.flatten(0, 1)
    truth = batch.target.images.flatten(0, 1)
    white, reached = (pooled_psnr(each, truth) for each in (torch.ones_like(truth), images))
    print(f"{OBJECT}: white {white:.2f} dB, reached {reached:.2f} dB on its 12 training views")
    assert seconds <= 180
    assert white <= 15
    assert reached >= 27
