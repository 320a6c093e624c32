"""Tests of the number of bytes that the operations of the renderer access."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lrm_pl.cli.fit_config import build_meta_model
from lrm_pl.losses.objective import Objective
from lrm_pl.models.triplane import Triplane
from lrm_pl.planning.operation_counter import OperationCounter
from lrm_pl.planning.run_plan import plan_run
from lrm_pl.planning.simulate import (
    A100,
    StepShape,
    copy_to,
    decomposed_operators,
    emulate_device,
    fake_renderer,
    simulate_step,
)
from lrm_pl.rendering.renderer import Renderer
from lrm_pl.training.parallelize import ParallelConfig
from tests.builders import V100, small_lrm

#: 2 objects, 4 views of 32 x 32 of which all rays hit, 24 samples each: 196,608 samples, one chunk per object.
SHAPE, SAMPLES = StepShape(2, 4, 32, 1.0, V100), 2 * 4 * 32 * 32 * 24


def renderer_operations(lrm, renderer, shape):
    """Count the operations from planes to pixels and back, with given gradients of the pixels."""
    counter = OperationCounter(decomposed_operators(shape))
    with FakeTensorMode(allow_non_fake_inputs=True), emulate_device(shape):
        decoder = copy_to("cpu", lrm.decoder).train()
        tokens = torch.empty(shape.objects, *lrm.transformer.tokens.shape[-2:])
        with torch.no_grad():
            planes = copy_to("cpu", lrm.upsampler)(tokens).to(shape.dtype).requires_grad_()
        views = shape.objects, shape.views
        c2w, fxfycxcy = torch.empty(*views, 4, 4), torch.empty(*views, 4)
        jitter = torch.empty(*views, shape.size, shape.size)
        with counter, torch.autocast("cpu", shape.dtype, enabled=shape.dtype != torch.float32):
            counter.part = "renderer"
            field = decoder.field(Triplane(planes, lrm.plane_layout))
            rendering = fake_renderer(renderer, shape, counter)(
                field, c2w, fxfycxcy, (shape.size,) * 2, jitter
            )
            pixels = rendering.rgb, rendering.opacity, rendering.depth
            counter.part = "backward"
            torch.autograd.grad(
                pixels, [planes, *decoder.parameters()], [torch.empty_like(x) for x in pixels]
            )
    return tuple(counter.operations)


@pytest.mark.parametrize("gpu", [None, V100, A100])
def test_operations_match_those_of_the_renderer_in_a_training_step(gpu):
    lrm, shape = small_lrm(depth=1), StepShape(2, 4, 32, 1.0, gpu)
    step = simulate_step(lrm, Renderer(24), Objective(lpips=0.0), ParallelConfig(), shape)
    ours = renderer_operations(lrm, Renderer(24), shape)
    for what in ("flops", "accessed"):
        theirs = sum(getattr(x, what) for x in step.operations if x.part == "renderer")
        assert sum(getattr(x, what) for x in ours if x.part == "renderer") == pytest.approx(theirs, rel=0.01)


def test_each_layer_of_the_mlp_reads_and_writes_each_sample_once():
    """Two layers of 32 x 32 and one of 32 x 4 in bf16 with biases; backward also recomputes them."""
    operations = renderer_operations(small_lrm(), Renderer(24), SHAPE)
    layers = [(32, 32), (32, 32), (32, 4)]
    forward = sum(2 * (SAMPLES * (i + o) + SHAPE.objects * (i * o + o)) for i, o in layers)
    # Per layer x^T g and g W^T, of samples and weights.
    backward = sum(2 * 2 * (SAMPLES * (i + o) + SHAPE.objects * i * o) for i, o in layers)
    moved = {
        (part, name): sum(x.accessed for x in operations if (x.part, x.name) == (part, name))
        for part in ("renderer", "backward")
        for name in ("addmm", "mm")
    }
    assert moved["renderer", "addmm"] == forward
    assert moved["backward", "addmm"] == forward
    assert moved["backward", "mm"] == backward


def test_importance_samples_are_sorted_and_decoded_in_a_second_pass():
    plain, importance = (renderer_operations(small_lrm(), Renderer(24, n), SHAPE) for n in (0, 8))
    assert not any(x.name == "sort" for x in plain)
    assert any(x.name == "sort" for x in importance)
    assert sum(x.flops for x in importance) == pytest.approx(sum(x.flops for x in plain))


@pytest.mark.parametrize("importance", [0, 8])
def test_the_fused_decoder_accesses_rays_and_samples_once_and_planes_once_per_chunk(importance):
    operations = renderer_operations(small_lrm(), Renderer(24, importance), StepShape(2, 4, 32, 1.0, A100))
    passes = 2 if importance else 1
    rays, planes = 2 * 4 * 32 * 32, 2 * 3 * 32 * 32 * 32
    weights, biases = 2 * 2 * (2 * 32 * 32 + 32 * 16), 2 * 4 * (3 * 32 + 16)  # bytes, two objects
    moved = {
        name: sum(x.accessed for x in operations if x.name == name)
        for name in ("decode_along_rays", "decode_along_rays_backward")
    }
    a_pass = rays * (24 + 1) + 2 * planes + weights + biases  # origins, directions, whether it hits
    assert moved["decode_along_rays"] == passes * a_pass + SAMPLES * (4 + 16)
    sums = 2 * 2 * 4 * 108 * (2 * 32 * 32 + 32 * 16 + 3 * 32 + 16)  # of 108 programs, written and read
    assert moved["decode_along_rays_backward"] == passes * (a_pass + 2 * 4 * planes + sums) + SAMPLES * (
        4 + 16
    )
    scratch = 108 * 3 * 4 * 4 * 8 * 32 * 2
    assert {x.scratch for x in operations if x.name == "decode_along_rays_backward"} == {scratch}


def test_rays_that_miss_reduce_only_the_flops_of_the_fused_decoder():
    """They stay in their grid, which compositing processes as a whole."""
    fused = "decode_along_rays", "decode_along_rays_backward"

    def costs(hits):
        operations = renderer_operations(small_lrm(), Renderer(24), StepShape(2, 4, 32, hits, A100))
        flops = sum(x.flops for x in operations if x.name in fused)
        return flops, sum(x.accessed for x in operations), sum(x.count for x in operations)

    (flops, *rest), (all_flops, *all_rest) = costs(0.25), costs(1.0)
    assert flops == 0.25 * all_flops
    assert rest == all_rest


@pytest.mark.filterwarnings("default")  # LightningCLI uses names that jsonargparse has deprecated
def test_bytes_of_a_step_with_the_settings_of_the_paper(root):
    """configs/experiment/paper.yaml on 128 GPUs: 8 objects each, 4 views of 128 x 128, 128 samples; 95 % hit.

    With plain operators 2.3 TB; with the fused decoder at most a twentieth of 1.8 TB, and scratch that stays in the L2.
    """
    moved = {}
    for name, gpu in (("plain", V100), ("fused", A100)):
        planned = plan_run(*build_meta_model(["-c", str(root / "configs/experiment/paper.yaml")]), 128, gpu)
        module, shape = planned.module, planned.shape
        assert (shape.objects, shape.views, shape.size, shape.dtype) == (8, 4, 128, torch.bfloat16)
        assert shape.hits == pytest.approx(0.95, abs=0.01)
        operations = renderer_operations(module.lrm, module.renderer, shape)
        moved[name] = sum(x.accessed for x in operations)
        print(f"renderer of the paper's step, {name}: {moved[name] / 1e12:.3f} TB")
    assert 1.7e12 < moved["plain"] < 2.4e12
    assert moved["fused"] < 1.8e12 / 20
    assert 0 < max(x.scratch for x in operations) < A100.l2 / 4
