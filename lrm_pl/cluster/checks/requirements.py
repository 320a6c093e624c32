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
class RunRequirements:
    """Requirements of a run.

    Attributes:
        nodes: Number of nodes.
        processes: Number of processes per node.
        gpus: Number of GPUs per node. If 0, the run uses CPUs.
        precision: Value of ``trainer.precision``, for example ``bf16-mixed``.
        accumulate: Number of accumulated batches per optimizer step.
        batch_size: Number of objects per optimizer step.
        views: Number of views per object.
        workers: Number of data loader workers per process.
        bounds: Value of ``model.renderer.bounds``.
        sets: The data sets.
        run: Folder of the run.
        weights: Mapping from names in the weight catalog to files of pretrained weights.
        source: Value of ``weights.source`` in the config.
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
    weights: dict[WeightName, WeightsFile]
    source: WeightSource


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
        source=config["weights"].source,
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


def _required_weights(config: Namespace) -> dict[WeightName, WeightsFile]:
    weights: WeightsConfig = config["weights"]
    encoder = catalog_name(config["model"]["lrm"]["encoder"]["name"])
    files: dict[WeightName, WeightsFile] = {}
    if weights.pretrained and weights.network is None and encoder is not None:
        files[encoder] = weights.encoder
    if config.get("model.objective.init_args.lpips", 1.0):
        files["lpips_vgg"] = weights.lpips_vgg
    return files | {"lpips_alex": weights.lpips_alex}
