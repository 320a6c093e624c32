"""File systems without locks, and read-only folders."""

import errno
import fcntl
import logging

import pytest

from data_tools.rendering.shard_folder import lock_folder
from lrm_pl.errors import InputError
from lrm_pl.kernels.compiled import compiled
from lrm_pl.locks import lock


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_reported_once(monkeypatch, tmp_path, caplog, code):
    def none(file, operation):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", none)
    with caplog.at_level(logging.WARNING), lock_folder(tmp_path), open(tmp_path / "other", "w") as file:
        assert not lock(file, wait=True)
    assert caplog.text.count("does not support locks") == 1


def test_other_lock_errors_are_raised(monkeypatch, tmp_path):
    def broken(file, operation):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", broken)
    with open(tmp_path / "file", "w") as file, pytest.raises(OSError, match="broken"):
        lock(file, wait=False)


def test_a_second_render_job_in_a_folder_raises_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("data_tools.rendering.shard_folder.LOCK_TIMEOUT_S", 0.2)
    with (
        lock_folder(tmp_path),
        pytest.raises(InputError, match="but found a running process"),
        lock_folder(tmp_path),
    ):
        raise AssertionError


def test_numba_functions_are_compiled_without_a_cache_folder():
    """A read-only container of a user without home folder has no cache folder."""
    names = {}
    exec("def twice(x):\n    return 2 * x\n", names)
    assert compiled()(names["twice"])(21) == 42
