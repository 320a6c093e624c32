"""Settings and callbacks that a run would ignore, contradict, or fail with later: refused before anything starts."""

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
from lrm_pl.training.strategies import require_supported

_OWN_AVERAGE = (
    "checkpoints would not hold its average; use lrm_pl.training.ema.WeightAverage, whose average checkpoints, "
    "validations and `lrm export --average` have"
)

#: Callbacks of Lightning that change what a run is, unknown to its data, its optimizer or its checkpoints: why not, and
#: what to use instead.
_UNSUPPORTED_CALLBACKS: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "data.batch_size counts the objects of a step, however many batches it is "
    "divided into, and that division is one for the whole run: --trainer.accumulate_grad_batches",
    WeightAveraging: _OWN_AVERAGE,
    StochasticWeightAveraging: _OWN_AVERAGE,
    LearningRateFinder: "the learning rate of each step is that of model.optimizer; compare short runs with several "
    "--model.optimizer.lr",
    BatchSizeFinder: "it would train on other samples than the run; `lrm estimate` says which batch fits in memory",
    BaseFinetuning: "a run is one epoch, so nothing would be unfrozen later, and checkpoints hold what the optimizer "
    "has from the start; freeze the encoder (--model.lrm.encoder.frozen true), or let early blocks learn slower with "
    "--model.optimizer.layer_decay",
    ModelPruning: "it renames the weights, which checkpoints would not hold; prune an exported network",
}


def require_supported_settings(trainer: L.Trainer) -> None:
    """Refuse what a run cannot do as its trainer says.

    Raises:
        InputError: A strategy, a precision, a callback or another setting; the message names what to use instead.
    """
    require_supported(trainer.strategy)
    require_supported_precision(str(trainer.precision))
    require_supported_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
    if (algorithm := trainer.gradient_clip_algorithm) not in (None, "norm"):
        raise InputError(
            expected="trainer.gradient_clip_algorithm norm",
            found=f"{algorithm.value}: gradients are clipped by the norm of them all",
            remedy="leave it out",
        )
    clip = trainer.gradient_clip_val
    if clip is not None and not clip >= 0:  # NaN is refused too
        raise InputError(
            expected="trainer.gradient_clip_val of at least 0",
            found=f"{clip}: it is the largest norm of a gradient",
            remedy="0 or null does not clip",
        )
    # Lightning leaves it unset for a time interval.
    interval, accumulate = getattr(trainer, "val_check_interval", None), trainer.accumulate_grad_batches
    if interval is None:
        raise InputError(
            expected="trainer.val_check_interval as a number of batches",
            found="a time: a run is counted in steps",
        )
    if isinstance(interval, int) and interval < 1:
        raise InputError(
            expected="trainer.val_check_interval of at least 1",
            found=interval,
            remedy="--trainer.limit_val_batches 0 trains without validation",
        )
    if (every := trainer.log_every_n_steps) < 0:  # type: ignore[attr-defined]
        raise InputError(
            expected="trainer.log_every_n_steps of at least 0",
            found=every,
            remedy="0 logs no step of training",
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise InputError(
            expected="no trainer.overfit_batches",
            found=f"{trainer.overfit_batches}: the stream of samples would begin anew after so many batches",  # type: ignore[attr-defined]
            remedy="render one object and train on it, as configs/experiment/overfit.yaml does",
        )
    limit = trainer.limit_train_batches
    if limit != 1.0 and not (isinstance(limit, int) and trainer.max_steps * accumulate <= limit):
        raise InputError(
            expected="no trainer.limit_train_batches",
            found=f"{limit}: the stream of samples would begin anew after so many batches",
            remedy="give the length of the run, --trainer.max_steps",
        )
    for name in ("limit_val_batches", "limit_test_batches"):
        measured = getattr(trainer, name)
        if trainer.world_size > 1 and measured not in (0, 1.0) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise InputError(
                expected=f"no trainer.{name}",
                found=(
                    f"{measured}: it counts the objects of each process, so that metrics and the best "
                    "checkpoint would depend on their number"
                ),
                remedy="give --data.val_objects, which counts all, and `lrm validate`",
            )
    if isinstance(interval, int) and interval % accumulate:
        raise InputError(
            expected=(
                "trainer.val_check_interval, which counts batches, to be a multiple of "
                "trainer.accumulate_grad_batches"
            ),
            found=f"{interval} and {accumulate}: weights would be measured within a step",
            remedy=f"give --trainer.val_check_interval {-(-interval // accumulate) * accumulate}",
        )


def require_supported_length(trainer: L.Trainer) -> None:
    """Refuse a length of training that is not counted in steps, and one that no signal could cut short.

    Raises:
        InputError: The trainer counts epochs, or has a minimum.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if trainer.max_epochs not in (None, -1):
        raise InputError(
            expected="trainer.max_epochs -1",
            found=f"{trainer.max_epochs}: a run is one epoch, counted in steps",
            remedy="give its length, --trainer.max_steps",
        )
    if trainer.min_steps is not None or (trainer.min_epochs or 0) > 1:
        name = "min_epochs" if trainer.min_steps is None else "min_steps"
        raise InputError(
            expected=f"no trainer.{name}",
            found=f"{getattr(trainer, name)}: neither signals nor EarlyStopping would end the run before",
            remedy="leave it out",
        )
    if (every := trainer.check_val_every_n_epoch) not in (None, 1):
        raise InputError(
            expected="trainer.check_val_every_n_epoch null",
            found=f"{every}: a run is one epoch, so it would never be validated",
            remedy="give --trainer.val_check_interval, in steps",
        )


def require_supported_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks of Lightning that change what a run is.

    Raises:
        InputError: One of ``_UNSUPPORTED_CALLBACKS``, or a subclass of one.
    """
    for callback in callbacks:
        for kind, why in _UNSUPPORTED_CALLBACKS.items():
            if isinstance(callback, kind):
                raise InputError(
                    expected=f"no {type(callback).__name__} among trainer.callbacks", found=f"one: {why}"
                )


def require_own_optimizer(trainer: L.Trainer) -> None:
    """Reject a custom ``configure_optimizers``: every step sets the learning rate of ``model.optimizer``.

    Raises:
        InputError: An optimizer or a scheduler is not ours.
    """
    optimizers = trainer.optimizers
    own = [type(one).__name__ for one in optimizers if any("share" not in g for g in one.param_groups)]
    own += [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    if own or len(optimizers) != 1:
        raise InputError(
            expected="the AdamW of model.optimizer alone",
            found=(
                f"{', '.join(own) or len(optimizers)} of configure_optimizers: each step's learning rate "
                "and the checkpoints are those of model.optimizer"
            ),
            remedy=(
                "leave configure_optimizers out, and set --model.optimizer.lr, warmup, final_lr, betas, "
                "weight_decay"
            ),
        )


def require_trained(module: nn.Module, trained: nn.Module) -> None:
    """Refuse trainable parameters that the optimizer does not have.

    Args:
        module: The whole.
        trained: The part whose parameters are trained, averaged, and saved in checkpoints.

    Raises:
        InputError: There are some.
    """
    known = {id(parameter) for parameter in trained.parameters()}
    left = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in known]
    if left:
        raise InputError(
            expected="trainable parameters in module.lrm only",
            found=f"{', '.join(left)}: these would be neither trained nor saved",
            remedy="move them into the network, or freeze them with requires_grad_(False)",
        )
