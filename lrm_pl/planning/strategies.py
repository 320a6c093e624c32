"""Estimates of the memory, communication and time of a run for each parallel strategy.

Trained weights are float32, and AdamW stores two float32 moments per weight. DDP and ZeRO stage 1 always hold all
gradients. In a single process, the gradients of early layers are allocated after most activations have been freed.

Times on GPUs are not measured. They are ranges between the roofline models ``FAST`` and ``SLOW``. The time of an
operation is the maximum of three terms: the FLOPs divided by a fraction of the peak rate, the bytes divided by a
fraction of the memory bandwidth, and a launch overhead. The model assumes that no operations are fused. Atomic
additions, host synchronization and data loading are excluded. The time of a collective is the number of bytes divided
by a fraction of the bandwidth of the slowest link, plus a latency per hop. Gradients are reduced during backward, and
weights are gathered during any computation. The all-gather of ZeRO stages 1 and 2 follows the optimizer step and does
not overlap with computation. The resulting waiting time is a lower bound.

Attention kernels reach 35 % of the peak rate of an H100 and 50 to 73 % of the peak rate of an A100 (Dao 2023,
FlashAttention-2; Shah et al. 2024, FlashAttention-3). Large matrix products reach the upper end of the range. Copies
reach 80 to 90 % of the memory bandwidth. The lower fraction of 50 % for reductions and strided reads is an assumption,
as are launch overheads of 4 us without autograd and of 10 us with autograd and a busy host.
"""

import dataclasses
import math
from collections.abc import Sequence

from lrm_pl.planning.gpus import Gpu
from lrm_pl.planning.operation_counter import Collective
from lrm_pl.planning.simulate import StepCosts


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Achieved fractions of the peak rates, and overheads.

    Attributes:
        flops: Fraction of the peak FLOP/s.
        bytes: Fraction of the bandwidth of memory and links.
        launch: Minimum time per operation in seconds.
        hop: Latency per hop of a collective in seconds.
    """

    flops: float
    bytes: float
    launch: float
    hop: float


FAST, SLOW = Efficiency(0.7, 0.8, 4e-6, 6e-6), Efficiency(0.35, 0.5, 10e-6, 12e-6)

#: Number of float32 values that are read or written per trained weight in gradient clipping, in fused AdamW and in
#: PyTorch's foreach AdamW. Fused AdamW reads the weight, the gradient and two moments, and writes the weight and the
#: moments. Foreach AdamW uses 2 values for the decay, 3 for the first moment, 2 + 3 for the second moment, 2 for the
#: square root, 2 for the division, 2 for epsilon and 4 for the update.
CLIPPING_VALUES, FUSED_VALUES, FOREACH_VALUES = 3, 7, 20

#: Factors for memory that the allocator holds in addition to the tensors. The factor for GPUs is an assumption. The
#: factor for CPUs was measured with the allocator of glibc.
GPU_SLACK, CPU_SLACK = 1.1, 1.5

#: Memory that the CUDA context and the libraries of a process occupy, in bytes.
CUDA_CONTEXT = 0.6e9


@dataclasses.dataclass(frozen=True)
class Hardware:
    """GPUs and network of a run.

    Attributes:
        gpu: Type of the GPUs.
        processes: Number of processes, which equals the number of GPUs.
        per_node: Number of GPUs per node.
        network: Bandwidth between nodes in bytes per second per node.
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
    """Memory and time per step of one process with a given strategy.

    Times are pairs of the estimates of the models ``FAST`` and ``SLOW``.

    Attributes:
        strategy: Name of the strategy in configs/trainer/.
        weights: Size in bytes of the weights of the network and of the LPIPS network.
        gradients: Size in bytes of the gradients.
        optimizer: Size in bytes of AdamW's moments and of ZeRO's copies of the weights.
        activations: Peak size in bytes of activations, gathered weights and temporary tensors.
        peak: Peak memory in bytes, including memory that the allocator holds in addition to the tensors.
        sent: Number of bytes sent per step.
        compute: Time of computation in seconds.
        exposed: Time of communication that does not overlap with computation, in seconds.
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
        """Total time per step in seconds."""
        fast, slow = (a + b for a, b in zip(self.compute, self.exposed, strict=True))
        return fast, slow


def estimate_single_process(
    costs: StepCosts, accumulate: int, base: float, slack: float, temporaries: float
) -> StrategyEstimate:
    """Estimate the memory of a single process. All times in the result are 0.

    Args:
        costs: Costs of a step.
        accumulate: Number of batches per optimizer step.
        base: Memory in bytes of the process without a network.
        slack: Factor for memory that the allocator holds in addition to the tensors.
        temporaries: Size in bytes of the temporary tensors in the optimizer step.
    """
    weights, optimizer = costs.weights + costs.frozen_other, 8.0 * costs.trained
    kept = costs.gradients if accumulate > 1 else 0.0
    work = max(kept + costs.activations, costs.work, costs.gradients + temporaries)
    # The heap keeps a part of the memory that was freed, including the gradients that are freed between steps.
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
    """Estimate the memory and time of all strategies on GPUs.

    Args:
        whole: Costs of a step of a process that holds the whole network.
        sharded: Costs of a step with FSDP2 over all processes, or None if there is one process.
        hybrid: Costs of a step with FSDP2 inside each node and replicas over nodes, or None if there is one node.
        hardware: GPUs and network of the run.
        accumulate: Number of batches per optimizer step.
        fused: Whether AdamW is fused. If it is not fused, it allocates temporary tensors that are as large as the
            weights that it updates.

    Returns:
        The estimates, ordered from the simplest to the most complex strategy.
    """
    n, trained = hardware.processes, 4.0 * whole.trained
    temporary = 0.0 if fused else 1.0
    if n == 1:
        single = estimate_single_process(whole, accumulate, CUDA_CONTEXT, 1.0, temporary * trained)
        fast, slow = (
            _compute(whole, trained, hardware.gpu, accumulate, x, fused=fused) for x in (FAST, SLOW)
        )
        return [dataclasses.replace(single, peak=_with_slack(single.peak), compute=(fast, slow))]
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
        # ZeRO stage 3 keeps up to 1e9 gathered weights, so it keeps all weights of these networks.
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
    """Return the times in seconds of computation and of exposed communication per optimizer step.

    Args:
        whole: Costs of a step of a process that holds the whole network.
        collectives: Collectives of an optimizer step.
        stepped: Size in bytes of the weights that the optimizer updates in this process.
        hardware: GPUs and network of the run.
        accumulate: Number of batches per optimizer step.
        efficiency: Achieved fractions of the peak rates.
        fused: Whether AdamW is fused.
        per_batch: Whether there is communication in every accumulated batch, which overlaps with computation.
    """
    compute = _compute(whole, stepped, hardware.gpu, accumulate, efficiency, fused=fused)
    backward = _roofline(whole, hardware.gpu, efficiency, "backward") * (accumulate if per_batch else 1)
    gathering = sum(_seconds(x, hardware, efficiency) for x in collectives if x.op == "all_gather")
    reducing = sum(_seconds(x, hardware, efficiency) for x in collectives if x.op != "all_gather")
    elsewhere = compute - min(reducing, backward) if per_batch else 0.0
    return compute, max(0.0, reducing - backward) + max(0.0, gathering - elsewhere)


def _with_slack(peak: float) -> float:
    return CUDA_CONTEXT + GPU_SLACK * (peak - CUDA_CONTEXT)


def _compute(
    costs: StepCosts, stepped: float, gpu: Gpu, accumulate: int, efficiency: Efficiency, *, fused: bool
) -> float:
    """Return the time of an optimizer step, including gradient accumulation, clipping and AdamW, in seconds."""
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
    """Return the time of a collective in seconds.

    A collective inside a node uses the links between the GPUs, and other collectives use the network. The processes of
    a replica are placed on the same node if possible. If replicas are reduced over nodes, each GPU of a node is part of
    a different ring, and all rings communicate at the same time.
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
    """Return the simplest strategy that fits into memory and is at most 5 % slower than the fastest such strategy.

    The midpoints of the time ranges are compared. Differences of less than 5 % are within the error of the estimate.

    Args:
        estimates: Estimates, ordered from the simplest to the most complex strategy.
        memory: Memory of a GPU in bytes.

    Returns:
        The estimate of the strategy, or None if no strategy fits into memory.
    """
    fits = [x for x in estimates if x.peak <= memory]
    least = min((sum(x.seconds) for x in fits), default=0.0)
    return next((x for x in fits if sum(x.seconds) <= 1.05 * least), None)
