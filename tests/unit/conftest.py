"""Fixtures shared by the modules of this folder."""

import shutil

import pytest


@pytest.fixture
def checkout(tmp_path, root, monkeypatch):
    """A folder with the template, three strategies and a config, as the working folder."""
    shutil.copytree(root / "configs" / "cluster", tmp_path / "configs" / "cluster")
    (tmp_path / "configs" / "trainer").mkdir()
    for strategy in ("cpu", "gpu", "ddp"):
        (tmp_path / "configs" / "trainer" / f"{strategy}.yaml").write_text("trainer: {}\n")
    (tmp_path / "mine.yaml").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_slurm(checkout, monkeypatch):
    """No sbatch on PATH; git, env and the shell stay."""
    monkeypatch.setenv("PATH", str(checkout))
