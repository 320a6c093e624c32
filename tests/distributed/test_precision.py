"""Tests of dtypes under every strategy: products in the configured precision, geometry in float32."""

import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

#: Layer -> processes: every file of configs/trainer but gpu.yaml, which needs one.
LAYERS = {
    "cpu": 1, "ddp": 2, "fsdp2": 2, "hsdp": 4, "deepspeed_1": 2, "deepspeed_2": 2, "deepspeed_3": 2,
}  # fmt: skip
PRODUCTS = {"32-true": "torch.float32", "bf16-mixed": "torch.bfloat16"}
SPY = [
    {"class_path": "tests.distributed.spies.PrecisionSpy"},
    {"class_path": "lrm_pl.training.checkpointing.CheckpointAndResume", "init_args": {"monitor": None}},
]


def check(runs, layer, precision):
    log = runs.run(
        f"spied-{layer}-{precision}", LAYERS[layer], f"--trainer.callbacks={json.dumps(SPY)}",
        f"--trainer.precision={precision}", "--trainer.max_steps=2", "--trainer.val_check_interval=2",
        layers=[layer],
    )  # fmt: skip
    for rank in range(LAYERS[layer]):
        assert f"rank {rank} is exact; products in {{{PRODUCTS[precision]}}}" in log


def test_all_trainer_configs_are_tested(root):
    assert {path.stem for path in (root / "configs/trainer").glob("*.yaml")} == LAYERS.keys() | {"gpu"}


@pytest.mark.parametrize("layer", ["fsdp2", pytest.param("deepspeed_2", marks=pytest.mark.soak)])
def test_only_matrix_products_use_bf16_with_bf16_mixed(runs, layer):
    check(runs, layer, "bf16-mixed")


@pytest.mark.soak
@pytest.mark.parametrize("precision", PRODUCTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_only_matrix_products_use_the_precision_of_the_trainer(runs, layer, precision):
    check(runs, layer, precision)
