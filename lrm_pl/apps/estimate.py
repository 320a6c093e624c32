"""Estimate the memory and time of a run, without a GPU and without data.

The command simulates a step of one process on fake tensors. For FSDP2, it also checks the shards of the first and the
last process. Times on GPUs are estimated ranges and not measurements. All arguments of `lrm fit` are accepted.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from rich.console import Console

from lrm_pl.cli.fit_config import build_meta_model
from lrm_pl.errors import InputError, exit_on_error
from lrm_pl.planning.estimate import print_cpu_estimate, print_gpu_estimate
from lrm_pl.planning.gpus import require_gpu
from lrm_pl.planning.run_plan import RunPlan, plan_run
from lrm_pl.planning.strategies import Hardware


@exit_on_error
def main(argv: Sequence[str]) -> None:
    """Run ``lrm estimate``."""
    _estimate(Console(width=None if sys.stdout.isatty() else 140), *parse(argv))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into the options of ``lrm estimate`` and the arguments of ``lrm fit``."""
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
        help="number of GPUs, or 0 for the CPU of this machine (default: 1 with --gpu, otherwise 0)",
    )
    add("--gpu", help="type of GPU, such as 4090, H100, a100-40g or MI300X (default: A100 80GB)")
    add("--gpus-per-node", type=int, default=8, help="number of GPUs per node (default: %(default)s)")
    add(
        "--network",
        type=float,
        default=800,
        help="network bandwidth per node in Gbit/s (default: %(default)s)",
    )
    add("--every-rank", action="store_true", help="check the FSDP2 shards of every process")
    add("--less-memory", action="store_true", help="also list settings that reduce memory")
    configs, rest = [], list(argv)
    while rest and not rest[0].startswith("-"):
        configs.append(rest.pop(0))
    options, arguments = parser.parse_known_args(rest)
    if options.gpus is None:
        options.gpus = 0 if options.gpu is None else 1
    if not configs and not arguments:
        parser.error(
            "a config file is required, for example: lrm estimate configs/experiment/demo.yaml --gpus 8"
        )
    return options, [*(word for config in configs for word in ("-c", config)), *arguments]


def _estimate(console: Console, options: argparse.Namespace, arguments: list[str]) -> None:
    if options.gpus < 0 or options.gpus_per_node < 1 or not options.network > 0:
        raise InputError(
            "--gpus must be at least 0, --gpus-per-node at least 1, and --network greater than 0"
        )
    if options.gpus > options.gpus_per_node and options.gpus % options.gpus_per_node:
        raise InputError(
            expected=f"a multiple of {options.gpus_per_node} GPUs, the number per node",
            found=f"{options.gpus} GPUs",
            remedy="correct --gpus or --gpus-per-node",
        )
    gpu = require_gpu(options.gpu or "A100 80GB") if options.gpus else None

    def planner(more: Sequence[str]) -> RunPlan:
        return plan_run(
            *build_meta_model([*arguments, *more]), options.gpus or 1, None if gpu is None else gpu.properties
        )

    if gpu is None:
        print_cpu_estimate(console, planner, less_memory=options.less_memory)
        _print_next(console, arguments, [])
        return
    hardware = Hardware(gpu, options.gpus, options.gpus_per_node, options.network * 1e9 / 8)
    best = print_gpu_estimate(
        console, planner, hardware, every_rank=options.every_rank, less_memory=options.less_memory
    )
    if best is not None:
        variables = [f"NODES={hardware.nodes}"] if hardware.nodes > 1 else []
        variables.append(f"GPUS={min(options.gpus, options.gpus_per_node)}")
        variables += [] if best.strategy == "none" else [f"STRATEGY={best.strategy}"]
        _print_next(console, arguments, variables)


def _print_next(console: Console, arguments: Sequence[str], variables: Sequence[str]) -> None:
    """Print the make command that starts the run.

    Args:
        console: Console to print to.
        arguments: Arguments of ``lrm fit``.
        variables: Assignments of make variables.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    options, others = parser.parse_known_args(arguments)
    words = [*variables, f'CONFIG="{" ".join(options.config)}" DATA=...']
    words += [f"ARGS={shlex.quote(shlex.join(others))}"] if others else []
    console.print(f"To start the run: make train {' '.join(words)}", soft_wrap=True)
