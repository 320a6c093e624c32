"""Shared fixtures: a folder of analytic shards, the repository's root."""

from pathlib import Path

import pytest

from lrm_pl.data.synthetic import write_synthetic_shards

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Six ellipsoids, 8 views of 32 x 32, in shards of 2. Read-only: copy before changing it."""
    folder = tmp_path_factory.mktemp("shards")
    write_synthetic_shards(folder, train=4, val=2, views=8, resolution=32)
    return folder
