"""``lrm evaluate``: measure a trained network under a protocol that has a name.

Every process of a group (torchrun, Slurm) measures its share of the objects; what is measured already is not measured
again. OUT gets results.json, results.md, index.html and TensorBoard's events.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from rich.console import Console

from lrm_pl.apps.options import add_model
from lrm_pl.data.manifest import SPLITS
from lrm_pl.errors import InputError
from lrm_pl.evaluation.comparison import compare
from lrm_pl.evaluation.dataset import EvaluationDataset
from lrm_pl.evaluation.protocols import PROTOCOLS
from lrm_pl.evaluation.records import DEFAULT_FOLDER
from lrm_pl.inference.find_model import find_model
from lrm_pl.paths import require_out, user_path
from lrm_pl.training.processes import in_group, rank_and_world_size, run_processes


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; expected errors end in one message."""
    given = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        rank, world = rank_and_world_size()
        console = Console(soft_wrap=True, markup=False, quiet=rank > 0)
        if given.processes < 1:
            raise InputError(expected="--processes of at least 1", found=given.processes)
        if given.compare:
            a, b = given.compare
            told, page = compare(a, b, given.out)
            console.print(f"{told}\nPage: {page}")
            return
        if given.clip and not given.clip_sha256:
            raise InputError(
                expected="the hash of CLIP's weights too", found="none: --clip-sha256 $(sha256sum FILE)"
            )
        find_model(given.ckpt)
        require_out(given.out or DEFAULT_FOLDER)
        objects = EvaluationDataset(given.data, given.split, given.ids, given.limit)
        PROTOCOLS[given.protocol].check_manifest(objects.manifest, given.data)
        if given.processes > 1 and not in_group():  # what is wrong is said once, before they start
            run_processes(given.processes, ["evaluate", *(sys.argv[2:] if arguments is None else arguments)])
        from lrm_pl.evaluation.run import run

        run(given, objects, rank, world, console)
    except (InputError, OSError) as error:
        sys.exit(f"lrm: {error}")


def _parser() -> argparse.ArgumentParser:
    protocols = "; ".join(f"{protocol.name}: {protocol.description}" for protocol in PROTOCOLS.values())
    parser = argparse.ArgumentParser(prog="lrm evaluate", description=__doc__)
    add_model(parser)
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
