"""The device that a test runs on: a GPU, or a CPU that every question about the device takes for one."""

import dataclasses

import pytest
import torch

from lrm_pl.kernels import device as device_file
from tests.accelerator.branches import RECORD


@dataclasses.dataclass
class Device:
    """Where a test's body runs.

    Attributes:
        name: PyTorch's name.
        rounding: Largest relative difference to the CPU branch that sums of another order may make in float32. A CPU
            has the same instructions on either side; a GPU has its own exp, and convolutions of other algorithms.
        monkeypatch: Of the test.
    """

    name: str
    rounding: float
    monkeypatch: pytest.MonkeyPatch

    @property
    def is_gpu(self):
        return self.name == "cuda"

    def to_accelerator(self):
        """From here on, the CPU is no CPU."""
        RECORD.types = frozenset()

    def to_cpu(self):
        """From here on, the CPU is one."""
        RECORD.types = frozenset({"cpu"})

    def close(self, ours, theirs, times=1.0):
        """Say whether tensors differ by no more than rounding, in the 2-norm of the whole."""
        ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
        assert ours.shape == theirs.shape
        return (ours - theirs).norm() <= times * self.rounding * theirs.norm().clamp_min(1e-12)


@pytest.fixture
def recorded(monkeypatch):
    """Note which questions about the device are asked; a CPU is one until a test says otherwise."""
    RECORD.types = frozenset({"cpu"})
    monkeypatch.setattr(device_file, "HOST_TYPES", RECORD)
    with RECORD.tracing():
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, recorded, monkeypatch):
    """The accelerator: a CPU in its place, or (marked gpu) a GPU; a missing one is a failure, never a skip."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("expected a GPU that PyTorch can use, but found none")
    found = Device(request.param, {"cpu": 1e-5, "cuda": 1e-3}[request.param], monkeypatch)
    found.to_accelerator()
    return found
