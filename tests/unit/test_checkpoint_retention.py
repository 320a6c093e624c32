"""Which checkpoints of a folder are kept and which are deleted."""

import math
import os

import pytest

from lrm_pl import checkpoints as ck
from lrm_pl.checkpoints import checkpoint_path
from lrm_pl.errors import InputError
from tests.unit.checkpoint_files import flipped, steps, write


def test_the_newest_the_best_and_every_nth_stay(tmp_path):
    scores = {10: 1.0, 20: 3.0, 30: 2.0, 40: None, 50: 2.5}
    for step, score in scores.items():
        write(tmp_path, step, run={"score": score})
        ck.prune_checkpoints(str(tmp_path), keep=1, keep_every=30)
    assert steps(tmp_path) == [20, 30, 50]
    assert ck.best_score(str(tmp_path), print) == (3.0, set())


def test_the_best_may_be_the_lowest_and_scores_of_another_metric_do_not_count(tmp_path):
    scores = {
        10: ("lpips", 0.5),
        20: ("lpips", 0.3),
        30: ("psnr", 0.1),
        40: ("lpips", math.nan),
        50: ("lpips", 0.4),
    }
    for step, (monitor, score) in scores.items():
        write(tmp_path, step, run={"score": score, "monitor": monitor})
    assert ck.best_score(str(tmp_path), print, monitor="lpips", mode="min") == (0.3, set())
    assert ck.best_score(str(tmp_path), print, monitor="psnr") == (0.1, set())
    assert ck.best_score(str(tmp_path), print, monitor="ssim") == (None, set())
    ck.prune_checkpoints(str(tmp_path), keep=1, monitor="lpips", mode="min")
    assert steps(tmp_path) == [20, 50]


def test_a_damaged_best_checkpoint_is_not_the_best_any_more(tmp_path, capsys):
    for step, score in {10: 1.0, 20: 3.0, 30: 2.0}.items():
        write(tmp_path, step, run={"score": score})
    flipped(tmp_path / "step-00000020")
    damaged = checkpoint_path(str(tmp_path), 20)
    assert ck.best_score(str(tmp_path), print) == (2.0, {damaged})
    assert "The best checkpoint is damaged" in capsys.readouterr().out
    write(tmp_path, 40, run={"score": 1.5})
    ck.prune_checkpoints(str(tmp_path), keep=1, ignored={damaged})
    assert steps(tmp_path) == [20, 30, 40], "the best whole one stays"


def test_a_damaged_checkpoint_that_a_run_passed_over_does_not_push_out_the_whole_ones(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step)
    flipped(tmp_path / "step-00000030")
    apart = {checkpoint_path(str(tmp_path), 30)}
    write(tmp_path, 25)  # the run goes on after 20
    ck.prune_checkpoints(str(tmp_path), keep=1, ignored=apart)
    assert steps(tmp_path) == [25, 30]
    assert ck.newest_checkpoint(str(tmp_path), print).step == 25


def test_a_deletion_that_is_cut_short_leaves_nothing_that_is_taken_for_whole(tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    write(tmp_path, 1)
    write(tmp_path, 2)

    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalFileSystem, "rm", cut)
    with pytest.raises(KeyboardInterrupt):
        ck.remove_checkpoint(checkpoint_path(str(tmp_path), 2))
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path / "step-00000002")) == [".metadata", "__0_0.distcp"]
    assert ck.newest_checkpoint(str(tmp_path), print).step == 1
    ck.remove_checkpoint(checkpoint_path(str(tmp_path), 2))
    assert steps(tmp_path) == [1]


def test_only_half_written_checkpoints_are_cleared_away(tmp_path):
    write(tmp_path, 1)
    for name in ("step-00000002.partial", "mine.partial"):
        (tmp_path / name).mkdir()
    said = []
    ck.remove_partial_checkpoints(str(tmp_path), said.append)
    assert sorted(os.listdir(tmp_path)) == ["mine.partial", "step-00000001"]
    assert len(said) == 1
    ck.remove_partial_checkpoints(str(tmp_path / "none"), said.append)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_lost(tmp_path):
    ck.require_writable(str(tmp_path / "new" / "folder"))
    assert os.listdir(tmp_path / "new" / "folder") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: expected a writable folder"):
        ck.require_writable(str(tmp_path / "file"))
