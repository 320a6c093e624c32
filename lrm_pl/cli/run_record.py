"""Callback that stores the config, the git commit and the input framing with a run."""

from pathlib import Path

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from lrm_pl.cli.hyperparameters import flatten_config, log_hyperparameters
from lrm_pl.cli.report import REPORT_METRICS
from lrm_pl.data.input_framing import InputFraming
from lrm_pl.data.manifest import write_atomically
from lrm_pl.inference.model_folder import FRAMING_NAME, framing_yaml
from lrm_pl.training.checkpointing import CheckpointAndResume
from lrm_pl.training.run_folder import trainer_folder
from lrm_pl.version import git_commit


class RunConfigRecord(SaveConfigCallback):
    """Callback that writes the resolved config, the git commit and the input framing to the run's folder.

    The config and the commit are also written to the loggers. The files describe the latest start of the run. If a
    start changes a file, the previous version is kept in ``earlier/until-step-N``.

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
    """Copy a file that is about to change into a folder, unless the folder already contains a copy."""
    if path.is_file() and path.read_text() != text and not (folder / path.name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / path.name, path.read_bytes())
