"""What would make a run need less memory, estimated: for `lrm estimate`, and for a run that ran out of it."""

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lrm_pl.apps.checks.wanted import process_count
from lrm_pl.apps.parsed import parse_fit
from lrm_pl.apps.plan import Plan, plan
from lrm_pl.callbacks.memory import memory_of_libraries
from lrm_pl.errors import InputError
from lrm_pl.kernels.device import GpuProperties, gpu_properties, num_visible_gpus
from lrm_pl.training.costs.division import CPU_SLACK, CUDA_CONTEXT, GPU_SLACK, alone
from lrm_pl.training.costs.simulation import StepCosts
from lrm_pl.training.parallel import network_blocks

#: Seconds that a process waits for the one that estimates.
_PATIENCE = 120.0

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


def peak_of(planned: Plan, sharded: bool | None = None) -> float:
    """Estimate the most bytes that a process of a run holds.

    Args:
        planned: The run.
        sharded: Whether weights are divided over the processes; None as the run says.
    """
    costs, n, gpu = planned.costs(), planned.processes, planned.shape.gpu
    if sharded is None:
        sharded = planned.strategy.endswith(_SHARDED)
    base, slack = (CUDA_CONTEXT, GPU_SLACK) if gpu else (memory_of_libraries(), CPU_SLACK)
    step = planned.optimizer_temporaries(costs)
    if sharded and n > 1:
        held, work = _divided(costs, planned, stage=planned.stage or 3)
        return base + held + slack * work
    # DDP holds all gradients all the time, as accumulation does.
    kept = planned.accumulate if n == 1 else 2
    if gpu:
        return base + slack * alone(costs, kept, 0.0, 1.0, step).peak
    return alone(costs, kept, base, slack, step).peak


def _divided(costs: StepCosts, planned: Plan, stage: int) -> tuple[float, float]:
    """Return bytes that a process holds all the time under ZeRO or FSDP2, and those that come and go.

    Stage 1 divides moments, 2 gradients too, 3 weights too, of which two blocks at a time are whole.
    """
    n = planned.processes // planned.replicas
    weights = costs.weights / n if stage == 3 else costs.weights
    gradients = costs.gradients / n if stage > 1 else costs.gradients
    gathered = 2 * costs.weights / len(network_blocks(planned.module.lrm)) if stage == 3 else 0.0
    return weights + costs.frozen_other + gradients + 8.0 * costs.trained / n, costs.activations + gathered


def what_would_help(
    arguments: Sequence[str],
    processes: int,
    gpu: GpuProperties | None,
) -> tuple[float, list[Remedy]]:
    """Try settings that need less memory.

    Args:
        arguments: Of `lrm fit`.
        processes: All processes of the run.
        gpu: The GPU that each has; None on this machine's CPU.

    Returns:
        Bytes of the run as it is, and the settings that need less: the best first, other networks last.
    """
    now = plan(list(arguments), processes, gpu)
    peak = peak_of(now)
    found = []
    for options, price in _candidates(now):
        try:
            changed = plan([*arguments, *(o for o in options if "trainer.strategy" not in o)], processes, gpu)
        except InputError:
            continue  # it does not go together with the rest of the config
        sharded = True if any("trainer.strategy" in o for o in options) else None
        less = peak_of(changed, sharded)
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


#: What errors of memory say that have no class of their own.
_SAYINGS = ("can't allocate memory", "std::bad_alloc", "CUDA error: out of memory", "ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Say whether an error is one of memory: of a GPU, of PyTorch's allocator on a CPU, or of Python."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(saying in str(error) for saying in _SAYINGS)
    )


def explain(arguments: Sequence[str]) -> str:
    """Say what a fit that ran out of memory needs, and the three settings that would help most.

    Where several processes of a machine ran out, the first says it and the others wait: if one ended earlier, the
    launcher would stop them all.

    Args:
        arguments: Of `lrm fit`.
    """
    with _first_of_a_node() as first:
        if not first:
            return "lrm: see what another process says"
        sys.stderr.write("Estimating what would help ...\n")
        try:
            config = parse_fit(list(arguments))["trainer"]
            gpus = num_visible_gpus(config["accelerator"])
            devices = process_count(config["devices"], gpus or 1)
            found = what_would_help(
                arguments,
                config["num_nodes"] * devices,
                gpu_properties(torch.device("cuda")) if gpus else None,
            )
        except Exception as error:  # the run has failed already: this must not hide why
            return f"lrm: no estimate: {error}; see `lrm estimate --help`"
        text = "\n".join(table_lines(*found))
        sys.stderr.write(f"{text}\n")
        return "lrm: out of memory"


@contextlib.contextmanager
def _first_of_a_node() -> Iterator[bool]:
    """Let one process of those that a launcher started here do something while the others wait."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1"))) == 1:
        yield True
        return
    path = Path(tempfile.gettempdir()) / f"lrm-memory-{os.getuid()}-{os.getppid()}"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        deadline = time.monotonic() + _PATIENCE
        while path.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)


def table_lines(peak: float, remedies: Sequence[Remedy]) -> list[str]:
    """Say what the three best would do."""
    need = f"estimated: {peak / 1e9:.1f} GB a process."
    if not remedies:
        return [f"{need} No setting would need noticeably less: most of it are Python and its libraries."]
    lines = [f"{need} What would help most:"]
    width = max((len(remedy.option) for remedy in remedies[:3]), default=0)
    return lines + [
        f"  {remedy.option:<{width}}  {remedy.peak / 1e9:6.1f} GB  ({remedy.price})"
        for remedy in remedies[:3]
    ]
