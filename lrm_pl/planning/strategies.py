"""What a run costs a process under each strategy: memory, bytes sent, seconds a step.

Memory. Everything trained is float32 (4 bytes a number), AdamW holds two numbers more of each. DDP and ZeRO 1 hold all
gradients all the time; alone, those of early layers come when activations are gone.

Time on a GPU is a range, estimated and not measured: a roofline between FAST and SLOW. Each operation takes as long as
its products at some share of the data sheet's peak, its bytes at some share of the memory's bandwidth, or its launch,
whichever is longest; nothing is fused. Atomic additions, waits of the host and loading of data are not in it. A message
takes its bytes at the same share of the slowest link that its ring crosses, and a latency per process (an all-reduce
goes along a tree). Gradients travel while backward runs, weights while anything else runs; those that ZeRO 1 and 2
spread after their step, while nothing does. So waiting is a lower bound.

Where the shares are from. Products: attention kernels reach 35 % of an H100's peak and 50 to 73 % of an A100's (Dao
2023, FlashAttention-2; Shah et al. 2024, FlashAttention-3); large matrix products reach the upper end. Bytes: copies
reach 80 to 90 % of a data sheet's bandwidth, reductions and strided reads less; 50 % is a guess. Launches: 4 us is
about what PyTorch needs for an operator without a graph, 10 us with autograd and a busy host; guesses.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from lrm_pl.planning.gpus import Gpu
from lrm_pl.planning.ledger import Message
from lrm_pl.planning.simulate import StepCosts


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """What programs reach of a data sheet's figures.

    Attributes:
        products: Fraction of the peak of products.
        bytes: Fraction of the bandwidth of memory and links.
        launch: Seconds that an operation takes at least.
        hop: Seconds of latency of a message, per process.
    """

    products: float
    bytes: float
    launch: float
    hop: float


FAST, SLOW = Efficiency(0.7, 0.8, 4e-6, 6e-6), Efficiency(0.35, 0.5, 10e-6, 12e-6)

#: Numbers read or written per trained number by the norm of gradients and their scaling, and by AdamW: fused, it reads
#: weight, gradient and moments and writes weight and moments once. PyTorch's foreach AdamW makes a pass per operation:
#: decay 2, first moment 3, second 2 + 3, square root 2, division 2, epsilon 2, update 4.
NORM_NUMBERS, FUSED_NUMBERS, FOREACH_NUMBERS = 3, 7, 20

#: What an allocator holds besides: on a GPU a guess; on a CPU what glibc's heap held of what was freed (measured).
GPU_SLACK, CPU_SLACK = 1.1, 1.5

#: Bytes that a process holds before it has a network: CUDA's context and libraries.
CUDA_CONTEXT = 0.6e9


@dataclasses.dataclass(frozen=True)
class Machines:
    """What a run runs on.

    Attributes:
        gpu: Its GPUs.
        processes: One a GPU.
        per_node: GPUs of a node.
        network: Bytes a second that a node sends to others.
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
class Division:
    """One strategy's costs for one process; bytes and seconds per step, times from fast to slow.

    Attributes:
        strategy: Its name among configs/trainer/.
        weights: Of the network, and of the network that LPIPS uses.
        gradients: What of them is held all the time, or at the end.
        optimizer: AdamW's moments, and copies that ZeRO makes.
        activations: At the peak, with what is gathered or made for a while.
        peak: All together, with the allocator's slack.
        sent: Bytes that the process sends.
        compute: Seconds of computing.
        exposed: Seconds of waiting for messages.
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
        """Seconds per step."""
        fast, slow = (a + b for a, b in zip(self.compute, self.exposed, strict=True))
        return fast, slow


def alone(costs: StepCosts, accumulate: int, base: float, slack: float, spare: float) -> Division:
    """Divide nothing: one process. Times are not known here.

    Args:
        costs: Of its step.
        accumulate: Batches a step.
        base: Bytes that the process holds before it has a network.
        slack: Factor on what comes and goes.
        spare: Bytes that the optimizer's step needs for a while.
    """
    weights, optimizer = costs.weights + costs.frozen_other, 8.0 * costs.trained
    kept = costs.gradients if accumulate > 1 else 0.0
    work = max(kept + costs.activations, costs.work, costs.gradients + spare)
    # What a heap keeps of freed memory grows with all that comes and goes: activations, and gradients between steps.
    peak = base + weights + optimizer + (work + (slack - 1) * (work + costs.gradients) if slack > 1 else work)
    return Division(
        "none", weights, costs.gradients, optimizer, costs.activations, peak, 0.0, (0.0, 0.0), (0.0, 0.0)
    )


def divisions(
    whole: StepCosts,
    sharded: StepCosts | None,
    hybrid: StepCosts | None,
    machines: Machines,
    accumulate: int,
    *,
    fused: bool,
) -> list[Division]:
    """Cost every strategy on GPUs.

    Args:
        whole: A step of a process that holds the whole network.
        sharded: The same under FSDP2 over all processes; None for one process.
        hybrid: The same with shards inside a node; None for one node.
        machines: What it runs on.
        accumulate: Batches a step.
        fused: Whether AdamW is fused; else its step holds temporary tensors as large as the weights that it moves.
    """
    n, trained = machines.processes, 4.0 * whole.trained
    spare = 0.0 if fused else 1.0
    if n == 1:
        single = alone(whole, accumulate, CUDA_CONTEXT, 1.0, spare * trained)
        compute = _range(lambda reach: _compute(whole, trained, machines.gpu, accumulate, reach, fused=fused))
        return [dataclasses.replace(single, peak=_with_slack(single.peak), compute=compute)]
    weights, activations = whole.weights + whole.frozen_other, whole.activations
    reduce, scatter, gather = (Message(kind, trained, n) for kind in ("reduce", "scatter", "gather"))
    all_weights = Message("gather", whole.weights, n)
    rows = [
        # name, weights, gradients, optimizer, activations, messages, trained bytes of the optimizer's step
        ("ddp", weights, trained, 2 * trained, max(activations, spare * trained), [reduce], trained),
        ("deepspeed_1", weights, trained, 3 * trained / n, activations, [scatter, gather], trained / n),
        ("deepspeed_2", weights, trained / n, 3 * trained / n, whole.work, [*[scatter] * accumulate, gather],
         trained / n),
        # ZeRO 3 keeps up to 1e9 gathered numbers: of these networks all.
        ("deepspeed_3", whole.weights / n + whole.frozen_other, trained / n, 3 * trained / n,
         whole.weights + whole.work, [*[all_weights] * 2 * accumulate, *[scatter] * accumulate], trained / n),
    ]  # fmt: skip
    for name, costs in (("fsdp2", sharded), ("hsdp", hybrid)):
        if costs is not None:
            rows.append((name, costs.weights + costs.frozen_other, costs.gradients, 2 * costs.gradients,
                         max(costs.activations, spare * costs.gradients), list(costs.messages) * accumulate,
                         costs.gradients))  # fmt: skip
    found = []
    for name, held, gradients, optimizer, active, messages, stepped in rows:
        times = [
            _times(whole, messages, stepped, machines, accumulate, reach, fused=fused,
                   in_parts=name in ("fsdp2", "hsdp", "deepspeed_3"))
            for reach in (FAST, SLOW)
        ]  # fmt: skip
        (fast, waiting), (slow, waiting_slow) = times
        peak = _with_slack(CUDA_CONTEXT + held + gradients + optimizer + active)
        sent = sum(message.sent for message in messages)
        found.append(
            Division(
                name, held, gradients, optimizer, active, peak, sent, (fast, slow), (waiting, waiting_slow)
            )
        )
    return found


def _times(
    whole: StepCosts,
    messages: Sequence[Message],
    stepped: float,
    machines: Machines,
    accumulate: int,
    reach: Efficiency,
    *,
    fused: bool,
    in_parts: bool,
) -> tuple[float, float]:
    """Return seconds of computing, and of waiting for messages; ``in_parts``: each batch sends, module by module."""
    compute = _compute(whole, stepped, machines.gpu, accumulate, reach, fused=fused)
    backward = _roofline(whole, machines.gpu, reach, "backward") * (accumulate if in_parts else 1)
    gathering = sum(_seconds(message, machines, reach) for message in messages if message.kind == "gather")
    summing = sum(_seconds(message, machines, reach) for message in messages if message.kind != "gather")
    elsewhere = compute - min(summing, backward) if in_parts else 0.0
    return compute, max(0.0, summing - backward) + max(0.0, gathering - elsewhere)


def _range(seconds: Callable[[Efficiency], float]) -> tuple[float, float]:
    return seconds(FAST), seconds(SLOW)


def _with_slack(peak: float) -> float:
    return CUDA_CONTEXT + GPU_SLACK * (peak - CUDA_CONTEXT)


def _compute(
    costs: StepCosts, stepped: float, gpu: Gpu, accumulate: int, reach: Efficiency, *, fused: bool
) -> float:
    """Return the seconds of all batches of a step, then of the gradient's norm and AdamW."""
    numbers = NORM_NUMBERS + (FUSED_NUMBERS if fused else FOREACH_NUMBERS)
    return accumulate * _roofline(costs, gpu, reach) + numbers * stepped / (reach.bytes * gpu.bandwidth)


def _roofline(costs: StepCosts, gpu: Gpu, reach: Efficiency, part: str | None = None) -> float:
    return sum(
        max(
            x.flops / (reach.products * gpu.products(costs.shape.dtype)),
            x.moved / (reach.bytes * gpu.bandwidth),
            x.count * reach.launch,
        )
        for x in costs.operations
        if part is None or x.part == part
    )


def _seconds(message: Message, machines: Machines, reach: Efficiency) -> float:
    """A ring inside a node runs at the GPUs' links; one over nodes at what a node sends.

    Shards are laid inside nodes first; what is reduced over copies crosses nodes, one ring a GPU of a node at once.
    """
    if message.processes == 1:
        return 0.0
    inside = message.processes <= machines.per_node and not (message.kind == "reduce" and machines.nodes > 1)
    rings = machines.per_node if message.processes < machines.processes and not inside else 1
    speed = machines.gpu.link if inside else min(machines.gpu.link, machines.network / rings)
    n = message.processes
    hops = 2 * math.log2(n) if message.kind == "reduce" else n - 1
    return message.sent / (reach.bytes * speed) + reach.hop * hops


def best_fitting(rows: Sequence[Division], memory: float) -> Division | None:
    """Return the simplest row that fits a GPU's memory and is as fast as any to 5 %; None where nothing fits.

    The middles of the ranges are compared; estimates of one GPU's strategies are no closer to each other than that.
    """
    fits = [row for row in rows if row.peak <= memory]
    least = min((sum(row.seconds) for row in fits), default=0.0)
    return next((row for row in fits if sum(row.seconds) <= 1.05 * least), None)
