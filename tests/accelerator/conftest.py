"""Fixtures of tests that run on a GPU, or on a CPU that takes the branches of a GPU."""

from tests.accelerator.devices import device, recorded  # noqa: F401 - fixtures
from tests.accelerator.training import lpips_networks  # noqa: F401 - a fixture

#: What is told of all other tests.
LAST = "test_every_question_about_the_device_is_asked_for_both_and_all_that_hangs_on_it_runs"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.name == LAST)
