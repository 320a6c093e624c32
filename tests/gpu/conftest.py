"""Fixtures of tests that run on a GPU, and on a CPU in its place."""

from tests.accelerator.devices import device, recorded  # noqa: F401 - fixtures
from tests.accelerator.training import lpips_networks  # noqa: F401 - a fixture
