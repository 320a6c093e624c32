"""Serve a web page that reconstructs a mesh from a photo and shows an orbit video of the mesh."""

import argparse
from collections.abc import Sequence

from lrm_pl.apps.options import (
    add_address,
    add_background,
    add_model,
    format_url,
    load_pipeline,
    require_free,
    require_packages,
)
from lrm_pl.errors import exit_on_error
from lrm_pl.inference.find_model import find_model


@exit_on_error
def main(arguments: Sequence[str]) -> None:
    """Run ``lrm demo``."""
    args = _parser().parse_args(arguments)
    require_packages("demo", "gradio")
    find_model(args.ckpt)
    require_free(args.host, args.port)
    from lrm_pl.inference.demo_page import launch

    pipeline = load_pipeline(args)
    pipeline.remover.load()
    page = launch(pipeline, args.host, args.port)
    url = format_url(args.host, args.port)
    print(f"Serving {pipeline.source} at {url}. Press Ctrl-C to stop.", flush=True)
    page.block_thread()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrm demo", description=__doc__)
    add_model(parser)
    add_address(parser, 7860)
    add_background(parser)
    return parser
