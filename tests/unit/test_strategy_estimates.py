"""Tests of the estimates of each strategy, compared with values computed by hand."""

import dataclasses

import pytest
import torch

from lrm_pl.errors import InputError
from lrm_pl.kernels.device import GpuProperties
from lrm_pl.planning.gpus import GPUS, Gpu, cpu_flops, gpu_of_name, peak_flops, require_gpu
from lrm_pl.planning.operation_counter import Collective, Operation
from lrm_pl.planning.simulate import StepCosts, StepShape
from lrm_pl.planning.strategies import (
    CUDA_CONTEXT,
    GPU_SLACK,
    SLOW,
    Hardware,
    StrategyEstimate,
    best_fitting,
    estimate_single_process,
    estimate_strategies,
)

#: A GPU of round numbers: 1 TFLOP/s, 1 TB/s, links of 100 GB/s.
ROUND = Gpu("round", 1e12, 0.5e12, 10e9, 1e12, 100e9, GpuProperties((8, 0), 100, 40 * 2**20))

#: A network of 1e9 numbers, all trained: 4 GB.
STEP = StepCosts(
    trained=10**9, largest=10**6, weights=4e9, frozen_other=0.5e9, gradients=4e9, activations=3e9,
    work=5e9,
    operations=(
        Operation("transformer", "mm", 0.7e12, 1.0),  # one second at 70 % of the peak
        Operation("backward", "add", 0.0, 1.6e12),  # two seconds at 80 % of the bandwidth
        Operation("renderer", "mm", 1.0, 1.0, 500_000.0),  # two seconds of launches
    ),
    collectives=(), forward={"encoder": 1.0, "transformer": 2.0, "renderer": 3.0, "losses": 4.0},
    shape=StepShape(1, 4, 8, 1.0), encoder_frozen=False,
)  # fmt: skip

#: Per number that AdamW moves: three read or written by the norm and the clipping, seven by the fused step.
OPTIMIZER = 10 * 4e9 / 0.8e12


def hardware(processes, per_node=8, network=10e9):
    return Hardware(ROUND, processes, per_node, network)


def rows(processes, accumulate=1, sharded=None, hybrid=None, *, fused=True, **options):
    found = estimate_strategies(
        STEP, sharded, hybrid, hardware(processes, **options), accumulate, fused=fused
    )
    return {row.strategy: row for row in found}


def test_the_time_of_an_operation_is_the_maximum_of_flops_bytes_and_launch():
    assert rows(1)["none"].seconds[0] == pytest.approx(1 + 2 + 2 + OPTIMIZER)


def test_the_slow_model_has_lower_efficiencies_and_a_longer_launch():
    """35 instead of 70 % of the peak FLOP/s, 50 instead of 80 % of the bandwidth, 10 instead of 4 us per launch."""
    assert (SLOW.flops, SLOW.bytes, SLOW.launch) == (0.35, 0.5, 10e-6)
    assert rows(1)["none"].seconds[1] == pytest.approx(2 + 3.2 + 5 + OPTIMIZER * 0.8 / 0.5)
    for row in rows(16, network=1e9).values():
        assert row.seconds[0] < row.seconds[1]


def test_foreach_adamw_accesses_more_bytes_and_allocates_temporaries():
    fused, foreach = rows(1)["none"], rows(1, fused=False)["none"]
    assert foreach.seconds[0] - fused.seconds[0] == pytest.approx((20 - 7) * 4e9 / 0.8e12)
    assert foreach.peak - fused.peak == pytest.approx(
        GPU_SLACK * (8e9 - 5e9)
    )  # 4 + 4 GB against 5 GB of work
    assert rows(8)["ddp"].activations == 3e9
    assert rows(8, fused=False)["ddp"].activations == 4e9


def test_the_time_is_proportional_to_the_number_of_accumulated_batches():
    assert rows(1, accumulate=3)["none"].seconds[0] == pytest.approx(3 * 5 + OPTIMIZER)


def test_ddp_stores_weights_gradients_and_two_moments():
    row = rows(8)["ddp"]
    assert (row.weights, row.gradients, row.optimizer, row.activations) == (4.5e9, 4e9, 8e9, 3e9)
    assert row.peak == pytest.approx(CUDA_CONTEXT + GPU_SLACK * 19.5e9)


def test_zero_stages_shard_moments_gradients_and_weights():
    found = rows(8)
    one, two, three = (found[f"deepspeed_{stage}"] for stage in (1, 2, 3))
    assert one.optimizer == two.optimizer == three.optimizer == 12e9 / 8  # with its own copy of the weights
    assert (one.gradients, two.gradients, three.gradients) == (4e9, 0.5e9, 0.5e9)
    assert (one.weights, two.weights, three.weights) == (4.5e9, 4.5e9, 1e9)


def test_an_all_reduce_overlaps_with_backward_unless_the_network_is_slow():
    """2 x 4 GB x 7/8 at 80 GB/s in a node: 0.09 s of 2 s of backward. Over 16 of two nodes at 8 GB/s: 0.94 s of 2."""
    assert rows(8)["ddp"].exposed == (0.0, 0.0)
    assert rows(16)["ddp"].exposed == (0.0, 0.0)
    slow = rows(16, network=1e9)["ddp"]
    assert slow.sent == 2 * 4e9 * 15 / 16
    assert slow.exposed == pytest.approx((slow.sent / 0.8e9 - 2, slow.sent / 0.5e9 - 3.2), abs=1e-3)


def test_hybrid_sharding_gathers_inside_nodes_and_reduces_between_nodes():
    hybrid = dataclasses.replace(
        STEP,
        weights=0.5e9,
        gradients=0.5e9,
        collectives=(Collective("all_gather", 2e9, 8), Collective("all_reduce", 0.5e9, 2)),
    )
    row = rows(16, network=1e9, hybrid=hybrid)["hsdp"]
    inside, between = 2e9 * 7 / 8 / 80e9, 2 * 0.5e9 / 2 / (0.8e9 / 8)
    assert row.sent == 2e9 * 7 / 8 + 0.5e9
    assert between > 2 > inside
    # The reduction overlaps with backward, the gather with other computation.
    assert row.exposed[0] == pytest.approx(between - 2, abs=1e-3)


def test_gradients_and_activations_overlap_only_with_accumulated_batches():
    assert estimate_single_process(STEP, 1, 0.0, 1.0, 0.0).peak == 4.5e9 + 8e9 + 5e9
    assert estimate_single_process(STEP, 2, 0.0, 1.0, 0.0).peak == 4.5e9 + 8e9 + 4e9 + 3e9
    assert (
        estimate_single_process(STEP, 1, 0.0, 1.0, 4e9).peak == 4.5e9 + 8e9 + 8e9
    )  # AdamW's own step is the peak


def test_the_slack_is_applied_to_temporary_memory():
    assert estimate_single_process(STEP, 1, 1e9, 1.5, 0.0).peak == pytest.approx(
        1e9 + 4.5e9 + 8e9 + 5e9 + 0.5 * (5e9 + 4e9)
    )


def test_the_simplest_of_the_fastest_strategies_that_fit_is_recommended():
    def row(name, peak, seconds):
        return StrategyEstimate(name, 0.0, 0.0, 0.0, 0.0, peak, 0.0, (seconds, 2 * seconds), (0.0, 0.0))

    found = [row("ddp", 9.0, 1.04), row("zero", 5.0, 1.01), row("fsdp2", 3.0, 0.995), row("slow", 1.0, 2.0)]
    for memory, name in ((9.0, "ddp"), (6.0, "zero"), (4.0, "fsdp2"), (2.0, "slow")):
        assert best_fitting(found, memory).strategy == name
    assert best_fitting(found, 0.5) is None


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"), ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"), ("NVIDIA B200", "B200"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40"), ("NVIDIA A40", "A40"), ("NVIDIA A10", "A10"), ("NVIDIA A10G", "A10G"),
        ("Tesla T4", "T4"), ("Tesla V100-SXM2-16GB", "V100 16GB"), ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("Tesla V100-PCIE-16GB", "V100 PCIe 16GB"), ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"), ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("NVIDIA GH200 480GB", "GH200 480GB"), ("Tesla V100S-PCIE-32GB", "V100S"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"), ("NVIDIA GeForce RTX 4090 D", "GeForce RTX 4090 D"),
        ("NVIDIA GeForce RTX 3090 Ti", "GeForce RTX 3090 Ti"), ("NVIDIA GeForce RTX 5080", "GeForce RTX 5080"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "GeForce RTX 4070 Ti SUPER"),
    ],
)  # fmt: skip
def test_names_reported_by_pytorch_are_found(written, name):
    assert gpu_of_name(written).name == name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("4090", "GeForce RTX 4090"), ("rtx4090", "GeForce RTX 4090"), ("RTX 4090", "GeForce RTX 4090"),
        ("rtx-4090", "GeForce RTX 4090"), ("2080 Ti", "GeForce RTX 2080 Ti"), ("quadro rtx8000", "Quadro RTX 8000"),
        ("H800", "H800"), ("A800", "A800 80GB"), ("H20", "H20"), ("Titan RTX", "TITAN RTX"), ("MI250X", "MI250X"),
        ("4070tisuper", "GeForce RTX 4070 Ti SUPER"),
        ("3090ti", "GeForce RTX 3090 Ti"),
        ("H100", "H100"), ("h100", "H100"), ("h100-pcie", "H100 PCIe"), ("h100pcie", "H100 PCIe"),
        ("a100", "A100 80GB"), ("a100-40g", "A100 40GB"), ("a100_80gb", "A100 80GB"), ("A100 40 GB", "A100 40GB"),
        ("v100", "V100 16GB"), ("t4", "T4"), ("l40s", "L40S"), ("a6000", "RTX A6000"), ("6000 ada", "RTX 6000 Ada"),
        ("mi300x", "MI300X"), ("b200", "B200"), ("B200 192GB", "B200"), ("GB200 NVL72", "GB200"),
        ("A100-80", "A100 80GB"), ("A100 40", "A100 40GB"), ("L40S-48", "L40S"), ("3080 12", "GeForce RTX 3080 12GB"),
        ("GH200", "GH200 96GB"), ("gh200-144gb", "GH200 144GB"), ("V100S", "V100S"), ("rtx6000ada", "RTX 6000 Ada"),
        ("RTX PRO 6000", "RTX PRO 6000"), ("rtxpro6000", "RTX PRO 6000"),
    ],
)  # fmt: skip
def test_common_names_are_found(written, name):
    assert require_gpu(written).name == name


def test_all_gpus_are_found_by_their_names():
    assert all(gpu_of_name(gpu.name) is gpu for gpu in GPUS)
    for series in ("30", "40", "50"):
        assert all(
            gpu_of_name(f"RTX {series}{model}") for model in ("60", "60 Ti", "70", "70 Ti", "80", "90")
        )


def test_variants_that_are_not_in_the_table_are_not_found():
    for name in ("NVIDIA GeForce GTX 1080", "Quadro P6000", "NVIDIA GeForce RTX 4090 Laptop GPU",
                 "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA H100 96GB HBM3",
                 "NVIDIA GeForce RTX 3060 8GB", "NVIDIA GeForce RTX 4090 48GB",
                 "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "A100 80GB 40GB"):  # fmt: skip
        assert gpu_of_name(name) is None, name


def test_the_error_for_an_unknown_gpu_lists_similar_names():
    with pytest.raises(
        InputError, match=r"found '4090x'. Use a name such as GeForce RTX 4090, GeForce RTX 4090 D"
    ):
        require_gpu("4090x")


def test_bfloat16_is_an_error_on_gpus_without_support():
    for name in ("T4", "V100"):
        with pytest.raises(InputError, match=r"but found bf16. Use --trainer"):
            require_gpu(name).peak(torch.bfloat16)
    assert require_gpu("T4").peak(torch.float16) == 65e12
    assert require_gpu("T4").peak(torch.float32) == 8.1e12
    assert {gpu.name.split()[0] for gpu in GPUS if not gpu.has_bfloat16} == {
        "T4", "V100", "V100S", "P100", "TITAN", "Quadro", "GeForce",
    }  # fmt: skip


def test_rates_of_geforce_gpus_are_those_with_float32_accumulation():
    """On GeForce 30, 40 and 50, half precision is twice as fast as float32 without tensor cores; on 20, four times."""
    cards = [gpu for gpu in GPUS if gpu.name.startswith("GeForce")]
    assert len(cards) >= 25
    for gpu in cards:
        assert gpu.half == pytest.approx((2 if gpu.has_bfloat16 else 4) * gpu.single, rel=0.01), gpu.name


def test_the_peak_rate_of_the_cpu_is_cached():
    assert cpu_flops() > 1e9
    assert peak_flops(torch.device("cpu")) == cpu_flops()
