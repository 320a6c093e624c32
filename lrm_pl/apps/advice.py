"""What would make a run need less memory, estimated: for `lrm estimate`, and for a run that ran out of it."""

import dataclasses
import os
from collections.abc import Callable, Sequence

import torch

from lrm_pl.apps.checks.wanted import process_count
from lrm_pl.apps.parsed import parse_fit
from lrm_pl.apps.plan import Plan, plan
from lrm_pl.callbacks.memory import memory_of_libraries
from lrm_pl.errors import InputError
from lrm_pl.training.costs.division import CPU_SLACK, CUDA_CONTEXT, GPU_SLACK, alone, arithmetic_fsdp2
from lrm_pl.training.parallel import network_blocks

#: What Lightning calls a strategy that divides weights.
_SHARDED = ("FSDP2Strategy", "ZeroStrategy")


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A setting that needs less memory.

    Attributes:
        option: As it is typed.
        price: What it costs.
        same: Whether the network stays the same.
        peak: Bytes that a process then holds at most.
    """

    option: str
    price: str
    same: bool
    peak: float


def peak_of(planned: Plan, *, gpu: bool, sharded: bool | None = None) -> float:
    """Estimate the most bytes that a process of a run holds.

    Args:
        planned: The run.
        gpu: On a GPU; else on this machine's CPU.
        sharded: Whether weights are divided over the processes; None as the run says.
    """
    costs = planned.costs()
    if sharded is None:
        sharded = planned.strategy.endswith(_SHARDED)
    if sharded and planned.processes > 1:
        return arithmetic_fsdp2(costs, planned.processes, len(network_blocks(planned.module.lrm)))
    # DDP holds all gradients all the time, as accumulation does.
    kept = planned.accumulate if planned.processes == 1 else 2
    if gpu:
        peak = alone(costs, kept, 0.0, 1.0, 4.0 * costs.trained).peak
        return CUDA_CONTEXT + GPU_SLACK * peak
    return alone(costs, kept, memory_of_libraries(), CPU_SLACK, 4.0 * costs.largest).peak


def what_would_help(
    arguments: Sequence[str],
    processes: int,
    *,
    gpu: bool,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[float, list[Remedy]]:
    """Try settings that need less memory.

    Args:
        arguments: Of `lrm fit`.
        processes: All processes of the run.
        gpu: Whether it runs on GPUs.
        progress: Called with each option before it is tried.

    Returns:
        Bytes of the run as it is, and the settings that need less: the best first, other networks last.
    """
    now = plan(list(arguments), processes, gpu=gpu)
    peak = peak_of(now, gpu=gpu)
    found = []
    for options, price in _candidates(now):
        progress(" ".join(options))
        try:
            changed = plan(
                [*arguments, *(o for o in options if "trainer.strategy" not in o)], processes, gpu=gpu
            )
        except InputError:
            continue  # it does not go together with the rest of the config
        sharded = True if any("trainer.strategy" in o for o in options) else None
        less = peak_of(changed, gpu=gpu, sharded=sharded)
        if less < 0.99 * peak:
            found.append(Remedy(" ".join(options), price, not price.startswith("another network"), less))
    return peak, sorted(found, key=lambda remedy: (not remedy.same, remedy.peak))


def _candidates(now: Plan) -> list[tuple[list[str], str]]:
    lrm, parallel = now.module.lrm, now.module.parallel
    tokens = round((lrm.transformer.tokens.shape[-2] // 3) ** 0.5)
    depth = len(lrm.transformer.blocks)
    options: list[tuple[list[str], str]] = []
    if now.shape.objects > 1:
        parts = next(k for k in range(2, now.shape.objects + 1) if now.shape.objects % k == 0)
        options.append(
            (
                [f"--trainer.accumulate_grad_batches={now.accumulate * parts}"],
                "the same run, in smaller parts",
            )
        )
    if parallel.recompute_every != 1:
        options.append((["--model.parallel.recompute_every=1"], "the same run, about a third more time"))
    if not parallel.recompute_mlp and not parallel.recompute_every:
        options.append((["--model.parallel.recompute_mlp=true"], "the same run, about a twentieth more time"))
    if now.processes > 1 and not now.strategy.endswith(_SHARDED):
        options.append(
            (["--trainer.strategy=lrm_pl.training.strategies.FSDP2Strategy"], "the same run, more messages")
        )
    if not lrm.encoder.frozen:
        options.append((["--model.lrm.encoder.frozen=true"], "the encoder stays as it is"))
    if depth > 1:
        options.append(([f"--model.lrm.depth={depth // 2}"], "another network: half as deep"))
    if tokens > 1:
        options.append(([f"--model.lrm.plane_tokens={tokens // 2}"], "another network: planes half as fine"))
    return options


def ran_out(error: BaseException) -> bool:
    """Say whether an error is one of memory: of a GPU, of PyTorch's allocator on a CPU, or of Python."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def explain(arguments: Sequence[str]) -> str:
    """Say what a fit that ran out of memory needs, and the three settings that would help most.

    Args:
        arguments: Of `lrm fit`.
    """
    config = parse_fit(list(arguments))["trainer"]
    gpu = torch.cuda.is_available() and config["accelerator"] != "cpu"
    devices = process_count(config["devices"], torch.cuda.device_count() if gpu else 1)
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank != "0":
        return f"rank {rank}: `lrm estimate` with the same arguments says what it needs, and what would help"
    return "\n".join(table_lines(*what_would_help(arguments, config["num_nodes"] * devices, gpu=gpu)))


def table_lines(peak: float, remedies: Sequence[Remedy]) -> list[str]:
    """Say what the three best would do."""
    lines = [f"estimated: {peak / 1e9:.1f} GB a process. What would help most:"]
    width = max((len(remedy.option) for remedy in remedies[:3]), default=0)
    return lines + [
        f"  {remedy.option:<{width}}  {remedy.peak / 1e9:6.1f} GB  ({remedy.price})"
        for remedy in remedies[:3]
    ]
