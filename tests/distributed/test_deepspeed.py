"""DeepSpeed ZeRO 1, 2 and 3 on two CPU processes: agreement with one process, and checkpoints."""

import importlib.util
import json

import lightning as L
import pytest
import torch

from lrm_pl.checkpoints.index import read_checkpoint
from lrm_pl.checkpoints.tensors import read_tensors, tensor_names
from lrm_pl.errors import InputError
from lrm_pl.training.zero import ZeroStrategy
from tests.runs import largest_difference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.filterwarnings("default")]

STAGES = ("deepspeed_1", "deepspeed_2", "deepspeed_3")

#: The last ones replace the base's callbacks: a checkpoint every so many steps, an average of the weights.
QUIET = "--trainer.limit_val_batches=0"


def callbacks(*more, every=100, keep=100):
    keeper = {
        "class_path": "lrm_pl.training.checkpointing.CheckpointAndResume",
        "init_args": {"every": every, "keep": keep, "monitor": None},
    }
    average = {"class_path": "lrm_pl.training.ema.WeightAverage", "init_args": {"decay": 0.5}}
    return f"--trainer.callbacks={json.dumps([average, *more, keeper])}"


def tensors(runs, name, step):
    checkpoint = read_checkpoint(str(runs.folder / name / "checkpoints" / f"step-{step:08d}"))
    found = {key: torch.empty(shape) for key, shape in tensor_names(checkpoint).items()}
    read_tensors(checkpoint, found)
    return found


def farthest(ours, theirs, kind):
    """Return the largest relative difference (2-norms) of tensors with a prefix; check names and shapes."""
    assert ours.keys() == theirs.keys()
    keys = [key for key in ours if key.startswith(f"{kind}.")]
    assert keys
    return max(((ours[k] - theirs[k]).norm() / theirs[k].norm().clamp_min(1e-6)).item() for k in keys)


#: name -> processes, layer, options; compared with "zero-one".
WAYS = {
    **{stage: (2, stage, []) for stage in STAGES},
    # The second half of every accumulated step is another micro-batch of the engine.
    "accumulation": (
        2,
        "deepspeed_2",
        ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=20"],
    ),
    "recomputed": (2, "deepspeed_3", ["--model.parallel.activation_checkpointing_every=1"]),
}


#: Below the norms of this run, so that it counts.
CLIPPED = "--trainer.gradient_clip_val=0.01"


def compare(runs, ways):
    runs.fit_here("zero-one", callbacks(), CLIPPED)
    expected, losses = tensors(runs, "zero-one", 20), runs.losses("zero-one")
    norms = dict(runs.scalars("zero-one")["optim/grad_norm"])
    assert min(norms.values()) < 0.01 < max(norms.values())
    heads = ("loss", "norm", "weights", "moments", "average")
    print(f"\n{'run':<14} " + " ".join(f"{head:>8}" for head in heads) + "   farthest from one process")
    worst = 0.0
    for name, (processes, layer, options) in ways.items():
        runs.run(f"zero-{name}", processes, callbacks(), CLIPPED, *options, layers=[layer], limit_s=300)
        ours = tensors(runs, f"zero-{name}", 20)
        loss = largest_difference(runs.losses(f"zero-{name}"), losses)
        norm = largest_difference(dict(runs.scalars(f"zero-{name}")["optim/grad_norm"]), norms)
        rest = [farthest(ours, expected, kind) for kind in ("network", "adam", "average")]
        print(f"{name:<14} " + " ".join(f"{value:8.1e}" for value in (loss, norm, *rest)))
        worst = max(worst, loss)
    return worst


def test_stage_2_agrees_with_one_process(runs):
    assert compare(runs, {"deepspeed_2": WAYS["deepspeed_2"]}) <= 1e-5


@pytest.mark.soak
def test_all_stages_agree_with_one_process(runs):
    assert compare(runs, WAYS) <= 1e-5


def spoilt(rank):
    return {"class_path": "tests.distributed.spies.Spoiler", "init_args": {"step": 3, "rank": rank}}


def check_that_a_nan_is_skipped(runs, layer):
    runs.run(f"nan-{layer}", 2, callbacks(spoilt(1), every=1), "--trainer.max_steps=6", QUIET, layers=[layer])
    before, after, later = (tensors(runs, f"nan-{layer}", step) for step in (3, 4, 5))
    assert all(torch.equal(before[key], after[key]) for key in before), (
        "weights, moments and average are unchanged"
    )
    assert not torch.equal(after["network.transformer.tokens"], later["network.transformer.tokens"])
    scalars = runs.scalars(f"nan-{layer}")
    assert [value for _, value in scalars["optim/skipped_steps"]] == [0, 0, 0, 1, 1, 1]
    return {step: value for step, value in scalars["loss/total"] if step != 4}


def test_both_ranks_skip_a_step_with_nan_on_one_rank(runs):
    check_that_a_nan_is_skipped(runs, "deepspeed_2")


@pytest.mark.soak
def test_a_run_with_a_skipped_step_agrees_with_one_process(runs):
    losses = check_that_a_nan_is_skipped(runs, "deepspeed_2")
    runs.run("nan-one", 1, callbacks(spoilt(0)), "--trainer.max_steps=6", QUIET, layers=["cpu"])
    expected = runs.losses("nan-one")
    del expected[4]
    assert largest_difference(losses, expected) <= 1e-5


@pytest.mark.soak
@pytest.mark.parametrize("layer", ["deepspeed_1", "deepspeed_3"])
def test_all_stages_skip_a_step_with_nan(runs, layer):
    check_that_a_nan_is_skipped(runs, layer)


@pytest.mark.soak
def test_stage_3_supports_a_wide_decoder_and_a_frozen_encoder(runs):
    # Wider than what DeepSpeed keeps whole by itself; frozen weights are cut too, and no optimizer knows them.
    wide = (
        "--model.lrm.decoder.width=400", "--model.lrm.encoder.frozen=true", "--trainer.max_steps=2", QUIET,
        callbacks(),
    )  # fmt: skip
    runs.run("wide-one", 1, *wide, layers=["cpu"])
    runs.run("wide-zero", 2, *wide, layers=["deepspeed_3"])
    assert largest_difference(runs.losses("wide-zero"), runs.losses("wide-one")) <= 1e-5
    ours, theirs = tensors(runs, "wide-zero", 2), tensors(runs, "wide-one", 2)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key.startswith("network.encoder."))
    again = ("--trainer.max_steps=3", f"--run.resume={runs.folder / 'wide-one'}")
    runs.run("wide-again", 2, *wide, *again, layers=["deepspeed_3"])
    ours = tensors(runs, "wide-again", 3)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key.startswith("network.encoder."))


def go_on(runs, sources, goals):
    """Resume checkpoints of step 10 across strategies, and compare the rest to the uninterrupted run."""
    runs.run("uninterrupted", 1, callbacks(), layers=["cpu"], limit_s=300)
    losses, end = runs.losses("uninterrupted"), tensors(runs, "uninterrupted", 20)
    rest = {step: value for step, value in losses.items() if step > 10}
    for source in sources:
        processes = 1 if source == "cpu" else 2
        runs.run(f"from-{source}", processes, callbacks(every=10), layers=[source], limit_s=300)
    print(f"\n{'from':<12} {'to':<12} {'loss':>8} {'weights':>8} {'moments':>8} {'average':>8}   farthest")
    worst = 0.0
    for source in sources:
        for goal in goals(source):
            name, processes = f"{source}-to-{goal}", 1 if goal == "cpu" else 2
            half = runs.folder / f"from-{source}" / "checkpoints" / "step-00000010"
            log = runs.run(name, processes, callbacks(), f"--run.resume={half}", layers=[goal], limit_s=300)
            assert "Resuming after step 10" in log
            assert "start anew" not in log
            difference = largest_difference(runs.losses(name), rest)
            ours = tensors(runs, name, 20)
            others = [farthest(ours, end, kind) for kind in ("network", "adam", "average")]
            print(f"{source:<12} {goal:<12} " + " ".join(f"{value:8.1e}" for value in (difference, *others)))
            worst = max(worst, difference)
    return worst


@pytest.mark.soak
def test_a_run_is_resumed_with_and_without_deepspeed(runs):
    other = {"deepspeed_2": ["cpu"], "cpu": ["deepspeed_2"]}
    assert go_on(runs, list(other), lambda source: other[source]) <= 1e-5


@pytest.mark.soak
def test_a_run_is_resumed_with_all_pairs_of_strategies(runs):
    others = ("cpu", "ddp", "fsdp2")
    ways = {**dict.fromkeys(STAGES, (*STAGES, *others)), **dict.fromkeys(others, STAGES)}
    assert go_on(runs, list(ways), lambda source: ways[source]) <= 1e-5


@pytest.mark.soak
def test_validation_uses_the_average_and_training_the_weights(runs):
    measured = {
        "class_path": "lrm_pl.training.ema.WeightAverage",
        "init_args": {"decay": 0.5, "validate": True},
    }
    keeper = {
        "class_path": "lrm_pl.training.checkpointing.CheckpointAndResume",
        "init_args": {"monitor": None},
    }
    metrics = {"class_path": "lrm_pl.training.image_metrics.ImageMetricsLogger"}
    options = (
        f"--trainer.callbacks={json.dumps([measured, metrics, keeper])}",
        "--trainer.max_steps=6", "--trainer.val_check_interval=2",
    )  # fmt: skip
    runs.run("averaged-one", 1, *options, layers=["cpu"])
    runs.run("averaged-zero", 2, *options, layers=["deepspeed_3"])
    ours, theirs = runs.scalars("averaged-zero"), runs.scalars("averaged-one")
    for tag in ("loss/total", "val/unseen/psnr_pooled"):
        assert largest_difference(dict(ours[tag]), dict(theirs[tag])) <= 1e-5, tag


@pytest.mark.soak
def test_validation_with_deepspeed_agrees_with_one_process(runs):
    runs.run("to-measure", 1, "--trainer.max_steps=2", QUIET, layers=["cpu"])
    found = []
    for name, processes, layer in (("measure-one", 1, "cpu"), ("measure-zero", 2, "deepspeed_3")):
        path = f"--ckpt_path={runs.folder / 'to-measure'}"
        log = runs.run(name, processes, path, layers=[layer], command="validate")
        found.append([line for line in log.splitlines() if line.startswith("│ val/")])
    assert found[0]
    assert found[0] == found[1]


def test_the_extra_to_install_is_named_if_deepspeed_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"DeepSpeed is not installed, .* Install it with pip install"):
        ZeroStrategy()


def test_unsupported_precisions_are_rejected_with_deepspeed():
    strategy = ZeroStrategy()
    with pytest.raises(InputError, match="32-true or bf16-mixed with DeepSpeed, but found 16-mixed"):
        L.Trainer(accelerator="cpu", strategy=strategy, precision="16-mixed", logger=False)
