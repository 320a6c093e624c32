"""Measure a trained network: what is not measured yet, on each of several processes; then what it comes to."""

import argparse
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
    Baseline,
    PerceptualMetrics,
    Reconstruct,
    features_file,
    input_view,
    measure_baselines,
    measure_object,
)
from lrm_pl.evaluation.protocols import PROTOCOLS, Protocol, metrics_of
from lrm_pl.evaluation.records import (
    DEFAULT_FOLDER,
    RESULTS_NAME,
    SETTINGS_NAME,
    ObjectRecord,
    open_evaluation,
    read_features,
    read_json,
    read_object,
    without_locations,
    write_object,
)
from lrm_pl.evaluation.results import finish, incomplete_means
from lrm_pl.evaluation.summary import table
from lrm_pl.evaluation.tensorboard import SHOWN_OBJECTS, is_shown, show_object
from lrm_pl.geometry.cameras import PosedCamera, canonicalize
from lrm_pl.inference.find_model import find_model
from lrm_pl.inference.model_folder import hash_weights
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.inference.scene import Scene
from lrm_pl.kernels.device import choose_device
from lrm_pl.storage import StoreError
from lrm_pl.weights.encoders import pretrained_perceptual_loss

#: Seconds between two lines that say how far it is.
_SAY_S = 30.0

Thing = TypeVar("Thing")


def evaluate(
    pipeline: LRMPipeline,
    protocol: Protocol,
    objects: EvaluationDataset,
    out: Path,
    perceptual: PerceptualMetrics,
    baselines: Mapping[str, Baseline],
    settings: dict[str, Any],
    *,
    rank: int = 0,
    world: int = 1,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Measure what is not measured yet; the first process then writes the results.

    Args:
        pipeline: The trained model.
        protocol: What is measured.
        objects: Of which objects.
        out: The evaluation's folder.
        perceptual: What images are measured with.
        baselines: What else is measured.
        settings: What the folder is claimed for.
        rank: Number of this process.
        world: Number of processes.
        console: Where progress is shown.

    Returns:
        The results, on rank 0.
    """
    console = console or Console(quiet=True)
    settings = open_evaluation(out, settings)
    mine = objects.samples[rank::world]
    shown = {key for key, _ in objects.samples[:SHOWN_OBJECTS]}
    todo = [(key, place) for key, place in mine if not is_measured(out, key, shown, baselines)]
    if len(todo) < len(mine):
        console.print(f"measured already: {counted(len(mine) - len(todo), 'object')}")
    for key, place in track_progress(todo, f"Measuring, {protocol.name}", console):
        try:
            sample = objects.read(place, protocol)
            if is_measured(out, key, shown, ()):  # but for the baselines
                _add_baselines(out, key, sample, protocol, perceptual, baselines, pipeline)
                continue
            measured = measure_object(sample, protocol, reconstructor(pipeline), perceptual, baselines)
        except SampleError as error:
            if isinstance(error.__cause__, StoreError):  # it may answer the next time
                raise
            write_object(out, ObjectRecord(key, {}, bad=str(error)), {})
        else:
            if key in shown:
                show_object(out, key, reconstruct_sample(pipeline, sample, protocol.inputs[0]))
            files = measured.files
            write_object(out, ObjectRecord(key, measured.rows, measured.notes, files=tuple(files)), files)
    if rank:
        return None
    return finish(out, [key for key, _ in objects.samples], protocol, settings)


def is_measured(out: Path, key: str, shown: Collection[str], baselines: Iterable[str]) -> bool:
    """Say whether an object has its record, with these baselines, and what is shown of it."""
    record = read_object(out, key)
    if record is None or record.bad:
        return record is not None
    return set(baselines) <= set(record.rows) and (key not in shown or is_shown(out, key))


def _add_baselines(
    out: Path, key: str, sample: Sample, protocol: Protocol, perceptual: PerceptualMetrics,
    baselines: Mapping[str, Baseline], pipeline: LRMPipeline,
) -> None:  # fmt: skip
    """Add baselines to the record of an object."""
    record = read_object(out, key)
    assert record is not None, key
    device = pipeline.device
    rows, features = measure_baselines(sample, protocol, perceptual, baselines, device)
    files = features_file(read_features(out, [key]) | features) if features else {}
    write_object(out, dataclasses.replace(record, rows=record.rows | rows), files)


def track_progress(things: Sequence[Thing], what: str, console: Console) -> Iterator[Thing]:
    """Go through things, and say how far it is: a bar on a terminal, else a line now and then."""
    if console.is_terminal:
        yield from track(things, what, console=console)
        return
    told = time.monotonic()
    for number, thing in enumerate(things):
        yield thing
        if time.monotonic() - told > _SAY_S:
            told = time.monotonic()
            console.print(f"{what}: {number + 1} of {len(things)}")


def reconstructor(pipeline: LRMPipeline) -> Reconstruct:
    """Return a function that reconstructs input views with their own cameras."""
    return lambda image, c2w, fxfycxcy: pipeline(image, PosedCamera(c2w, fxfycxcy))


def reconstruct_sample(pipeline: LRMPipeline, sample: Sample, view: int) -> Scene:
    """Reconstruct an object from one of its views.

    Raises:
        SampleError: The view cannot be read, or shows nothing.
    """
    c2w = canonicalize(torch.from_numpy(sample.c2w[[view]]))
    return reconstructor(pipeline)(input_view(sample, view), c2w[0], torch.from_numpy(sample.fxfycxcy[view]))


def run(
    given: argparse.Namespace, objects: EvaluationDataset, rank: int, world: int, console: Console
) -> None:
    """Do what the command's options say, on one of several processes.

    Args:
        given: Parsed options of `lrm evaluate`.
        objects: Those that they name.
        rank: Number of this process.
        world: Number of processes.
        console: Where it is said.

    Raises:
        InputError: Something is not what it should be.
    """
    protocol = PROTOCOLS[given.protocol]
    place = choose_device(given.device, int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))))
    name = find_model(given.ckpt)
    pipeline = LRMPipeline.from_pretrained(name, average=given.average, config=given.config).to(place)
    manifest = json.dumps([(s.name, s.sha256) for s in objects.manifest.shards]).encode()
    settings = {
        "protocol": json.loads(
            json.dumps(vars(protocol) | {"geometry": vars(protocol.surface) if protocol.surface else None})
        ),
        "network": {
            "source": pipeline.source,
            "step": pipeline.step,
            "sha256": pipeline.sha256,
            "framing": dataclasses.asdict(pipeline.framing),
            "renderer": pipeline.model.get("renderer", {}),
        },
        "data": {
            "folder": given.data,
            "shards": hashlib.sha256(manifest).hexdigest(),
            "split": given.split,
            "ids": given.ids,
            "objects": len(objects.samples),
        },
        "baselines": bool(given.baseline),
        "clip": given.clip_sha256.lower() if given.clip else None,
    }
    out = given.out or DEFAULT_FOLDER / f"{protocol.name}-{Path(given.data).name}-{pipeline.sha256[:8]}"
    console.print(f"Model: {pipeline.description}\nProtocol {protocol.name}: {protocol.description}")
    baselines = trivial_baselines(objects) if given.baseline and protocol.targets else {}
    if _is_finished(out, settings, objects, baselines, given):
        console.print(
            f"All of it is measured already; to measure again, delete {out}, or choose another --out."
        )
        results = read_json(out / RESULTS_NAME) if not rank else None
    else:
        perceptual, measured_with = _judges(given, protocol, place)
        results = evaluate(
            pipeline, protocol, objects, out, perceptual, baselines, settings | measured_with,
            rank=rank, world=world, console=console,
        )  # fmt: skip
    if results is not None:
        _say(results, protocol, objects, given, out, console)


def _is_finished(
    out: Path,
    settings: dict[str, Any],
    objects: EvaluationDataset,
    baselines: Iterable[str],
    given: argparse.Namespace,
) -> bool:
    """Say whether a folder holds the results of such an evaluation, whatever LPIPS networks they were measured with."""
    if not (out / RESULTS_NAME).is_file() or not (out / SETTINGS_NAME).is_file():
        return False
    found = read_json(out / SETTINGS_NAME)
    expected = without_locations(json.loads(json.dumps(settings)))
    same = {name: value for name, value in without_locations(found).items() if name in expected} == expected
    inception = found.get("inception")
    wanted = bool(settings["protocol"]["targets"]) and (given.fid or given.inception is not None)
    if not same or (inception is not None) != wanted:
        return False
    if wanted and given.inception_sha256 and given.inception_sha256.lower() != inception:
        return False
    shown = {key for key, _ in objects.samples[:SHOWN_OBJECTS]}
    return read_json(out / RESULTS_NAME).get("settings") == found and all(
        is_measured(out, key, shown, baselines) for key, _ in objects.samples
    )


def _judges(
    given: argparse.Namespace, protocol: Protocol, place: torch.device
) -> tuple[PerceptualMetrics, dict[str, Any]]:
    """Load what images are measured with; and say by hashes what that is."""
    perceptual, inception = PerceptualMetrics({}), None
    if protocol.targets:
        lpips = {name: pretrained_perceptual_loss(name).to(place) for name in ("alex", "vgg")}
        clip = load_clip(given.clip, given.clip_sha256, place) if given.clip else None
        features = None
        if given.fid or given.inception:
            features, inception = load_inception(given.inception, given.inception_sha256, place)
        perceptual = PerceptualMetrics(lpips, clip, features)
    lpips_sha256 = {name: hash_weights(judge.network) for name, judge in perceptual.lpips.items()}
    return perceptual, {"lpips": lpips_sha256, "inception": inception}


def _say(
    results: dict[str, Any], protocol: Protocol, objects: EvaluationDataset, given: argparse.Namespace, out: Path,
    console: Console,
) -> None:  # fmt: skip
    """Print the table, and what to type next."""
    console.print(
        f"{results['objects']} of {len(objects.samples)} objects of {given.data}, split {given.split}:"
    )
    console.print(table(results["mean"], metrics_of(protocol)))
    if short := incomplete_means(results):
        console.print(f"Means of fewer: {short}")
    for key, why in results["not measured"].items():
        console.print(f"  {key}: {why}")
    for key, notes in results["notes"].items():
        console.print(f"  {key}: {'; '.join(notes)}")
    console.print(f"Page: {out / 'index.html'}; figures: {out / RESULTS_NAME}, {out / 'results.md'}")
    console.print(
        f"Compare it with another one: lrm evaluate --compare {out} OTHER   Watch: tensorboard --logdir {out}"
    )
