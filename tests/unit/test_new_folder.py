"""Atomic creation of folders."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from lrm_pl.data.manifest import new_folder
from lrm_pl.errors import InputError


def test_a_folder_is_created_atomically_and_does_not_replace_a_folder(tmp_path):
    precious = tmp_path / "out.partial" / "notes.txt"
    precious.parent.mkdir()
    precious.write_text("precious")
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert precious.read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.partial"}
    assert (tmp_path / "out").stat().st_mode == precious.parent.stat().st_mode, "others may read it"


def test_a_failed_creation_leaves_no_folder(tmp_path):
    def fail(folder):
        (folder / "a").write_text("a")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "deep" / "out") as folder:
        fail(folder)
    assert list((tmp_path / "deep").iterdir()) == []


KILLED = """
import os, sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from lrm_pl.data.manifest import new_folder
pool = ProcessPoolExecutor(1)
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("a")
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), 9)
"""


def test_folders_of_killed_processes_are_removed_by_the_next_process(tmp_path, root):
    (tmp_path / ".out.notes").mkdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as run:
        orphan = int(run.stdout.readline())
        run.wait()
    try:
        left = [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
        assert len(left) == 1
        with new_folder(tmp_path / "out"):
            pass
        assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.notes"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(orphan, signal.SIGKILL)


@pytest.mark.parametrize("there", ["file", "folder", "link to nothing"])
def test_folders_created_in_the_meantime_are_not_replaced(tmp_path, there):
    def put():
        if there == "folder":
            (tmp_path / "out").mkdir()
        elif there == "file":
            (tmp_path / "out").touch()
        else:
            os.symlink("nothing", tmp_path / "out")

    with (
        pytest.raises(InputError, match=r"The folder .*out cannot be created because it exists"),
        new_folder(tmp_path / "out"),
    ):
        put()
    assert os.path.lexists(tmp_path / "out")
    with pytest.raises(InputError, match="because it exists"), new_folder(tmp_path / "out"):
        raise AssertionError
