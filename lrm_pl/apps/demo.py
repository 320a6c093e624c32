"""Serve a web page that reconstructs a photo as a mesh and shows a video of an orbit around it."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from lrm_pl.apps.options import (
    add_address,
    add_background,
    add_model,
    fail,
    format_url,
    load_pipeline,
    require_free,
)
from lrm_pl.errors import InputError
from lrm_pl.inference.find_model import find_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    if importlib.util.find_spec("gradio") is None:
        fail("lrm demo needs gradio: pip install -e '.[demo]'")
    try:
        find_model(args.ckpt)
        require_free(args.host, args.port)
        from lrm_pl.inference.demo_page import launch

        pipeline = load_pipeline(args)
        pipeline.remover.load()
    except (InputError, OSError) as error:
        fail(error)
    page = launch(pipeline, args.host, args.port)
    print(f"{format_url(args.host, args.port)} shows {pipeline.source}; press Ctrl-C to stop", flush=True)
    page.block_thread()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrm demo", description=__doc__)
    add_model(parser)
    add_address(parser, 7860)
    add_background(parser)
    return parser
