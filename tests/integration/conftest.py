"""Fixtures shared by the modules of this folder."""

import pytest
import yaml

from lrm_pl.cli.main import main
from tests.builders import TINY


@pytest.fixture
def here(tmp_path, shards, monkeypatch):
    """Arguments of a tiny run with the default loggers and callbacks, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    trainer = {"max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1, "precision": "32-true"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "trainer": trainer}))
    return ["-c", "tiny.yaml", "--data.folder", str(shards)]


@pytest.fixture
def tiny(tmp_path, shards):
    """Arguments of a tiny run that logs below tmp_path."""
    path = tmp_path / "tiny.yaml"
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(tmp_path / "runs"), "name": "tiny"},
    }
    trainer = {
        "max_steps": 2,
        "val_check_interval": 2,
        "log_every_n_steps": 1,
        "logger": logger,
        "precision": "32-true",
    }
    path.write_text(yaml.safe_dump({**TINY, "trainer": trainer}))
    return ["-c", str(path), "--data.folder", str(shards)]


@pytest.fixture
def fit(tmp_path, shards):
    """Run the tiny configuration below tmp_path for so many steps."""

    def run(name, steps, *callbacks, options=()):
        trainer = {
            "max_steps": steps, "val_check_interval": steps, "limit_val_batches": 0, "log_every_n_steps": 1,
            "precision": "32-true", "accelerator": "cpu", "callbacks": list(callbacks),
        }  # fmt: skip
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({**TINY, "trainer": trainer, "run": {"folder": str(tmp_path / name)}}))
        main(["fit", "-c", str(path), "--data.folder", str(shards), *options])
        return tmp_path / name

    return run
