"""Real runs whose gradient goes bad on the way: the step is skipped on the device, and the host reads that later."""

import contextlib
import copy
import re
import threading

import lightning as L
import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from lrm_pl.callbacks.progress_bar import ProgressBar
from lrm_pl.checkpoints.index import read_checkpoint
from lrm_pl.checkpoints.tensors import read_tensors, tensor_names
from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.kernels.device import CopyStream, as_accelerator
from lrm_pl.training import sharded_state
from lrm_pl.training.checkpointing import CheckpointAndResume
from lrm_pl.training.ema import WeightAverage
from lrm_pl.training.run_state import run_tensors
from tests.runs import RUN_CONFIG

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]

aten = torch.ops.aten

#: Operators that make the host wait for a number or a shape from the device.
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.masked_select, aten.equal, aten.unique_consecutive,
    aten._unique2, aten.bincount,
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Fail where the host would wait for an accelerator."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in WAITING, f"{function} makes the host wait"
        self.names.add(function.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


class NoWaitingForCuda:
    """Fail where the host waits for a GPU, from the third step on: the first ones make tensors that stay."""

    entered = 0

    def __enter__(self):
        self.entered += 1
        if self.entered > 2:
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


class Spoil(L.Callback):
    """Multiply the gradient by a factor at some steps; then nothing may wait, until ``Watch`` says so."""

    def __init__(self, factors, mode):
        self.factors, self.mode = factors, mode

    def on_after_backward(self, trainer, pl_module):
        for parameter in pl_module.lrm.parameters():
            if parameter.grad is not None:
                parameter.grad *= self.factors.get(trainer.global_step, 1.0)
        if self.mode is not None:
            self.mode.__enter__()


class Watch(L.Callback):
    """Keep all tensors of a run after every step."""

    def __init__(self, mode):
        self.mode, self.states, self.skipped = mode, {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
        tensors = run_tensors(trainer, pl_module)
        self.states[trainer.global_step] = {name: tensor.clone() for name, tensor in tensors.items()}
        self.skipped[trainer.global_step] = float(trainer.callback_metrics.get("optim/skipped_steps", 0))


@pytest.fixture
def fit(tmp_path, shards):
    def run(name, factors, *options, every=100, mode=None, steps=8, validating=None):
        """Train; returns what it was after every step, and its folder of checkpoints."""
        config = copy.deepcopy(RUN_CONFIG)
        validations = 0 if validating is None else 1
        config["trainer"] |= {"max_steps": steps, "limit_val_batches": validations, "gradient_clip_val": 0.01}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        arguments = ["-c", str(path), "--data.folder", str(shards), "--run.folder", str(tmp_path / name)]
        cli = LRMCLI("fit", [*arguments, *options], records=False)
        watch = Watch(mode)
        keeper = CheckpointAndResume(every=every, keep=100, monitor=None)
        average = WeightAverage(0.5, validate=validating is not None)
        cli.trainer.callbacks = [Spoil(factors, mode), average, watch, keeper]
        cli.trainer.callbacks += [] if validating is None else [validating]
        cli.before_fit()
        cli.trainer.fit(cli.model, cli.datamodule)
        keeper.signals.restore()
        return watch, tmp_path / name / "checkpoints"

    return run


def read(folder, step):
    checkpoint = read_checkpoint(str(folder / f"step-{step:08d}"))
    tensors = {name: torch.empty(shape) for name, shape in tensor_names(checkpoint).items()}
    read_tensors(checkpoint, tensors)
    return checkpoint, tensors


def different(ours, theirs):
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


BAD = {2: float("nan"), 5: 1e4}
SPIKES = ("--model.guard.spike=50", "--model.guard.window=3")
ONE_GPU = ("--trainer.accelerator=gpu", "--trainer.devices=1")


@pytest.mark.parametrize("branch", [contextlib.nullcontext, as_accelerator])
def test_skipped_steps_change_no_state_and_do_not_synchronize(fit, branch):
    mode = NoWaiting()
    with branch():
        watch, _ = fit("bad", BAD, *SPIKES, mode=mode)
    assert list(watch.skipped.values()) == [0, 0, 1, 1, 1, 2, 2, 2]
    states = watch.states
    kinds = {name.partition(".")[0] for name in states[1]}
    assert kinds == {"network", "adam", "average"}
    for bad in (3, 6):
        assert different(states[bad], states[bad - 1]) == []
    for good in (2, 4, 5, 7, 8):
        changed = different(states[good], states[good - 1])
        assert {name.partition(".")[0] for name in changed} == kinds
        assert all(torch.isfinite(tensor).all() for tensor in states[good].values())
    steps = {tensor.item() for name, tensor in states[8].items() if name.endswith(".step")}
    assert steps == {6.0}, "AdamW's own count leaves skipped steps out"
    assert {"_fused_adamw_", "_foreach_lerp_", "_foreach_mul_", "_foreach_norm"} <= mode.names
    # For `--trainer.deterministic true`: operators that PyTorch lists as not deterministic, or slower if they must be.
    listed = re.findall(r":func:`torch\.(?:\w+\.)*(\w+)`", torch.use_deterministic_algorithms.__doc__)
    assert {"cumsum", "index_put", "median"} <= set(listed)
    assert {name.rstrip("_") for name in listed} & {name.rstrip("_") for name in mode.names} == set()


@pytest.mark.gpu
def test_optimizer_steps_do_not_synchronize_on_a_gpu(fit):
    watch, folder = fit("gpu", BAD, *SPIKES, *ONE_GPU, mode=NoWaitingForCuda(), every=2)
    assert list(watch.skipped.values()) == [0, 0, 1, 1, 1, 2, 2, 2]
    for bad in (3, 6):
        assert different(watch.states[bad], watch.states[bad - 1]) == []
    for step in (2, 4, 6, 8):
        state = {name: tensor.cpu() for name, tensor in watch.states[step].items()}
        assert different(read(folder, step)[1], state) == [], step


def test_a_run_resumed_between_skipped_steps_is_bitwise_equal(fit):
    whole, folder = fit("whole", BAD, *SPIKES, every=4)
    resumed, again = fit("resumed", BAD, *SPIKES, f"--run.resume={folder}/step-00000004")
    assert list(resumed.states) == [5, 6, 7, 8]
    for step, state in resumed.states.items():
        assert different(state, whole.states[step]) == []
        assert resumed.skipped[step] == whole.skipped[step]
    assert read(again, 8)[0].run == read(folder, 8)[0].run
    assert read(folder, 4)[0].run["guard"]["skipped"] == 1


class ReadsPerStep(L.Callback):
    """Count the numbers that are read from the device in every step, callbacks and logging included."""

    def __init__(self):
        self.reads, self.mode = {}, None

    def on_train_batch_start(self, trainer, *_):
        self.stop()
        self.mode = CountReads()
        self.reads[trainer.global_step] = self.mode
        self.mode.__enter__()

    def stop(self):
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.mode = None


class CountReads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket == aten._local_scalar_dense
        return function(*args, **(kwargs or {}))


def test_default_callbacks_synchronize_only_on_logged_steps(tmp_path, shards):
    config = copy.deepcopy(RUN_CONFIG)
    config["trainer"] |= {
        "max_steps": 9,
        "limit_val_batches": 0,
        "log_every_n_steps": 4,
        "gradient_clip_val": 1.0,
    }
    path = tmp_path / "default.yaml"
    path.write_text(yaml.safe_dump(config))
    folders = ["--data.folder", str(shards), "--run.folder", str(tmp_path / "default")]
    cli = LRMCLI("fit", ["-c", str(path), *folders], records=False)
    reads = ReadsPerStep()
    cli.trainer.callbacks.insert(0, reads)
    cli.before_fit()
    with as_accelerator():
        cli.trainer.fit(cli.model, cli.datamodule)
    reads.stop()
    keeper, bar = (
        next(c for c in cli.trainer.callbacks if isinstance(c, kind))
        for kind in (CheckpointAndResume, ProgressBar)
    )
    keeper.signals.restore()
    assert [mode.count for mode in reads.reads.values()][4:7] == [0, 0, 0], (
        "the fourth and the eighth are logged"
    )
    assert reads.reads[3].count > 0
    assert bar.get_metrics(cli.trainer, cli.model).keys() >= {"loss", "samples/s"}


class DeferredCopies(CopyStream):
    """A stream whose copies are made as late as can be: when training is held back for them.

    Those of the last checkpoint, after which there is no step, are made when they are waited for.
    """

    deferred = 3  # checkpoints

    def __init__(self, device):
        super().__init__(device)
        type(self).newest = self
        self.pending, self.lock, self.due, self.taken = [], threading.Lock(), threading.Event(), 0

    def after_current(self):
        self.taken += 1
        self.due.clear()
        if self.taken > self.deferred:
            self.due.set()
        return super().after_current()

    def copy(self, into, source):
        self.pending.append((into, source))

    def block_current(self):
        self._make()
        self.due.set()

    def synchronize(self):
        assert self.due.wait(120)
        self._make()

    def _make(self):
        with self.lock:
            for into, source in self.pending:
                into.copy_(source)
            self.pending.clear()


class CopiesInValidation(L.Callback):
    """Make the copies that are still to be made while the average is validated in place of the weights."""

    def on_validation_batch_start(self, *_):
        DeferredCopies.newest._make()


class LateCopies(DeferredCopies):
    """A stream whose copies are made one step too late, with nothing held back."""

    deferred, steps = 1, 0

    def block_current(self):
        self.steps += 1
        if self.steps > 1:  # one step was made after the copies were queued
            self.due.set()


def test_a_checkpoint_is_the_state_of_its_step_if_copies_are_deferred(fit, monkeypatch):
    monkeypatch.setattr(sharded_state, "CopyStream", DeferredCopies)
    with as_accelerator():
        watch, folder = fit("deferred", {}, every=2)
    for step in (2, 4, 6, 8):
        assert different(read(folder, step)[1], watch.states[step]) == [], step


def test_validation_of_the_average_waits_for_copies(fit, monkeypatch):
    """Accumulation puts validations between a checkpoint and the next optimizer step."""
    monkeypatch.setattr(sharded_state, "CopyStream", DeferredCopies)
    options = ("--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=3")
    with as_accelerator():
        watch, folder = fit("validated", {}, *options, every=1, steps=4, validating=CopiesInValidation())
    for step in (1, 2, 3, 4):
        assert different(read(folder, step)[1], watch.states[step]) == [], step


def test_copies_are_wrong_without_waiting_before_the_optimizer_step(fit, monkeypatch):
    monkeypatch.setattr(sharded_state, "CopyStream", LateCopies)
    with as_accelerator():
        watch, folder = fit("late", {}, every=2, steps=4)
    assert different(read(folder, 2)[1], watch.states[2]) != []


def test_copies_on_a_cpu_are_synchronous(fit, monkeypatch):
    monkeypatch.setattr(sharded_state, "CopyStream", LateCopies)
    watch, folder = fit("at-once", {}, every=2, steps=4)
    assert different(read(folder, 2)[1], watch.states[2]) == []
