"""``lrm view RUN``: fly around what a run reconstructs, also while it trains.

The page draws the current field at the visitor's camera, shows the cameras of the object's views as frusta, and takes
over new checkpoints as they appear.
"""

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from lrm_pl.apps.options import add_address, require_free, url_of
from lrm_pl.errors import InputError
from lrm_pl.inference.find_model import newest_run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; expected errors end in one message."""
    given = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # it prints a stack for whoever hangs up
    if importlib.util.find_spec("viser") is None:
        sys.exit("lrm: expected viser to show the page with, but found none; pip install -e '.[view]'")
    try:
        require_free(given.host, given.port)
        run = given.run or newest_run()
        if "://" not in run and not Path(run).expanduser().is_dir():
            raise InputError(expected=f"a run's folder at {run}", found="none", remedy="correct the path")
        from lrm_pl.apps.viewer import Viewer, data_of, wait_for_checkpoint

        wait_for_checkpoint(run)
        viewer = Viewer(run, given.data or data_of(run), given.device, given.host, given.port)
    except (InputError, OSError) as error:
        sys.exit(f"lrm: {error}")
    print(f"{url_of(given.host, viewer.server.get_port())} shows {run}; Ctrl-C ends it", flush=True)
    try:
        viewer.serve()
    except KeyboardInterrupt:
        viewer.server.stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrm view", description=__doc__)
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="a run's folder; the newest in runs/lrm unless given"
    )
    parser.add_argument("--data", help="folder of shards whose objects are shown; the run's own unless given")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ... (auto)")
    add_address(parser, 8080)
    return parser
