"""Agreement of runs with one process, DDP, FSDP2, HSDP and gradient accumulation."""

import pytest

from tests.runs import keep_every, largest_difference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("default")]

#: name -> processes, configs of the trainer, options. The other runs are compared with "one".
WAYS = {
    "one": (1, ["cpu"], []),
    "accumulation": (1, ["cpu"], ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=20"]),
    "ddp": (2, ["ddp"], []),
    "fsdp2": (2, ["fsdp2"], []),
}
MORE = {
    "recomputed": (1, ["cpu"], ["--model.parallel.activation_checkpointing_every=1"]),
    "ddp-accumulation": (
        2,
        ["ddp"],
        ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=20"],
    ),
    "ddp-workers": (2, ["ddp"], ["--data.workers=3"]),
    "fsdp2-recomputed": (2, ["fsdp2"], ["--model.parallel.activation_checkpointing_every=2"]),
    "compiled": (1, ["cpu"], ["--model.parallel.compile=true"]),
    "fsdp2-compiled": (
        2,
        ["fsdp2"],
        ["--model.parallel.compile=true", "--model.parallel.activation_checkpointing_every=2"],
    ),
    "hsdp": (4, ["hsdp"], []),
    "ddp-4": (4, ["ddp"], []),
}


def compare(runs, ways):
    for name, (processes, layers, options) in ways.items():
        if (runs.folder / name).exists():
            continue
        if processes == 1:
            runs.fit_here(name, keep_every(10), *options, layers=layers)
        else:
            runs.run(name, processes, keep_every(10), *options, layers=layers, limit_s=300)
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


@pytest.fixture(scope="module")
def differences(runs):
    """Run each configuration once with a checkpoint at step 10, and compare its losses to one process."""
    return compare(runs, WAYS)


def test_losses_of_ddp_fsdp2_and_accumulation_agree_with_one_process(runs, differences):
    assert max(differences.values()) <= 1e-5
    _, weights = runs.final("one")
    assert weights["network.decoder.layers.0.bias"].abs().max() > 1e-3, (
        "the bias is initialized to 0, so it has been trained"
    )


@pytest.mark.soak
def test_losses_of_all_strategies_agree_with_one_process(runs, differences):
    rows = compare(runs, {**WAYS, **MORE})
    assert max(rows.values()) <= 1e-5


@pytest.mark.soak
def test_a_run_is_resumed_with_a_different_strategy(runs, differences):
    print("\nstrategy until step 10 -> strategy afterwards: largest relative difference of the loss")
    for name, processes, layer, source in (
        ("fsdp2(2) -> one", 1, "cpu", "fsdp2"),
        ("fsdp2(2) -> ddp(2)", 2, "ddp", "fsdp2"),
        ("one -> fsdp2(2)", 2, "fsdp2", "one"),
    ):
        halfway = runs.folder / source / "checkpoints" / "step-00000010"
        runs.run(name, processes, f"--run.resume={halfway}", layers=[layer])
        rest = {step: value for step, value in runs.losses("one").items() if step > 10}
        difference = largest_difference(runs.losses(name), rest)
        print(f"{name:<20} {difference:.1e}")
        assert difference <= 1e-5


@pytest.mark.soak
def test_a_run_is_resumed_with_fewer_processes(runs):
    runs.run("four", 4, keep_every(6), layers=["ddp"])
    first = runs.folder / "four" / "checkpoints" / "step-00000006"
    runs.run("two", 2, keep_every(6), f"--run.resume={first}", layers=["ddp"])
    second = runs.folder / "two" / "checkpoints" / "step-00000012"
    runs.run("one-after", 1, f"--run.resume={second}", layers=["cpu"])
    runs.run("one-alone", 1, layers=["cpu"])
    whole = runs.losses("one-alone")
    for name, start in (("four", 0), ("two", 6), ("one-after", 12)):
        rest = {step: value for step, value in whole.items() if step > start}
        difference = largest_difference(runs.losses(name), rest)
        print(f"{name:<10} from step {start:>2}: {difference:.1e}")
        assert difference <= 1e-5
