"""``lrm evaluate``: measure a trained network under a protocol that has a name.

Every process of a group (torchrun, Slurm) measures its share of the objects; what is measured already is not measured
again. OUT gets results.json, results.md, index.html and TensorBoard's events.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lrm_pl.apps.evaluation_board import SHOWN_OBJECTS, is_shown, show_object
from lrm_pl.apps.evaluation_results import compare, finish, metrics_of, shortfall
from lrm_pl.apps.options import add_network
from lrm_pl.apps.paths import require_out, user_path
from lrm_pl.apps.processes import in_group, run_processes
from lrm_pl.apps.trained import Trained, open_network
from lrm_pl.data.manifest import SPLITS
from lrm_pl.data.schema import Sample, SampleError
from lrm_pl.errors import InputError
from lrm_pl.evaluation.baselines import trivial_baselines
from lrm_pl.evaluation.folder import RESULTS_NAME, claim, read_object, write_object
from lrm_pl.evaluation.objects import Baseline, Judges, Reconstruct, input_view, measure_object
from lrm_pl.evaluation.protocols import PROTOCOLS, Protocol
from lrm_pl.evaluation.selection import Objects
from lrm_pl.evaluation.summary import table
from lrm_pl.geometry.cameras import PosedCamera, canonicalise
from lrm_pl.inference import Scene, reconstruct
from lrm_pl.io.image_features import load_clip, load_inception
from lrm_pl.io.pretrained import weights_hash
from lrm_pl.kernels.device import choose_device
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.stores import StoreError

#: Where results go that were given no folder.
EVALUATIONS = Path("evaluation")


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
    settings = claim(out, settings)
    mine = objects.chosen[rank::world]
    shown = {key for key, _ in objects.chosen[:SHOWN_OBJECTS]}
    todo = [(key, place) for key, place in mine if not _is_measured(out, key, shown)]
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


def _is_measured(out: Path, key: str, shown: set[str]) -> bool:
    record = read_object(out, key)
    return record is not None and bool(record.bad or key not in shown or is_shown(out, key))


def reconstructor(trained: Trained) -> Reconstruct:
    """Make scenes of input views with their own cameras."""
    model = trained.model

    def make(image: Tensor, c2w: Tensor, fxfycxcy: Tensor) -> Scene:
        return reconstruct(
            model.network,
            model.renderer,
            image,
            PosedCamera(c2w, fxfycxcy),
            model.setup.background,
            model.setup.threshold,
        )

    return make


def scene_of(trained: Trained, sample: Sample, view: int) -> Scene:
    """Reconstruct an object from one of its views.

    Raises:
        SampleError: The view cannot be read, or shows nothing.
    """
    c2w = canonicalise(torch.from_numpy(sample.c2w[[view]]))
    return reconstructor(trained)(input_view(sample, view), c2w[0], torch.from_numpy(sample.fxfycxcy[view]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; expected errors end in one message."""
    given = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if given.processes > 1 and not in_group():
        run_processes(given.processes, ["evaluate", *(sys.argv[2:] if arguments is None else arguments)])
    under_srun = "SLURM_STEP_NUM_TASKS" in os.environ  # an allocation alone has SLURM_NTASKS too
    rank = int(os.environ.get("RANK", os.environ["SLURM_PROCID"] if under_srun else 0))
    world = int(os.environ.get("WORLD_SIZE", os.environ["SLURM_STEP_NUM_TASKS"] if under_srun else 1))
    console = Console(soft_wrap=True, markup=False, quiet=rank > 0)
    try:
        if given.compare:
            a, b = given.compare
            out = given.out or EVALUATIONS
            require_out(out)
            console.print(compare(a, b, out))
            console.print(f"Page: {out / 'comparison.html'}")
            return
        _run(given, rank, world, console)
    except (InputError, OSError) as error:
        sys.exit(f"lrm: {error}")


def _run(given: argparse.Namespace, rank: int, world: int, console: Console) -> None:
    if given.clip and not given.clip_sha256:
        raise InputError(
            "expected the hash of CLIP's weights too, found none: --clip-sha256 $(sha256sum FILE)"
        )
    require_out(given.out or EVALUATIONS)
    protocol = PROTOCOLS[given.protocol]
    objects = Objects(given.data, given.split, given.ids, given.limit)
    protocol.require(objects.manifest, given.data)
    place = choose_device(given.device, int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))))
    trained = open_network(given, str(place))
    judges, inception = Judges({}), None
    if protocol.targets:
        lpips = {name: PerceptualLoss.pretrained(name).to(place) for name in ("alex", "vgg")}
        clip = load_clip(given.clip, given.clip_sha256, place) if given.clip else None
        features = None
        if given.fid or given.inception:
            features, inception = load_inception(given.inception, given.inception_sha256, place)
        judges = Judges(lpips, clip, features)
    lpips_sha256 = {name: weights_hash(judge.network) for name, judge in judges.lpips.items()}
    manifest = json.dumps([(s.name, s.sha256) for s in objects.manifest.shards]).encode()
    settings = {
        "protocol": json.loads(
            json.dumps(vars(protocol) | {"geometry": vars(protocol.geometry) if protocol.geometry else None})
        ),
        "network": {
            "source": trained.source,
            "step": trained.step,
            "sha256": trained.sha256,
            "setup": dataclasses.asdict(trained.model.setup),
            "renderer": trained.model.model.get("renderer", {}),
        },
        "data": {
            "folder": given.data,
            "shards": hashlib.sha256(manifest).hexdigest(),
            "split": given.split,
            "ids": given.ids,
            "objects": len(objects.chosen),
        },
        "baselines": bool(given.baseline),
        "lpips": lpips_sha256,
        "clip": given.clip_sha256.lower() if given.clip else None,
        "inception": inception,
    }
    out = given.out or EVALUATIONS / f"{protocol.name}-{Path(given.data).name}-{trained.sha256[:8]}"
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
    console.print(table(results["mean"], metrics_of(protocol)))
    if short := shortfall(results):
        console.print(f"Means of fewer: {short}")
    for key, why in results["not measured"].items():
        console.print(f"  {key}: {why}")
    for key, notes in results["notes"].items():
        console.print(f"  {key}: {'; '.join(notes)}")
    console.print(f"Page: {out / 'index.html'}; figures: {out / RESULTS_NAME}, {out / 'results.md'}")
    console.print(
        f"Compare it with another one: lrm evaluate --compare {out} OTHER   Watch: tensorboard --logdir {out}"
    )


def _parser() -> argparse.ArgumentParser:
    protocols = "; ".join(f"{protocol.name}: {protocol.what}" for protocol in PROTOCOLS.values())
    parser = argparse.ArgumentParser(prog="lrm evaluate", description=__doc__)
    add_network(parser)
    parser.add_argument("--data", default="data/demo", help="folder of shards, or its URL (data/demo)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="lrm", help=protocols)
    parser.add_argument("--split", choices=SPLITS, default="val", help="which objects: held-out ones (val)")
    parser.add_argument(
        "--ids", default="*", metavar="PATTERN", help="objects whose id fits, such as 'KatorLegaz*' (*)"
    )
    parser.add_argument("--limit", type=int, help="most objects, evenly spread; all unless given")
    parser.add_argument("--out", type=user_path, help="folder of the results (evaluation/...)")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes on this machine, one a GPU where there are (1)"
    )
    parser.add_argument("--baseline", action="store_true", help="measure trivial answers too")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=user_path,
        metavar=("A", "B"),
        help="instead, compare two finished evaluations object by object: paired differences with their 95 %% interval",
    )
    more = parser.add_argument_group("metrics that need networks of one's own choice")
    more.add_argument(
        "--clip", type=user_path, metavar="FILE", help="CLIP similarity: the weights of timm's CLIP ViT-B/32"
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
