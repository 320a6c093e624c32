"""Tests of unreadable samples: few are replaced, many stop the run on all ranks."""

import shutil

import pytest

from lrm_pl.data.manifest import read_manifest
from lrm_pl.data.order import SampleOrder
from tests.builders import spoil_first_poses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def damaged(runs, tmp_path_factory):
    """The shards with one of twelve objects damaged."""
    folder = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(runs.shards, folder)
    spoil_first_poses(folder / "train-000000.tar")
    return folder


def test_too_many_bad_samples_stop_both_ranks_with_a_checkpoint(runs, damaged):
    options = (
        f"--data.folder={damaged}", "--data.workers=1", "--trainer.max_steps=40", "--trainer.limit_val_batches=0",
    )  # fmt: skip
    log = runs.run("bad", 2, *options, layers=["ddp"], status=1)
    # 4 objects a step: 100 are judged at step 25
    order = SampleOrder(
        tuple(shard.samples for shard in read_manifest(damaged).split("train")), seed=0, streams=64
    )
    met = sum((place.shard, place.index) == (0, 0) for place in map(order.locate, range(100)))
    assert f"Expected at most a fraction of 0.01 of the samples to be bad, but found {met} of 100" in log
    assert "train-000000.tar: sample 'train-ellipsoid-000'" in log
    assert log.count("Skipped ") == log.count("Skipped /"), "each is named once a rank"
    assert log.count("Skipped /") <= 2
    checkpoint, _ = runs.final("bad")
    assert checkpoint.step == 25
    assert runs.scalars("bad")["data/bad_samples"][-1][1] == met


@pytest.mark.soak
def test_a_fraction_of_bad_samples_within_the_limit_is_accepted(runs, damaged):
    options = (f"--data.folder={damaged}", "--data.max_bad_fraction=0.2", "--trainer.max_steps=30")
    runs.run("bad-allowed", 2, *options, layers=["ddp"])
    assert runs.final("bad-allowed")[0].step == 30
    assert len(runs.losses("bad-allowed")) == 30
