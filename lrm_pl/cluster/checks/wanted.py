"""What a run asks for: its config, as `lrm fit` would read it, without making the model."""

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
class Weights:
    """One file of pretrained weights: the entry, and where the config looks for it."""

    name: WeightName
    source: WeightSource
    path: str | None
    sha256: str | None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a run asks of the machines.

    Attributes:
        nodes: Machines.
        processes: Processes a machine.
        gpus: GPUs a machine; 0 on CPUs.
        precision: Lightning's name of it.
        accumulate: Batches accumulated into an optimizer step.
        batch_size: Objects an optimizer step.
        views: Views an object must have.
        workers: Loader workers a process.
        bounds: ``bounds`` of the renderer.
        sets: The data sets.
        run: Folder that the run writes into.
        weights: Pretrained files that it starts from or measures with.
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
    weights: tuple[Weights, ...]


def read_wanted(arguments: list[str]) -> Wanted:
    """Read the arguments of `lrm fit`.

    Raises:
        InputError: `lrm fit` would refuse them.
    """
    config = parse_fit(arguments)
    trainer, data = config["trainer"], config["data"]
    accelerator = trainer["accelerator"]
    on_gpus = requires_gpu(accelerator) or num_visible_gpus(accelerator) > 0
    processes = process_count(trainer["devices"], num_visible_gpus(accelerator) if on_gpus else 1)
    return Wanted(
        nodes=trainer["num_nodes"],
        processes=processes,
        gpus=processes if on_gpus else 0,
        precision=str(trainer["precision"]),
        accumulate=trainer["accumulate_grad_batches"],
        batch_size=data["batch_size"],
        views=config["model"]["lrm"]["input_views"] + data["side_views"] + data["unseen_views"],
        workers=data["workers"],
        bounds=config["model"]["renderer"]["bounds"],
        sets=(DataSet(data["folder"], data["weight"]), *(DataSet(**vars(one)) for one in data["also"])),
        run=Path(config.get("run.folder") or "runs"),
        weights=_weights(config),
    )


def process_count(devices: int | str | list[int], available: int) -> int:
    """Return how many processes Lightning's ``devices`` starts on a node, of which -1 and "auto" mean all there are."""
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return max(1, available)
    chosen = [part for part in str(devices).split(",") if part]
    return len(chosen) if "," in str(devices) else int(chosen[0])


def _weights(config: Namespace) -> tuple[Weights, ...]:
    given: WeightsConfig = config["weights"]
    files: list[tuple[WeightName, WeightsFile]] = [("lpips_alex", given.lpips_alex)]
    if config.get("model.objective.init_args.lpips", 1.0):
        files.insert(0, ("lpips_vgg", given.lpips_vgg))
    encoder = config["model"]["lrm"]["encoder"]["name"]
    if given.pretrained and given.network is None and (name := catalog_name(encoder)) is not None:
        files.insert(0, (name, given.encoder))  # of others the hub is asked, or the user's file taken
    return tuple(Weights(name, given.source, file.path, file.sha256) for name, file in files)
