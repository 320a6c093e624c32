"""Search for settings that reduce the estimated peak memory of a run."""

import dataclasses
from collections.abc import Callable, Sequence

from lrm_pl.errors import InputError
from lrm_pl.planning.memory import memory_of_libraries
from lrm_pl.planning.run_plan import RunPlan
from lrm_pl.planning.simulate import StepCosts
from lrm_pl.planning.strategies import CPU_SLACK, CUDA_CONTEXT, GPU_SLACK, estimate_single_process
from lrm_pl.training.parallelize import network_blocks

#: Names of the strategy classes that shard weights.
_SHARDED = ("FSDP2Strategy", "ZeroStrategy")


@dataclasses.dataclass(frozen=True)
class MemoryOption:
    """A setting that reduces the memory usage of a run.

    Attributes:
        option: Command-line option that applies the setting.
        cost: Description of the drawback of the setting.
        same_network: Whether the architecture of the network remains the same.
        peak: Peak memory of a process with the setting, in bytes.
    """

    option: str
    cost: str
    same_network: bool
    peak: float


def peak_bytes(plan: RunPlan, sharded: bool | None = None) -> float:
    """Estimate the peak memory of a process in bytes.

    Args:
        plan: Plan of the run.
        sharded: Whether weights are sharded over the processes. If None, this is determined by the plan's strategy.
    """
    costs, n, gpu = plan.costs(), plan.processes, plan.shape.gpu
    if sharded is None:
        sharded = plan.strategy.endswith(_SHARDED)
    base, slack = (CUDA_CONTEXT, GPU_SLACK) if gpu else (memory_of_libraries(), CPU_SLACK)
    step = plan.optimizer_temporaries(costs)
    if sharded and n > 1:
        held, transient = _sharded_bytes(costs, plan, stage=plan.stage or 3)
        return base + held + slack * transient
    # DDP always holds all gradients, as gradient accumulation does.
    batches = plan.accumulate if n == 1 else 2
    if gpu:
        return base + slack * estimate_single_process(costs, batches, 0.0, 1.0, step).peak
    return estimate_single_process(costs, batches, base, slack, step).peak


def _sharded_bytes(costs: StepCosts, plan: RunPlan, stage: int) -> tuple[float, float]:
    """Return the permanent and the transient memory of a process with ZeRO or FSDP2, in bytes.

    Stage 1 shards AdamW's moments, stage 2 also shards the gradients, and stage 3 also shards the weights. In stage 3,
    the weights of two blocks are gathered at a time.
    """
    n = plan.processes // plan.replicas
    weights = costs.weights / n if stage == 3 else costs.weights
    gradients = costs.gradients / n if stage > 1 else costs.gradients
    gathered = 2 * costs.weights / len(network_blocks(plan.module.lrm)) if stage == 3 else 0.0
    return weights + costs.frozen_other + gradients + 8.0 * costs.trained / n, costs.activations + gathered


def find_memory_options(plan_with: Callable[[Sequence[str]], RunPlan]) -> tuple[float, list[MemoryOption]]:
    """Find settings that reduce memory.

    Args:
        plan_with: Function that takes additional arguments of ``lrm fit`` and returns the plan of the run.

    Returns:
        The peak memory of the run in bytes, and the settings, sorted by peak memory. Settings that change the
        architecture of the network are last.
    """
    plan = plan_with(())
    peak = peak_bytes(plan)
    found = []
    for option, cost in _candidates(plan):
        changes_strategy = "trainer.strategy" in option
        try:
            changed = plan if changes_strategy else plan_with([option])
        except InputError:
            continue  # the option is not compatible with the config
        reduced = peak_bytes(changed, True if changes_strategy else None)
        if reduced < 0.99 * peak:
            found.append(MemoryOption(option, cost, not cost.startswith("another network"), reduced))
    return peak, sorted(found, key=lambda found: (not found.same_network, found.peak))


def _candidates(plan: RunPlan) -> list[tuple[str, str]]:
    """Return command-line options that may reduce memory, and descriptions of their drawbacks."""
    lrm, parallel, objects = plan.module.lrm, plan.module.parallel, plan.shape.objects
    tokens = round((lrm.transformer.tokens.shape[-2] // 3) ** 0.5)
    depth, every = len(lrm.transformer.blocks), parallel.activation_checkpointing_every
    batches = next((k for k in range(2, objects + 1) if objects % k == 0), 1)
    shards = plan.strategy.endswith(_SHARDED)
    options = [
        (objects > 1, f"trainer.accumulate_grad_batches={plan.accumulate * batches}", "same run, in smaller batches"),
        (every != 1, "model.parallel.activation_checkpointing_every=1", "same run, about a third more time"),
        (not (parallel.recompute_mlp or every), "model.parallel.recompute_mlp=true",
         "same run, about a twentieth more time"),
        (plan.processes > 1 and not shards, "trainer.strategy=lrm_pl.training.strategies.FSDP2Strategy",
         "same run, more communication"),
        (not lrm.encoder.frozen, "model.lrm.encoder.frozen=true", "the encoder is not trained"),
        (depth > 1, f"model.lrm.depth={depth // 2}", "another network: half the depth"),
        (tokens > 1, f"model.lrm.plane_tokens={tokens // 2}", "another network: half the plane resolution"),
    ]  # fmt: skip
    return [(f"--{setting}", cost) for applies, setting, cost in options if applies]


def memory_report(peak: float, options: Sequence[MemoryOption]) -> str:
    """Format the estimated peak memory and the first three settings as text.

    Args:
        peak: Peak memory of the run in bytes.
        options: Settings as returned by ``find_memory_options``.
    """
    need = f"estimated: {peak / 1e9:.1f} GB per process."
    if not options:
        return f"{need} No setting reduces it noticeably; most of it is Python and its libraries."
    width = max(len(option.option) for option in options[:3])
    lines = (
        f"  {option.option:<{width}}  {option.peak / 1e9:6.1f} GB  ({option.cost})" for option in options[:3]
    )
    return "\n".join([f"{need} Settings that reduce it most:", *lines])
