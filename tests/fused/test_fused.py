"""Tests of the fused decoder without a GPU, with Triton's interpreter and the reference implementation."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lrm_pl.geometry.cameras import orbit
from lrm_pl.kernels import decode_along_rays as fused
from lrm_pl.kernels import device
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.triplane import Triplane
from lrm_pl.planning.gpus import require_gpu
from lrm_pl.rendering import fused as rendering
from lrm_pl.rendering.renderer import Renderer
from tests.fused.triton_process import interpreted


@pytest.mark.slow
def test_interpreted_kernels_match_the_decoder_in_values_and_gradients():
    assert " passed, 0 failed" in interpreted("tests.fused.interpreted")


@pytest.mark.slow
def test_a_training_step_with_interpreted_kernels_matches_pytorch_operators():
    assert "2 passed, 0 failed" in interpreted("tests.fused.interpreted_step")


@pytest.mark.slow
def test_all_kernel_launches_are_compiled_by_the_jit():
    assert "compiled 16 launches" in interpreted("tests.fused.jit", interpret="0")


@pytest.fixture
def twin(monkeypatch):
    """Make the renderer use the fused decoder with its reference implementation."""
    monkeypatch.setattr(device, "HOST_TYPES", frozenset())
    monkeypatch.setattr(rendering, "triton_unavailable", lambda device: None)


def scene(width=16, layers=4, **options):
    torch.manual_seed(0)
    decoder = NeRFDecoder(channels=5, width=width, layers=layers, **options)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    planes = torch.randn(2, 3, 5, 12, 12, requires_grad=True)
    return decoder, planes


def rendered(decoder, planes, renderer, *, views=2, size=(10, 9), layout="lrm", autocast=False):
    """Render with random jitter, and return pixels and the gradients of planes and weights."""
    torch.manual_seed(1)
    c2w = orbit(views, 2.37).expand(2, -1, -1, -1)
    cameras = torch.tensor([0.6, 0.6, 0.5, 0.5]).expand(2, views, 4)  # rays at the corners miss
    jitter = torch.rand(2, views, *size)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        field = decoder.field(Triplane(planes, layout))
        seen = renderer(field, c2w, cameras, size, jitter)
    pixels = seen.rgb, seen.opacity, seen.depth
    leaves = [planes, *decoder.parameters()]
    return pixels, torch.autograd.grad(pixels, leaves, [torch.randn_like(x) for x in pixels])


RENDERERS = {
    "bins": Renderer(12),
    "midpoints": Renderer(12, quadrature="midpoints", bounds="box"),
    "chord": Renderer(12, unit="chord"),
    "importance": Renderer(12, 5, unit="chord"),
    "importance, midpoints": Renderer(12, 6, quadrature="midpoints"),
}


@pytest.mark.parametrize("renderer", RENDERERS.values(), ids=RENDERERS)
@pytest.mark.parametrize("chunk", [None, 12 * 9 * 4])
def test_fused_rendering_matches_deferred_rendering_for_all_marching_settings(
    renderer, chunk, twin, monkeypatch
):
    decoder, planes = scene(activation="silu")
    monkeypatch.setattr(renderer, "chunk", chunk)
    pixels, gradients = rendered(decoder, planes, renderer)
    monkeypatch.undo()
    assert not rendering.is_fused(decoder.field(Triplane(planes)), planes.device)
    expected, expected_gradients = rendered(decoder, planes, renderer)
    for name, a, b in zip(("rgb", "opacity", "depth"), pixels, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=name)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert (a - b).norm() <= 2e-4 * b.norm()
    assert (expected[1] == 0).any()
    assert torch.equal(pixels[1] == 0, expected[1] == 0), "pixels of rays that miss are zero"


def test_rays_that_are_parallel_to_a_face_and_miss_the_box_are_transparent(twin):
    decoder, planes = scene()
    c2w = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, -2.4], [0, -1, 0, -1.5], [0, 0, 0, 1]]).expand(2, 1, 4, 4)
    camera = torch.tensor([1.0, 1.0, 0.5, 0.5]).expand(2, 1, 4)
    for unit in ("scene", "chord"):
        seen = Renderer(8, bounds="box", unit=unit)(decoder.field(Triplane(planes)), c2w, camera, (9, 9))
        assert seen.rgb.isfinite().all()
        assert (seen.opacity[:, :, 4] == 0).all(), "horizontal rays below the box"
        assert (seen.opacity > 0).any()


def test_decoded_samples_beyond_the_memory_limit_are_recomputed(twin, monkeypatch):
    decoder, planes = scene()
    pixels, gradients = rendered(decoder, planes, Renderer(12))
    calls = []
    decode = rendering.decode_along_rays
    monkeypatch.setattr(rendering, "decode_along_rays", lambda *given: calls.append(1) or decode(*given))
    monkeypatch.setattr(rendering, "_POINTS", 12 * 9 * 4)  # 5 chunks per object
    monkeypatch.setattr(rendering, "SAVED_BYTES", 3 * 12 * 9 * 4 * 16)
    again = rendered(decoder, planes, Renderer(12))
    assert len(calls) == 10 + 7, "three of ten chunks are saved"
    for a, b in zip([*pixels, *gradients], [*again[0], *again[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_samples_are_saved_without_gradients(twin, monkeypatch):
    decoder, planes = scene()
    field = decoder.field(Triplane(planes))
    contexts = []
    forward = rendering._Fused.forward
    monkeypatch.setattr(
        rendering._Fused,
        "forward",
        lambda context, *given: contexts.append(context) or forward(context, *given),
    )
    given = orbit(1, 2.37).expand(2, -1, -1, -1), torch.tensor([1.0, 1.0, 0.5, 0.5]).expand(2, 1, 4), (8, 8)
    with torch.no_grad():
        Renderer(12)(field, *given)
    Renderer(12)(field, *given)
    assert [len(context.saved) for context in contexts] == [0, 2]


def test_the_fused_decoder_is_as_accurate_as_pytorch_operators_in_bfloat16(twin, monkeypatch):
    decoder, planes = scene()
    seen = []
    decode = rendering.decode_along_rays
    monkeypatch.setattr(
        rendering, "decode_along_rays", lambda *given: seen.append(given[0].dtype) or decode(*given)
    )
    ours = rendered(decoder, planes, Renderer(12), autocast=True)
    assert set(seen) == {torch.bfloat16}
    exact = rendered(decoder, planes, Renderer(12))
    assert seen[-1] == torch.float32
    monkeypatch.undo()
    plain = rendered(decoder, planes, Renderer(12), autocast=True)

    def errors(found):
        pairs = zip([*found[0], *found[1]], [*exact[0], *exact[1]], strict=True)
        return [float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs]

    for mine, theirs in zip(errors(ours), errors(plain), strict=True):
        assert 1e-5 < mine < 1.5 * theirs


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"fold": False}, "not folded"), ({"width": 24}, "decoder.width is 24"), ({}, "float16")],
)
def test_unsupported_fields_are_rendered_with_pytorch_operators_and_the_reason_is_logged_once(
    options, reason, twin, caplog
):
    decoder, planes = scene(**options)
    field = decoder.field(Triplane(planes))
    device.log_once.cache_clear()
    with caplog.at_level(logging.INFO), torch.autocast("cpu", torch.float16, enabled="float16" in reason):
        assert not rendering.is_fused(field, planes.device)
        assert not rendering.is_fused(field, planes.device)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("Rendering without the fused decoder: ")
    assert reason in message


def test_the_fused_decoder_is_not_used_with_deterministic_algorithms(twin):
    decoder, planes = scene()
    torch.use_deterministic_algorithms(True)
    try:
        assert not rendering.is_fused(decoder.field(Triplane(planes)), planes.device)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("capability", "works"),
    [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)],
)
def test_kernels_require_compute_capability_8(capability, works, monkeypatch):
    found = SimpleNamespace(
        major=capability[0], minor=capability[1], multi_processor_count=80, L2_cache_size=6 << 20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    reason = device.triton_unavailable(torch.device("cuda:0"))
    assert (reason is None) is works
    if not works:
        assert f"has {capability[0]}.{capability[1]}" in reason


@pytest.fixture
def machine(monkeypatch):
    """A GPU of compute capability 8.0, with empty caches of the requirements of Triton."""
    found = SimpleNamespace(major=8, minor=0, multi_processor_count=80, L2_cache_size=6 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.delenv("CC", raising=False)
    for cached in (device._missing_for_triton, device.log_once):
        cached.cache_clear()
    yield monkeypatch
    device._missing_for_triton.cache_clear()


def reason_against_triton():
    return device.triton_unavailable(torch.device("cuda:0"))


def test_kernels_require_triton(machine):
    machine.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert reason_against_triton() == "Triton is not installed"


def test_kernels_require_a_c_compiler_and_the_reason_is_logged_once(machine, tmp_path, caplog):
    machine.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO):
        assert "but none was found. Install gcc" in reason_against_triton()
        assert reason_against_triton()
    (record,) = caplog.records
    assert record.getMessage().startswith("Running without Triton kernels: Triton requires")
    compiler = tmp_path / "mycc"
    compiler.touch(mode=0o755)
    machine.setenv("CC", "mycc")
    device._missing_for_triton.cache_clear()
    assert reason_against_triton() is None


@pytest.mark.parametrize("given", ["/nonexistent/cc", "gcc -m64", ""])
def test_the_reason_names_a_cc_variable_that_is_not_a_program(machine, given):
    machine.setattr(device.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert reason_against_triton() is None
    machine.setenv("CC", given)
    device._missing_for_triton.cache_clear()
    assert f"CC={given} is not a program" in reason_against_triton()


def test_kernels_require_the_headers_of_python(machine, tmp_path):
    machine.setattr(device.sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    machine.setattr(device.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert f"{tmp_path} contains no Python.h. Install python3-dev" in reason_against_triton()
    (tmp_path / "Python.h").touch()
    device._missing_for_triton.cache_clear()
    assert reason_against_triton() is None


def test_unpacked_weights_equal_the_original_weights():
    decoder, planes = scene(width=32, layers=5)
    weights = decoder.field(Triplane(planes)).weights
    packed = fused.pack(weights, torch.float32)
    assert packed.weights.numel() == 3 * 32 * 32 + 32 * 16
    assert packed.biases.numel() == 4 * 32 + 16
    for a, b in zip(fused.unpack(packed, 32), weights, strict=True):
        assert torch.equal(a, b)


def test_the_layout_of_packed_matrices():
    weights = [torch.zeros(16), torch.zeros(16, 16), torch.zeros(16), torch.zeros(4, 16), torch.zeros(4)]
    weights[1][3, 7] = 5.0  # output 3 of input 7
    weights[3][2, 11] = 6.0
    packed = fused.pack(weights, torch.float32)
    assert packed.weights[7 * 16 + 3] == 5
    assert packed.weights[256 + 11 * 16 + 2] == 6
    assert packed.weights.count_nonzero() == 2


@pytest.mark.parametrize("name", ["A100 80GB", "H100", "H200", "B200", "L4", "L40S", "RTX 4090", "RTX 5090"])
def test_the_scratch_buffer_is_smaller_than_a_quarter_of_the_l2_cache(name):
    gpu = require_gpu(name).properties
    planes, t = (
        torch.empty(3, 64, 64, 64, dtype=torch.bfloat16, device="meta"),
        torch.empty(512, 128, 128, device="meta"),
    )
    launch = fused.plan_launch(planes, t, torch.empty(9 * 64 + 16, device="meta"), gpu)
    rows, columns, samples = launch.tile
    assert launch.programs == gpu.multiprocessors
    assert launch.tiles == (512 // rows) * (128 // columns) * (128 // samples)
    assert launch.scratch == launch.programs * 9 * rows * columns * samples * 64 * 2
    assert launch.scratch < gpu.l2 / 4


def test_flops_of_the_fused_decoder():
    decoder, planes = scene(width=16, layers=4)
    field = decoder.field(Triplane(planes))
    mlp = fused.pack(field.weights, torch.float32)
    with FlopCounterMode(display=False) as plain:
        decoder.mlp(torch.randn(7, 16), field.weights)
    a_sample = 2 * (2 * 16 * 16 + 16 * 4)
    assert plain.get_total_flops() == 7 * a_sample
    shapes = (3, 12, 12, 16), (5, 4, 3), (5, 4, 3), (5, 4, 6), (5, 4)
    forward = torch.utils.flop_counter.flop_registry[torch.ops.lrm_pl.decode_along_rays]
    backward = torch.utils.flop_counter.flop_registry[torch.ops.lrm_pl.decode_along_rays_backward]
    planes, *samples = (torch.empty(shape, device="meta") for shape in shapes)
    tensors = planes, samples, mlp
    assert forward(*tensors, [0, 1, 0, 2, 1, 2], False) == 120 * a_sample
    total, grad = torch.empty(shapes[0], device="meta"), torch.empty(5, 4, 6, 4, device="meta")
    assert backward(total, grad, *tensors, [0, 1, 0, 2, 1, 2], False) == 120 * (
        3 * a_sample + 2 * 3 * 64 * 16
    )


def test_accumulated_gradients_must_be_contiguous_and_float32():
    decoder, planes = scene()
    field = decoder.field(Triplane(planes))
    mlp, rays, t = fused.pack(field.weights, torch.float32), torch.zeros(2, 3, 3), torch.zeros(2, 3, 5)
    samples = fused.RaySamples(rays, rays, t, torch.ones(2, 3, dtype=torch.bool))
    given = field.planes[0].detach(), samples, mlp, field.axes, "relu"
    for total in (torch.zeros(3, 12, 12, 32)[..., ::2], torch.zeros(3, 12, 12, 16, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="expected a contiguous float32 total"):
            fused.accumulate_gradient(total, torch.zeros(2, 3, 5, 4), *given)


def test_invalid_shapes_and_dtypes_are_errors():
    decoder, planes = scene()
    field = decoder.field(Triplane(planes))
    mlp = fused.pack(field.weights, torch.float32)
    rays, t, alive = torch.zeros(2, 3, 3), torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.bool)
    samples, planes = fused.RaySamples(rays, rays, t, alive), field.planes[0]
    assert fused.decode_along_rays(planes, samples, mlp, field.axes, "relu").shape == (2, 3, 5, 4)
    for wrong_planes, wrong_samples, found in (
        (planes.bfloat16(), samples, "found torch.bfloat16 planes and torch.float32 weights"),
        (planes, samples._replace(t=t[:1]), r"\(1, 3, 5\)"),
        (planes, samples._replace(alive=alive[:, :1]), r"\(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=found):
            fused._check(wrong_planes, wrong_samples, mlp)


def test_offsets_in_a_launch_fit_into_32_bits():
    grid = rendering.PixelGrid(rows=2**20, columns=2**10, samples=2**7, chunk=2**40)
    assert grid.chunk_rows * grid.columns * grid.samples * 4 < 2**31
