"""Checks that reject unsupported settings and callbacks of the trainer before training starts."""

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from lrm_pl.errors import InputError
from lrm_pl.training.precision import require_supported_precision
from lrm_pl.training.strategies import require_supported_strategy

_AVERAGING = (
    "checkpoints do not store its average",
    "use lrm_pl.training.ema.WeightAverage, which checkpoints, validation and `lrm export --average` support",
)

#: Unsupported Lightning callback -> (reason, alternative).
_UNSUPPORTED_CALLBACKS: dict[type[Callback], tuple[str, str]] = {
    GradientAccumulationScheduler: (
        "data.batch_size is the number of objects per step, divided into the same number of batches in all steps",
        "use --trainer.accumulate_grad_batches",
    ),
    WeightAveraging: _AVERAGING,
    StochasticWeightAveraging: _AVERAGING,
    LearningRateFinder: (
        "model.optimizer sets the learning rate of each step",
        "compare short runs with several --model.optimizer.lr",
    ),
    BatchSizeFinder: (
        "it trains on samples that the run does not train on",
        "use `lrm estimate` to find the batch size that fits in memory",
    ),
    BaseFinetuning: (
        "a run has one epoch, so nothing would be unfrozen, and checkpoints store the initial optimizer groups",
        "freeze the encoder (--model.lrm.encoder.frozen true), or lower the learning rate of early blocks with "
        "--model.optimizer.layer_decay",
    ),
    ModelPruning: ("it renames weights, which checkpoints would not store", "prune an exported network"),
}


def require_supported_settings(trainer: L.Trainer) -> None:
    """Reject unsupported settings of a trainer.

    Raises:
        InputError: The strategy, the precision, a callback or a different setting is not supported. The message names
            an alternative.
    """
    require_supported_strategy(trainer.strategy)
    require_supported_precision(str(trainer.precision))
    require_supported_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
    _require_supported_clipping(trainer)
    if (every := trainer.log_every_n_steps) < 0:  # type: ignore[attr-defined]
        raise InputError(
            expected="trainer.log_every_n_steps of at least 0",
            found=every,
            remedy="use 0 to disable logging of training steps",
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise InputError(
            expected="no trainer.overfit_batches",
            found=f"{trainer.overfit_batches}, after which the sample stream would restart",  # type: ignore[attr-defined]
            remedy="to overfit, train on a dataset of one object, as configs/experiment/overfit.yaml does",
        )
    limit = trainer.limit_train_batches
    steps = trainer.max_steps * trainer.accumulate_grad_batches
    if limit != 1.0 and not (isinstance(limit, int) and steps <= limit):
        raise InputError(
            expected="no trainer.limit_train_batches",
            found=f"{limit}, after which the sample stream would restart",
            remedy="set the length of the run with --trainer.max_steps",
        )
    _require_supported_validation(trainer)


def _require_supported_clipping(trainer: L.Trainer) -> None:
    if (algorithm := trainer.gradient_clip_algorithm) not in (None, "norm"):
        raise InputError(
            expected="trainer.gradient_clip_algorithm norm", found=algorithm.value, remedy="omit the option"
        )
    clip = trainer.gradient_clip_val
    if clip is not None and not clip >= 0:  # also rejects NaN
        raise InputError(
            expected="trainer.gradient_clip_val, a maximum norm, of at least 0",
            found=clip,
            remedy="use 0 or null to disable clipping",
        )


def _require_supported_validation(trainer: L.Trainer) -> None:
    # Lightning does not set the attribute for a time interval.
    interval, accumulate = getattr(trainer, "val_check_interval", None), trainer.accumulate_grad_batches
    if interval is None:
        raise InputError(
            expected="trainer.val_check_interval as a number of batches",
            found="a duration",
            remedy="use a number of batches, since the length of a run is counted in steps",
        )
    if isinstance(interval, int) and interval < 1:
        raise InputError(
            expected="trainer.val_check_interval of at least 1",
            found=interval,
            remedy="to disable validation, use --trainer.limit_val_batches 0",
        )
    if isinstance(interval, int) and interval % accumulate:
        raise InputError(
            expected=(
                f"trainer.val_check_interval, in batches, as a multiple of trainer.accumulate_grad_batches {accumulate}"
            ),
            found=interval,
            remedy=f"use --trainer.val_check_interval {-(-interval // accumulate) * accumulate}",
        )
    for name in ("limit_val_batches", "limit_test_batches"):
        limit = getattr(trainer, name)
        if trainer.world_size > 1 and limit not in (0, 1.0) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise InputError(
                expected=f"no trainer.{name}",
                found=f"{limit}, which would make metrics and the best checkpoint depend on the number of processes",
                remedy="use --data.val_objects, the number of objects over all processes",
            )


def require_supported_length(trainer: L.Trainer) -> None:
    """Check that the length of a run is given only by a maximum number of steps.

    Raises:
        InputError: The trainer has a maximum number of epochs, a minimum length, or a validation interval in epochs.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if trainer.max_epochs not in (None, -1):
        raise InputError(
            expected="trainer.max_epochs -1, since a run has one epoch",
            found=trainer.max_epochs,
            remedy="set the length of the run with --trainer.max_steps",
        )
    if trainer.min_steps is not None or (trainer.min_epochs or 0) > 1:
        name = "min_epochs" if trainer.min_steps is None else "min_steps"
        raise InputError(
            expected=f"no trainer.{name}",
            found=f"{getattr(trainer, name)}, which would disable signals and EarlyStopping until then",
            remedy="omit the option",
        )
    if (every := trainer.check_val_every_n_epoch) not in (None, 1):
        raise InputError(
            expected="trainer.check_val_every_n_epoch null, since a run has one epoch",
            found=every,
            remedy="set the interval of validations with --trainer.val_check_interval",
        )


def require_supported_callbacks(callbacks: Sequence[Callback]) -> None:
    """Reject Lightning callbacks that are incompatible with the data, the optimizer or the checkpoints of a run.

    Raises:
        InputError: A callback is not supported.
    """
    for callback in callbacks:
        for unsupported, (reason, alternative) in _UNSUPPORTED_CALLBACKS.items():
            if isinstance(callback, unsupported):
                name = type(callback).__name__
                raise InputError(f"The callback {name} is not supported: {reason}", remedy=alternative)


def require_builtin_optimizer(trainer: L.Trainer) -> None:
    """Reject a custom ``configure_optimizers``, because ``LRMModule`` sets the learning rate of each step.

    Raises:
        InputError: The optimizer was not created by ``OptimizerConfig``, or there is a scheduler.
    """
    optimizers = trainer.optimizers
    custom = [type(one).__name__ for one in optimizers if any("lr_scale" not in g for g in one.param_groups)]
    custom += [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    if custom or len(optimizers) != 1:
        raise InputError(
            expected="only the AdamW of model.optimizer",
            found=f"{', '.join(custom) or len(optimizers)} from configure_optimizers",
            remedy=(
                "remove configure_optimizers, and set --model.optimizer.lr, warmup, final_lr, betas and weight_decay"
            ),
        )


def require_optimized_parameters(module: nn.Module, network: nn.Module) -> None:
    """Check that all trainable parameters of a module are parameters of the network.

    Args:
        module: The LightningModule.
        network: The submodule whose parameters are optimized, averaged and saved.

    Raises:
        InputError: The module has trainable parameters outside of the network.
    """
    optimized = {id(parameter) for parameter in network.parameters()}
    others = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in optimized]
    if others:
        raise InputError(
            expected="trainable parameters in module.lrm only",
            found=f"{', '.join(others)}, which would be neither optimized nor saved",
            remedy="move them into the network, or freeze them with requires_grad_(False)",
        )
