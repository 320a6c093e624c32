"""The resolved config of a run as hyperparameters, for every logger: what its tables of runs are sorted by."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.utils.tensorboard.summary import hparams


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a config to the names that are typed on the command line: ``model.optimizer.lr``.

    A ``class_path`` becomes the name of the class, with its ``init_args`` below it; of a list of classes each class has
    its name as a level: ``trainer.callbacks.CheckpointAndResume.every``.

    Args:
        config: Mappings, lists, numbers and texts.
        prefix: Begins every name.
    """
    found = dict[str, Any]()
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            entries = {str(number): one for number, one in enumerate(value)}
            if all(isinstance(one, Mapping) and "class_path" in one for one in value):
                entries = {_class_name(one): one.get("init_args") or {} for one in value}
                found[key] = ", ".join(entries)
            found |= flattened(entries, f"{key}.")
        elif isinstance(value, Mapping) and "class_path" in value:
            found[key] = _class_name(value)
            found |= flattened(value.get("init_args") or {}, f"{key}.")
        elif isinstance(value, Mapping):
            found |= flattened(value, f"{key}.")
        else:
            found[key] = value
    return found


def log_hyperparameters(loggers: Iterable[Logger], values: Mapping[str, Any], metrics: Iterable[str]) -> None:
    """Give every logger the hyperparameters of a run; one process does this, before the first step.

    Args:
        loggers: The trainer's.
        values: By name, as ``flattened`` makes them.
        metrics: Logged values that TensorBoard's HPARAMS tab shows beside them.
    """
    for log in loggers:
        if isinstance(log, TensorBoardLogger):
            log.log_hyperparams(dict(values), {})  # into hparams.yaml alone
            plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in values.items()}
            writer = log.experiment._get_file_writer()
            # Lightning writes these only with values of the metrics, of which there are none yet.
            experiment, start, _ = hparams(plain, dict.fromkeys(metrics, 0.0))  # type: ignore[no-untyped-call]
            writer.add_summary(experiment)
            writer.add_summary(start)
        else:
            log.log_hyperparams(dict(values))


def _class_name(spec: Mapping[str, Any]) -> str:
    return str(spec["class_path"]).rpartition(".")[2]
