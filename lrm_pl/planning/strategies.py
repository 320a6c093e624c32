"""Estimated memory, communication and time of a run under each parallel strategy.

Memory: trained weights are float32, and AdamW stores two float32 moments per weight. DDP and ZeRO 1 hold all gradients
all the time; in a single process, gradients of early layers are allocated after most activations are freed.

Time on a GPU is a range between two roofline models, ``FAST`` and ``SLOW``, and is not measured. The time of an
operation is the maximum of its FLOPs over a fraction of the peak rate, its bytes over a fraction of the memory
bandwidth, and a launch overhead; no operations are fused. Atomic additions, host synchronization and data loading are
excluded. The time of a collective is its bytes over a fraction of the slowest link of its ring, plus a latency per
process (an all-reduce uses a tree). Gradients are reduced during backward, and weights are gathered during any
computation; the all-gather of ZeRO 1 and 2 after the optimizer's step overlaps with nothing. The resulting waiting time
is a lower bound.

Sources of the fractions: attention kernels reach 35 % of the peak of an H100 and 50 to 73 % of an A100 (Dao 2023,
FlashAttention-2; Shah et al. 2024, FlashAttention-3), and large matrix products reach the upper end. Copies reach 80 to
90 % of the bandwidth, reductions and strided reads less; 50 % is a guess. A launch takes about 4 us without autograd,
and 10 us with autograd and a busy host; both are guesses.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from lrm_pl.planning.gpus import Gpu
from lrm_pl.planning.operation_counter import Collective
from lrm_pl.planning.simulate import StepCosts


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Achieved fractions of the peak rates, and overheads.

    Attributes:
        flops: Fraction of the peak FLOP/s.
        bytes: Fraction of the bandwidth of memory and links.
        launch: Minimum seconds per operation.
        hop: Latency of a collective in seconds, per process.
    """

    flops: float
    bytes: float
    launch: float
    hop: float


FAST, SLOW = Efficiency(0.7, 0.8, 4e-6, 6e-6), Efficiency(0.35, 0.5, 10e-6, 12e-6)

#: Float32 values read or written per trained weight: by gradient clipping, by fused AdamW (reads weight, gradient and
#: moments, writes weight and moments), and by PyTorch's foreach AdamW, with one pass per operation: decay 2, first
#: moment 3, second 2 + 3, square root 2, division 2, epsilon 2, update 4.
CLIPPING_VALUES, FUSED_VALUES, FOREACH_VALUES = 3, 7, 20

#: Factor for memory that the allocator holds in addition: a guess on a GPU; measured for glibc's heap on a CPU.
GPU_SLACK, CPU_SLACK = 1.1, 1.5

#: Bytes of the CUDA context and libraries in a process.
CUDA_CONTEXT = 0.6e9


@dataclasses.dataclass(frozen=True)
class Hardware:
    """GPUs and network of a run.

    Attributes:
        gpu: Type of the GPUs.
        processes: Number of processes, one per GPU.
        per_node: GPUs per node.
        network: Bandwidth between nodes in bytes per second and node.
    """

    gpu: Gpu
    processes: int
    per_node: int
    network: float

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.processes // self.per_node)


@dataclasses.dataclass(frozen=True)
class StrategyEstimate:
    """Memory in bytes and time in seconds per step of one process under a strategy.

    Attributes:
        strategy: Name of the strategy in configs/trainer/.
        weights: Bytes of the network and of the LPIPS network.
        gradients: Bytes of gradients.
        optimizer: Bytes of AdamW's moments, and of ZeRO's copies of the weights.
        activations: Bytes of activations at the peak, with gathered and temporary tensors.
        peak: Peak bytes, with the allocator's slack.
        sent: Bytes sent.
        compute: Seconds of computation, from fast to slow.
        exposed: Seconds of communication that does not overlap with computation, from fast to slow.
    """

    strategy: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    peak: float
    sent: float
    compute: tuple[float, float]
    exposed: tuple[float, float]

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds per step, from fast to slow."""
        fast, slow = (a + b for a, b in zip(self.compute, self.exposed, strict=True))
        return fast, slow


def estimate_single_process(
    costs: StepCosts, accumulate: int, base: float, slack: float, temporaries: float
) -> StrategyEstimate:
    """Estimate the memory of a single process; its times are left at 0.

    Args:
        costs: Costs of a step.
        accumulate: Batches per step.
        base: Bytes of the process without a network.
        slack: Factor for memory that the allocator holds in addition.
        temporaries: Bytes of temporary tensors of the optimizer's step.
    """
    weights, optimizer = costs.weights + costs.frozen_other, 8.0 * costs.trained
    kept = costs.gradients if accumulate > 1 else 0.0
    work = max(kept + costs.activations, costs.work, costs.gradients + temporaries)
    # The heap keeps a part of all freed memory: of activations, and of gradients between steps.
    peak = base + weights + optimizer + (work + (slack - 1) * (work + costs.gradients) if slack > 1 else work)
    return StrategyEstimate(
        "none", weights, costs.gradients, optimizer, costs.activations, peak, 0.0, (0.0, 0.0), (0.0, 0.0)
    )


def estimate_strategies(
    whole: StepCosts,
    sharded: StepCosts | None,
    hybrid: StepCosts | None,
    hardware: Hardware,
    accumulate: int,
    *,
    fused: bool,
) -> list[StrategyEstimate]:
    """Estimate every strategy on GPUs, from simplest to most complex.

    Args:
        whole: Step of a process that holds the whole network.
        sharded: Step under FSDP2 over all processes; None for one process.
        hybrid: Step under FSDP2 with shards inside a node and replicas over nodes; None for one node.
        hardware: GPUs and network.
        accumulate: Batches per step.
        fused: Whether AdamW is fused; otherwise its temporary tensors are as large as the weights that it updates.
    """
    n, trained = hardware.processes, 4.0 * whole.trained
    temporary = 0.0 if fused else 1.0
    if n == 1:
        single = estimate_single_process(whole, accumulate, CUDA_CONTEXT, 1.0, temporary * trained)
        compute = _range(
            lambda efficiency: _compute(whole, trained, hardware.gpu, accumulate, efficiency, fused=fused)
        )
        return [dataclasses.replace(single, peak=_with_slack(single.peak), compute=compute)]
    weights, activations = whole.weights + whole.frozen_other, whole.activations
    all_reduce, reduce_scatter, all_gather = (
        Collective(op, trained, n) for op in ("all_reduce", "reduce_scatter", "all_gather")
    )
    gather_weights = Collective("all_gather", whole.weights, n)
    rows = [
        # name, weights, gradients, optimizer, activations, collectives, trained bytes of the optimizer's step
        ("ddp", weights, trained, 2 * trained, max(activations, temporary * trained), [all_reduce], trained),
        ("deepspeed_1", weights, trained, 3 * trained / n, activations, [reduce_scatter, all_gather], trained / n),
        ("deepspeed_2", weights, trained / n, 3 * trained / n, whole.work, [*[reduce_scatter] * accumulate, all_gather],
         trained / n),
        # ZeRO 3 keeps up to 1e9 gathered weights, which are all weights of these networks.
        ("deepspeed_3", whole.weights / n + whole.frozen_other, trained / n, 3 * trained / n,
         whole.weights + whole.work, [*[gather_weights] * 2 * accumulate, *[reduce_scatter] * accumulate], trained / n),
    ]  # fmt: skip
    for name, costs in (("fsdp2", sharded), ("hsdp", hybrid)):
        if costs is not None:
            rows.append((name, costs.weights + costs.frozen_other, costs.gradients, 2 * costs.gradients,
                         max(costs.activations, temporary * costs.gradients), list(costs.collectives) * accumulate,
                         costs.gradients))  # fmt: skip
    estimates = []
    for name, held, gradients, optimizer, active, collectives, stepped in rows:
        times = [
            _times(whole, collectives, stepped, hardware, accumulate, efficiency, fused=fused,
                   per_batch=name in ("fsdp2", "hsdp", "deepspeed_3"))
            for efficiency in (FAST, SLOW)
        ]  # fmt: skip
        (fast, waiting), (slow, waiting_slow) = times
        peak = _with_slack(CUDA_CONTEXT + held + gradients + optimizer + active)
        sent = sum(collective.sent for collective in collectives)
        estimates.append(
            StrategyEstimate(
                name, held, gradients, optimizer, active, peak, sent, (fast, slow), (waiting, waiting_slow)
            )
        )
    return estimates


def _times(
    whole: StepCosts,
    collectives: Sequence[Collective],
    stepped: float,
    hardware: Hardware,
    accumulate: int,
    efficiency: Efficiency,
    *,
    fused: bool,
    per_batch: bool,
) -> tuple[float, float]:
    """Return seconds of computation and of exposed communication.

    Args:
        whole: Step of a process that holds the whole network.
        collectives: Collectives of an optimizer step.
        stepped: Bytes of the weights that the optimizer updates in this process.
        hardware: GPUs and network.
        accumulate: Batches per step.
        efficiency: Achieved fractions of the peak rates.
        fused: Whether AdamW is fused.
        per_batch: Whether every accumulated batch communicates, module by module.
    """
    compute = _compute(whole, stepped, hardware.gpu, accumulate, efficiency, fused=fused)
    backward = _roofline(whole, hardware.gpu, efficiency, "backward") * (accumulate if per_batch else 1)
    gathering = sum(_seconds(x, hardware, efficiency) for x in collectives if x.op == "all_gather")
    reducing = sum(_seconds(x, hardware, efficiency) for x in collectives if x.op != "all_gather")
    elsewhere = compute - min(reducing, backward) if per_batch else 0.0
    return compute, max(0.0, reducing - backward) + max(0.0, gathering - elsewhere)


def _range(seconds: Callable[[Efficiency], float]) -> tuple[float, float]:
    return seconds(FAST), seconds(SLOW)


def _with_slack(peak: float) -> float:
    return CUDA_CONTEXT + GPU_SLACK * (peak - CUDA_CONTEXT)


def _compute(
    costs: StepCosts, stepped: float, gpu: Gpu, accumulate: int, efficiency: Efficiency, *, fused: bool
) -> float:
    """Return the seconds of all batches of a step, gradient clipping and AdamW."""
    values = CLIPPING_VALUES + (FUSED_VALUES if fused else FOREACH_VALUES)
    return accumulate * _roofline(costs, gpu, efficiency) + values * stepped / (
        efficiency.bytes * gpu.bandwidth
    )


def _roofline(costs: StepCosts, gpu: Gpu, efficiency: Efficiency, part: str | None = None) -> float:
    return sum(
        max(
            x.flops / (efficiency.flops * gpu.peak(costs.shape.dtype)),
            x.accessed / (efficiency.bytes * gpu.bandwidth),
            x.count * efficiency.launch,
        )
        for x in costs.operations
        if part is None or x.part == part
    )


def _seconds(collective: Collective, hardware: Hardware, efficiency: Efficiency) -> float:
    """Return the seconds of a collective: at the GPUs' link inside a node, else at the network's bandwidth.

    Shards are placed inside nodes first. Replicas are reduced over nodes, with one ring per GPU of a node at once.
    """
    if collective.processes == 1:
        return 0.0
    inside = collective.processes <= hardware.per_node and not (
        collective.op == "all_reduce" and hardware.nodes > 1
    )
    rings = hardware.per_node if collective.processes < hardware.processes and not inside else 1
    speed = hardware.gpu.link if inside else min(hardware.gpu.link, hardware.network / rings)
    n = collective.processes
    hops = 2 * math.log2(n) if collective.op == "all_reduce" else n - 1
    return collective.sent / (efficiency.bytes * speed) + efficiency.hop * hops


def best_fitting(estimates: Sequence[StrategyEstimate], memory: float) -> StrategyEstimate | None:
    """Return the simplest strategy that fits into memory and is at most 5 % slower than the fastest; None if none fits.

    The midpoints of the time ranges are compared; smaller differences are within the error of the estimate.
    """
    fits = [x for x in estimates if x.peak <= memory]
    least = min((sum(x.seconds) for x in fits), default=0.0)
    return next((x for x in fits if sum(x.seconds) <= 1.05 * least), None)
