"""Fixtures of tests that run on a GPU, or on a CPU that takes the branches for accelerators."""

from tests.accelerator.devices import device, recorded  # noqa: F401 - fixtures
from tests.accelerator.training import lpips_networks  # noqa: F401 - a fixture

#: The test that depends on all other tests runs last.
LAST = "test_all_device_checks_and_branches_run_for_a_cpu_and_an_accelerator"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.name == LAST)
