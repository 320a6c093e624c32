"""``lrm estimate CONFIG... --gpus N``: what a run costs before it is started; no GPU and no data are needed.

A step of one process is run on fake tensors, so every option counts; under FSDP2 as a process of the whole run, its
messages going nowhere, and what each process holds is checked. Times of GPUs are ranges, estimated and not measured.
Everything that `lrm fit` takes may follow.
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import track
from rich.table import Table

from lrm_pl.cli.fit_config import build_meta_model
from lrm_pl.errors import InputError, counted
from lrm_pl.kernels.device import GpuProperties
from lrm_pl.planning.fake_group import as_rank
from lrm_pl.planning.gpus import cpu_flops, require_gpu
from lrm_pl.planning.memory import memory_of_libraries
from lrm_pl.planning.memory_advice import table_lines, what_would_help
from lrm_pl.planning.run_plan import Plan, plan
from lrm_pl.planning.sharding import check_shards
from lrm_pl.planning.simulate import StepCosts, simulate_step
from lrm_pl.planning.strategies import (
    CPU_SLACK,
    FAST,
    SLOW,
    Division,
    Machines,
    alone,
    best_fitting,
    divisions,
)

#: Fraction of the measured peak that a step reaches on a CPU, about (`make bench`).
_CPU_SHARE = 0.5


def _plan(arguments: Sequence[str], processes: int, gpu: GpuProperties | None) -> Plan:
    return plan(*build_meta_model(list(arguments)), processes, gpu)


def _print_less_memory(
    console: Console, arguments: Sequence[str], processes: int, gpu: GpuProperties | None
) -> None:
    peak, remedies = what_would_help(lambda more: _plan([*arguments, *more], processes, gpu))
    console.print("\n".join(table_lines(peak, remedies)), soft_wrap=True)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into our options and the arguments of `lrm fit`."""
    parser = argparse.ArgumentParser(
        prog="lrm estimate",
        description=__doc__,
        usage="%(prog)s CONFIG... [--gpus N] [options] [arguments of lrm fit]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--gpus",
        type=int,
        help="all GPUs of the run; 1 with --gpu, else 0: one process on this machine's CPU",
    )
    add(
        "--gpu",
        help="which GPU, as in 4090, H100, a100-40g or MI300X; memory where there are several (default: A100 80GB)",
    )
    add("--gpus-per-node", type=int, default=8, help="default: %(default)s")
    add(
        "--network", type=float, default=800, help="Gbit/s that a node sends to others (default: %(default)s)"
    )
    add(
        "--every-rank",
        action="store_true",
        help="build the sharded program of every process, not of the first and last",
    )
    add("--less-memory", action="store_true", help="also list settings that need less memory")
    configs = []
    rest = list(argv)
    while rest and not rest[0].startswith("-"):
        configs.append(rest.pop(0))
    options, arguments = parser.parse_known_args(rest)
    if options.gpus is None:
        options.gpus = 0 if options.gpu is None else 1
    options.gpu = options.gpu or "A100 80GB"
    if not configs and not arguments:
        parser.error("expected a config: lrm estimate configs/experiment/demo.yaml --gpus 8")
    return options, [*(part for config in configs for part in ("-c", config)), *arguments]


def show_step(console: Console, planned: Plan, costs: StepCosts) -> None:
    """Print the network's size and the operations of an optimizer step, of all processes together."""
    lrm, times = planned.module.lrm, planned.processes * planned.accumulate
    table = Table(title="The network and a step of all processes", show_header=False)
    for name, part in (("encoder", lrm.encoder), ("transformer", lrm.transformer), ("all", lrm)):
        table.add_row(f"parameters, {name}", f"{sum(p.numel() for p in part.parameters()) / 1e6:.1f} M")
    table.add_row("parameters that learn", f"{costs.trained / 1e6:.1f} M")
    hits = f"{planned.shape.hits:.0%} of {planned.shape.pixels * times:,} ({planned.cameras})"
    table.add_row(f"rays that hit the {planned.module.renderer.bounds}", hits)
    table.add_row("objects a step", f"{planned.batch_size}: {times} x {planned.shape.objects} at a time")
    lines = {f"forward, {name}": flops for name, flops in costs.forward.items()}
    lines |= {"forward + backward": costs.model, "run, with what is recomputed": costs.flops}
    for name, flops in lines.items():
        table.add_row(name, f"{flops * times / 1e9:,.1f} GFLOP")
    console.print(table)


def duration(seconds: tuple[float, float]) -> str:
    """Write a range of seconds in the unit in which one would say its end."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds[1] >= 2 * size:
            return f"{span((seconds[0] / size, seconds[1] / size), 1)} {unit}"
    return f"{span(seconds, 1)} s"


def span(ends: tuple[float, float], digits: int) -> str:
    """Write a range, with as many more digits as tell its ends apart; one number where they are the same."""
    low, high = sorted(ends)
    while digits < 6 and low != high and f"{low:.{digits}f}" == f"{high:.{digits}f}":
        digits += 1
    written = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return written[0] if low == high else "-".join(written)


def show_divisions(console: Console, rows: Sequence[Division], planned: Plan, memory: float | None) -> None:
    """Print a row a strategy."""
    timed = any(row.compute[1] for row in rows)
    title = f"A process of {planned.processes}, GB" + (
        f"; it has {memory / 1e9:.0f}. Times are estimated, not measured" if memory else ""
    )
    table = Table(title=title)
    for column in ("strategy", "weights", "gradients", "optimizer", "activations", "peak"):
        table.add_column(column, justify="left" if column == "strategy" else "right", no_wrap=True)
    if timed:
        for column in ("sent a step", "s computing", "s waiting", "whole run"):
            table.add_column(column, justify="right")
    for row in rows:
        sizes = [row.weights, row.gradients, row.optimizer, row.activations]
        peak = f"{row.peak / 1e9:.2f}" + ("" if memory is None or row.peak <= memory else " too much")
        cells = [row.strategy, *(f"{size / 1e9:.2f}" for size in sizes), peak]
        if timed:
            fast, slow = (planned.steps * end for end in row.seconds)
            whole = duration((fast, slow)) if planned.steps > 0 else "-"
            cells += [f"{row.sent / 1e9:.2f}", span(row.compute, 2), span(row.exposed, 2), whole]
        table.add_row(*cells)
    console.print(table)


def on_gpus(console: Console, options: argparse.Namespace, arguments: list[str]) -> None:
    """Estimate a run on GPUs.

    Raises:
        InputError: Arguments that cannot be used.
    """
    if options.gpus > options.gpus_per_node and options.gpus % options.gpus_per_node:
        raise InputError(
            expected=f"whole nodes of {options.gpus_per_node} GPUs",
            found=options.gpus,
            remedy="give --gpus-per-node",
        )
    gpu = require_gpu(options.gpu)
    planned = _plan(arguments, options.gpus, gpu.properties)
    gpu.products(planned.shape.dtype)  # refuses what it is not built for before anything is simulated
    machines = Machines(gpu, options.gpus, options.gpus_per_node, options.network * 1e9 / 8)
    console.print(
        f"Going through a step of one process with {counted(planned.shape.objects, 'object')}, operation by operation"
    )
    whole = planned.costs()
    flat, hybrid = (
        _sharded(console, planned, name, copies, every_rank=options.every_rank)
        if options.gpus > 1 and (name == "fsdp2" or copies > 1)
        else None
        for name, copies in (("fsdp2", 1), ("hsdp", machines.nodes))
    )
    show_step(console, planned, whole)
    rows = divisions(whole, flat, hybrid, machines, planned.accumulate, fused=planned.fused)
    show_divisions(console, rows, planned, gpu.memory)
    gbit = f", {options.network:g} Gbit/s a node" if machines.nodes > 1 else ""
    console.print(
        f"{options.gpus} x {gpu.name} in {counted(machines.nodes, 'node')}{gbit}; {planned.steps} steps. Roofline: "
        f"products at {FAST.products:.0%} to {SLOW.products:.0%} of the peak, memory and links at {FAST.bytes:.0%} to "
        f"{SLOW.bytes:.0%} of theirs, {FAST.launch * 1e6:.0f} to {SLOW.launch * 1e6:.0f} us per launch; no atomics, no "
        f"loading of data. {'Fused' if planned.fused else 'Foreach'} AdamW. DeepSpeed's rows are arithmetic.",
        soft_wrap=True,
    )
    best = best_fitting(rows, gpu.memory)
    if best is None:
        console.print("No strategy fits into memory.")
        _print_less_memory(console, arguments, options.gpus, gpu.properties)
        return
    if options.less_memory:
        _print_less_memory(console, arguments, options.gpus, gpu.properties)
    needed = whole.model * planned.accumulate / gpu.products(whole.shape.dtype)
    mfu = needed / best.seconds[0], needed / best.seconds[1]
    console.print(
        f"Simplest of the fastest that fit: {best.strategy}, {span(best.seconds, 2)} s a step, MFU {span(mfu, 2)} "
        "(estimated, not measured).",
        soft_wrap=True,
    )
    words = [f"NODES={machines.nodes}"] if machines.nodes > 1 else []
    words.append(f"GPUS={min(options.gpus, options.gpus_per_node)}")
    words += [] if best.strategy == "none" else [f"STRATEGY={best.strategy}"]
    _print_next(console, arguments, words)


def _sharded(console: Console, planned: Plan, name: str, copies: int, *, every_rank: bool) -> StepCosts:
    """Check the parts of the first and last process, or of every one, and simulate the first one's step."""
    module, n = planned.module, planned.processes
    ranks = range(n) if every_rank else (0, n - 1)
    shown = track(ranks, f"checking shards, {name}", console=console, transient=True)
    check_shards(module.lrm, n, copies, planned.shape.dtype, shown)
    console.print(
        f"{name}: built {len(ranks)} of {n} processes' programs: each holds a part of the right shape of every weight"
    )
    parts = module.lrm, module.renderer, module.objective, module.parallel
    with as_rank(0, n, copies) as mesh:
        return simulate_step(*parts, planned.shape, mesh)


def _print_next(console: Console, arguments: Sequence[str], words: Sequence[str] = ()) -> None:
    """Print the command that starts the run; ``words`` are variables of make before its config."""
    configs, others = _layers(arguments)
    words = [*words, f'CONFIG="{" ".join(configs)}" DATA=...']
    words += [f"ARGS={shlex.quote(shlex.join(others))}"] if others else []
    console.print(f"Next: make train {' '.join(words)}  (make doctor checks the nodes)", soft_wrap=True)


def _layers(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell config files from the other arguments of `lrm fit`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    known, others = parser.parse_known_args(arguments)
    return known.config, others


def on_cpu(console: Console, options: argparse.Namespace, arguments: list[str]) -> None:
    """Estimate a run of one process on this machine.

    Raises:
        InputError: Arguments that cannot be used.
    """
    base = memory_of_libraries()
    planned = _plan(arguments, 1, None)
    costs = planned.costs()
    show_step(console, planned, costs)
    row = alone(costs, planned.accumulate, base, CPU_SLACK, planned.optimizer_temporaries(costs))
    peak = cpu_flops(costs.shape.dtype)
    seconds = planned.accumulate * costs.flops / (_CPU_SHARE * peak)
    row = dataclasses.replace(row, strategy="cpu", compute=(seconds, seconds))
    show_divisions(console, [row], planned, None)
    console.print(
        f"The peak holds {base / 1e9:.2f} GB of Python and libraries, and what the heap keeps. This machine's peak: "
        f"{peak / 1e9:.0f} GFLOP/s, of which a step reaches about half.",
        soft_wrap=True,
    )
    if options.less_memory:
        _print_less_memory(console, arguments, 1, None)
    _print_next(console, arguments)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; expected errors end in one message."""
    options, arguments = parse(sys.argv[2:] if argv is None else argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        if options.gpus < 0 or options.gpus_per_node < 1 or not options.network > 0:
            raise InputError(
                "expected --gpus of 0 or more, --gpus-per-node of 1 or more and --network above 0"
            )
        if options.gpus:
            on_gpus(console, options, arguments)
        else:
            on_cpu(console, options, arguments)
    except InputError as error:
        sys.exit(f"lrm: {error}")
