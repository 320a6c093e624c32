"""Tests that a step with ``--trainer.deterministic true`` uses only operators that are deterministic on CUDA."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lrm_pl.kernels import device
from lrm_pl.kernels import triplane as triplane_kernels
from lrm_pl.losses.objective import Objective
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.encoder import ImageEncoder
from lrm_pl.models.lrm import LRM
from lrm_pl.rendering.renderer import Renderer
from lrm_pl.training.module import LRMModule
from lrm_pl.training.optim import OptimizerConfig
from lrm_pl.weights.encoders import pretrained_perceptual_loss
from tests.builders import make_batch

#: Operators that raise an error on CUDA with torch.use_deterministic_algorithms, which are those that call
#: Context::alertNotDeterministic in libtorch_cuda.so and libtorch_cpu.so of torch 2.14.1. _embedding_bag_dense_backward
#: raises an error only with mode="max", which training does not use.
NONDETERMINISTIC = {
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "_ctc_loss_backward",
    "_embedding_bag_dense_backward",
    "_upsample_bicubic2d_aa_backward",
    "_upsample_bilinear2d_aa_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "bincount",
    "cudnn_grid_sampler_backward",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
    "histc",
    "index_reduce",
    "index_reduce_",
    "max_pool3d_with_indices_backward",
    "max_unpool2d",
    "max_unpool3d",
    "median",
    "nanmedian",
    "nll_loss2d_forward",
    "put",
    "put_",
    "reflection_pad1d_backward",
    "reflection_pad3d_backward",
    "replication_pad1d_backward",
    "replication_pad2d_backward",
    "replication_pad3d_backward",
    "scatter",
    "scatter_",
    "scatter_reduce",
    "scatter_reduce_",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_linear1d_backward",
    "upsample_trilinear3d_backward",
}

#: The project's own operators, whose bodies the mode looks into.
BODIES = {
    "triplane_sample": triplane_kernels._op,
    "triplane_sample_backward": triplane_kernels._backward_op,
    "triplane_accumulate": triplane_kernels._accumulate_op,
}


class Operators(TorchDispatchMode):
    """Dispatch mode that records the names of all operators."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        self.names.add(name.split(".")[0])
        if namespace == "lrm_pl":
            with self:
                return BODIES[name]._init_fn(*args, **(kwargs or {}))  # private; torch 2.14.1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def vgg():
    return pretrained_perceptual_loss("vgg", source="pypi")


def train_one_step(encoder, renderer, vgg, **options):
    torch.manual_seed(0)
    # An image of another size than the encoder's is resized.
    network = LRM(
        ImageEncoder(encoder, 64, depth=1),
        NeRFDecoder(4, 16, 4),
        **{"dim": 32, "depth": 1, "heads": 2, "camera_dim": 16, "plane_tokens": 4, **options},
    )
    objective = Objective(mask=0.1, tv=1e-3, opacity=0.01)
    objective.perceptual = vgg
    module, optimizer = LRMModule(network, renderer, objective), OptimizerConfig().build(network)
    sum(objective(module.render_targets(make_batch()), 0).values()).backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


@pytest.mark.parametrize(
    ("encoder", "renderer", "options"),
    [
        ("vit_tiny_patch16_224", Renderer(8), {}),
        ("vit_small_patch16_dinov3", Renderer(8, 4, "box", "midpoints"), {"qk_norm": True}),
        ("vit_tiny_patch16_224", Renderer(8, 4, unit="chord"), {"blocks": "triposr", "camera": None}),
    ],
)
@pytest.mark.usefixtures("deterministic")
def test_all_operators_of_a_training_step_are_deterministic_on_cuda(encoder, renderer, options, vgg):
    with device.as_accelerator(), Operators() as operators:
        train_one_step(encoder, renderer, vgg, **options)
    assert operators.names >= {
        "index_add_",
        "cumsum",
        "max_pool2d_with_indices_backward",
    }  # all of it is looked into
    assert not operators.names & NONDETERMINISTIC


@pytest.mark.usefixtures("deterministic")
def test_the_reference_for_sampling_is_not_deterministic_on_cuda():
    planes = torch.randn(3, 4, 4, 2, requires_grad=True)
    with Operators() as operators:
        sampled = triplane_kernels.triplane_sample_plain(
            planes, torch.rand(5, 3), ((0, 1), (0, 2), (1, 2)), "sum"
        )
        sampled.sum().backward()
    assert operators.names & NONDETERMINISTIC == {"grid_sampler_2d_backward"}
