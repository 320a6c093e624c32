"""What a run costs a process under each strategy: memory, bytes sent, seconds a step.

Memory. Everything trained is float32 (4 bytes a number), AdamW holds two numbers more of each. DDP and ZeRO 1 hold all
gradients all the time; alone, those of early layers come when activations are gone.

Time on a GPU, a roofline: each operation takes as long as its products at 70 % of the peak, its bytes at 80 % of the
memory's bandwidth, or 4 microseconds, whichever is longest; nothing is fused. A message takes its bytes at 80 % of the
slowest link that its ring crosses, and 6 microseconds a process (a sum that all get goes along a tree). Gradients
travel while backward runs, weights while anything else runs; those that ZeRO 1 and 2 spread after their step, while
nothing does. So waiting is a lower bound. Loading data is not in it.
"""

import dataclasses
import math
from collections.abc import Sequence

from lrm_pl.training.costs.ledger import Message
from lrm_pl.training.costs.machines import Gpu
from lrm_pl.training.costs.simulation import StepCosts

_PRODUCTS, _BYTES, _LAUNCH, _HOP = 0.7, 0.8, 4e-6, 6e-6

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
    """One strategy's costs for one process; bytes and seconds, a step.

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
    compute: float
    exposed: float

    @property
    def seconds(self) -> float:
        """Seconds a step."""
        return self.compute + self.exposed


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
    return Division("none", weights, costs.gradients, optimizer, costs.activations, peak, 0.0, 0.0, 0.0)


def divisions(
    whole: StepCosts, sharded: StepCosts | None, hybrid: StepCosts | None, machines: Machines, accumulate: int
) -> list[Division]:
    """Cost every strategy on GPUs.

    Args:
        whole: A step of a process that holds the whole network.
        sharded: The same under FSDP2 over all processes; None for one process.
        hybrid: The same with shards inside a node; None for one node.
        machines: What it runs on.
        accumulate: Batches a step.
    """
    n, trained = machines.processes, 4.0 * whole.trained
    if n == 1:
        single = alone(whole, accumulate, CUDA_CONTEXT, 1.0, trained)
        return [
            dataclasses.replace(
                single,
                peak=_with_slack(single.peak),
                compute=_compute(whole, trained, machines.gpu, accumulate),
            )
        ]
    weights, activations = whole.weights + whole.frozen_other, whole.activations
    reduce, scatter, gather = (Message(kind, trained, n) for kind in ("reduce", "scatter", "gather"))
    all_weights = Message("gather", whole.weights, n)
    rows = [
        # name, weights, gradients, optimizer, activations, messages, trained bytes of the optimizer's step
        ("ddp", weights, trained, 2 * trained, max(activations, trained), [reduce], trained),
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
                         max(costs.activations, costs.gradients), list(costs.messages) * accumulate,
                         costs.gradients))  # fmt: skip
    found = []
    for name, held, gradients, optimizer, active, messages, stepped in rows:
        compute = _compute(whole, stepped, machines.gpu, accumulate)
        in_parts = name in ("fsdp2", "hsdp", "deepspeed_3")
        backward = _roofline(whole, machines.gpu, "backward") * (accumulate if in_parts else 1)
        gathering = sum(_seconds(message, machines) for message in messages if message.kind == "gather")
        summing = sum(_seconds(message, machines) for message in messages if message.kind != "gather")
        elsewhere = compute - min(summing, backward) if in_parts else 0.0
        exposed = max(0.0, summing - backward) + max(0.0, gathering - elsewhere)
        peak = _with_slack(CUDA_CONTEXT + held + gradients + optimizer + active)
        sent = sum(message.sent for message in messages)
        found.append(Division(name, held, gradients, optimizer, active, peak, sent, compute, exposed))
    return found


def _with_slack(peak: float) -> float:
    return CUDA_CONTEXT + GPU_SLACK * (peak - CUDA_CONTEXT)


def _compute(costs: StepCosts, stepped: float, gpu: Gpu, accumulate: int) -> float:
    """Seconds of all batches of a step, then of AdamW: it reads and writes eight numbers for each that it moves."""
    return accumulate * _roofline(costs, gpu) + 8 * stepped / (_BYTES * gpu.bandwidth)


def _roofline(costs: StepCosts, gpu: Gpu, part: str | None = None) -> float:
    return sum(
        max(
            x.flops / (_PRODUCTS * gpu.products(costs.shape.dtype)),
            x.moved / (_BYTES * gpu.bandwidth),
            x.count * _LAUNCH,
        )
        for x in costs.operations
        if part is None or x.part == part
    )


def _seconds(message: Message, machines: Machines) -> float:
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
    return message.sent / (_BYTES * speed) + _HOP * hops


def best_fitting(rows: Sequence[Division], memory: float) -> Division | None:
    """Return the simplest row that fits a GPU's memory and is as fast as any to 2 %; None where nothing fits."""
    fits = [row for row in rows if row.peak <= memory]
    least = min((row.seconds for row in fits), default=0.0)
    return next((row for row in fits if row.seconds <= 1.02 * least), None)
