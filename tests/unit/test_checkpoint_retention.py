"""Deletion of old, incomplete and damaged checkpoints."""

import math
import os

import pytest

from lrm_pl.checkpoints.files import require_writable
from lrm_pl.checkpoints.index import (
    checkpoint_path,
    newest_checkpoint,
    remove_checkpoint,
    remove_partial_checkpoints,
)
from lrm_pl.checkpoints.retention import Retention
from lrm_pl.errors import InputError
from tests.unit.checkpoint_files import flipped, steps, write


def test_the_newest_the_best_and_every_nth_checkpoint_are_kept(tmp_path):
    retention = Retention(str(tmp_path), None, keep=1, keep_every=30)
    for step, score in {10: 1.0, 20: 3.0, 30: 2.0, 40: None, 50: 2.5}.items():
        retention.add(write(tmp_path, step, run={"score": score}).path, score)
    assert steps(tmp_path) == [20, 30, 50]
    assert retention.best == Retention(str(tmp_path), 50, keep=1).best == 3.0


def test_the_lowest_score_can_be_the_best_and_scores_of_other_metrics_are_ignored(tmp_path):
    scores = {
        10: ("lpips", 0.5),
        20: ("lpips", 0.3),
        30: ("psnr", 0.1),
        40: ("lpips", math.nan),
        50: ("lpips", 0.4),
    }
    for step, (monitor, score) in scores.items():
        write(tmp_path, step, run={"score": score, "monitor": monitor})
    for monitor, mode, best in (("lpips", "min", 0.3), ("psnr", "max", 0.1), ("ssim", "max", None)):
        assert Retention(str(tmp_path), 50, keep=1, monitor=monitor, mode=mode).best == best
    lowest = Retention(str(tmp_path), 40, keep=1, monitor="lpips", mode="min")
    lowest.add(checkpoint_path(str(tmp_path), 50), 0.4)
    assert steps(tmp_path) == [20, 50]


def test_a_damaged_checkpoint_is_no_longer_the_best_checkpoint(tmp_path, caplog):
    for step, score in {10: 1.0, 20: 3.0, 30: 2.0}.items():
        write(tmp_path, step, run={"score": score})
    flipped(tmp_path / "step-00000020")
    retention = Retention(str(tmp_path), 30, keep=1)
    assert retention.best == 2.0
    assert "The best checkpoint is damaged" in caplog.text
    retention.add(write(tmp_path, 40, run={"score": 1.5}).path, 1.5)
    assert steps(tmp_path) == [20, 30, 40], "the best valid checkpoint is kept"


def test_a_damaged_newest_checkpoint_does_not_count_as_one_of_the_newest(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step)
    flipped(tmp_path / "step-00000030")
    Retention(str(tmp_path), 20, keep=1).add(write(tmp_path, 25).path, None)
    assert steps(tmp_path) == [25, 30]
    assert newest_checkpoint(str(tmp_path), print).step == 25


def test_a_partially_deleted_checkpoint_is_not_valid(tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    write(tmp_path, 1)
    write(tmp_path, 2)

    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalFileSystem, "rm", cut)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(checkpoint_path(str(tmp_path), 2))
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path / "step-00000002")) == [".metadata", "__0_0.distcp"]
    assert newest_checkpoint(str(tmp_path), print).step == 1
    remove_checkpoint(checkpoint_path(str(tmp_path), 2))
    assert steps(tmp_path) == [1]


def test_only_incomplete_checkpoints_are_deleted_at_the_start(tmp_path):
    write(tmp_path, 1)
    for name in ("step-00000002.partial", "mine.partial"):
        (tmp_path / name).mkdir()
    said = []
    remove_partial_checkpoints(str(tmp_path), said.append)
    assert sorted(os.listdir(tmp_path)) == ["mine.partial", "step-00000001"]
    assert len(said) == 1
    remove_partial_checkpoints(str(tmp_path / "none"), said.append)


def test_a_folder_that_is_not_writable_is_rejected(tmp_path):
    require_writable(str(tmp_path / "new" / "folder"))
    assert os.listdir(tmp_path / "new" / "folder") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"expected a writable folder .*file"):
        require_writable(str(tmp_path / "file"))
