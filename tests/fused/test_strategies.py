"""Training runs with the fused decoder, by reference or interpreted kernels, have the losses of plain operators."""

import pytest

from tests.runs import largest_difference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: Few samples: the interpreter takes a fifth of a second for 32 of them.
TINY = (
    "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--model.lrm.decoder.width=16",
    "--model.renderer.samples_per_ray=4", "--data.batch_size=2", "--data.crop.size=8", "--trainer.limit_val_batches=0",
)  # fmt: skip

WAYS = {
    "ddp": (2, ["ddp"], []),
    "fsdp2": (2, ["fsdp2"], ["--model.parallel.activation_checkpointing_every=1"]),
    "deepspeed_2": (2, ["deepspeed_2"], []),
    "accumulation": (1, ["cpu"], ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=4"]),
    "compiled": (1, ["cpu"], ["--model.parallel.compile=true"]),
}


#: Strategies that `make test` runs.
FEW = ("fsdp2",)


@pytest.fixture(scope="module")
def plain(runs):
    runs.run("plain", 1, *TINY, layers=["cpu"])
    return runs.losses("plain")


def require_plain_losses(runs, plain, way, **how):
    processes, layers, options = WAYS[way]
    name = f"{how['module']}-{way}"
    log = runs.run(name, processes, *TINY, *options, layers=layers, limit_s=600, **how)
    assert "Rendering without the fused decoder" not in log
    found = runs.losses(name)
    assert len(found) == 2
    assert largest_difference(found, plain) <= 1e-5


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way in FEW else [pytest.mark.soak]) for way in WAYS]
)
def test_every_strategy_trains_fused_as_one_process_does_plainly(runs, plain, way):
    require_plain_losses(runs, plain, way, module="tests.fused.twin")


@pytest.mark.soak
@pytest.mark.parametrize("way", WAYS)
def test_every_strategy_trains_with_interpreted_kernels_as_one_process_does_plainly(runs, plain, way):
    require_plain_losses(runs, plain, way, module="tests.accelerator.run", TRITON_INTERPRET="1")
