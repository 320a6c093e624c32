"""Run the package on fake CUDA tensors, on which an operation on tensors of two devices is an error as on a GPU.

Custom operators, backward passes and autocast are not covered.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

from lrm_pl.data.batch import collate
from lrm_pl.data.synthetic import synthetic_sample
from lrm_pl.data.transforms import Augmentation, CropConfig, decode_views, evaluation_item, training_item
from lrm_pl.geometry.cameras import InputCamera
from lrm_pl.inference.model_folder import build_network
from lrm_pl.losses.objective import Objective
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.metrics import ImageMetrics
from lrm_pl.rendering.density_grid import query_color, query_density
from lrm_pl.training.module import LRMModule
from lrm_pl.training.parallelize import ParallelConfig, prepare_blocks
from tests.accelerator.configs import MODELS, shrunk
from tests.accelerator.fake import DEVICE, FakeCuda, devices

SAMPLES = [synthetic_sample(name, 4, 32, 0) for name in "ab"]


@pytest.fixture(params=[(8, 0), (7, 5)], ids=["sm_80", "sm_75"])
def cuda(request, recorded, monkeypatch):
    """Fake CUDA devices that support the Triton kernels, and older devices."""
    major, minor = request.param
    gpu = SimpleNamespace(major=major, minor=minor, multi_processor_count=108, L2_cache_size=40 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    with FakeCuda() as mode:
        yield mode


def training_batch():
    augmentation, rng = Augmentation(CropConfig(low=16, high=32, size=16)), np.random.default_rng(0)
    return collate(
        [training_item(decode_views(sample, (0, 1), 0, rng), 1, augmentation) for sample in SAMPLES]
    )


def evaluation_batch():
    return collate([evaluation_item(sample, 1, (2, 3)) for sample in SAMPLES])


def arrived(cuda, packed):
    """Copy a batch to the device as Lightning does."""
    host = dataclasses.replace(packed, flat=cuda.on_the_host(packed.flat))
    return host.to(DEVICE)


@pytest.mark.parametrize("make", [training_batch, evaluation_batch])
def test_all_tensors_of_a_batch_are_copied_to_the_device(cuda, make):
    assert devices(arrived(cuda, make())) == {DEVICE}


@pytest.fixture(scope="module")
def lpips():
    with torch.device("meta"):
        features = torchvision.models.vgg16().features.state_dict()
    return PerceptualLoss({f"features.{name}": value for name, value in features.items()}, "vgg")


@pytest.fixture
def perceptual(cuda, lpips):
    """LPIPS on the fake device."""
    copied = PerceptualLoss.__new__(PerceptualLoss)
    copied.name, copied.network = lpips.name, cuda.module(lpips.network)
    return copied


@pytest.fixture(scope="module", params=MODELS)
def built(request):
    """Section of a config, its network with real weights, and its renderer."""
    section = shrunk(request.param)
    return section, *build_network(section)


@pytest.fixture
def module(built, cuda, perceptual):
    """Training module of a config on the device."""
    section, network, renderer = built
    network = cuda.module(network)
    prepare_blocks(network, ParallelConfig(**section.get("parallel", {})))
    made = LRMModule(network, renderer, Objective(**section["objective"]))
    made.objective.perceptual = perceptual
    return made


def test_all_tensors_of_a_training_step_are_on_the_device(cuda, module):
    batch = arrived(cuda, training_batch())
    inputs = module.render_targets(batch)
    assert devices(inputs) == {DEVICE}
    assert inputs.prediction.requires_grad
    terms = module.objective(dataclasses.replace(inputs, prediction=inputs.prediction.detach()), 0)
    assert terms.keys() == {"mse", "lpips", "mask", "tv", "opacity"}
    assert devices(terms) == {DEVICE}


@pytest.fixture(scope="module")
def metrics():
    """Metrics with real states, because torchmetrics does not support fake tensors."""
    return ImageMetrics()


@pytest.mark.parametrize("built", ["small"], indirect=True)
def test_all_tensors_of_validation_and_metrics_are_on_the_device(metrics, cuda, module, perceptual):
    module = module.eval()
    batch = arrived(cuda, evaluation_batch())
    with torch.no_grad():
        prediction = module.validation_step(batch, 0)
        assert devices(prediction) == {DEVICE}
        metrics.perceptual, metrics._device = perceptual, DEVICE
        for name, default in metrics._defaults.items():
            setattr(metrics, name, torch.empty(default.shape, dtype=default.dtype, device=DEVICE))
        metrics.update(prediction.images.flatten(0, 1), batch.target.images.flatten(0, 1))
        assert devices([getattr(metrics, name) for name in metrics._defaults]) == {DEVICE}


def test_images_and_densities_of_a_reconstruction_are_on_the_device(cuda, module):
    with torch.no_grad():
        scene, _ = module.eval().predict_step(arrived(cuda, evaluation_batch()), 0)
    assert devices(scene.field.planes) == {DEVICE}
    assert devices(scene.occupancy.cells) == {DEVICE}
    pose = cuda.on_the_host(InputCamera(2.5, 45.0).c2w)
    assert devices(scene.render(pose, 16)) == {DEVICE}
    points = torch.empty(100, 3, device=DEVICE)
    assert devices([query_density(scene.field, 0, points), query_color(scene.field, 0, points)]) == {DEVICE}


def test_an_operation_on_tensors_of_two_devices_is_an_error(cuda):
    with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        torch.empty(2, device=DEVICE) + torch.empty(2)
