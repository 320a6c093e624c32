"""However it is divided, a run is the same run: one process = DDP = FSDP2 = HSDP = accumulation."""

import pytest

from tests.distributed.conftest import largest_difference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: name -> processes, layers, options. "one" is what the others are compared with.
WAYS = {
    "one": (1, ["cpu"], []),
    "accumulation": (1, ["cpu"], ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=20"]),
    "ddp": (2, ["ddp"], []),
    "fsdp2": (2, ["fsdp2"], []),
}
MORE = {
    "recomputed": (1, ["cpu"], ["--model.parallel.recompute_every=1"]),
    "ddp-accumulation": (
        2,
        ["ddp"],
        ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=20"],
    ),
    "ddp-workers": (2, ["ddp"], ["--data.workers=3"]),
    "fsdp2-recomputed": (2, ["fsdp2"], ["--model.parallel.recompute_every=2"]),
    "hsdp": (4, ["hsdp"], []),
    "ddp-4": (4, ["ddp"], []),
}


def compare(runs, ways):
    for name, (processes, layers, options) in ways.items():
        runs.run(name, processes, *options, layers=layers)
    losses, (_, weights) = runs.losses("one"), runs.final("one")
    print(
        f"\n{'run':<18} {'loss, largest':>14} {'weights, largest':>17}   relative to one process, 20 steps, fp32"
    )
    rows = {}
    for name in ways:
        _, theirs = runs.final(name)
        moved = max(
            ((theirs[key] - weights[key]).norm() / weights[key].norm().clamp_min(1e-12)).item()
            for key in weights
            if key.startswith("network.")
        )
        rows[name] = largest_difference(runs.losses(name), losses)
        print(f"{name:<18} {rows[name]:>14.1e} {moved:>17.1e}")
    return rows


def test_one_process_ddp_fsdp2_and_accumulation_agree_to_1e_5_in_the_loss_over_20_steps(runs):
    rows = compare(runs, WAYS)
    assert max(rows.values()) <= 1e-5
    losses = runs.losses("one")
    assert losses[19] < 0.8 * losses[0], "it learns, so a wrong gradient would show"


@pytest.mark.soak
def test_every_way_to_divide_a_run_agrees_to_1e_5(runs):
    rows = compare(runs, {**WAYS, **MORE})
    assert max(rows.values()) <= 1e-5


def test_a_checkpoint_of_two_fsdp2_processes_goes_on_in_one_process_and_the_other_way_round(runs):
    runs.run("half-sharded", 2, "--trainer.max_steps=10", layers=["fsdp2"])
    runs.run("half-single", 1, "--trainer.max_steps=10", layers=["cpu"])
    for name, processes, layer, source in (
        ("single-from-sharded", 1, "cpu", "half-sharded"),
        ("sharded-from-single", 2, "fsdp2", "half-single"),
        ("ddp-from-sharded", 2, "ddp", "half-sharded"),
    ):
        runs.run(name, processes, f"--run.resume={runs.folder / source}", layers=[layer])
    runs.run("whole", 1, layers=["cpu"])
    whole = runs.losses("whole")
    for name in ("single-from-sharded", "sharded-from-single", "ddp-from-sharded"):
        rest = {step: value for step, value in whole.items() if step >= 10}
        assert largest_difference(runs.losses(name), rest) <= 1e-5
