"""Settings that reduce a run's memory, with the estimated peak of each."""

import dataclasses
from collections.abc import Callable, Sequence

from lrm_pl.errors import InputError
from lrm_pl.planning.memory import memory_of_libraries
from lrm_pl.planning.run_plan import Plan
from lrm_pl.planning.simulate import StepCosts
from lrm_pl.planning.strategies import CPU_SLACK, CUDA_CONTEXT, GPU_SLACK, alone
from lrm_pl.training.parallelize import network_blocks

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


def what_would_help(plan_with: Callable[[Sequence[str]], Plan]) -> tuple[float, list[Remedy]]:
    """Try settings that need less memory.

    Args:
        plan_with: Plans the run with further arguments of `lrm fit`.

    Returns:
        Peak bytes of the run as it is, and the settings that need less: smallest first, other networks last.
    """
    now = plan_with(())
    peak = peak_of(now)
    found = []
    for options, price in _candidates(now):
        try:
            changed = plan_with([o for o in options if "trainer.strategy" not in o])
        except InputError:
            continue  # not compatible with the rest of the config
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
    if parallel.activation_checkpointing_every != 1:
        options.append(
            (["--model.parallel.activation_checkpointing_every=1"], "the same run, about a third more time")
        )
    if not parallel.recompute_mlp and not parallel.activation_checkpointing_every:
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
