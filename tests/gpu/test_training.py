"""Runs as they are typed, under every config of configs/trainer, against a run on a CPU."""

import shutil

import pytest

from tests.accelerator.configs import shrunk
from tests.accelerator.training import train
from tests.runs import keep_every, largest_difference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("default")]

#: Config -> what one process needs besides.
LAYERS = {
    "gpu": (),
    "ddp": (),
    "fsdp2": (),
    "hsdp": ("--trainer.strategy.init_args.replicas=1",),
    "deepspeed_1": (),
    "deepspeed_2": (),
    "deepspeed_3": (),
}

#: Those that `make test` runs on a CPU too; a GPU gets them all.
FEW = ("gpu", "fsdp2", "deepspeed_2")

STEPS = ("--trainer.max_steps=4", "--trainer.val_check_interval=4")


@pytest.fixture(scope="module")
def on_a_cpu(runs):
    """Losses of four steps on a CPU."""
    runs.run("on-a-cpu", 1, *STEPS, layers=["cpu"])
    return runs.losses("on-a-cpu")


def run_on(device, runs, name, layer, *options):
    """Run on the accelerator; returns the losses."""
    accelerator = f"--trainer.accelerator={'gpu' if device.is_gpu else 'cpu'}"
    module = "lrm_pl" if device.is_gpu else "tests.accelerator.run"
    runs.run(
        name,
        1,
        accelerator,
        "--trainer.devices=1",
        *STEPS,
        *options,
        layers=[layer],
        module=module,
        limit_s=300,
    )
    return runs.losses(name)


def test_all_trainer_configs_are_tested(root):
    assert {path.stem for path in (root / "configs/trainer").glob("*.yaml")} == LAYERS.keys() | {"cpu"}


@pytest.mark.parametrize(
    "layer", [pytest.param(layer, marks=[] if layer in FEW else [pytest.mark.soak]) for layer in LAYERS]
)
def test_training_with_each_trainer_config_matches_a_cpu(device, runs, on_a_cpu, layer):
    losses = run_on(device, runs, f"{device.name}-{layer}", layer, *LAYERS[layer])
    assert largest_difference(losses, on_a_cpu) <= device.rounding


def test_training_in_bf16_is_close_to_float32(device, runs, on_a_cpu):
    losses = run_on(device, runs, f"{device.name}-bf16", "gpu", "--trainer.precision=bf16-mixed")
    assert largest_difference(losses, on_a_cpu) <= 0.03


def test_a_resumed_run_matches_an_uninterrupted_run(device, runs, on_a_cpu):
    name = f"{device.name}-stopped"
    run_on(device, runs, name, "gpu", keep_every(2))
    shutil.rmtree(runs.folder / name / "checkpoints" / "step-00000004")
    whole = runs.losses(name)
    assert largest_difference(run_on(device, runs, name, "gpu", keep_every(2)), whole) <= device.rounding
    assert "Resuming after step 2" in runs.log(name)


def test_a_run_is_timed_and_traced(device, tmp_path, shards, lpips_networks, monkeypatch):
    config = shrunk("small")
    for choose in (device.to_cpu, device.to_accelerator):
        choose()
    run = train(
        config, tmp_path / "run", shards, lpips_networks, monkeypatch, "--run.profile=1",
        accelerator="gpu" if device.is_gpu else "cpu", max_steps=7, val_check_interval=7,
    )  # fmt: skip
    parts = {tag.removeprefix("time/") for tag in run.logged[-1] if tag.startswith("time/")}
    assert {"step", "encoder", "transformer", "renderer", "losses", "backward", "optimizer"} <= parts
    assert list((tmp_path / "run").rglob("*.pt.trace.json"))
