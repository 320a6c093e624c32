"""Evaluation of a trained model in one or several processes."""

import argparse
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track

from lrm_pl.data.schema import Sample, SampleError
from lrm_pl.errors import counted
from lrm_pl.evaluation.baselines import trivial_baselines
from lrm_pl.evaluation.dataset import EvaluationDataset
from lrm_pl.evaluation.features import load_clip, load_inception
from lrm_pl.evaluation.objects import (
    Baselines,
    PerceptualMetrics,
    features_file,
    measure_baselines,
    measure_object,
    reconstruct_sample,
)
from lrm_pl.evaluation.protocols import PROTOCOLS, Protocol, metrics_of
from lrm_pl.evaluation.records import (
    DEFAULT_FOLDER,
    RESULTS_NAME,
    ObjectRecord,
    open_evaluation,
    read_features,
    read_json,
    read_object,
    without_locations,
    write_object,
)
from lrm_pl.evaluation.results import incomplete_means, write_results
from lrm_pl.evaluation.summary import markdown, mean_cells
from lrm_pl.evaluation.tensorboard import SHOWN_OBJECTS, is_shown, show_object
from lrm_pl.inference.find_model import find_model
from lrm_pl.inference.model_folder import hash_weights
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.kernels.device import choose_device
from lrm_pl.storage import StoreError
from lrm_pl.weights.encoders import pretrained_perceptual_loss

#: Interval in seconds between progress messages if the output is not a terminal.
_PROGRESS_S = 30.0

Item = TypeVar("Item")


def evaluate(
    pipeline: LRMPipeline,
    protocol: Protocol,
    objects: EvaluationDataset,
    out: Path,
    perceptual: PerceptualMetrics,
    baselines: Baselines,
    settings: dict[str, Any],
    *,
    rank: int = 0,
    world: int = 1,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Evaluate the objects that have no record yet, and write the results on rank 0.

    Args:
        pipeline: Trained model.
        protocol: Evaluation protocol.
        objects: Objects to evaluate.
        out: Folder of the evaluation.
        perceptual: Networks of the perceptual metrics.
        baselines: Baselines by name.
        settings: Settings that identify the evaluation.
        rank: Rank of this process.
        world: Number of processes.
        console: Console for progress output.

    Returns:
        Results on rank 0, and None on other ranks.
    """
    console = console or Console(quiet=True)
    settings = open_evaluation(out, settings)
    mine = objects.samples[rank::world]
    shown = {key for key, _ in objects.samples[:SHOWN_OBJECTS]}
    todo = [(key, location) for key, location in mine if not is_measured(out, key, shown, baselines)]
    if len(todo) < len(mine):
        console.print(f"Already evaluated: {counted(len(mine) - len(todo), 'object')}")
    for key, location in track_progress(todo, f"Evaluating, {protocol.name}", console):
        try:
            sample = objects.read(location, protocol)
            if is_measured(out, key, shown, ()):  # only the baselines are missing
                _add_baselines(out, key, sample, protocol, perceptual, baselines, pipeline)
                continue
            record, files = measure_object(sample, protocol, pipeline, perceptual, baselines)
        except SampleError as error:
            if isinstance(error.__cause__, StoreError):  # the error may be temporary
                raise
            record, files = ObjectRecord(key, {}, bad=str(error)), {}
        else:
            if key in shown:
                show_object(out, key, reconstruct_sample(pipeline, sample, protocol.inputs[0]))
        write_object(out, record, files)
    if rank:
        return None
    return write_results(out, [key for key, _ in objects.samples], protocol, settings)


def is_measured(out: Path, key: str, shown: Collection[str], baselines: Iterable[str]) -> bool:
    """Return whether the evaluation of an object is complete.

    Args:
        out: Folder of the evaluation.
        key: Id of the object.
        shown: Ids of the objects with an orbit video and a mesh.
        baselines: Names of the required baselines.
    """
    record = read_object(out, key)
    if record is None or record.bad:
        return record is not None
    return set(baselines) <= set(record.rows) and (key not in shown or is_shown(out, key))


def _add_baselines(
    out: Path, key: str, sample: Sample, protocol: Protocol, perceptual: PerceptualMetrics,
    baselines: Baselines, pipeline: LRMPipeline,
) -> None:  # fmt: skip
    """Add the metrics of baselines to the record of an object."""
    record = read_object(out, key)
    assert record is not None, key
    rows, features = measure_baselines(sample, protocol, perceptual, baselines, pipeline.device)
    files = features_file(read_features(out, [key]) | features) if features else {}
    write_object(out, dataclasses.replace(record, rows=record.rows | rows), files)


def track_progress(items: Sequence[Item], description: str, console: Console) -> Iterator[Item]:
    """Iterate over items with a progress bar on a terminal, or with periodic messages otherwise."""
    if console.is_terminal:
        yield from track(items, description, console=console)
        return
    last_s = time.monotonic()
    for number, item in enumerate(items):
        yield item
        if time.monotonic() - last_s > _PROGRESS_S:
            last_s = time.monotonic()
            console.print(f"{description}: {number + 1} of {len(items)}")


def run(
    options: argparse.Namespace, objects: EvaluationDataset, rank: int, world: int, console: Console
) -> None:
    """Run ``lrm evaluate`` in one of several processes.

    Args:
        options: Parsed command line options.
        objects: Objects to evaluate.
        rank: Rank of this process.
        world: Number of processes.
        console: Console for the output.

    Raises:
        InputError: An option or a file is invalid.
    """
    protocol = PROTOCOLS[options.protocol]
    device = choose_device(
        options.device, int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    )
    name = find_model(options.ckpt)
    pipeline = LRMPipeline.from_pretrained(name, average=options.average, config=options.config).to(device)
    manifest = json.dumps([(s.name, s.sha256) for s in objects.manifest.shards]).encode()
    settings = {
        "protocol": json.loads(json.dumps(dataclasses.asdict(protocol))),
        "network": {
            "source": pipeline.source,
            "step": pipeline.step,
            "sha256": pipeline.sha256,
            "framing": dataclasses.asdict(pipeline.framing),
            "renderer": pipeline.model.get("renderer", {}),
        },
        "data": {
            "folder": options.data,
            "shards": hashlib.sha256(manifest).hexdigest(),
            "split": options.split,
            "ids": options.ids,
            "objects": len(objects.samples),
        },
        "baselines": bool(options.baseline),
        "clip": options.clip_sha256.lower() if options.clip else None,
    }
    out = options.out or DEFAULT_FOLDER / f"{protocol.name}-{Path(options.data).name}-{pipeline.sha256[:8]}"
    console.print(f"Model: {pipeline.description}\nProtocol {protocol.name}: {protocol.description}")
    baselines = trivial_baselines(objects) if options.baseline and protocol.targets else {}
    measures_sets = bool(protocol.targets) and (options.fid or options.inception is not None)
    inception = {"inception": options.inception_sha256.lower()} if options.inception_sha256 else {}
    if _is_finished(out, settings | inception, objects, baselines, measures_sets=measures_sets):
        console.print(
            f"All objects have already been evaluated. To evaluate them again, delete {out} or pass another folder "
            "with --out."
        )
        results = read_json(out / RESULTS_NAME) if not rank else None
    else:
        perceptual, measured_with = _load_perceptual(options, protocol, device)
        results = evaluate(
            pipeline, protocol, objects, out, perceptual, baselines, settings | measured_with,
            rank=rank, world=world, console=console,
        )  # fmt: skip
    if results is not None:
        _print_results(results, protocol, objects, options, out, console)


def _is_finished(
    out: Path,
    settings: dict[str, Any],
    objects: EvaluationDataset,
    baselines: Iterable[str],
    *,
    measures_sets: bool,
) -> bool:
    """Return whether a folder contains the results of this evaluation.

    Hashes of weights that are not in ``settings`` are not compared, because the networks have not been loaded.

    Args:
        out: Folder of the evaluation.
        settings: Known settings of the evaluation.
        objects: Objects to evaluate.
        baselines: Names of the required baselines.
        measures_sets: Whether the evaluation includes FID and KID.
    """
    if not (out / RESULTS_NAME).is_file():
        return False
    recorded = without_locations(read_json(out / RESULTS_NAME).get("settings", {}))
    expected = without_locations(json.loads(json.dumps(settings)))
    shown = {key for key, _ in objects.samples[:SHOWN_OBJECTS]}
    return (
        {name: value for name, value in recorded.items() if name in expected} == expected
        and (recorded.get("inception") is not None) == measures_sets
        and all(is_measured(out, key, shown, baselines) for key, _ in objects.samples)
    )


def _load_perceptual(
    options: argparse.Namespace, protocol: Protocol, device: torch.device
) -> tuple[PerceptualMetrics, dict[str, Any]]:
    """Load the networks of the perceptual metrics, and return the networks and the hashes of the weights."""
    perceptual, inception = PerceptualMetrics({}), None
    if protocol.targets:
        lpips = {name: pretrained_perceptual_loss(name).to(device) for name in ("alex", "vgg")}
        clip = load_clip(options.clip, options.clip_sha256, device) if options.clip else None
        features = None
        if options.fid or options.inception:
            features, inception = load_inception(options.inception, options.inception_sha256, device)
        perceptual = PerceptualMetrics(lpips, clip, features)
    lpips_sha256 = {name: hash_weights(loss.network) for name, loss in perceptual.lpips.items()}
    return perceptual, {"lpips": lpips_sha256, "inception": inception}


def _print_results(
    results: dict[str, Any], protocol: Protocol, objects: EvaluationDataset, options: argparse.Namespace, out: Path,
    console: Console,
) -> None:  # fmt: skip
    """Print the table of results and possible next commands."""
    console.print(
        f"Evaluated {results['objects']} of {len(objects.samples)} objects of the split {options.split!r} "
        f"in {options.data}:"
    )
    console.print(markdown(mean_cells(results["mean"], metrics_of(protocol))))
    if short := incomplete_means(results):
        console.print(f"Some means include fewer objects: {short}")
    notes = {key: "; ".join(each) for key, each in results["notes"].items()}
    for key, reason in (results["failed"] | notes).items():
        console.print(f"  {key}: {reason}")
    console.print(f"Page: {out / 'index.html'}; results: {out / RESULTS_NAME}, {out / 'results.md'}")
    console.print(f"Compare: lrm evaluate --compare {out} OTHER   TensorBoard: tensorboard --logdir {out}")
