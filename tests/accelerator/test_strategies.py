"""Compare strategies on two processes with the branches for accelerators with one process on a CPU."""

import pytest
import torch

from tests.runs import largest_difference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = ("--trainer.max_steps=10", "--trainer.val_check_interval=10")

#: Message that the renderer logs only on an accelerator, because this decoder is too narrow for the kernels.
BRANCHES_TAKEN = "Rendering without the fused decoder"


@pytest.fixture(scope="module")
def ordinary(runs):
    """Losses and checkpoint tensors of a run with one process on the CPU."""
    assert BRANCHES_TAKEN not in runs.run("ordinary", 1, *STEPS, layers=["cpu"])
    return runs.losses("ordinary"), runs.final("ordinary")[1]


@pytest.mark.parametrize(
    "layer",
    [
        "fsdp2",
        pytest.param("ddp", marks=pytest.mark.soak),
        pytest.param("deepspeed_2", marks=pytest.mark.soak),
    ],
)
def test_strategies_on_accelerators_match_one_process_on_a_cpu(runs, ordinary, layer):
    losses, expected = ordinary
    name = f"accelerated-{layer}"
    log = runs.run(name, 2, *STEPS, layers=[layer], module="tests.accelerator.run")
    assert BRANCHES_TAKEN in log
    found = runs.losses(name)
    assert len(found) == 10
    # On a CPU, the losses of strategies differ by at most 1e-6 after 20 steps, without a different order of summation.
    assert largest_difference(found, losses) <= 1e-5
    _, tensors = runs.final(name)
    assert tensors.keys() == expected.keys()
    whole = [torch.cat([t[key].flatten() for key in sorted(t) if key.startswith("network.")]) for t in
             (tensors, expected)]  # fmt: skip
    assert (whole[0] - whole[1]).norm() <= 1e-4 * whole[1].norm()
