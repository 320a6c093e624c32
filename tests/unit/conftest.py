"""Fixtures shared by the modules of this folder."""

import shutil

import pytest


@pytest.fixture
def checkout(tmp_path, root, monkeypatch):
    """A working folder with the job scripts, three strategies and a config."""
    shutil.copytree(root / "configs" / "cluster", tmp_path / "configs" / "cluster")
    (tmp_path / "configs" / "trainer").mkdir()
    for strategy in ("cpu", "gpu", "ddp"):
        (tmp_path / "configs" / "trainer" / f"{strategy}.yaml").write_text("trainer: {}\n")
    (tmp_path / "mine.yaml").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_slurm(checkout, monkeypatch):
    """A PATH without sbatch."""
    monkeypatch.setenv("PATH", str(checkout))
