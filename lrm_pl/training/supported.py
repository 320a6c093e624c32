"""Checks that reject unsupported settings and callbacks of the trainer before training starts."""

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

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

from lrm_pl.errors import InputError, counted
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


#: Trainer setting -> remedy for an unsupported value. The default remedy is to correct or omit it.
_REMEDIES = {
    "log_every_n_steps": "use 0 to disable logging of training steps",
    "overfit_batches": "to overfit, train on a dataset of one object, as configs/experiment/overfit.yaml does",
    "limit_train_batches": "set the length of the run with --trainer.max_steps",
    "max_epochs": "set the length of the run with --trainer.max_steps",
    "check_val_every_n_epoch": "set the interval of validations with --trainer.val_check_interval",
    "gradient_clip_val": "use 0 or null to disable clipping",
    "limit_val_batches": "use --data.val_objects, the number of objects over all processes",
    "limit_test_batches": "use --data.val_objects, the number of objects over all processes",
}


def require_rules(
    owner: object, section: str, rules: Mapping[str, bool], remedies: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Check that settings satisfy a set of rules.

    Args:
        owner: Object whose attributes are the settings.
        section: Prefix of the settings in the config.
        rules: Mapping from a rule to whether it is satisfied. A rule begins with the name of a setting.
        remedies: Mapping from the name of a setting to a remedy. The default remedy is to correct or omit it.

    Raises:
        InputError: A rule is not satisfied.
    """
    for rule, holds in rules.items():
        if not holds:
            name = rule.replace(",", " ").split()[0]
            found = getattr(owner, name)
            remedy = remedies.get(name, f"correct or omit --{section}.{name}")
            raise InputError(
                expected=f"{section}.{rule}", found=getattr(found, "value", found), remedy=remedy
            )


def require_supported_settings(trainer: Any) -> None:  # noqa: ANN401 - Lightning does not declare all attributes
    """Reject unsupported settings of a trainer.

    Raises:
        InputError: The strategy, the precision, a callback or another setting is not supported. The message suggests an
            alternative.
    """
    require_supported_strategy(trainer.strategy)
    require_supported_precision(str(trainer.precision))
    require_supported_callbacks(trainer.callbacks)
    clip, limit = trainer.gradient_clip_val, trainer.limit_train_batches
    accumulate, one_process = trainer.accumulate_grad_batches, trainer.world_size == 1 or trainer.fast_dev_run
    whole = limit == 1.0 or (isinstance(limit, int) and trainer.max_steps * accumulate <= limit)
    rules = {
        "gradient_clip_algorithm norm": trainer.gradient_clip_algorithm in (None, "norm"),
        "gradient_clip_val, a maximum norm, of at least 0": clip is None or clip >= 0,  # False for NaN
        "log_every_n_steps of at least 0": trainer.log_every_n_steps >= 0,
        "overfit_batches 0, because the sample stream would restart": not trainer.overfit_batches,
        "limit_train_batches 1.0, because the sample stream would restart": whole,
    }
    for name in ("limit_val_batches", "limit_test_batches"):
        rule = f"{name} 1.0, so that metrics do not depend on the number of processes"
        rules[rule] = one_process or getattr(trainer, name) in (0, 1.0)
    require_rules(trainer, "trainer", rules, _REMEDIES)
    interval = getattr(trainer, "val_check_interval", None)  # Lightning does not set it for a duration
    if interval is None or (isinstance(interval, int) and (interval < 1 or interval % accumulate)):
        multiple = max(1, -(-(interval or 1) // accumulate)) * accumulate
        raise InputError(
            expected=f"trainer.val_check_interval to be a positive multiple of accumulate_grad_batches {accumulate}",
            found="a duration" if interval is None else interval,
            remedy=(
                f"use --trainer.val_check_interval {multiple}, or --trainer.limit_val_batches 0 to disable "
                "validation"
            ),
        )


def require_supported_length(trainer: Any) -> None:  # noqa: ANN401 - Lightning does not declare all attributes
    """Check that the length of a run is determined only by the maximum number of steps.

    Raises:
        InputError: The trainer has a maximum number of epochs, a minimum length, or a validation interval in epochs.
    """
    rules = {
        "max_epochs -1, because a run has one epoch": trainer.max_epochs in (None, -1),
        "min_steps null, because it disables signals and EarlyStopping": trainer.min_steps is None,
        "min_epochs null, because it disables signals and EarlyStopping": (trainer.min_epochs or 0) <= 1,
        "check_val_every_n_epoch null, because a run has one epoch": trainer.check_val_every_n_epoch
        in (None, 1),
    }
    if not trainer.fast_dev_run:
        require_rules(trainer, "trainer", rules, _REMEDIES)


def require_supported_callbacks(callbacks: Sequence[Callback]) -> None:
    """Reject Lightning callbacks that are incompatible with the data, the optimizer or the checkpoints of a run.

    Raises:
        InputError: A callback is not supported.
    """
    for callback, unsupported in itertools.product(callbacks, _UNSUPPORTED_CALLBACKS):
        if isinstance(callback, unsupported):
            reason, alternative = _UNSUPPORTED_CALLBACKS[unsupported]
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
            expected="only the AdamW optimizer of model.optimizer",
            found=f"{', '.join(custom) or counted(len(optimizers), 'optimizer')} from configure_optimizers",
            remedy="remove configure_optimizers, and set --model.optimizer.lr, warmup, betas and weight_decay",
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
            remedy="move the parameters into the network, or freeze them with requires_grad_(False)",
        )
