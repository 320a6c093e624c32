"""Requirements of a run, as read from the config."""

import dataclasses
from pathlib import Path

from jsonargparse import Namespace

from lrm_pl.cli.fit_config import parse_fit
from lrm_pl.cli.weights import WeightsConfig, WeightsFile, catalog_name
from lrm_pl.data.mixture import DataSet
from lrm_pl.kernels.device import num_visible_gpus, requires_gpu
from lrm_pl.weights.catalog import WeightName
from lrm_pl.weights.resolve import WeightSource


@dataclasses.dataclass(frozen=True)
class RequiredWeights:
    """A file of pretrained weights.

    Attributes:
        name: Name of the weights in the catalog.
        source: Value of ``weights.source`` in the config.
        path: Path of the file in the config, or None.
        sha256: SHA-256 of the file in the config, or None.
    """

    name: WeightName
    source: WeightSource
    path: str | None
    sha256: str | None


@dataclasses.dataclass(frozen=True)
class RunRequirements:
    """Requirements of a run.

    Attributes:
        nodes: Number of nodes.
        processes: Number of processes per node.
        gpus: Number of GPUs per node. If 0, the run uses CPUs.
        precision: Lightning's name of the precision.
        accumulate: Number of accumulated batches per optimizer step.
        batch_size: Number of objects per optimizer step.
        views: Number of views per object.
        workers: Number of data loader workers per process.
        bounds: Value of ``bounds`` of the renderer.
        sets: The data sets.
        run: Folder of the run.
        weights: Files of pretrained weights.
    """

    nodes: int
    processes: int
    gpus: int
    precision: str
    accumulate: int
    batch_size: int
    views: int
    workers: int
    bounds: str
    sets: tuple[DataSet, ...]
    run: Path
    weights: tuple[RequiredWeights, ...]


def read_requirements(arguments: list[str]) -> RunRequirements:
    """Read the requirements of a run from the arguments of ``lrm fit``.

    Raises:
        InputError: ``lrm fit`` would reject the arguments.
    """
    config = parse_fit(arguments)
    trainer, data = config["trainer"], config["data"]
    accelerator = trainer["accelerator"]
    on_gpus = requires_gpu(accelerator) or num_visible_gpus(accelerator) > 0
    processes = process_count(trainer["devices"], num_visible_gpus(accelerator) if on_gpus else 1)
    return RunRequirements(
        nodes=trainer["num_nodes"],
        processes=processes,
        gpus=processes if on_gpus else 0,
        precision=str(trainer["precision"]),
        accumulate=trainer["accumulate_grad_batches"],
        batch_size=data["batch_size"],
        views=config["model"]["lrm"]["input_views"] + data["side_views"] + data["unseen_views"],
        workers=data["workers"],
        bounds=config["model"]["renderer"]["bounds"],
        sets=(DataSet(data["folder"], data["weight"]), *(DataSet(**vars(also)) for also in data["also"])),
        run=Path(config.get("run.folder") or "runs"),
        weights=_required_weights(config),
    )


def process_count(devices: int | str | list[int], available: int) -> int:
    """Return the number of processes per node.

    Args:
        devices: Value of ``trainer.devices``. -1 and "auto" select all available devices.
        available: Number of available devices.
    """
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return max(1, available)
    indices = [index for index in str(devices).split(",") if index]
    return len(indices) if "," in str(devices) else int(indices[0])


def _required_weights(config: Namespace) -> tuple[RequiredWeights, ...]:
    weights: WeightsConfig = config["weights"]
    files: list[tuple[WeightName, WeightsFile]] = [("lpips_alex", weights.lpips_alex)]
    if config.get("model.objective.init_args.lpips", 1.0):
        files.insert(0, ("lpips_vgg", weights.lpips_vgg))
    encoder = config["model"]["lrm"]["encoder"]["name"]
    if weights.pretrained and weights.network is None and (name := catalog_name(encoder)) is not None:
        files.insert(0, (name, weights.encoder))
    return tuple(RequiredWeights(name, weights.source, file.path, file.sha256) for name, file in files)
