"""LightningCLI for ``lrm fit | validate | test | predict``.

Every constructor argument is a config key and a command-line option. Unknown keys and options are rejected.
"""

import logging
import re
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from lrm_pl import __version__
from lrm_pl.callbacks.scene_writer import SceneWriter
from lrm_pl.callbacks.trace import TraceRecorder
from lrm_pl.checkpoints.index import Checkpoint, read_index
from lrm_pl.checkpoints.network import load_average, load_network
from lrm_pl.checkpoints.selection import read_newest
from lrm_pl.cli.arguments import (
    OWN_CLASSES,
    PARSER_OPTIONS,
    load_class,
    merge_callbacks,
    own_classes,
    reject_empty_sections,
)
from lrm_pl.cli.environment import cluster_environment, require_started_together
from lrm_pl.cli.report import print_report
from lrm_pl.cli.run_record import RunConfigRecord
from lrm_pl.cli.run_start import callbacks_of, checkpointing_of, enter_run_folder, prepare
from lrm_pl.cli.weights import WeightsConfig
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.data.input_framing import measure_framing
from lrm_pl.errors import InputError
from lrm_pl.inference.model_card import weights_name
from lrm_pl.inference.model_folder import hash_weights
from lrm_pl.losses.objective import Objective
from lrm_pl.training.checkpointing import StoppedError
from lrm_pl.training.ema import WeightAverage
from lrm_pl.training.module import LRMModule
from lrm_pl.training.run_folder import (
    RunConfig,
    find_run_folder,
    new_run_folder,
    set_logger_folders,
    trainer_folder,
)
from lrm_pl.training.run_state import set_progress
from lrm_pl.training.strategies import require_supported_start_method, require_supported_strategy_name
from lrm_pl.version import git_commit

logger = logging.getLogger(__name__)

#: Trainer methods that are available as commands.
Command = Literal["fit", "validate", "test", "predict"]


class LRMCLI(LightningCLI):
    """LightningCLI with a run folder, pretrained weights, and a report after a fit.

    All commands share one parser without subcommands because jsonargparse resolves ${...} only in a root parser.

    Args:
        command: Trainer method to run.
        arguments: Arguments after the command.
        records: Whether to write the config to the run's folder.
        exits: Whether to exit on invalid arguments instead of raising ``argparse.ArgumentError``.
    """

    def __init__(
        self, command: Command, arguments: list[str], *, records: bool = True, exits: bool = True
    ) -> None:
        self.command = command
        self._scratch: TemporaryDirectory[str] | None = None
        classes = own_classes(arguments)
        super().__init__(
            load_class("model_class", classes["model_class"], LRMModule),
            load_class("data_class", classes["data_class"], ShardDataModule),
            run=False,
            args=arguments,
            auto_configure_optimizers=False,  # the optimizer is configured by model.optimizer
            save_config_callback=RunConfigRecord if records else None,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs=PARSER_OPTIONS | {"prog": f"lrm {command}", "exit_on_error": exits},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--run.*``, ``--weights.*``, the options for custom classes and, except for fit, ``--ckpt_path``."""
        parser.set_defaults(
            {"model.objective": {"class_path": f"{Objective.__module__}.{Objective.__name__}"}}
        )
        for name, base in OWN_CLASSES.items():
            parser.add_argument(
                f"--{name}", type=str | None, help=f"Subclass of {base} that replaces {base}."
            )
        parser.add_class_arguments(RunConfig, "run")
        parser.add_class_arguments(WeightsConfig, "weights")
        if self.command != "fit":  # fit resumes with --run.resume
            parser.add_argument("--ckpt_path", type=str | None, help="Checkpoint, or the folder of its run.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the given arguments instead of ``sys.argv``.

        Raises:
            InputError: An interpolation cannot be resolved, a section is empty, or the seed is out of range.
        """
        try:
            self.config = parser.parse_args(cast(list[str], args))
        except OmegaConfBaseException as error:
            raise InputError(
                f"cannot resolve ${{...}} in the config: {one_line(error)}",
                remedy="correct the interpolation, or set the key that it refers to",
            ) from error
        reject_empty_sections(self.config, parser.get_defaults())
        seed = self.config.get("seed_everything")
        if isinstance(seed, int) and not 0 <= seed < 2**32:
            raise InputError(
                expected=f"a seed from 0 to {2**32 - 1}", found=seed, remedy="correct --seed_everything"
            )

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder, set it in the loggers, and merge the callbacks.

        Raises:
            InputError: The strategy is not supported, for example Lightning's FSDP or DeepSpeed strategy.
        """
        config, trainer = self.config, self.config.trainer
        if isinstance(trainer.strategy, str):
            require_supported_strategy_name(trainer.strategy)
        elif trainer.strategy is not None:  # Lightning rejects null
            require_supported_strategy_name(trainer.strategy["class_path"])
            require_supported_start_method(trainer.strategy.get("init_args.start_method"))
        if isinstance(trainer.callbacks, Namespace):
            trainer.callbacks = [trainer.callbacks]
        self.portable_config = config.clone()
        self.portable_config.run.folder, self.portable_config.run.resume = RunConfig.folder, RunConfig.resume
        defaults = self.parser.get_defaults().trainer
        folder = self._choose_folder(defaults.logger)
        if self.command == "fit":
            config.run.folder = folder
        if trainer.callbacks:
            shown = trainer.enable_progress_bar is not False
            trainer.callbacks = merge_callbacks(trainer.callbacks, defaults.callbacks, progress_bar=shown)
        elif self.command == "fit":
            logger.warning(
                "trainer.callbacks is empty, so the run does not write checkpoints or images and does not log LPIPS"
            )
        set_logger_folders(trainer.logger, folder)
        if folder is not None:
            trainer.default_root_dir = folder

    def _choose_folder(self, default_logger: Namespace) -> str | None:
        """Return the folder that the command writes into, or None if the first logger determines the folder."""
        run, trainer = self.config.run, self.config.trainer
        if trainer.fast_dev_run:
            self._scratch = TemporaryDirectory(prefix="lrm-fast-dev-run-")
            return self._scratch.name
        if self.command != "fit":  # the logs of the run remain unchanged
            folder = run.folder or find_run_folder(str(self.config.ckpt_path))
            return f"{folder}/{self.command}" if folder else None
        if run.folder is not None:
            return run.folder
        if trainer.default_root_dir is not None and trainer.logger == default_logger:
            trainer.logger["init_args"]["save_dir"] = trainer.default_root_dir
        return new_run_folder(trainer.logger, trainer.default_root_dir)

    def instantiate_classes(self) -> None:
        """Build the model, the data module and the trainer.

        Raises:
            InputError: A class rejects the given arguments, or requires a package that is not installed.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:  # the message of jsonargparse lists every type that was tried
            if (own := _input_error(error)) is not None:
                raise own from None
            match = re.search(
                r"Problem with given class_path '(\S+)':\s+(.+?)(?=\n\s*- Expected|\nGiven|\Z)",
                str(error),
                re.S,
            )
            if match is None:
                raise
            raise InputError(f"cannot create {match[1]}: {' '.join(match[2].split())}") from error

    def instantiate_trainer(self, **options: Any) -> L.Trainer:  # noqa: ANN401 - the trainer's arguments
        """Build the trainer, with ``val_check_interval`` in optimizer steps.

        Raises:
            InputError: Lightning rejects a setting, or would automatically resume from one of Lightning's checkpoints.
        """
        trainer = self.config.trainer
        interval = trainer.val_check_interval
        if not isinstance(interval, int | None):  # Lightning also accepts fractions and times
            raise InputError(
                expected="an integer number of steps as trainer.val_check_interval",
                found=interval,
                remedy="set an integer, such as 500",
            )
        if isinstance(interval, int):  # Lightning counts batches
            options["val_check_interval"] = interval * trainer.accumulate_grad_batches
        if checkpoints := sorted(Path(trainer.default_root_dir or ".").glob("hpc_ckpt_*")):
            raise InputError(
                f"Lightning would automatically load the checkpoint {checkpoints[0]}",
                remedy="move the checkpoint to another folder",
            )
        if (environment := cluster_environment()) is not None:
            plugins = self.config_init["trainer"].get("plugins") or []
            options["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), environment]
        try:
            return super().instantiate_trainer(**options)
        except InputError:
            raise
        except (ValueError, TypeError, ImportError) as error:  # an unknown name, or a missing package
            raise InputError(f"Lightning rejects the trainer's settings: {one_line(error)}") from error

    def run(self) -> None:
        """Run the trainer method of the command, with the steps before and after the method."""
        with self._scratch or nullcontext():
            require_started_together(self.trainer)
            getattr(self, f"before_{self.command}")()
            # Lightning's argument ckpt_path accepts only Lightning checkpoints, so it is not passed here.
            options = {
                "fit": {},
                "predict": {"return_predictions": False},  # a callback writes the predictions
            }.get(self.command, {"verbose": False})  # avoids one table per data loader
            try:
                getattr(self.trainer, self.command)(self.model, datamodule=self.datamodule, **options)
            except RuntimeError as error:
                if error.__context__ is None or "combined_loader" not in str(error):
                    raise
                raise error.__context__ from None  # the error of a data loader that could not start
            getattr(self, f"after_{self.command}")()

    def before_fit(self) -> None:
        """Check the data, load the weights, and choose the checkpoint to resume from."""
        self._prepare(training=True)
        if self.config.run.profile:
            self.trainer.callbacks.append(TraceRecorder(self.config.run.profile))  # type: ignore[attr-defined]
        checkpointing = checkpointing_of(self.trainer)
        if checkpointing is not None:
            checkpointing.keep_signal_handlers = True
        if self.trainer.is_global_zero:
            self._locks = enter_run_folder(self.trainer, self.model.lrm, self.config_init["run"])
            network = self.config_init["weights"].network
            if network is not None and (checkpointing is None or checkpointing.resume_from is None):
                print(f"Initialized the network from {network}")
            for record in callbacks_of(self.trainer, RunConfigRecord):
                record.portable_config = self.portable_config
                record.input_framing = measure_framing(self.datamodule.framing_batches())

    def before_validate(self) -> None:
        """Set up the data, and load the metric network and the checkpoint.

        Raises:
            InputError: ``--ckpt_path`` is missing.
        """
        path = self.config.ckpt_path
        if path is None:
            raise InputError("--ckpt_path is not set", remedy="set --ckpt_path to the checkpoint to evaluate")
        self._prepare(training=False)
        average = self._validates_average()

        def load(checkpoint: Checkpoint) -> Checkpoint:
            load_network(checkpoint, self.model.lrm, average=average)
            return checkpoint

        checkpoint = read_newest(str(path), load)
        set_progress(self.trainer, checkpoint.step)  # the step that metrics are logged at
        self.measured = {"source": checkpoint.path, "step": checkpoint.step, "average": average}

    before_test = before_validate

    def before_predict(self) -> None:
        """Load the checkpoint and add the callback that writes the reconstructions."""
        self.before_validate()
        root = Path(self.config.trainer.default_root_dir or ".")
        record = {
            "network": self.measured | {"sha256": hash_weights(self.model.lrm)},
            "data": self.datamodule.folder,
            "versions": {"lrm_pl": __version__, "commit": git_commit(), "torch": torch.__version__},
        }
        self.scenes = SceneWriter(root if root.name == "predict" else root / "predict", record)
        self.trainer.callbacks.append(self.scenes)  # type: ignore[attr-defined]

    def after_validate(self) -> None:
        """Print each metric once, and print the folder of the images."""
        if self.trainer.is_global_zero:
            table = Table("metric", "value")
            for name, value in sorted(self.trainer.callback_metrics.items()):
                table.add_row(name, f"{float(value):.6g}")
            console = Console()
            console.print(table)
            console.print(f"Images and logs: {trainer_folder(self.trainer)}", soft_wrap=True)

    after_test = after_validate

    def after_predict(self) -> None:
        """Print the folder of the reconstructions."""
        if self.trainer.is_global_zero:
            print(f"Meshes, orbits and grids: {self.scenes.folder}")

    def after_fit(self) -> None:
        """Measure the trained model and print the report.

        Raises:
            StoppedError: The run stopped before its last step, or during the report.
        """
        checkpointing = checkpointing_of(self.trainer)
        checkpoint = "" if checkpointing is None or checkpointing.newest is None else checkpointing.newest

        def check_stop() -> None:
            if checkpointing is not None and checkpointing.signals.received is not None:
                raise StoppedError(
                    "a signal stopped the report after the last step. The checkpoint is "
                    f"{checkpoint or 'not saved'}. To print the report, start the same command with --run.folder "
                    f"{trainer_folder(self.trainer)}"
                )

        try:
            if checkpointing is not None and checkpointing.stopped is not None:
                raise checkpointing.stopped
            if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                print("fast_dev_run: training and validation succeeded; no files were kept")
                return
            averaged = self._load_validated_average(checkpoint)
            self.reports = print_report(
                self.trainer,
                self.model,
                self.datamodule,
                self.perceptual,
                checkpoint,
                check_stop,
                weights_name(average=averaged),
            )
        finally:
            if checkpointing is not None:
                checkpointing.signals.restore()

    def _validates_average(self) -> bool:
        return any(callback.validate for callback in callbacks_of(self.trainer, WeightAverage))

    def _load_validated_average(self, checkpoint: str) -> bool:
        """Load the weight average if validation used it, so that the report measures the same weights."""
        path = self.trainer.strategy.broadcast(checkpoint)  # only rank 0 knows the path
        if averaged := bool(path) and self._validates_average():
            load_average(read_index(path), self.model.lrm)
        return averaged

    def _prepare(self, *, training: bool) -> None:
        weights = self.config_init["weights"]
        self.perceptual = prepare(self.trainer, self.model, self.datamodule, weights, training=training)


def _input_error(error: BaseException | None) -> InputError | None:
    """Return the first ``InputError`` in the chain of causes, or None if there is no such error."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())
