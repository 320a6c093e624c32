"""Device of a test, which is a GPU or a CPU that takes the branches for accelerators."""

import dataclasses

import pytest
import torch

from lrm_pl.kernels import device as device_file
from tests.accelerator.branches import RECORD


@dataclasses.dataclass
class Device:
    """Device on which a test runs.

    Attributes:
        name: Name of the device in PyTorch.
        rounding: Maximum relative difference from the branches for CPUs, due to a different order of summation in
            float32. On a GPU, functions such as exp and the algorithms of convolutions also differ.
        monkeypatch: The fixture of the test.
    """

    name: str
    rounding: float
    monkeypatch: pytest.MonkeyPatch

    @property
    def is_gpu(self):
        return self.name == "cuda"

    def to_accelerator(self):
        """Select the branches for accelerators on the CPU."""
        RECORD.types = frozenset()

    def to_cpu(self):
        """Select the branches for CPUs."""
        RECORD.types = frozenset({"cpu"})

    def close(self, ours, theirs, times=1.0):
        """Return whether tensors are equal up to rounding in the 2-norm."""
        ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
        assert ours.shape == theirs.shape
        return (ours - theirs).norm() <= times * self.rounding * theirs.norm().clamp_min(1e-12)


@pytest.fixture
def recorded(monkeypatch):
    """Record which device checks run. The branches for CPUs are selected until a test changes this."""
    RECORD.types = frozenset({"cpu"})
    monkeypatch.setattr(device_file, "HOST_TYPES", RECORD)
    with RECORD.tracing():
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, recorded, monkeypatch):
    """A CPU that takes the branches for accelerators, or a GPU in tests with the marker gpu."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("expected a GPU that PyTorch can use, but found none")
    found = Device(request.param, {"cpu": 1e-5, "cuda": 1e-3}[request.param], monkeypatch)
    found.to_accelerator()
    return found
