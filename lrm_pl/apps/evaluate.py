"""Evaluate a trained model under a named protocol.

If torchrun or Slurm starts several processes, each process evaluates a subset of the objects. Objects that have already
been evaluated are skipped. The folder OUT contains results.json, results.md, index.html and TensorBoard event files.
"""

import argparse
import logging
from collections.abc import Sequence

from rich.console import Console

from lrm_pl.apps.options import add_model
from lrm_pl.data.manifest import SPLITS
from lrm_pl.errors import InputError, exit_on_error
from lrm_pl.evaluation.comparison import compare
from lrm_pl.evaluation.protocols import PROTOCOLS
from lrm_pl.evaluation.records import DEFAULT_FOLDER
from lrm_pl.inference.find_model import find_model
from lrm_pl.paths import require_out, user_path
from lrm_pl.training.processes import is_distributed_process, launch_processes, rank_and_world_size


@exit_on_error
def main(arguments: Sequence[str]) -> None:
    """Run ``lrm evaluate``."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    rank, world = rank_and_world_size()
    console = Console(soft_wrap=True, markup=False, quiet=rank > 0)
    if args.compare:
        a, b = args.compare
        table, page = compare(a, b, args.out)
        console.print(f"{table}\nPage: {page}")
        return
    if args.processes < 1:
        raise InputError(expected="--processes of at least 1", found=args.processes)
    if args.clip and not args.clip_sha256:
        raise InputError(
            "--clip requires --clip-sha256",
            remedy="add --clip-sha256 HEX with the hash that `sha256sum FILE` prints",
        )
    find_model(args.ckpt)
    require_out(args.out or DEFAULT_FOLDER)
    from lrm_pl.evaluation.dataset import EvaluationDataset  # imports torch

    dataset = EvaluationDataset(args.data, args.split, args.ids, args.limit)
    PROTOCOLS[args.protocol].check_manifest(dataset.manifest, args.data)
    # The errors above are reported only once because the processes have not been started yet.
    if args.processes > 1 and not is_distributed_process():
        launch_processes(args.processes, ["evaluate", *arguments])
    from lrm_pl.evaluation.run import run

    run(args, dataset, rank, world, console)


def _parser() -> argparse.ArgumentParser:
    protocols = "; ".join(f"{protocol.name}: {protocol.description}" for protocol in PROTOCOLS.values())
    parser = argparse.ArgumentParser(prog="lrm evaluate", description=__doc__)
    add_model(parser)
    add = parser.add_argument
    add("--data", default="data/demo", help="folder or URL of the shards (default: %(default)s)")
    add(
        "--protocol",
        choices=PROTOCOLS,
        default="lrm",
        help=f"evaluation protocol; {protocols} (default: %(default)s)",
    )
    add("--split", choices=SPLITS, default="val", help="split to evaluate (default: %(default)s)")
    add("--ids", default="*", help="pattern of object IDs, such as 'KatorLegaz*' (default: all)")
    add("--limit", type=int, help="maximum number of objects, selected at regular intervals (default: all)")
    add("--out", type=user_path, help="folder of the results (default: a folder in evaluation/)")
    add(
        "--processes",
        type=int,
        default=1,
        help="number of local processes, one per GPU (default: %(default)s)",
    )
    add("--baseline", action="store_true", help="also evaluate trivial baselines")
    add(
        "--compare",
        nargs=2,
        type=user_path,
        metavar=("A", "B"),
        help="compare two finished evaluations by paired differences with 95 %% confidence intervals",
    )
    add = parser.add_argument_group("metrics with additional networks").add_argument
    add(
        "--clip",
        type=user_path,
        metavar="FILE",
        help="compute the CLIP similarity with the weights of timm's CLIP ViT-B/32 in FILE",
    )
    add("--clip-sha256", metavar="HEX", help="SHA-256 of the CLIP weights")
    add(
        "--fid",
        action="store_true",
        help="compute FID and KID, and download the Inception weights if they are not in the cache",
    )
    add(
        "--inception",
        metavar="FILE",
        help="compute FID and KID with the Inception weights in FILE",
    )
    add("--inception-sha256", metavar="HEX", help="SHA-256 of custom Inception weights")
    return parser
