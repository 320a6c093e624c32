"""What a run costs a process under each strategy, worked out by hand on a step of round numbers."""

import dataclasses

import pytest
import torch

from lrm_pl.training.costs.division import (
    CUDA_CONTEXT,
    GPU_SLACK,
    Division,
    Machines,
    alone,
    best_fitting,
    divisions,
)
from lrm_pl.training.costs.ledger import Message, Operation
from lrm_pl.training.costs.machines import GPUS, Gpu, cpu_flops, gpu_of_name, peak_flops
from lrm_pl.training.costs.simulation import StepCosts, StepShape

#: A GPU of round numbers: 1 TFLOP/s, 1 TB/s, links of 100 GB/s.
ROUND = Gpu("round", ("Round",), 1e12, 0.5e12, 10e9, 1e12, 100e9)

#: A network of 1e9 numbers, all trained: 4 GB.
STEP = StepCosts(
    parameters=10**9, trained=10**9, largest=10**6, weights=4e9, frozen_other=0.5e9, gradients=4e9, activations=3e9,
    work=5e9,
    operations=(
        Operation("transformer", "mm", 0.7e12, 1.0),  # a second of products at 70 %
        Operation("backward", "add", 0.0, 1.6e12),  # two seconds of bytes at 80 %
        Operation("renderer", "mm", 1.0, 1.0, 500_000.0),  # two seconds of starting kernels
    ),
    messages=(), forward={"encoder": 1.0, "transformer": 2.0, "renderer": 3.0, "losses": 4.0},
    shape=StepShape(1, 4, 8), encoder_frozen=False,
)  # fmt: skip

OPTIMIZER = 8 * 4e9 / 0.8e12  # eight numbers read or written for each that AdamW moves


def machines(processes, per_node=8, network=10e9):
    return Machines(ROUND, processes, per_node, network)


def rows(processes, accumulate=1, sharded=None, hybrid=None, **options):
    found = divisions(STEP, sharded, hybrid, machines(processes, **options), accumulate)
    return {row.strategy: row for row in found}


def test_an_operation_takes_as_long_as_its_products_its_bytes_or_its_start():
    assert rows(1)["none"].seconds == pytest.approx(1 + 2 + 2 + OPTIMIZER)


def test_accumulated_batches_are_computed_one_after_the_other():
    assert rows(1, accumulate=3)["none"].seconds == pytest.approx(3 * 5 + OPTIMIZER)


def test_ddp_holds_weights_gradients_and_two_moments_of_every_number():
    row = rows(8)["ddp"]
    assert (row.weights, row.gradients, row.optimizer) == (4.5e9, 4e9, 8e9)
    # The optimizer's step needs as much as the gradients for a while, which is more than the activations.
    assert row.activations == 4e9
    assert row.peak == pytest.approx(CUDA_CONTEXT + GPU_SLACK * 20.5e9)


def test_zero_divides_the_moments_then_gradients_then_weights():
    found = rows(8)
    one, two, three = (found[f"deepspeed_{stage}"] for stage in (1, 2, 3))
    assert one.optimizer == two.optimizer == three.optimizer == 12e9 / 8  # with its own copy of the weights
    assert (one.gradients, two.gradients, three.gradients) == (4e9, 0.5e9, 0.5e9)
    assert (one.weights, two.weights, three.weights) == (4.5e9, 4.5e9, 1e9)


def test_a_sum_over_a_node_hides_behind_backward_and_one_over_nodes_shows():
    """2 x 4 GB x 7/8 at 80 GB/s in a node: 0.09 s of 2 s of backward. Over 16 of two nodes at 8 GB/s: 0.94 s of 2."""
    assert rows(8)["ddp"].exposed == 0.0
    assert rows(16)["ddp"].exposed == 0.0
    slow = rows(16, network=1e9)["ddp"]
    assert slow.sent == 2 * 4e9 * 15 / 16
    assert slow.exposed == pytest.approx(slow.sent / 0.8e9 - 2, abs=1e-3)


def test_hybrid_sharding_gathers_inside_nodes_and_sums_in_as_many_rings_as_a_node_has_gpus():
    hybrid = dataclasses.replace(
        STEP,
        weights=0.5e9,
        gradients=0.5e9,
        messages=(Message("gather", 2e9, 8), Message("reduce", 0.5e9, 2)),
    )
    row = rows(16, network=1e9, hybrid=hybrid)["hsdp"]
    inside, between = 2e9 * 7 / 8 / 80e9, 2 * 0.5e9 / 2 / (0.8e9 / 8)
    assert row.sent == 2e9 * 7 / 8 + 0.5e9
    assert between > 2 > inside
    assert row.exposed == pytest.approx(
        between - 2, abs=1e-3
    )  # the sum hides behind backward, the gather elsewhere


def test_alone_gradients_come_when_activations_are_gone_unless_batches_are_accumulated():
    assert alone(STEP, 1, 0.0, 1.0, 0.0).peak == 4.5e9 + 8e9 + 5e9
    assert alone(STEP, 2, 0.0, 1.0, 0.0).peak == 4.5e9 + 8e9 + 4e9 + 3e9
    assert alone(STEP, 1, 0.0, 1.0, 4e9).peak == 4.5e9 + 8e9 + 8e9  # AdamW's own step is the peak


def test_a_heap_keeps_half_as_much_again_of_what_comes_and_goes():
    assert alone(STEP, 1, 1e9, 1.5, 0.0).peak == pytest.approx(1e9 + 4.5e9 + 8e9 + 5e9 + 0.5 * (5e9 + 4e9))


def test_the_simplest_of_the_fastest_that_fit_is_chosen():
    def row(name, peak, seconds):
        return Division(name, 0.0, 0.0, 0.0, 0.0, peak, 0.0, seconds, 0.0)

    found = [row("ddp", 9.0, 1.0), row("zero", 5.0, 1.01), row("fsdp2", 3.0, 0.995), row("slow", 1.0, 2.0)]
    for memory, name in ((9.0, "ddp"), (6.0, "zero"), (4.0, "fsdp2"), (2.0, "slow")):
        assert best_fitting(found, memory).strategy == name
    assert best_fitting(found, 0.5) is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40g"), ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA H200", "h200"),
        ("NVIDIA L4", "l4"), ("NVIDIA L40S", "l40s"), ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA A10G", "a10g"),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_the_name_that_pytorch_gives_it(name, key):
    assert gpu_of_name(name) is GPUS[key]


def test_a_gpu_that_the_table_lacks_is_not_taken_for_another():
    assert gpu_of_name("NVIDIA GeForce GTX 1080") is None
    assert gpu_of_name("Tesla T4") is None
    for name in ("NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
                 "NVIDIA GeForce RTX 3090 Ti", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"):  # fmt: skip
        assert gpu_of_name(name) is None, name


def test_the_peak_of_a_cpu_is_measured_once():
    assert cpu_flops() > 1e9
    assert peak_flops(torch.device("cpu")) == cpu_flops()
