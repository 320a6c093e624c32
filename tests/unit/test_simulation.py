"""Tests of simulated training steps, compared with real steps."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lrm_pl.data.batch import Batch, Views
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.data.transforms import CropConfig
from lrm_pl.geometry.cameras import orbit, resize_and_crop
from lrm_pl.geometry.rays import pixel_rays, ray_interval
from lrm_pl.kernels.device import HOST_TYPES, as_accelerator, on_cpu
from lrm_pl.losses.objective import Objective
from lrm_pl.planning.ray_hits import default_cameras, hit_fraction, training_cameras
from lrm_pl.planning.sharding import check_shards, fake_process_group
from lrm_pl.planning.simulate import A100, StepShape, copy_to, simulate_step
from lrm_pl.rendering.renderer import Renderer
from lrm_pl.training.module import LRMModule
from lrm_pl.training.parallelize import ParallelConfig, prepare_blocks
from tests.builders import CAMERA, V100, small_lrm

SIZE = 32


#: Fraction of the rays of ``real_batch`` that hit the sphere.
HITS = 0.76


def shape(objects=2, *, gpu=None, **options):
    return StepShape(objects, 4, SIZE, HITS, gpu, dtype=torch.bfloat16, **options)


def real_batch(objects):
    """Four views around each object at a distance from which it fits the image."""
    c2w = orbit(4, 2.4, 12.0).expand(objects, 4, 4, 4)
    camera = CAMERA.expand(objects, 4, 4)

    def views(count, size):
        images = torch.rand(objects, count, 3, size, size)
        alpha, background = torch.rand(objects, count, size, size), torch.rand(objects, count, 3)
        return Views(
            images,
            alpha,
            background,
            c2w[:, :count].clone(),
            camera[:, :count].clone(),
            torch.rand_like(alpha),
        )

    return Batch(tuple("ab")[:objects], views(1, 64), views(4, SIZE), torch.ones(objects))


@pytest.fixture
def one_thread():
    """FlopCounterMode counts only operations of the calling thread, and rendering uses several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_hit_fraction_of_the_real_batch():
    near, far = ray_interval(*pixel_rays(orbit(4, 2.4, 12.0), CAMERA.expand(4, 4), SIZE, SIZE), "sphere")
    assert (far > near).float().mean().item() == pytest.approx(HITS, abs=0.01)


@pytest.mark.parametrize("gpu", [None, V100])
@pytest.mark.parametrize(
    ("frozen", "recompute", "importance"), [(False, 0, 0), (False, 1, 8), (True, 0, 8), (True, 2, 0)]
)
def test_flops_match_the_counter_of_pytorch_in_a_real_step(one_thread, gpu, frozen, recompute, importance):
    """A GPU is simulated with CPU tensors in the code paths for accelerators."""
    lrm, renderer = small_lrm(frozen=frozen), Renderer(24, importance)
    objective, parallel = (
        Objective(lpips=0.0, tv=1e-3),
        ParallelConfig(activation_checkpointing_every=recompute),
    )
    estimated = simulate_step(lrm, renderer, objective, parallel, shape(gpu=gpu))
    prepare_blocks(lrm, parallel)
    module, batch = LRMModule(lrm, renderer, objective), real_batch(2)
    branches = as_accelerator(gpu) if gpu else contextlib.nullcontext()
    with branches, FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(objective(module.render_targets(batch), 0).values())
        loss.backward()
    assert estimated.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_deterministic_steps_are_simulated_without_the_fused_decoder_and_the_flag_is_restored():
    parts = small_lrm(plane_tokens=8), Renderer(8), Objective(lpips=0.0), ParallelConfig()
    names = [
        {x.name for x in simulate_step(*parts, shape(gpu=A100, deterministic=flag)).operations}
        for flag in (False, True)
    ]
    assert ["decode_along_rays" in found for found in names] == [True, False]
    assert "index_add_" in names[1]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_gpu_is_simulated_with_the_code_paths_for_accelerators():
    parts = small_lrm(plane_tokens=8), Renderer(8), Objective(lpips=0.0), ParallelConfig()
    gpu, cpu = ({x.name for x in simulate_step(*parts, shape(gpu=gpu)).operations} for gpu in (V100, None))
    assert {"_scaled_dot_product_flash_attention_for_cpu", "embedding_bag", "index_add_"} <= gpu
    assert {"triplane_sample", "triplane_accumulate"} <= cpu
    assert not {"triplane_sample", "triplane_accumulate", "attention_in_blocks", "_softmax"} & gpu
    assert HOST_TYPES == {"cpu"}


def test_the_emulation_of_accelerators_ends_after_an_error():
    with contextlib.suppress(ZeroDivisionError), as_accelerator():
        assert not on_cpu(torch.empty(1))
        raise ZeroDivisionError
    assert on_cpu(torch.empty(1))


def test_a_simulation_changes_neither_the_network_nor_the_random_state():
    lrm = small_lrm()
    before, state = copy.deepcopy(lrm.state_dict()), torch.get_rng_state()
    simulate_step(
        lrm, Renderer(16, 8), Objective(lpips=2.0), ParallelConfig(activation_checkpointing_every=1), shape()
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in lrm.state_dict().items())
    assert all(p.grad is None for p in lrm.parameters())


def test_a_network_on_the_meta_device_has_the_same_costs():
    lrm = small_lrm()
    parts = (Renderer(16), Objective(lpips=2.0), ParallelConfig(), shape())
    whole, bare = simulate_step(lrm, *parts), simulate_step(copy_to("meta", lrm), *parts)
    assert whole == bare


def test_activation_checkpointing_reduces_memory_and_increases_executed_flops():
    lrm, rest = small_lrm(depth=6), (Renderer(8), Objective(lpips=0.0))
    plain = simulate_step(lrm, *rest, ParallelConfig(), shape())
    again = simulate_step(lrm, *rest, ParallelConfig(activation_checkpointing_every=1), shape())
    assert again.activations < 0.6 * plain.activations
    assert again.flops > 1.15 * plain.flops
    assert again.model_flops == plain.model_flops


def test_model_flops_equal_executed_flops_except_for_the_recomputed_rendering():
    """Without recomputed blocks, only the renderer recomputes."""
    lrm = small_lrm(plane_tokens=8)
    costs = simulate_step(lrm, Renderer(24), Objective(lpips=0.0), ParallelConfig(), shape())
    assert costs.flops - costs.forward["renderer"] == pytest.approx(costs.model_flops, rel=0.02)


def test_model_flops_are_proportional_to_objects_and_pixels():
    parts = (small_lrm(), Renderer(24), Objective(lpips=2.0), ParallelConfig())
    one, two = (simulate_step(*parts, shape(objects)) for objects in (1, 2))
    assert one.model_flops_of(2, two.shape.pixels, lpips=True) == pytest.approx(two.model_flops, rel=1e-3)
    assert one.model_flops_of(1, one.shape.pixels, lpips=False) == pytest.approx(
        one.model_flops - one.forward["losses"]
    )


def test_a_frozen_encoder_has_no_gradients_and_no_backward():
    parts = (Renderer(8), Objective(lpips=0.0), ParallelConfig(), shape())
    trained, frozen = simulate_step(small_lrm(), *parts), simulate_step(small_lrm(frozen=True), *parts)
    encoder = sum(p.numel() for p in small_lrm().encoder.parameters())
    assert trained.trained - frozen.trained == encoder
    assert trained.gradients - frozen.gradients == 4 * encoder
    assert trained.model_flops - frozen.model_flops == pytest.approx(2 * trained.forward["encoder"])


def whole(size=128):
    return CropConfig(low=size, high=size, size=size)


def test_the_unit_sphere_fits_the_image_of_the_default_camera():
    """The silhouette's radius is f / sqrt(d^2 - 1) image widths, here 1/2; a disc of it covers pi / 4."""
    cameras = default_cameras()
    distance, focal = cameras.c2w[0, :3, 3].norm().item(), cameras.fxfycxcy[0, 0].item()
    assert focal / (distance**2 - 1) ** 0.5 == pytest.approx(0.5)
    assert hit_fraction("sphere", whole(), cameras) == pytest.approx(3.14159 / 4, abs=0.01)
    assert hit_fraction("box", whole(), cameras) > 0.99


def test_the_hit_fraction_equals_that_of_random_crops():
    """Crops of 128 pixels from views resized to 128 to 384 pixels: 95.6 % of the rays, counted over random crops."""
    cameras, crop = default_cameras(), CropConfig(low=128, high=384, size=128)
    draw, count = torch.Generator().manual_seed(0), 0.0
    for _ in range(300):
        side = int(torch.randint(128, 385, (), generator=draw))
        corner = torch.randint(0, side - 127, (1, 2), generator=draw)
        window = torch.cat([corner, torch.full((1, 2), 128)], dim=1).float()
        camera = resize_and_crop(cameras.fxfycxcy[:1], (side, side), window)
        near, far = ray_interval(*pixel_rays(cameras.c2w[:1], camera, 32, 32), "sphere")
        count += (far > near).float().mean().item() / 300
    assert hit_fraction("sphere", crop, cameras) == pytest.approx(count, abs=0.01)
    assert hit_fraction("sphere", crop, cameras) == pytest.approx(0.956, abs=0.002)


def test_foreground_crops_have_a_higher_hit_fraction():
    """A distant object in a view of twice the crop's size: all rays of a centered crop hit, none in a corner."""
    cameras = default_cameras()
    far = cameras._replace(c2w=orbit(4, 10.0))
    crops = [CropConfig(low=512, high=512, size=64, foreground=share) for share in (0.0, 0.5, 1.0)]
    anywhere, half, centered = (hit_fraction("sphere", crop, far) for crop in crops)
    assert centered > 3 * anywhere
    assert half == pytest.approx((anywhere + centered) / 2)


def test_cameras_are_read_from_local_shards(shards, tmp_path):
    cameras = training_cameras(ShardDataModule(str(shards)))
    assert cameras.source == "cameras of 4 training objects"
    assert cameras.c2w.shape == (16, 4, 4)
    distances = cameras.c2w[:, :3, 3].norm(dim=-1)
    assert (distances != default_cameras().c2w[0, :3, 3].norm()).all()
    for folder in (tmp_path, "s3://bucket/shards"):
        assert training_cameras(ShardDataModule(str(folder))).source.startswith("assumed")


def test_rendering_flops_are_proportional_to_the_hit_fraction():
    parts = small_lrm(), Renderer(24), Objective(lpips=0.0), ParallelConfig()
    some, all_ = (simulate_step(*parts, dataclasses.replace(shape(), hits=hits)) for hits in (0.5, 1.0))
    assert all_.forward["renderer"] == pytest.approx(2 * some.forward["renderer"], rel=0.02)


@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_the_shards_of_all_ranks_add_up_to_the_network(replicas):
    lrm, processes, held = small_lrm(depth=1), 4, 0.0
    for rank in range(processes):
        with fake_process_group(rank, processes, replicas) as mesh:
            costs = simulate_step(lrm, Renderer(8), Objective(lpips=0.0), ParallelConfig(), shape(1), mesh)
        held += costs.weights
        assert costs.flops > 0
    # PyTorch pads shards to the size of the largest: less than one row per tensor and rank.
    whole = 4 * sum(p.numel() for p in lrm.parameters())
    assert replicas * whole <= held < 1.1 * replicas * whole
    check_shards(lrm, processes, replicas, torch.bfloat16, range(processes))


def test_fsdp2_gathers_weights_twice_in_bf16_and_reduces_gradients_once_in_float32():
    lrm = small_lrm()
    with fake_process_group(0, 4) as mesh:
        costs = simulate_step(lrm, Renderer(8), Objective(lpips=0.0), ParallelConfig(), shape(1), mesh)
    sizes = {
        op: sum(x.size for x in costs.collectives if x.op == op) for op in ("all_gather", "reduce_scatter")
    }
    numbers = sum(p.numel() for p in lrm.parameters())
    blocks = sum(
        p.numel() for b in (*lrm.encoder.vit.blocks, *lrm.transformer.blocks) for p in b.parameters()
    )
    # Small modules and norms are gathered in float32; those outside of blocks are kept after forward.
    assert sizes["all_gather"] == pytest.approx(2 * 2 * blocks + 4 * (numbers - blocks), rel=0.05)
    assert sizes["reduce_scatter"] == pytest.approx(4 * numbers, rel=0.02)
