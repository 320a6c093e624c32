"""Tables of the estimated operations, memory and time of a run for each parallel strategy."""

import dataclasses
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import track
from rich.table import Table

from lrm_pl.errors import counted
from lrm_pl.planning.gpus import cpu_flops
from lrm_pl.planning.memory import memory_of_libraries
from lrm_pl.planning.memory_options import find_memory_options, memory_report
from lrm_pl.planning.run_plan import RunPlan
from lrm_pl.planning.sharding import check_shards, fake_process_group
from lrm_pl.planning.simulate import StepCosts, simulate_step
from lrm_pl.planning.strategies import (
    CPU_SLACK,
    FAST,
    SLOW,
    Hardware,
    StrategyEstimate,
    best_fitting,
    estimate_single_process,
    estimate_strategies,
)

#: Function that takes additional arguments of `lrm fit` and returns the plan of the run.
Planner = Callable[[Sequence[str]], RunPlan]

#: Approximate fraction of the measured peak that a step reaches on a CPU (`make bench`).
_CPU_EFFICIENCY = 0.5


def print_gpu_estimate(
    console: Console, planner: Planner, hardware: Hardware, *, every_rank: bool, less_memory: bool
) -> StrategyEstimate | None:
    """Print the estimated operations, memory and time of a run on GPUs.

    Args:
        console: Console to print to.
        planner: Function that takes additional arguments of ``lrm fit`` and returns the plan of the run.
        hardware: GPUs and network of the run.
        every_rank: Whether to check the shards of every rank instead of only those of the first and the last rank.
        less_memory: Whether to also print settings that reduce memory.

    Returns:
        The estimate of the recommended strategy, or None if no strategy fits into memory.

    Raises:
        InputError: The settings of the run are invalid, or the GPU does not support the precision of the run.
    """
    gpu, nodes = hardware.gpu, hardware.nodes
    plan = planner(())
    peak_flops = gpu.peak(plan.shape.dtype)
    console.print(f"Simulating a step of one process with {counted(plan.shape.objects, 'object')}")
    whole = plan.costs()
    sharded = hybrid = None
    if hardware.processes > 1:
        sharded = _sharded_costs(console, plan, "fsdp2", 1, every_rank=every_rank)
    if nodes > 1:
        hybrid = _sharded_costs(console, plan, "hsdp", nodes, every_rank=every_rank)
    _print_step(console, plan, whole)
    rows = estimate_strategies(whole, sharded, hybrid, hardware, plan.accumulate, fused=plan.fused)
    _print_strategies(console, rows, plan, gpu.memory)
    network = f", {hardware.network * 8 / 1e9:g} Gbit/s per node" if nodes > 1 else ""
    console.print(
        f"{hardware.processes} x {gpu.name} in {counted(nodes, 'node')}{network}; {plan.steps} steps. Roofline model: "
        f"{FAST.flops:.0%} to {SLOW.flops:.0%} of the peak FLOP/s, {FAST.bytes:.0%} to {SLOW.bytes:.0%} of the "
        f"bandwidth of memory and links, {FAST.launch * 1e6:.0f} to {SLOW.launch * 1e6:.0f} us per launch, excluding "
        f"atomics and data loading. {'Fused' if plan.fused else 'Foreach'} AdamW. DeepSpeed is not simulated.",
        soft_wrap=True,
    )
    best = best_fitting(rows, gpu.memory)
    if best is None:
        console.print("No strategy fits into memory.")
    if best is None or less_memory:
        _print_memory_options(console, planner)
    if best is not None:
        needed = whole.model_flops * plan.accumulate / peak_flops
        mfu = needed / best.seconds[0], needed / best.seconds[1]
        console.print(
            f"Recommended: {best.strategy}, the simplest strategy that fits into memory and is at most 5 % slower "
            f"than the fastest; {_format_range(best.seconds, 2)} s per step, MFU {_format_range(mfu, 2)} "
            "(estimated, not measured).",
            soft_wrap=True,
        )
    return best


def print_cpu_estimate(console: Console, planner: Planner, *, less_memory: bool) -> None:
    """Print the estimated operations, memory and time of a run in one process on the CPU of this machine.

    Args:
        console: Console to print to.
        planner: Function that takes additional arguments of ``lrm fit`` and returns the plan of the run.
        less_memory: Whether to also print settings that reduce memory.

    Raises:
        InputError: The settings of the run are invalid.
    """
    base = memory_of_libraries()
    plan = planner(())
    costs = plan.costs()
    _print_step(console, plan, costs)
    row = estimate_single_process(costs, plan.accumulate, base, CPU_SLACK, plan.optimizer_temporaries(costs))
    peak = cpu_flops(costs.shape.dtype)
    seconds = plan.accumulate * costs.flops / (_CPU_EFFICIENCY * peak)
    row = dataclasses.replace(row, strategy="cpu", compute=(seconds, seconds))
    _print_strategies(console, [row], plan, None)
    console.print(
        f"The peak memory includes {base / 1e9:.2f} GB for Python and libraries, and freed memory that the heap "
        f"retains. The peak rate of this machine is {peak / 1e9:.0f} GFLOP/s, and a step reaches about half of "
        "this rate.",
        soft_wrap=True,
    )
    if less_memory:
        _print_memory_options(console, planner)


def _sharded_costs(
    console: Console, plan: RunPlan, name: str, replicas: int, *, every_rank: bool
) -> StepCosts:
    """Check the shards of the first and last rank, or of all ranks, and simulate a step of the first rank."""
    module, n = plan.module, plan.processes
    ranks = range(n) if every_rank else (0, n - 1)
    tracked = track(ranks, f"checking shards, {name}", console=console, transient=True)
    check_shards(module.lrm, n, replicas, plan.shape.dtype, tracked)
    console.print(
        f"{name}: checked the shards of {len(ranks)} of {n} processes; all have the expected shapes"
    )
    with fake_process_group(0, n, replicas) as mesh:
        return simulate_step(module.lrm, module.renderer, module.objective, module.parallel, plan.shape, mesh)


def _print_step(console: Console, plan: RunPlan, costs: StepCosts) -> None:
    """Print the size of the network, and the number of operations per optimizer step over all processes."""
    lrm, batches = plan.module.lrm, plan.processes * plan.accumulate
    table = Table(title="Network, and one step of all processes", show_header=False)
    for name, module in (("encoder", lrm.encoder), ("transformer", lrm.transformer), ("all", lrm)):
        table.add_row(f"parameters, {name}", f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M")
    table.add_row("trained parameters", f"{costs.trained / 1e6:.1f} M")
    hits = f"{plan.shape.hits:.0%} of {plan.shape.pixels * batches:,} ({plan.cameras})"
    table.add_row(f"rays that hit the {plan.module.renderer.bounds}", hits)
    table.add_row("objects per step", f"{plan.batch_size}: {batches} batches of {plan.shape.objects}")
    lines = {f"forward, {name}": flops for name, flops in costs.forward.items()}
    lines |= {"forward + backward": costs.model_flops, "executed, with recomputation": costs.flops}
    for name, flops in lines.items():
        table.add_row(name, f"{flops * batches / 1e9:,.1f} GFLOP")
    console.print(table)


def _print_strategies(
    console: Console, rows: Sequence[StrategyEstimate], plan: RunPlan, memory: float | None
) -> None:
    """Print a table with one row per strategy."""
    timed = any(row.compute[1] for row in rows)
    title = f"GB per process, of {plan.processes}" + (
        f"; a GPU has {memory / 1e9:.0f} GB. Times are estimated, not measured" if memory else ""
    )
    table = Table(title=title)
    for column in ("strategy", "weights", "gradients", "optimizer", "activations", "peak"):
        table.add_column(column, justify="left" if column == "strategy" else "right", no_wrap=True)
    if timed:
        for column in ("sent per step", "s computing", "s waiting", "whole run"):
            table.add_column(column, justify="right")
    for row in rows:
        sizes = [row.weights, row.gradients, row.optimizer, row.activations]
        peak = f"{row.peak / 1e9:.2f}" + ("" if memory is None or row.peak <= memory else " too much")
        cells = [row.strategy, *(f"{size / 1e9:.2f}" for size in sizes), peak]
        if timed:
            fast, slow = (plan.steps * seconds for seconds in row.seconds)
            whole = _format_duration((fast, slow)) if plan.steps > 0 else "-"
            cells += [
                f"{row.sent / 1e9:.2f}", _format_range(row.compute, 2), _format_range(row.exposed, 2), whole,
            ]  # fmt: skip
        table.add_row(*cells)
    console.print(table)


def _print_memory_options(console: Console, planner: Planner) -> None:
    console.print(memory_report(*find_memory_options(planner)), soft_wrap=True)


def _format_duration(seconds: tuple[float, float]) -> str:
    """Format a range of durations in seconds as days, hours, minutes or seconds."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds[1] >= 2 * size:
            return f"{_format_range((seconds[0] / size, seconds[1] / size), 1)} {unit}"
    return f"{_format_range(seconds, 1)} s"


def _format_range(ends: tuple[float, float], digits: int) -> str:
    """Format a range with ``digits`` decimals, or up to 6 decimals if both ends would otherwise look the same."""
    low, high = sorted(ends)
    while digits < 6 and low != high and f"{low:.{digits}f}" == f"{high:.{digits}f}":
        digits += 1
    text = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return text[0] if low == high else "-".join(text)
