"""Logging of a run's resolved config as hyperparameters."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.utils.tensorboard.summary import hparams


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a config to the option names of the command line, such as ``model.optimizer.lr``.

    The value of a class is the last part of ``class_path``, and the names of ``init_args`` follow the name of the
    option. In a list of classes, the class name is part of the option name, for example
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
