"""Show the reconstructions of a run in a web viewer, after or during training."""

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from lrm_pl.apps.options import add_address, fail, format_url, require_free
from lrm_pl.errors import InputError
from lrm_pl.inference.find_model import newest_run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # logs a traceback for every closed connection
    if importlib.util.find_spec("viser") is None:
        fail("lrm view needs viser: pip install -e '.[view]'")
    try:
        require_free(args.host, args.port)
        run = args.run or newest_run()
        if "://" not in run and not Path(run).expanduser().is_dir():
            raise InputError(expected=f"a run folder at {run}", found="none", remedy="correct the path")
        from lrm_pl.apps.viewer import Viewer, find_data, wait_for_checkpoint

        wait_for_checkpoint(run)
        viewer = Viewer(run, args.data or find_data(run), args.device, args.host, args.port)
    except (InputError, OSError) as error:
        fail(error)
    print(f"{format_url(args.host, viewer.server.get_port())} shows {run}; press Ctrl-C to stop", flush=True)
    try:
        viewer.serve()
    except KeyboardInterrupt:
        viewer.server.stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrm view", description=__doc__)
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="run folder (default: the newest run in runs/lrm)"
    )
    parser.add_argument("--data", help="folder of shards with the objects to show (default: that of the run)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add_address(parser, 8080)
    return parser
