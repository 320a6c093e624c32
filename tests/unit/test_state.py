"""Tests of optimizer state, skipped steps, copies for checkpoints, agreement of ranks and rejected strategies."""

import re
import types

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.cli.main import command_line
from lrm_pl.errors import InputError
from lrm_pl.kernels.device import as_accelerator
from lrm_pl.losses.objective import Objective
from lrm_pl.rendering.renderer import Renderer
from lrm_pl.training.checkpointing import CheckpointAndResume
from lrm_pl.training.module import LRMModule
from lrm_pl.training.optim import OptimizerConfig
from lrm_pl.training.sharded_state import Snapshots, StateAccess
from lrm_pl.training.strategies import (
    FSDP2Strategy,
    require_supported_strategy,
    require_supported_strategy_name,
)
from tests.builders import tiny_lrm

NAN, INF = float("nan"), float("inf")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def set_gradient(model, step):
    torch.manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def steps(model, optimizer, *numbers):
    for number in numbers:
        set_gradient(model, number)
        optimizer.step()


def optimizer_state(model, optimizer):
    return StateAccess(model, optimizer).optimizer_state()


@pytest.fixture
def gloo(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# --- AdamW's state


@pytest.mark.parametrize("fused", [True, False])
def test_initialized_state_has_the_shape_dtype_and_device_of_adamw(fused):
    ours, theirs = network(), network()
    made = optimizer_state(ours, torch.optim.AdamW(ours.parameters(), fused=fused))
    optimizer = torch.optim.AdamW(theirs.parameters(), fused=fused)
    steps(theirs, optimizer, 0)
    for name, tensor in optimizer_state(theirs, optimizer).items():
        assert (made[name].shape, made[name].dtype, made[name].device) == (
            tensor.shape, tensor.dtype, tensor.device,
        ), name  # fmt: skip
        assert not made[name].any()


@pytest.mark.parametrize(("fused", "place"), [(True, "cuda"), (False, "cpu")])
def test_the_step_of_fused_adamw_is_stored_on_the_gpu(fused, place):
    with FakeTensorMode():
        model = nn.Linear(2, 2, device="cuda")
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        tensors = optimizer_state(model, optimizer)
    assert tensors["adam.weight.step"].device.type == place
    assert tensors["adam.weight.exp_avg"].device.type == "cuda"


@pytest.mark.parametrize("fused", [True, False])
def test_state_is_transferred_between_fused_and_unfused_adamw(fused):
    first, second, whole = network(), network(1), network()
    writes = torch.optim.AdamW(first.parameters(), fused=fused)
    steps(first, writes, 0, 1)
    reads = torch.optim.AdamW(second.parameters(), fused=not fused)
    state = optimizer_state(second, reads)
    for name, tensor in optimizer_state(first, writes).items():
        state[name].copy_(tensor)
    second.load_state_dict(first.state_dict())
    steps(second, reads, 2, 3)
    alone = torch.optim.AdamW(whole.parameters(), fused=fused)
    steps(whole, alone, 0, 1, 2, 3)
    for name, tensor in optimizer_state(whole, alone).items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-8)
    for ours, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


# --- skipped steps


@pytest.mark.parametrize("scaled", [False, True])
def test_a_skipped_step_has_no_effect_with_and_without_a_gradient_scaler(scaled):
    """With a scaler, as in 16-mixed, AdamW is not fused."""
    model, twin = network(), network()
    optimizer, theirs = (torch.optim.AdamW(m.parameters(), fused=not scaled) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1.0)
    for number, (factor, skip) in enumerate(((1.0, 0.0), (NAN, 1.0), (1.0, 0.0), (1e4, 1.0), (INF, 1.0))):
        set_gradient(model, number)
        for parameter in model.parameters():
            parameter.grad *= factor * scaler.get_scale()
        scaler.scale(torch.zeros(()))  # makes the scaler's own tensors
        scaler.unscale_(optimizer)
        holder = StateAccess(model, optimizer)
        holder.clip_or_skip(holder.gradient_norm(), None, torch.tensor(skip))
        scaler.step(optimizer)
        scaler.update()
        if not skip:
            steps(twin, theirs, number)
    ours, expected = optimizer_state(model, optimizer), optimizer_state(twin, theirs)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert ours["adam.0.weight.step"] == 2


def test_sharded_and_unsharded_adamw_skip_the_same_steps(gloo):
    model, twin = network(), network()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model:
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    optimizer, theirs = (torch.optim.AdamW(m.parameters(), fused=True) for m in (model, twin))
    for number, skip in enumerate((0.0, 1.0, 0.0)):
        set_gradient(twin, number)
        for ours, theirs_ in zip(model.parameters(), twin.parameters(), strict=True):
            ours.grad = distribute_tensor(theirs_.grad * (NAN if skip else 1.0), mesh, [Shard(0)])
        holder = StateAccess(model, optimizer)
        norm = holder.gradient_norm()
        holder.clip_or_skip(norm, 0.1, torch.tensor(skip))
        optimizer.step()
        if not skip:
            nn.utils.clip_grads_with_norm_(twin.parameters(), 0.1, norm)
            theirs.step()
    ours, expected = optimizer_state(model, optimizer), optimizer_state(twin, theirs)
    for name, tensor in expected.items():
        held = ours[name]
        assert torch.equal(held.full_tensor() if isinstance(held, DTensor) else held, tensor), name
    assert expected["adam.0.weight.step"] == 2


def test_adamw_is_not_fused_with_a_gradient_scaler():
    for scaler, fused in ((None, True), (object(), False)):
        module = LRMModule(tiny_lrm(), Renderer(8), Objective())
        module._trainer = types.SimpleNamespace(precision_plugin=types.SimpleNamespace(scaler=scaler))
        module._fabric = None
        assert module.optimizer.build(module.lrm).defaults["fused"]
        assert module.configure_optimizers().defaults["fused"] is fused
    assert OptimizerConfig().build(tiny_lrm(), fused=False).defaults["fused"] is False


# --- copies for checkpoints


@pytest.mark.parametrize("sharded", [False, True])
def test_snapshots_keep_the_layout_of_shards_and_reuse_buffers(gloo, sharded):
    mesh = init_device_mesh("cpu", (1,))
    plain, whole = torch.randn(3, 4).t(), torch.randn(5, 2)
    state = {"plain": plain, "shards": distribute_tensor(whole, mesh, [Shard(1)]), "empty": torch.empty(0, 3)}
    snapshots = Snapshots(torch.device("cpu"))
    with as_accelerator():
        first = snapshots.take(state, sharded=sharded)
        snapshots.stream.synchronize()
        assert torch.equal(first["plain"], plain)
        kept = first["shards"]
        if sharded:
            assert isinstance(kept, DTensor)
            assert (kept.placements, kept.device_mesh, kept.shape) == ((Shard(1),), mesh, whole.shape)
            kept = kept.full_tensor()
        else:
            assert type(kept) is torch.Tensor
        assert torch.equal(kept, whole)
        plain += 1
        assert not torch.equal(first["plain"], plain), "a copy"
        second = snapshots.take(state, sharded=sharded)
    assert torch.equal(second["plain"], plain)
    assert all(second[name] is first[name] for name in state)


def test_snapshots_on_a_cpu_do_not_share_memory():
    state = {"a": torch.ones(3)}
    snapshots = Snapshots(torch.device("cpu"))
    first, second = (snapshots.take(state, sharded=False)["a"] for _ in range(2))
    assert first.data_ptr() != second.data_ptr() != state["a"].data_ptr()
    assert snapshots.take(state, sharded=False, keep=False) == {}


# --- ranks that agree


def test_flags_are_reduced_on_the_cpu(gloo, monkeypatch):
    keeper = CheckpointAndResume()
    assert keeper._agree(True, False) == [True, False]
    group = torch.distributed.new_group(backend="gloo")
    keeper._flag_group = group
    reduce, seen = torch.distributed.all_reduce, []
    monkeypatch.setattr(
        torch.distributed,
        "all_reduce",
        lambda t, op, on: seen.append((t.device.type, on)) or reduce(t, op, on),
    )
    assert keeper._agree(False, True) == [False, True]
    assert seen == [("cpu", group)]


# --- strategies


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("fsdp", "fsdp2"),
        ("fsdp_cpu_offload", "fsdp2"),
        ("lightning.pytorch.strategies.FSDPStrategy", "fsdp2"),
        ("deepspeed", "deepspeed_2"),
        ("deepspeed_stage_1", "deepspeed_1"),
        ("deepspeed_stage_2", "deepspeed_2"),
        ("deepspeed_stage_2_offload", "deepspeed_2"),
        ("deepspeed_stage_3", "deepspeed_3"),
        ("deepspeed_stage_3_offload_nvme", "deepspeed_3"),
        ("lightning.pytorch.strategies.DeepSpeedStrategy", "deepspeed_2"),
    ],
)
def test_sharded_strategies_of_lightning_are_rejected(root, name, config):
    with pytest.raises(InputError, match=rf"found {name}. Use .*configs/trainer/{config}\.yaml"):
        require_supported_strategy_name(name)
    assert (root / "configs" / "trainer" / f"{config}.yaml").is_file()


def test_other_strategies_of_lightning_are_accepted():
    from lightning.pytorch.strategies import StrategyRegistry

    refused = []
    for name in ("auto", *StrategyRegistry.available_strategies(), "lrm_pl.training.zero.ZeroStrategy"):
        try:
            require_supported_strategy_name(name)
        except InputError:
            refused.append(name)
    started_inside = [name for name in refused if name.startswith("ddp")]
    assert all(re.match("ddp_(spawn|fork|notebook)", name) for name in started_inside)
    assert {"ddp_spawn", "ddp_notebook"} <= set(started_inside)
    assert {name.partition("_")[0] for name in refused} == {"fsdp", "deepspeed", "ddp"}
    require_supported_strategy(FSDP2Strategy())
    require_supported_strategy(DDPStrategy())


@pytest.mark.filterwarnings("default")
def test_unsupported_strategies_are_rejected_before_the_trainer_is_created(root, monkeypatch):
    monkeypatch.setattr(LRMCLI, "instantiate_trainer", lambda *_, **__: pytest.fail("a trainer was made"))
    config = str(root / "configs" / "experiment" / "demo.yaml")
    with pytest.raises(InputError, match=r"found fsdp. Use .*-c configs/trainer/fsdp2\.yaml"):
        command_line(["fit", "-c", config, "--trainer.strategy", "fsdp"])


def test_unsupported_strategies_are_rejected_in_setup():
    module = LRMModule(tiny_lrm(), Renderer(8), Objective())
    module.trainer = L.Trainer(accelerator="cpu", barebones=True)
    module.trainer._accelerator_connector.strategy = FSDPStrategy()  # Lightning makes one on GPUs only
    with pytest.raises(InputError, match=r"FSDPStrategy. Use .*configs/trainer/fsdp2\.yaml"):
        module.setup("fit")


def test_the_deepspeed_strategy_of_lightning_is_rejected():
    pytest.importorskip("deepspeed")
    from lightning.pytorch.strategies import DeepSpeedStrategy

    from lrm_pl.training.zero import ZeroStrategy

    require_supported_strategy(ZeroStrategy())
    with pytest.raises(InputError, match=r"DeepSpeedStrategy. Use .*configs/trainer/deepspeed_2\.yaml"):
        require_supported_strategy(DeepSpeedStrategy())
