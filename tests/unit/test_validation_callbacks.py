import dataclasses

import lightning as L
import pytest
import torch

from lrm_pl.callbacks.view_logger import ViewLogger, view_row
from lrm_pl.data.datamodule import EVALUATION_SETS
from lrm_pl.metrics import ImageMetrics, psnr
from lrm_pl.models.triplane import Triplane
from lrm_pl.rendering.output import Rendering
from lrm_pl.training.image_metrics import ImageMetricsLogger
from lrm_pl.training.module import Prediction
from tests.builders import Operators, make_batch

#: Unused arguments of the callbacks.
LIGHTNING = object.__new__(L.Trainer), L.LightningModule()


def batch_and_prediction(weight):
    torch.manual_seed(0)
    batch = dataclasses.replace(make_batch(), weight=torch.tensor(weight))
    rays = (2, 2, 32, 32)
    rendering = Rendering(torch.rand(*rays, 3), torch.rand(rays), torch.rand(rays))
    return batch, Prediction(torch.rand(2, 2, 3, 32, 32), rendering, Triplane(torch.zeros(2, 3, 1, 2, 2)))


@pytest.mark.parametrize(("weight", "images"), [([1.0, 1.0], 4), ([0.0, 1.0], 2), ([0.0, 0.0], 0)])
def test_padding_is_not_measured_and_each_batch_synchronizes_once(weight, images):
    batch, prediction = batch_and_prediction(weight)
    logger = ImageMetricsLogger()
    logger.metrics = {name: ImageMetrics() for name in EVALUATION_SETS}
    with Operators() as operators:
        logger.on_validation_batch_end(*LIGHTNING, prediction, batch, 0)
    assert operators.calls["aten::nonzero"] == 1
    assert not operators.calls["aten::_local_scalar_dense"]
    metric = logger.metrics[EVALUATION_SETS[0]]
    assert metric.images == images
    if images:
        real = batch.weight > 0
        expected = psnr(prediction.images[real].flatten(0, 1), batch.target.images[real].flatten(0, 1))
        assert metric.compute().psnr == pytest.approx(float(expected.mean()))


def test_only_rows_of_the_first_objects_are_kept():
    batch, prediction = batch_and_prediction([0.0, 1.0])
    logger = ViewLogger(objects=2)
    logger.on_validation_epoch_start(*LIGHTNING)
    for _ in range(2):
        logger.on_validation_batch_end(*LIGHTNING, prediction, batch, 0)
    rows = logger._rows[EVALUATION_SETS[0]]
    assert len(rows) == 2
    assert torch.equal(rows[0], view_row(prediction, batch, 1))
    with Operators() as operators:
        logger.on_validation_batch_end(*LIGHTNING, prediction, batch, 0)
    assert not operators.calls
