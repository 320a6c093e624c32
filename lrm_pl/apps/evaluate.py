"""``lrm evaluate``: measure a trained network under a protocol that has a name.

Every process of a group (torchrun, Slurm) measures its share of the objects; what is measured already is not measured
again. OUT gets results.json, results.md, index.html and TensorBoard's events.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lrm_pl import __version__
from lrm_pl.apps.evaluation_board import SHOWN_OBJECTS, show_object, write_board
from lrm_pl.apps.train import git_commit
from lrm_pl.apps.trained import Trained, choose_device, open_trained
from lrm_pl.data.manifest import SPLITS, write_atomically
from lrm_pl.data.schema import Sample, SampleError, decode_image
from lrm_pl.errors import InputError
from lrm_pl.evaluation.baselines import trivial_baselines
from lrm_pl.evaluation.folder import (
    RESULTS_NAME,
    SETTINGS_NAME,
    ObjectRecord,
    claim,
    read_features,
    read_json,
    read_object,
    write_object,
)
from lrm_pl.evaluation.objects import Baseline, Judges, Reconstruct, measure_object
from lrm_pl.evaluation.page import render_comparison, render_page
from lrm_pl.evaluation.protocols import PROTOCOLS, Protocol, image_metrics, surface_metrics
from lrm_pl.evaluation.selection import Objects
from lrm_pl.evaluation.summary import means, paired_differences, set_distances, table
from lrm_pl.geometry.cameras import InputCamera, canonicalise
from lrm_pl.inference import Scene, reconstruct
from lrm_pl.io.image_features import load_clip, load_inception
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.stores import StoreError

#: Seconds without a new record after which other processes are taken for dead.
_PATIENCE_S = 1800.0


def evaluate(
    trained: Trained,
    protocol: Protocol,
    objects: Objects,
    out: Path,
    judges: Judges,
    baselines: Mapping[str, Baseline],
    settings: dict[str, Any],
    *,
    rank: int = 0,
    world: int = 1,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Measure what is not measured yet; the first process then writes the results.

    Args:
        trained: The network.
        protocol: What is measured.
        objects: Of which objects.
        out: The evaluation's folder.
        judges: What images are measured with.
        baselines: What else is measured.
        settings: What the folder is claimed for.
        rank: Number of this process.
        world: Number of processes.
        console: Where progress is shown.

    Returns:
        The results, on rank 0.
    """
    console = console or Console(quiet=True)
    claim(out, settings)
    mine = objects.chosen[rank::world]
    shown = {key for key, _ in objects.chosen[:SHOWN_OBJECTS]}
    todo = [(key, place) for key, place in mine if read_object(out, key) is None]
    if len(todo) < len(mine):
        console.print(f"{len(mine) - len(todo)} objects are measured already")
    for key, place in track(
        todo, f"Measuring, {protocol.name}", console=console, disable=not console.is_terminal
    ):
        try:
            sample = objects.read(place, protocol)
            measured = measure_object(sample, protocol, reconstructor(trained), judges, baselines)
        except SampleError as error:
            if isinstance(error.__cause__, StoreError):  # it may answer the next time
                raise
            write_object(out, key, None, str(error))
        else:
            if key in shown:
                show_object(out, key, scene_of(trained, sample, protocol.inputs[0]))
            write_object(out, key, measured)
    if rank:
        return None
    return finish(out, [key for key, _ in objects.chosen], protocol, settings)


def finish(out: Path, keys: list[str], protocol: Protocol, settings: dict[str, Any]) -> dict[str, Any]:
    """Wait for all records, and write what they come to.

    Raises:
        InputError: Other processes do not finish, or nothing could be measured.
    """
    records = _wait_for(out, keys)
    good = [record for record in records if record.rows.get("model")]
    if not good:
        reasons = "; ".join(sorted({record.bad or "; ".join(record.notes) for record in records})[:3])
        raise InputError(f"{out}: expected at least one object that can be measured, found none: {reasons}")
    rows = means(good)
    features = read_features(out, keys)
    for name, values in (set_distances(features) if features else {}).items():
        rows[name] |= values
    better = metrics_of(protocol)
    results = {
        "protocol": settings["protocol"],
        "settings": settings,
        "objects": len(good),
        "not measured": {record.id: record.bad for record in records if record.bad},
        "notes": {record.id: list(record.notes) for record in records if record.notes},
        "mean": rows,
        "versions": {"lrm_pl": __version__, "commit": git_commit(), "torch": torch.__version__},
    }
    facts = {
        "protocol": f"{protocol.name}: {protocol.what}",
        "network": f"{settings['network']['source']}, step {settings['network']['step']}",
        "weights, sha256": settings["network"]["sha256"],
        "shards": f"{settings['data']['folder']}, split {settings['data']['split']}, {settings['data']['ids']}",
        "objects": f"{len(good)} of {len(records)}",
        "code": f"lrm_pl {__version__}, {git_commit()}",
    }
    told = "\n".join(f"{name}: {value}  " for name, value in facts.items())
    write_atomically(out / "results.md", f"{told}\n\n{table(rows, better)}\n".encode())
    page = render_page(f"Evaluation: {protocol.name}", facts, rows, better, records, out)
    write_atomically(out / "index.html", page.encode())
    write_board(out, protocol.name, table(rows, better), rows, good, better, settings["network"]["step"] or 0)
    write_atomically(out / RESULTS_NAME, (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())
    return results


def compare(a: Path, b: Path, out: Path) -> str:
    """Put two evaluations side by side.

    Returns:
        A Markdown table of the paired differences.

    Raises:
        InputError: They are not of one protocol and one data set, or not finished.
    """
    settings = []
    for folder in (a, b):
        if not (folder / RESULTS_NAME).is_file():
            raise InputError(
                f"expected a finished evaluation in {folder}, found none; make it: lrm evaluate --out {folder} ..."
            )
        settings.append(read_json(folder / SETTINGS_NAME))
    for name in ("protocol", "data"):
        if settings[0].get(name) != settings[1].get(name):
            raise InputError(
                f"expected two evaluations of one {name}, found {settings[0].get(name)} and {settings[1].get(name)}"
            )
    protocol = PROTOCOLS[settings[0]["protocol"]["name"]]
    found = [
        [_known(folder, path.stem) for path in sorted((folder / "objects").glob("*.json"))]
        for folder in (a, b)
    ]
    common = {r.id for r in found[0] if r.rows.get("model")} & {r.id for r in found[1] if r.rows.get("model")}
    found = [[record for record in records if record.id in common] for records in found]
    differences = paired_differences(*found)
    better = metrics_of(protocol)
    rows = {name: means(records).get("model", {}) for name, records in zip(("A", "B"), found, strict=True)}
    first = next(metric for metric in better if metric in differences)
    of_b = {
        record.id: record.rows["model"][first] for record in found[1] if first in record.rows.get("model", {})
    }
    widest = sorted(
        (record for record in found[0] if first in record.rows.get("model", {}) and record.id in of_b),
        key=lambda record: -abs(of_b[record.id] - record.rows["model"][first]),
    )
    names = f"A: {settings[0]['network']['source']}", f"B: {settings[1]['network']['source']}"
    out.mkdir(parents=True, exist_ok=True)
    page = render_comparison(
        f"Comparison: {protocol.name}; {names[0]}, {names[1]}",
        ("A", "B"),
        rows,
        better,
        differences,
        (a, b),
        widest,
    )
    write_atomically(out / "comparison.html", page.encode())
    lines = ["| B - A | mean | 95 % interval | objects |", "|---|---:|---:|---:|"]
    for metric in (metric for metric in better if metric in differences):
        d = differences[metric]
        lines.append(f"| {metric} | {d.mean:+.4f} | {d.low:+.4f} to {d.high:+.4f} | {d.objects} |")
    told = "\n".join([*names, "", table(rows, better), "", *lines])
    write_atomically(out / "comparison.md", (told + "\n").encode())
    return told


def metrics_of(protocol: Protocol) -> dict[str, bool]:
    """Name the metrics that a protocol may have, in the order of tables -> whether more is better."""
    images = image_metrics(["clip"]) | {"fid": False, "kid": False} if protocol.targets else {}
    return images | (surface_metrics(protocol.geometry) if protocol.geometry else {})


def reconstructor(trained: Trained) -> Reconstruct:
    """Make scenes of input views with their own cameras."""
    model = trained.model

    def make(image: Tensor, c2w: Tensor, fxfycxcy: Tensor) -> Scene:
        distance = float(c2w[:3, 3].norm())
        fov_deg = float(torch.rad2deg(2 * torch.atan(0.5 / fxfycxcy[0])))
        camera = InputCamera(distance, fov_deg)
        return reconstruct(
            model.network, model.renderer, image, camera, model.setup.background, model.setup.threshold
        )

    return make


def scene_of(trained: Trained, sample: Sample, view: int) -> Scene:
    """Reconstruct an object from one of its views."""
    c2w = canonicalise(torch.from_numpy(sample.c2w[[view]]))
    rgba = torch.from_numpy(decode_image(sample.info.id, sample.views[view])).permute(2, 0, 1).float() / 255
    return reconstructor(trained)(rgba, c2w[0], torch.from_numpy(sample.fxfycxcy[view]))


def _wait_for(out: Path, keys: list[str]) -> list[ObjectRecord]:
    records = dict[str, ObjectRecord]()
    last = time.monotonic()
    while True:
        before = len(records)
        for key in keys:
            if key not in records and (record := read_object(out, key)) is not None:
                records[key] = record
        if len(records) == len(keys):
            return [records[key] for key in keys]
        if len(records) > before:
            last = time.monotonic()
        if time.monotonic() - last > _PATIENCE_S:
            raise InputError(
                f"{out}: expected other processes to measure {len(keys) - len(records)} more objects, found nothing "
                f"new for {_PATIENCE_S / 60:.0f} minutes; start the same command again, it goes on where it was"
            )
        time.sleep(0.5)


def _known(folder: Path, key: str) -> ObjectRecord:
    record = read_object(folder, key)
    assert record is not None, key
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; expected errors end in one message."""
    given = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    under_srun = "SLURM_STEP_NUM_TASKS" in os.environ  # an allocation alone has SLURM_NTASKS too
    rank = int(os.environ.get("RANK", os.environ["SLURM_PROCID"] if under_srun else 0))
    world = int(os.environ.get("WORLD_SIZE", os.environ["SLURM_STEP_NUM_TASKS"] if under_srun else 1))
    console = Console(soft_wrap=True, quiet=rank > 0)
    try:
        if given.compare:
            a, b = given.compare
            console.print(compare(a, b, given.out or Path("evaluation")), markup=False)
            console.print(f"Page: {(given.out or Path('evaluation')) / 'comparison.html'}")
            return
        _run(given, rank, world, console)
    except (InputError, OSError) as error:
        sys.exit(f"lrm: {error}")


def _run(given: argparse.Namespace, rank: int, world: int, console: Console) -> None:
    protocol = PROTOCOLS[given.protocol]
    objects = Objects(given.data, given.split, given.ids, given.limit)
    protocol.require(objects.manifest, given.data)
    device = given.device
    if device == "auto" and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        device = f"cuda:{local % torch.cuda.device_count()}"  # a task of Slurm may see one GPU only
    trained = open_trained(given.ckpt, average=given.average, device=device)
    place = choose_device(device)
    judges = Judges({})
    if protocol.targets:
        judges = Judges(
            {name: PerceptualLoss.pretrained(name).to(place) for name in ("alex", "vgg")},
            load_clip(given.clip, given.clip_sha256 or "", place) if given.clip else None,
            load_inception(given.inception, given.inception_sha256, place)
            if given.fid or given.inception
            else None,
        )
    manifest = json.dumps([(s.name, s.sha256) for s in objects.manifest.shards]).encode()
    settings = {
        "protocol": json.loads(
            json.dumps(vars(protocol) | {"geometry": vars(protocol.geometry) if protocol.geometry else None})
        ),
        "network": {"source": trained.source, "step": trained.step, "sha256": trained.sha256},
        "data": {
            "folder": given.data,
            "shards": hashlib.sha256(manifest).hexdigest(),
            "split": given.split,
            "ids": given.ids,
            "objects": len(objects.chosen),
        },
        "baselines": bool(given.baseline),
        "clip": given.clip_sha256 if given.clip else None,
        "fid": bool(given.fid or given.inception),
    }
    out = given.out or Path("evaluation") / f"{protocol.name}-{Path(given.data).name}-{trained.sha256[:8]}"
    step = "" if trained.step is None else f", step {trained.step}"
    console.print(f"Network: {trained.source}{step}, on {place}\nProtocol {protocol.name}: {protocol.what}")
    baselines = trivial_baselines(objects) if given.baseline and protocol.targets else {}
    results = evaluate(
        trained, protocol, objects, out, judges, baselines, settings, rank=rank, world=world, console=console
    )
    if results is None:
        return
    console.print(
        f"{results['objects']} of {len(objects.chosen)} objects of {given.data}, split {given.split}:"
    )
    console.print(table(results["mean"], metrics_of(protocol)), markup=False)
    for key, why in [*results["not measured"].items(), *results["notes"].items()]:
        console.print(f"  {key}: {why}", markup=False)
    console.print(f"Page: {out / 'index.html'}; figures: {out / RESULTS_NAME}, {out / 'results.md'}")
    console.print(
        f"Compare it with another one: lrm evaluate --compare {out} OTHER   Watch: tensorboard --logdir {out}"
    )


def _parser() -> argparse.ArgumentParser:
    protocols = "; ".join(f"{protocol.name}: {protocol.what}" for protocol in PROTOCOLS.values())
    parser = argparse.ArgumentParser(prog="lrm evaluate", description=__doc__)
    parser.add_argument(
        "--ckpt",
        metavar="CKPT",
        help="a run's folder, a checkpoint, a folder of `lrm export`, or owner/name on the Hugging Face hub; unless "
        "given, the newest run in runs/lrm",
    )
    parser.add_argument("--data", default="data/demo", help="folder of shards, or its URL (data/demo)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="lrm", help=protocols)
    parser.add_argument("--split", choices=SPLITS, default="val", help="which objects: held-out ones (val)")
    parser.add_argument(
        "--ids", default="*", metavar="PATTERN", help="objects whose id fits, such as 'KatorLegaz*' (*)"
    )
    parser.add_argument("--limit", type=int, help="most objects, evenly spread; all unless given")
    parser.add_argument("--out", type=Path, help="folder of the results (evaluation/...)")
    parser.add_argument(
        "--average", action="store_true", help="the run's moving average instead of its weights"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ... (auto)")
    parser.add_argument("--baseline", action="store_true", help="measure trivial answers too")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="instead, compare two finished evaluations object by object: paired differences with their 95 %% interval",
    )
    more = parser.add_argument_group("metrics that need networks of one's own choice")
    more.add_argument(
        "--clip", type=Path, metavar="FILE", help="CLIP similarity: the weights of timm's CLIP ViT-B/32"
    )
    more.add_argument("--clip-sha256", metavar="HEX", help="their hash")
    more.add_argument(
        "--fid",
        action="store_true",
        help="FID and KID; the Inception network is looked for as other weights are",
    )
    more.add_argument("--inception", metavar="FILE", help="its file")
    more.add_argument("--inception-sha256", metavar="HEX", help="its hash, where it is another one")
    return parser
