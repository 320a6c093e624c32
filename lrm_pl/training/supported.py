"""Settings of a trainer that a run would ignore, or fail with later: refused before anything starts."""

import lightning as L
from torch import nn

from lrm_pl.errors import InputError
from lrm_pl.training.precision import require_supported_precision
from lrm_pl.training.strategies import require_supported


def require_supported_settings(trainer: L.Trainer) -> None:
    """Refuse what a run cannot do as its trainer says.

    Raises:
        InputError: A strategy, a precision or another setting; the message names what to use instead.
    """
    require_supported(trainer.strategy)
    require_supported_precision(str(trainer.precision))
    if (algorithm := trainer.gradient_clip_algorithm) not in (None, "norm"):
        raise InputError(
            f"expected trainer.gradient_clip_algorithm norm, found {algorithm.value}: gradients are clipped by "
            "the norm of them all; leave it out"
        )
    interval, accumulate = trainer.val_check_interval, trainer.accumulate_grad_batches
    limit = trainer.limit_train_batches
    if limit != 1.0 and not (isinstance(limit, int) and trainer.max_steps * accumulate <= limit):
        raise InputError(
            f"expected no trainer.limit_train_batches, found {limit}: the stream of samples "
            "would begin anew after so many batches; give the length of the run, --trainer.max_steps"
        )
    measured = trainer.limit_val_batches
    if trainer.world_size > 1 and measured not in (0, 1.0) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise InputError(
            f"expected no trainer.limit_val_batches, found {measured}: it counts the objects of each process, so that "
            "metrics and the best checkpoint would depend on their number; give --data.val_objects, which counts all"
        )
    if isinstance(interval, int) and interval % accumulate:
        raise InputError(
            f"expected trainer.val_check_interval, which counts batches, to be a multiple of "
            f"trainer.accumulate_grad_batches, found {interval} and {accumulate}: weights would be measured within a "
            f"step; give --trainer.val_check_interval {-(-interval // accumulate) * accumulate}"
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
            f"expected trainable parameters in module.lrm only, found {', '.join(left)}: these would be neither "
            "trained nor saved; move them into the network, or freeze them with requires_grad_(False)"
        )
