"""Compare values and gradients on an accelerator and a CPU for small variants of all configs in configs/model.

The bounds are ``Device.rounding``. A different order of summation changes results by a few float32 ulps (6e-8), and by
at most 5e-7 after all layers of these networks. In bf16, the ulp is 8e-3, and the branches round at different places.
"""

import dataclasses
import math

import pytest
import torch

from lrm_pl.checkpoints.network import load_network
from lrm_pl.checkpoints.tensors import read_tensors, tensor_names
from lrm_pl.data.input_framing import InputFraming
from lrm_pl.geometry.cameras import InputCamera, orbit
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.inference.scene import reconstruct
from lrm_pl.rendering.density_grid import density_grid
from tests.accelerator.configs import MODELS, shrunk
from tests.accelerator.training import train

# Lightning warns about few workers and short runs.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.parametrize("model", MODELS)]

#: Prefixes of metrics that do not depend on the weights.
OTHER = ("time/", "speed/", "memory/", "data/")


def tensors(checkpoint):
    """Read all tensors of a checkpoint."""
    found = {name: torch.empty(shape) for name, shape in tensor_names(checkpoint).items()}
    read_tensors(checkpoint, found)
    return found


def figures(run):
    return [{tag: value for tag, value in step.items() if not tag.startswith(OTHER)} for step in run.logged]


@pytest.fixture(scope="module")
def references():
    """Cached results of runs on a CPU, by model."""
    return {}


@pytest.fixture
def on_a_cpu(device, model, references, tmp_path, shards, lpips_networks, monkeypatch):
    """Train on the CPU in float32."""
    if model not in references:
        device.to_cpu()
        folder = tmp_path / "reference"
        references[model] = train(shrunk(model), folder, shards, lpips_networks, monkeypatch)
        device.to_accelerator()
    return references[model]


@pytest.fixture
def trained(device, model, tmp_path, shards, lpips_networks, monkeypatch):
    """Train on the accelerator."""

    def run(precision):
        where = {"accelerator": "gpu" if device.is_gpu else "cpu", "precision": precision}
        return train(shrunk(model), tmp_path / "ours", shards, lpips_networks, monkeypatch, **where)

    return run


def test_training_validation_and_checkpoint_match_a_cpu(device, trained, on_a_cpu):
    ours, theirs = trained("32-true"), on_a_cpu
    step, validation = figures(theirs)
    terms = {"loss/mse", "loss/lpips", "loss/mask", "loss/tv", "loss/opacity", "optim/grad_norm"}
    assert terms <= step.keys()
    assert {"val/unseen/psnr", "val/heldout/ssim", "val/heldout/lpips"} <= validation.keys()
    found, measured = figures(ours)
    assert found == pytest.approx(step, rel=device.rounding)
    assert ours.gradients.keys() == theirs.gradients.keys()
    wrong = [name for name, g in theirs.gradients.items() if not device.close(ours.gradients[name], g)]
    assert wrong == []
    kept, reference = tensors(ours.checkpoint), tensors(theirs.checkpoint)
    assert kept.keys() == reference.keys()
    moments = [name for name in kept if name.startswith("adam.")]
    assert moments
    # Squares of gradients have twice the relative difference.
    assert [name for name in moments if not device.close(kept[name], reference[name], times=2)] == []
    for name, gradient in theirs.gradients.items():
        # AdamW's first step is the learning rate times the sign of the gradient, which is arbitrary for gradients of 0.
        clear = gradient.abs() > 10 * device.rounding * gradient.abs().max()
        difference = (kept[f"network.{name}"] - reference[f"network.{name}"]).abs()
        assert (difference[clear] <= 0.01 * step["optim/lr"]).all(), name
    # Arbitrary signs change weights of about 0.1 by 4e-4 to 1.5e-3 in one step.
    assert measured == pytest.approx(validation, rel=10 * device.rounding)
    weights = {name: value.cpu().clone() for name, value in ours.module.lrm.state_dict().items()}
    with torch.no_grad():
        for parameter in ours.module.lrm.parameters():
            parameter.zero_()
    load_network(ours.checkpoint, ours.module.lrm)
    for name, value in ours.module.lrm.state_dict().items():
        assert torch.equal(value.cpu(), weights[name]), name


def test_training_in_bf16_is_close_to_float32_on_a_cpu(trained, on_a_cpu):
    found, expected = figures(trained("bf16-mixed"))[0], figures(on_a_cpu)[0]
    assert found.keys() == expected.keys()
    assert all(map(math.isfinite, found.values()))
    for name in ("loss/total", "loss/mse", "loss/mask"):
        assert found[name] == pytest.approx(expected[name], rel=0.02), name


def opaque(model):
    """Return a network with random weights whose field has a surface."""
    section = shrunk(model)
    torch.manual_seed(0)
    made = LRMPipeline({part: section[part] for part in ("lrm", "renderer")}, InputFraming())
    with torch.no_grad():
        made.network.decoder.layers[-1].weight[0] *= 20
        made.network.decoder.layers[-1].bias[0] += 1
    return made


def test_meshes_images_and_thresholds_match_a_cpu(device, model):
    found, surface = {}, 0.0
    image = torch.rand(4, 30, 30, generator=torch.Generator().manual_seed(1))
    camera = InputCamera(2.5, 45.0)
    for name, choose in ((device.name, device.to_accelerator), ("cpu", device.to_cpu)):
        choose()
        made = opaque(model).to(name)
        scene = reconstruct(made.network, made.renderer, image, camera)
        # Rounding to bf16 would change signs near a surface.
        with torch.autocast(name, enabled=False):
            triplane = made.network(
                image[None, None, :3].to(name), camera.c2w.to(name)[None, None],
                camera.fxfycxcy.to(name)[None, None],
            )  # fmt: skip
        exact = dataclasses.replace(scene, field=made.network.field(triplane))
        level = scene.threshold
        if not surface:  # a density that a quarter of the space exceeds
            surface = density_grid(exact.field, 0, 24).quantile(0.75).item()
        found[choose] = (
            scene.field.planes, level, exact.mesh(surface, 24),
            torch.stack([scene.render(c2w, 24) for c2w in orbit(2, 2.5)]), scene.occupancy.cells,
        )  # fmt: skip
    (planes, level, mesh, views, cells), (planes_cpu, level_cpu, mesh_cpu, views_cpu, cells_cpu) = (
        found.values()
    )
    assert device.close(planes, planes_cpu, 0.02 / device.rounding)
    assert level == pytest.approx(level_cpu, rel=0.05)
    assert len(mesh.faces) > 100
    assert mesh.faces.shape == mesh_cpu.faces.shape
    assert abs(mesh.vertices - mesh_cpu.vertices).max() < 10 * device.rounding
    assert abs(mesh.colors - mesh_cpu.colors).max() < 10 * device.rounding
    assert views_cpu.std() > 0.05
    assert (views.cpu() - views_cpu).abs().max() < 4 / 255
    assert (cells.cpu() != cells_cpu).float().mean() < 0.01
