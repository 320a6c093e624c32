"""Simulation of a training step on fake tensors, which have shapes but no data.

The simulation runs the training code itself, so it covers all options. To simulate a GPU, the code runs the branches
for accelerators on fake CPU tensors, because autograd on fake GPU tensors would require a GPU. The fraction of rays
that hit the bounds is an input. For each object, only one chunk of rays is simulated, and the cost is multiplied by
the number of chunks.
"""

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from lrm_pl.data.batch import Batch, Views
from lrm_pl.kernels.device import GpuProperties, as_accelerator
from lrm_pl.losses.objective import Objective
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.models.lrm import LRM
from lrm_pl.planning.operation_counter import Collective, Operation, OperationCounter
from lrm_pl.rendering.deferred import Rays
from lrm_pl.rendering.fused import SAVED_BYTES, PixelGrid, PixelRays
from lrm_pl.rendering.ray_marching import RayBundle
from lrm_pl.rendering.renderer import Renderer
from lrm_pl.training.module import LRMModule
from lrm_pl.training.parallelize import ParallelConfig, prepare_blocks, shard

Module = TypeVar("Module", bound=nn.Module)

#: Properties of the default GPU.
A100 = GpuProperties((8, 0), 108, 40 * 2**20)

PARTS = ("encoder", "transformer", "renderer", "losses", "backward")


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Shape of the batch of one process, and the device that processes the batch.

    Attributes:
        objects: Number of objects per batch.
        views: Number of target views per object.
        size: Side length of a target crop in pixels.
        hits: Fraction of the target rays that hit the bounds of the renderer.
        gpu: Properties of the GPU. If None, the device is a CPU.
        threads: Number of CPU threads. It must be 1 for a GPU.
        dtype: Data type of matrix products.
        deterministic: Whether deterministic algorithms are required.
    """

    objects: int
    views: int
    size: int
    hits: float
    gpu: GpuProperties | None = A100
    threads: int = 1
    dtype: torch.dtype = torch.bfloat16
    deterministic: bool = False

    @property
    def pixels(self) -> int:
        """Number of target pixels in the batch."""
        return self.objects * self.views * self.size**2


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """Operations and memory of one process in a training step, excluding the optimizer update.

    Attributes:
        trained: Number of trained parameters.
        largest: Number of elements of the largest trained tensor.
        weights: Size in bytes of the weights that this process holds.
        frozen_other: Size in bytes of the networks that are used only by the loss.
        gradients: Size in bytes of all gradients of the weights that this process holds.
        activations: Peak memory in bytes, excluding weights, gradients and networks of the loss.
        work: Peak memory in bytes of activations and gradients together.
        operations: All operations.
        collectives: All collectives.
        forward: FLOPs of each part of the forward pass.
        shape: Shape of the batch.
        encoder_frozen: Whether the encoder has no backward pass.
    """

    trained: int
    largest: int
    weights: float
    frozen_other: float
    gradients: float
    activations: float
    work: float
    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    forward: dict[str, float]
    shape: StepShape
    encoder_frozen: bool

    @property
    def flops(self) -> float:
        """Number of executed FLOPs, including recomputation."""
        return sum(x.flops for x in self.operations)

    @property
    def model_flops(self) -> float:
        """Number of FLOPs in forward and backward without recomputation, as in the definition of MFU."""
        return self.model_flops_of(self.shape.objects, self.shape.pixels, lpips=True)

    def model_flops_of(self, objects: int, pixels: int, *, lpips: bool) -> float:
        """Return ``model_flops`` for a different number of objects and target pixels.

        Backward is counted as twice the FLOPs of forward, with two exceptions. LPIPS computes the gradient in the
        forward pass, and a frozen encoder has no backward pass.

        Args:
            objects: Number of objects.
            pixels: Number of target pixels.
            lpips: Whether to include LPIPS.
        """
        forward = self.forward
        per_batch = forward["encoder"] * (1 if self.encoder_frozen else 3) + 3 * forward["transformer"]
        rendering = 3 * forward["renderer"] + (forward["losses"] if lpips else 0.0)
        return per_batch * objects / self.shape.objects + rendering * pixels / self.shape.pixels


def simulate_step(
    lrm: LRM,
    renderer: Renderer,
    objective: Objective,
    parallel: ParallelConfig,
    shape: StepShape,
    mesh: DeviceMesh | None = None,
) -> StepCosts:
    """Run the forward and backward pass of one batch on fake tensors, and count the operations and memory.

    Args:
        lrm: The network, which is copied. It should be on the meta device to save memory.
        renderer: The renderer.
        objective: The loss terms. LPIPS is included regardless of ``lpips_start_step``.
        parallel: Settings for the blocks of the network. Compilation is not simulated.
        shape: Shape of the batch.
        mesh: Device mesh over which FSDP2 shards the network. If None, the network is not sharded.
    """
    counter, fake = OperationCounter(decomposed_operators(shape)), FakeTensorMode(allow_non_fake_inputs=True)
    losses = copy.copy(objective)
    if losses.lpips:
        losses.perceptual = _meta_perceptual_loss()
    with fake, emulate_device(shape):
        network = copy_to("cpu", lrm).train()
        prepare_blocks(network, dataclasses.replace(parallel, compile=False))
        if mesh is not None:
            shard(network, mesh, None if shape.dtype == torch.float32 else shape.dtype)
        if losses.perceptual is not None:
            losses.perceptual.network = copy_to("cpu", losses.perceptual.network)
        module = LRMModule(network, renderer, losses)
        module.renderer = fake_renderer(renderer, shape, counter)
        network.encoder.register_forward_pre_hook(_enter(counter, "encoder"))
        network.encoder.register_forward_hook(_enter(counter, "transformer"))
        network.upsampler.register_forward_hook(_enter(counter, "renderer"))
        resizes = contextlib.nullcontext() if mesh is None else counter.track_resizes()
        with counter, resizes, warnings.catch_warnings():
            # The triplane is such a view, but it is never modified in place.
            warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPLRM\) returned a view tensor")
            parameters = list(network.parameters())
            for parameter in parameters:
                counter.track(_local(parameter))
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                        lambda x: counter.track_gradient(_local(x.grad))
                    )
            weights = counter.allocated
            if losses.perceptual is not None:
                network_of_loss = losses.perceptual.network
                for tensor in (*network_of_loss.parameters(), *network_of_loss.buffers()):
                    counter.track(tensor)
            other = counter.allocated - weights
            batch = _batch(network, shape)
            with torch.autocast("cpu", shape.dtype, enabled=shape.dtype != torch.float32):
                terms = losses(module.render_targets(batch), losses.lpips_start_step)
                loss = sum(terms.values(), start=torch.zeros(()))
            forward = {part: counter.flops(part) for part in PARTS[:-1]}
            counter.part = "backward"
            loss.backward()
    trained = [p for p in parameters if p.requires_grad]
    return StepCosts(
        trained=sum(p.numel() for p in trained),
        largest=max(p.numel() for p in trained),
        weights=weights,
        frozen_other=other,
        gradients=4.0 * sum(_local(p).numel() for p in trained),
        activations=counter.peak - weights - other,
        work=counter.peak_with_gradients - weights - other,
        operations=tuple(counter.operations),
        collectives=tuple(counter.collectives),
        forward=forward,
        shape=shape,
        encoder_frozen=network.encoder.frozen,
    )


def copy_to(device: str, module: Module) -> Module:
    """Copy a module to the meta device or, inside a ``FakeTensorMode``, to the CPU, without copying tensor values."""
    copies: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        new = torch.empty_like(tensor, device=device)
        is_parameter = isinstance(tensor, nn.Parameter)
        copies[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(module, copies)


def decomposed_operators(shape: StepShape) -> frozenset[str]:
    """Return the names of the custom operators that are implemented with PyTorch operators on the simulated device."""
    names = ("triplane_sample", "triplane_sample_backward", "triplane_accumulate")
    return frozenset() if shape.gpu is None else frozenset(names)


@contextlib.contextmanager
def emulate_device(shape: StepShape) -> Iterator[None]:
    """Emulate the device of ``shape`` inside the context, and apply the setting ``shape.deterministic``."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(shape.deterministic)
    try:
        with contextlib.nullcontext() if shape.gpu is None else as_accelerator(shape.gpu):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _batch(network: LRM, shape: StepShape) -> Batch:
    side, inputs = network.encoder.image_size, network.input_views

    def views(count: int, size: int, jitter: Tensor | None) -> Views:
        lead = (shape.objects, count)
        cameras = torch.empty(*lead, 4, 4), torch.empty(*lead, 4)
        return Views(torch.empty(*lead, 3, size, size), torch.empty(*lead, size, size), torch.empty(*lead, 3),
                     *cameras, jitter)  # fmt: skip

    jitter = torch.empty(shape.objects, shape.views, shape.size, shape.size)
    ids = tuple(str(number) for number in range(shape.objects))
    return Batch(
        ids, views(inputs, side, None), views(shape.views, shape.size, jitter), torch.ones(shape.objects)
    )


def _meta_perceptual_loss() -> PerceptualLoss:
    with torch.device("meta"):
        features = torchvision.models.vgg16().features.state_dict()
    return PerceptualLoss({f"features.{name}": value for name, value in features.items()}, "vgg")


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, torch.distributed.tensor.DTensor) else parameter


def _enter(counter: OperationCounter, part: str) -> Callable[..., None]:
    """Return a hook that sets ``counter.part``, except in the backward pass, which is a single part."""

    def hook(*_: object) -> None:
        if counter.part != "backward":
            counter.part = part

    return hook


def fake_renderer(renderer: Renderer, shape: StepShape, counter: OperationCounter) -> Renderer:
    """Return a renderer that marches one chunk of rays per object, and multiplies its cost by the number of chunks."""
    fake = copy.deepcopy(renderer)
    fake.ray_chunks = functools.partial(_OneChunk, shape, counter)
    fake.pixel_rays = functools.partial(_OneChunkOfPixels, shape, counter)
    fake.register_forward_hook(_enter(counter, "losses"))
    return fake


class _OneChunk(Rays):
    """Rays for the simulation. A given fraction of the rays hits the bounds, and only one chunk is marched."""

    def __init__(
        self, step: StepShape, counter: OperationCounter, bundle: RayBundle, max_points: int, samples: int
    ) -> None:
        self.bundle, self.threads, self.counter = bundle, step.threads, counter
        hit = step.hits * bundle.near.shape[1]
        self.marched = max(1, min(max_points // samples, round(hit / step.threads)))
        self.times = hit / self.marched

    def for_each_chunk(
        self, work: Callable[[int, int, Tensor], None], done: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        """March one chunk per object on every thread, and multiply its cost by the number of chunks."""
        chunk = torch.empty(self.marched, dtype=torch.int64)
        for index in range(len(self.bundle.near)):
            for thread in range(self.threads):
                with self.counter.repeated(self.times / self.threads, self.threads):
                    work(thread, index, chunk)
                done(thread, index)


class _OneChunkOfPixels(PixelRays):
    """Grids of rays for the simulation.

    One chunk per object is marched, and its cost is multiplied by the number of chunks. Rays that miss the bounds
    remain in the grid, and the kernels skip these rays.
    """

    def __init__(
        self, step: StepShape, counter: OperationCounter, bundle: RayBundle, grid: PixelGrid
    ) -> None:
        super().__init__(bundle, grid)
        self.counter, self.marched = counter, min(grid.chunk_rows, grid.rows)
        self.times = grid.rows / self.marched
        counter.work_fractions = dict.fromkeys(("decode_along_rays", "decode_along_rays_backward"), step.hits)
        samples = self.alive.numel() * grid.samples
        chunk = len(self.alive) * self.marched * grid.columns * grid.samples
        #: Number of bytes that are saved for backward, excluding the bytes for the marched chunks.
        self.more = max(0, min(SAVED_BYTES, 16 * samples) - 16 * chunk)
        self.kept: Tensor | None = None

    def for_each_chunk(self, work: Callable[[int, slice], None]) -> None:
        """March one chunk per object, and multiply its cost by the number of chunks.

        Between forward and backward, a buffer represents the saved samples of the other chunks.
        """
        for index in range(len(self.alive)):
            with self.counter.repeated(self.times):
                work(index, slice(0, self.marched))
        self.kept = torch.empty(self.more, dtype=torch.uint8) if self.kept is None else None
