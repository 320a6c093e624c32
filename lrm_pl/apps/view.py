"""Show the reconstructions of a run in a web viewer, after or during training."""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from lrm_pl.apps.options import add_address, add_device, format_url, require_free, require_packages
from lrm_pl.errors import InputError, exit_on_error
from lrm_pl.inference.find_model import newest_run


@exit_on_error
def main(arguments: Sequence[str]) -> None:
    """Run ``lrm view``."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # logs a traceback for every closed connection
    require_packages("view", "viser")
    require_free(args.host, args.port)
    run = args.run or newest_run()
    if "://" not in run and not Path(run).expanduser().is_dir():
        raise InputError(expected=f"a run folder at {run}", found="none", remedy="correct the path")
    from lrm_pl.evaluation.viewer import Viewer, find_data, has_no_checkpoint

    if has_no_checkpoint(run):
        print(f"Waiting for the first checkpoint of {run}. Press Ctrl-C to stop.", flush=True)
    while has_no_checkpoint(run):
        time.sleep(3)
    viewer = Viewer(run, args.data or find_data(run), args.device, args.host, args.port)
    url = format_url(args.host, viewer.server.get_port())
    print(f"Serving {run} at {url}. Press Ctrl-C to stop.", flush=True)
    try:
        viewer.serve()
    except KeyboardInterrupt:
        viewer.server.stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrm view", description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", nargs="?", help="run folder (default: the newest run in runs/lrm)")
    add(
        "--data",
        help="folder of the shards that contain the objects to show (default: the shards of the run)",
    )
    add_device(parser)
    add_address(parser, 8080)
    return parser
