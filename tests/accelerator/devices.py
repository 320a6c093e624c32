"""The device of a test: a GPU, or a CPU that takes the branches of an accelerator."""

import dataclasses

import pytest
import torch

from lrm_pl.kernels import device as device_file
from tests.accelerator.branches import RECORD


@dataclasses.dataclass
class Device:
    """Device on which a test runs.

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
        """Make the CPU take the branches of an accelerator."""
        RECORD.types = frozenset()

    def to_cpu(self):
        """Make the CPU take its own branches."""
        RECORD.types = frozenset({"cpu"})

    def close(self, ours, theirs, times=1.0):
        """Return whether tensors are equal up to rounding in the 2-norm."""
        ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
        assert ours.shape == theirs.shape
        return (ours - theirs).norm() <= times * self.rounding * theirs.norm().clamp_min(1e-12)


@pytest.fixture
def recorded(monkeypatch):
    """Record which device checks run; a CPU takes its own branches until a test changes this."""
    RECORD.types = frozenset({"cpu"})
    monkeypatch.setattr(device_file, "HOST_TYPES", RECORD)
    with RECORD.tracing():
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, recorded, monkeypatch):
    """The accelerator: a CPU that takes its branches, or (marked gpu) a GPU; a missing GPU is a failure."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("expected a GPU that PyTorch can use, but found none")
    found = Device(request.param, {"cpu": 1e-5, "cuda": 1e-3}[request.param], monkeypatch)
    found.to_accelerator()
    return found
