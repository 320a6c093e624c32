"""One training step on fake tensors: the program itself, whose tensors have shapes and no numbers.

So an estimate knows every option that the program knows. Nothing is computed: a step of the paper's size takes
seconds on a laptop. For a GPU the program takes the branches of accelerators, on fake tensors of the CPU: autograd
needs a real device of the tensors' type. Rendering depends on where rays go; here a given share of them hits the
bounds, and one chunk of them stands for all.
"""

import contextlib
import copy
import dataclasses
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
from lrm_pl.planning import traffic  # noqa: F401 - registers formulas
from lrm_pl.planning.ledger import Ledger, Message, Operation
from lrm_pl.rendering.deferred import Rays, render_rays
from lrm_pl.rendering.field import Field
from lrm_pl.rendering.fused import SAVED_BYTES, PixelGrid, PixelRays, is_fused, render_fused
from lrm_pl.rendering.output import Rendering
from lrm_pl.rendering.renderer import Renderer
from lrm_pl.training.module import LRMModule
from lrm_pl.training.parallelize import ParallelConfig, prepare_blocks, shard

Module = TypeVar("Module", bound=nn.Module)

#: The GPU that a step is simulated for where none is named.
A100 = GpuProperties((8, 0), 108, 40 * 2**20)

PARTS = ("encoder", "transformer", "renderer", "losses", "backward")


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What a process computes between two exchanges.

    Attributes:
        objects: Objects of a batch of one process.
        views: Target views of each.
        size: Side of a target window.
        hits: Fraction of the target rays that hit the renderer's bounds (``costs.hits``).
        gpu: The GPU that computes it: the operations are then those of the accelerators' branches; None for a CPU.
        threads: CPU threads; 1 for a GPU.
        dtype: What products are computed in.
        deterministic: Whether only deterministic algorithms may be used.
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
        """Target pixels of all objects."""
        return self.objects * self.views * self.size**2


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """What one process does and holds in a step, without the optimizer's own step.

    Attributes:
        parameters: Numbers of the network.
        trained: Those that learn.
        largest: Numbers of the largest trained tensor.
        weights: Bytes of weights held: all, or this process's part.
        frozen_other: Bytes of networks that only the loss uses.
        gradients: Bytes of all gradients of the weights held.
        activations: Bytes at the peak besides weights, their gradients, and the loss's network.
        work: The same with the gradients there are by then; those of early layers come after the peak.
        operations: What ran.
        messages: What was exchanged.
        forward: FLOPs of forward by part.
        shape: What was computed.
        encoder_frozen: Whether the encoder has no backward.
    """

    parameters: int
    trained: int
    largest: int
    weights: float
    frozen_other: float
    gradients: float
    activations: float
    work: float
    operations: tuple[Operation, ...]
    messages: tuple[Message, ...]
    forward: dict[str, float]
    shape: StepShape
    encoder_frozen: bool

    @property
    def flops(self) -> float:
        """FLOPs that are run, what backward computes again among them."""
        return sum(x.flops for x in self.operations)

    @property
    def model(self) -> float:
        """FLOPs that the mathematics needs, forward and backward, nothing computed twice."""
        return self.model_flops(self.shape.objects, self.shape.pixels, lpips=True)

    def model_flops(self, objects: int, pixels: int, *, lpips: bool) -> float:
        """Return ``model`` for another number of objects, of target pixels in all views, and with or without LPIPS.

        Backward is twice forward; LPIPS is differentiated in forward; a frozen encoder has no backward.
        """
        part = self.forward
        an_object = part["encoder"] * (1 if self.encoder_frozen else 3) + 3 * part["transformer"]
        a_pixel = 3 * part["renderer"] + (part["losses"] if lpips else 0.0)
        return an_object * objects / self.shape.objects + a_pixel * pixels / self.shape.pixels


def simulate_step(
    lrm: LRM,
    renderer: Renderer,
    objective: Objective,
    parallel: ParallelConfig,
    shape: StepShape,
    mesh: DeviceMesh | None = None,
) -> StepCosts:
    """Run forward and backward of one batch on fake tensors and account for it.

    Args:
        lrm: The network; best on the meta device, and not touched.
        renderer: The renderer.
        objective: The loss terms; LPIPS is in from its start.
        parallel: What is done to the blocks; compilation is left out.
        shape: The batch.
        mesh: Shards the network over it with FSDP2.
    """
    ledger, fake = Ledger(opened_operators(shape)), FakeTensorMode(allow_non_fake_inputs=True)
    judge = copy.copy(objective)
    if judge.lpips:
        judge.perceptual = _meta_perceptual_loss()
    with fake, branches(shape):
        network = fake_copy(lrm).train()
        prepare_blocks(network, dataclasses.replace(parallel, compile=False))
        if mesh is not None:
            shard(network, mesh, None if shape.dtype == torch.float32 else shape.dtype)
        if judge.perceptual is not None:
            judge.perceptual.network = fake_copy(judge.perceptual.network)
        module = LRMModule(network, renderer, judge)
        module.renderer = FakeRenderer(renderer, shape, ledger)  # type: ignore[assignment]
        resizes = contextlib.nullcontext() if mesh is None else ledger.seeing_resizes()
        with ledger, resizes, _marked(network, ledger), warnings.catch_warnings():
            # The planes are such a view; they are read, and never written in place.
            warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPLRM\) returned a view tensor")
            parameters = list(network.parameters())
            for parameter in parameters:
                ledger.hold(_local(parameter))
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_set_gradient_aside(ledger))  # type: ignore[no-untyped-call]
            weights = ledger.held
            other = _hold_perceptual(judge, ledger)
            batch = _batch(network, shape)
            autocast = torch.autocast("cpu", shape.dtype, enabled=shape.dtype != torch.float32)
            with autocast:
                terms = judge(module.render_targets(batch), judge.lpips_start_step)
                loss = sum(terms.values(), start=torch.zeros(()))
            forward = {part: ledger.flops(part) for part in PARTS[:-1]}
            ledger.part = "backward"
            loss.backward()
    trained = [p for p in parameters if p.requires_grad]
    return StepCosts(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        largest=max(p.numel() for p in trained),
        weights=weights,
        frozen_other=other,
        gradients=4.0 * sum(_local(p).numel() for p in trained),
        activations=ledger.peak - weights - other,
        work=ledger.peak_with_aside - weights - other,
        operations=tuple(ledger.operations),
        messages=tuple(ledger.messages),
        forward=forward,
        shape=shape,
        encoder_frozen=network.encoder.frozen,
    )


def without_numbers(module: Module) -> Module:
    """Copy a module to the meta device."""
    return _copied(module, "meta")


def fake_copy(module: Module) -> Module:
    """Copy a module in the fake mode that this is called in: tensors on a CPU, without numbers."""
    return _copied(module, "cpu")


def opened_operators(shape: StepShape) -> frozenset[str]:
    """Return the custom operators whose body is made of PyTorch's operators on the device that is estimated."""
    names = ("triplane_sample", "triplane_sample_backward", "triplane_accumulate")
    return frozenset() if shape.gpu is None else frozenset(names)


@contextlib.contextmanager
def branches(shape: StepShape) -> Iterator[None]:
    """Answer questions about the device for the one that is estimated, and whether algorithms are deterministic."""
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


def _copied(module: Module, device: str) -> Module:
    copies: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        new = torch.empty_like(tensor, device=device)
        copies[id(tensor)] = (
            nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        )
    return copy.deepcopy(module, copies)


def _meta_perceptual_loss() -> PerceptualLoss:
    with torch.device("meta"):
        features = torchvision.models.vgg16().features.state_dict()
    return PerceptualLoss({f"features.{name}": value for name, value in features.items()}, "vgg")


def _hold_perceptual(objective: Objective, ledger: Ledger) -> float:
    if objective.perceptual is None:
        return 0.0
    before = ledger.held
    for tensor in (*objective.perceptual.network.parameters(), *objective.perceptual.network.buffers()):
        ledger.hold(tensor)
    return ledger.held - before


def _set_gradient_aside(ledger: Ledger) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        ledger.set_aside(_local(parameter.grad))

    return hook


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, torch.distributed.tensor.DTensor) else parameter


@contextlib.contextmanager
def _marked(network: LRM, ledger: Ledger) -> Iterator[None]:
    """Book operations under the part that runs; backward is one part, also what it computes again."""

    def enter(part: str) -> Callable[..., None]:
        def mark(*_: Any) -> None:  # noqa: ANN401 - a hook's arguments
            if ledger.part != "backward":
                ledger.part = part

        return mark

    hooks = [
        network.encoder.register_forward_pre_hook(enter("encoder")),
        network.encoder.register_forward_hook(enter("transformer")),
        network.upsampler.register_forward_hook(enter("renderer")),
    ]
    yield
    for hook in hooks:
        hook.remove()


class FakeRenderer(torch.nn.Module):
    """A renderer that walks one chunk of an object's rays and books it as all of them."""

    def __init__(self, renderer: Renderer, shape: StepShape, ledger: Ledger) -> None:
        super().__init__()
        self.renderer, self.step, self.ledger = renderer, shape, ledger

    def forward(
        self, field: Field, c2w: Tensor, fxfycxcy: Tensor, size: tuple[int, int], jitter: Tensor | None = None
    ) -> Rendering:
        """Render as ``Renderer.forward`` does."""
        self.ledger.part = "renderer"
        shape = (*c2w.shape[:2], *size)
        most = max(1, self.renderer.chunk_on(c2w.device) // self.renderer.march.samples)
        noise = None if jitter is None else jitter.flatten(1)
        cast = self.renderer.rays(c2w, fxfycxcy, size)
        if is_fused(field, c2w.device):
            grid = PixelGrid(
                c2w.shape[1] * size[0], size[1], self.renderer.march.samples, self.renderer.chunk
            )
            pixels = _OneChunkOfPixels(cast, noise, grid, self.step, self.ledger)
            flat = render_fused(field, pixels, self.renderer.march)
        else:
            rays = _OneChunk(cast, noise, most, self.step, self.ledger)
            flat = render_rays(field, rays, self.renderer.march)
        self.ledger.part = "losses"
        return Rendering(flat.rgb.view(*shape, 3), flat.opacity.view(shape), flat.depth.view(shape))


class _OneChunk(Rays):
    """Rays that do not know where they go: a share of each object's hits, and one chunk of these is walked."""

    def __init__(
        self,
        rays: tuple[Tensor, Tensor, Tensor, Tensor],
        jitter: Tensor | None,
        rays_per_chunk: int,
        step: StepShape,
        ledger: Ledger,
    ) -> None:
        self.origins, self.directions, self.near, self.far = rays
        self.jitter, self.threads, self.ledger = jitter, step.threads, ledger
        hit = step.hits * self.near.shape[1]
        self.walked = max(1, min(rays_per_chunk, round(hit / step.threads)))
        self.times = hit / self.walked

    def for_each_chunk(
        self, work: Callable[[int, int, Tensor], None], done: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        """Let every thread walk one chunk of each object, which stands for all of its chunks."""
        chunk = torch.empty(self.walked, dtype=torch.int64)
        for index in range(self.near.shape[0]):
            for thread in range(self.threads):
                with self.ledger.repeated(self.times / self.threads, self.threads):
                    work(thread, index, chunk)
                done(thread, index)


class _OneChunkOfPixels(PixelRays):
    """Grids of rays of which one chunk per object is marched, and booked as all of them.

    Rays that miss stay in the grid; only the kernels pass over them.
    """

    def __init__(
        self,
        rays: tuple[Tensor, Tensor, Tensor, Tensor],
        jitter: Tensor | None,
        grid: PixelGrid,
        step: StepShape,
        ledger: Ledger,
    ) -> None:
        super().__init__(*rays, jitter, grid)
        self.ledger, self.walked = ledger, min(grid.chunk_rows, grid.rows)
        self.times = grid.rows / self.walked
        ledger.shares = dict.fromkeys(("decode_along_rays", "decode_along_rays_backward"), step.hits)
        samples = self.alive.numel() * grid.samples
        chunk = len(self.alive) * self.walked * grid.columns * grid.samples
        #: Bytes kept for backward beyond those of the chunks that are marched.
        self.more = max(0, min(SAVED_BYTES, 16 * samples) - 16 * chunk)
        self.kept: Tensor | None = None

    def for_each_chunk(self, work: Callable[[int, slice], None]) -> None:
        """RayMarching one chunk of each object; between forward and backward the others' samples are kept."""
        for index in range(len(self.alive)):
            with self.ledger.repeated(self.times):
                work(index, slice(0, self.walked))
        self.kept = torch.empty(self.more, dtype=torch.uint8) if self.kept is None else None
