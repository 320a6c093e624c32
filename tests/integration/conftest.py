"""Fixtures shared by the modules of this folder."""

import shutil

import pytest
import yaml

from lrm_pl.cli.main import main
from tests.builders import TINY

TRAINER = {"max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1, "precision": "32-true"}


@pytest.fixture
def here(tmp_path, shards, monkeypatch):
    """Arguments of a tiny run with the default loggers and callbacks, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "trainer": TRAINER}))
    return ["-c", "tiny.yaml", "--data.folder", str(shards)]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, shards):
    """Folder of a complete run with the arguments of ``here``. Read-only: use ``run`` to change it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "trainer": TRAINER}))
    main(
        [
            "fit",
            "-c",
            str(folder / "tiny.yaml"),
            "--data.folder",
            str(shards),
            "--run.folder",
            str(folder / "run"),
        ]
    )
    return folder / "run"


@pytest.fixture
def run(here, finished, tmp_path):
    """Copy of a complete run of two steps at ``run`` in the working folder."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def tiny(tmp_path, shards):
    """Arguments of a tiny run that logs to ``tmp_path``."""
    path = tmp_path / "tiny.yaml"
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(tmp_path / "runs"), "name": "tiny"},
    }
    path.write_text(yaml.safe_dump({**TINY, "trainer": TRAINER | {"logger": logger}}))
    return ["-c", str(path), "--data.folder", str(shards)]


@pytest.fixture
def fit(tmp_path, shards):
    """Return a function that runs the tiny config in ``tmp_path`` for a number of steps."""

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
