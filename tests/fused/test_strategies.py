"""Compare losses of training runs with the fused decoder and with PyTorch operators."""

import pytest

from tests.runs import largest_difference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: Settings with few samples, because the interpreter takes 0.2 s for 32 samples.
TINY = (
    "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--model.lrm.decoder.width=16",
    "--model.renderer.samples_per_ray=4", "--data.batch_size=2", "--data.crop.size=8", "--trainer.limit_val_batches=0",
)  # fmt: skip

CASES = {
    "ddp": (2, ["ddp"], []),
    "fsdp2": (2, ["fsdp2"], ["--model.parallel.activation_checkpointing_every=1"]),
    "deepspeed_2": (2, ["deepspeed_2"], []),
    "accumulation": (1, ["cpu"], ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=4"]),
    "compiled": (1, ["cpu"], ["--model.parallel.compile=true"]),
}


#: Configurations that `make test` runs.
DEFAULT_CASES = ("fsdp2",)


@pytest.fixture(scope="module")
def plain(runs):
    runs.run("plain", 1, *TINY, layers=["cpu"])
    return runs.losses("plain")


def require_plain_losses(runs, plain, case, **how):
    processes, layers, options = CASES[case]
    name = f"{how['module']}-{case}"
    log = runs.run(name, processes, *TINY, *options, layers=layers, limit_s=600, **how)
    assert "Rendering without the fused decoder" not in log
    found = runs.losses(name)
    assert len(found) == 2
    assert largest_difference(found, plain) <= 1e-5


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in DEFAULT_CASES else [pytest.mark.soak]) for case in CASES]
)
def test_strategies_with_the_fused_decoder_match_one_process_without_it(runs, plain, case):
    require_plain_losses(runs, plain, case, module="tests.fused.twin")


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES)
def test_strategies_with_interpreted_kernels_match_one_process_without_them(runs, plain, case):
    require_plain_losses(runs, plain, case, module="tests.accelerator.run", TRITON_INTERPRET="1")
