"""Callback that saves the config, git commit and input framing in the run's folder, and logs hyperparameters."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from lrm_pl.cli.report import REPORT_METRICS
from lrm_pl.data.input_framing import InputFraming
from lrm_pl.data.manifest import write_atomically
from lrm_pl.inference.model_folder import FRAMING_NAME, framing_yaml
from lrm_pl.training.checkpointing import CheckpointAndResume
from lrm_pl.training.run_folder import trainer_folder
from lrm_pl.version import git_commit


class RunConfigRecord(SaveConfigCallback):
    """Callback that writes the resolved config, the git commit and the input framing to the run's folder.

    The config and the commit are also written to the loggers. The files describe the latest start of the run. If
    resuming the run at step N changes a file, the previous version is kept in ``earlier/until-step-N``.

    Attributes:
        input_framing: Framing of the training images, which is used for inference.
        portable_config: The config without ``run.folder`` and ``run.resume``, so that other runs can use it.
    """

    input_framing: InputFraming | None = None
    portable_config: Namespace | None = None

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the files and log the config. Lightning calls this method on rank 0 only."""
        folder = trainer_folder(trainer)
        checkpointing = [c for c in trainer.callbacks if isinstance(c, CheckpointAndResume)]  # type: ignore[attr-defined]
        start = next((c.resume_from.step for c in checkpointing if c.resume_from is not None), None)
        if start == trainer.max_steps and (folder / "config.yaml").is_file():
            return  # the run is complete, so no step will use these settings
        folder.mkdir(parents=True, exist_ok=True)
        commit = git_commit()
        config = self.parser.dump(self.portable_config or self.config, skip_none=False)
        files = {"commit.txt": commit + "\n", "config.yaml": config}
        if self.input_framing is not None:
            files[FRAMING_NAME] = framing_yaml(self.input_framing)
        for name, text in files.items():
            if start is not None:
                _keep_previous(folder / name, text, folder / "earlier" / f"until-step-{start:08d}")
            write_atomically(folder / name, text.encode())
        monitored = [c.monitor for c in checkpointing if c.monitor is not None]
        values = {"commit": commit} | flatten_config(yaml.safe_load(config))
        log_hyperparameters(trainer.loggers, values, [*monitored, *REPORT_METRICS])
        for log in trainer.loggers:
            if isinstance(log, TensorBoardLogger):
                log.experiment.add_text("run/commit", commit)
                log.experiment.add_text("run/config", f"```yaml\n{config}\n```")


def _keep_previous(path: Path, text: str, folder: Path) -> None:
    """Copy a file to a folder before its content changes, unless the folder already contains a copy."""
    if path.is_file() and path.read_text() != text and not (folder / path.name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / path.name, path.read_bytes())


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a config to a dictionary whose keys are command-line option names, such as ``model.optimizer.lr``.

    An option whose value is a class is flattened to the class name without the module and one entry per argument in
    ``init_args``. In a list of classes, the class name is part of the option name, for example
    ``trainer.callbacks.CheckpointAndResume.every``.

    Args:
        config: Nested mappings and lists of plain values.
    """
    return dict(entry for name, value in config.items() for entry in _flatten(name, value))


def _flatten(key: str, value: object) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of each option in ``value``, where ``key`` is the name of ``value``."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        entries = {str(index): item for index, item in enumerate(value)}
        if all(isinstance(item, Mapping) and "class_path" in item for item in value):
            entries = {_class_name(item): item.get("init_args") or {} for item in value}
            yield key, ", ".join(entries)
        value = entries
    elif isinstance(value, Mapping) and "class_path" in value:
        yield key, _class_name(value)
        value = value.get("init_args") or {}
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flatten(f"{key}.{name}", item)
    else:
        yield key, value


def log_hyperparameters(loggers: Iterable[Logger], values: Mapping[str, Any], metrics: Iterable[str]) -> None:
    """Log the hyperparameters of a run to every logger.

    Call this function on rank 0, before the first step.

    Args:
        loggers: The trainer's loggers.
        values: Hyperparameters by name, as returned by ``flatten_config``.
        metrics: Names of the metrics that TensorBoard's HPARAMS tab shows next to the hyperparameters.
    """
    for log in loggers:
        if isinstance(log, TensorBoardLogger):
            log.log_hyperparams(dict(values), {})  # writes hparams.yaml only
            plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in values.items()}
            # Lightning writes the HPARAMS tab only if the metrics have values, which do not exist yet.
            experiment, start, _ = hparams(plain, dict.fromkeys(metrics, 0.0))  # type: ignore[no-untyped-call]
            writer = log.experiment.file_writer
            writer.add_summary(experiment)
            writer.add_summary(start)
        else:
            log.log_hyperparams(dict(values))


def _class_name(spec: Mapping[str, Any]) -> str:
    return str(spec["class_path"]).rpartition(".")[2]
