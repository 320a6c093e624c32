"""Evaluate a trained model under a named protocol.

If torchrun or Slurm starts several processes, each process evaluates a part of the objects. Objects that were evaluated
before are skipped. The folder OUT contains results.json, results.md, index.html and TensorBoard event files.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from rich.console import Console

from lrm_pl.apps.options import add_model, fail
from lrm_pl.data.manifest import SPLITS
from lrm_pl.errors import InputError
from lrm_pl.evaluation.comparison import compare
from lrm_pl.evaluation.protocols import PROTOCOLS
from lrm_pl.evaluation.records import DEFAULT_FOLDER
from lrm_pl.inference.find_model import find_model
from lrm_pl.paths import require_out, user_path
from lrm_pl.training.processes import is_distributed_process, launch_processes, rank_and_world_size


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = sys.argv[2:] if arguments is None else arguments
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
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
            raise InputError("--clip needs the hash of the file: --clip-sha256 $(sha256sum FILE)")
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
    except (InputError, OSError) as error:
        fail(error)


def _parser() -> argparse.ArgumentParser:
    protocols = "; ".join(f"{protocol.name}: {protocol.description}" for protocol in PROTOCOLS.values())
    parser = argparse.ArgumentParser(prog="lrm evaluate", description=__doc__)
    add_model(parser)
    parser.add_argument(
        "--data", default="data/demo", help="folder of shards, or its URL (default: data/demo)"
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="lrm", help=f"{protocols} (default: lrm)")
    parser.add_argument("--split", choices=SPLITS, default="val", help="split to evaluate (default: val)")
    parser.add_argument(
        "--ids",
        default="*",
        metavar="PATTERN",
        help="pattern of object ids, such as 'KatorLegaz*' (default: all)",
    )
    parser.add_argument("--limit", type=int, help="maximum number of objects, evenly spaced (default: all)")
    parser.add_argument("--out", type=user_path, help="folder of the results (default: evaluation/...)")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes on this machine, one per GPU (default: 1)"
    )
    parser.add_argument("--baseline", action="store_true", help="evaluate trivial baselines too")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=user_path,
        metavar=("A", "B"),
        help="compare two finished evaluations instead: paired differences with 95 %% confidence intervals",
    )
    networks = parser.add_argument_group("metrics with additional networks")
    networks.add_argument(
        "--clip", type=user_path, metavar="FILE", help="CLIP similarity: weights of timm's CLIP ViT-B/32"
    )
    networks.add_argument("--clip-sha256", metavar="HEX", help="sha256 of the CLIP weights")
    networks.add_argument(
        "--fid", action="store_true", help="FID and KID; the Inception weights are downloaded"
    )
    networks.add_argument("--inception", metavar="FILE", help="weights of the Inception network")
    networks.add_argument("--inception-sha256", metavar="HEX", help="sha256 of custom Inception weights")
    return parser
