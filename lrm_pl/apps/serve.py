"""Serve reconstructions over HTTP. POST /reconstruct accepts an image and returns a GLB file.

    curl --data-binary @photo.png http://127.0.0.1:8000/reconstruct -o mesh.glb

One image is processed at a time, and other requests wait in a queue of limited length. GET /health returns the status,
GET /metrics returns Prometheus metrics, and GET /docs returns the documentation of the API. Run public services behind
a reverse proxy.
"""

import argparse
import dataclasses
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
from lrm_pl.inference.options import ServerLimits


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    if any(importlib.util.find_spec(name) is None for name in ("uvicorn", "fastapi")):
        fail("lrm serve needs uvicorn and fastapi: pip install -e '.[serve]'")
    try:
        fields = dataclasses.fields(ServerLimits)
        limits = ServerLimits(**{field.name: getattr(args, field.name) for field in fields})
        find_model(args.ckpt)
        require_free(args.host, args.port)
        from lrm_pl.inference.server import serve

        pipeline = load_pipeline(args)
        pipeline.remover.load()
    except (InputError, OSError) as error:
        fail(error)
    url = format_url(args.host, args.port)
    print(f"Model: {pipeline.description}\nTry: curl --data-binary @photo.png {url}/reconstruct -o mesh.glb")
    serve(pipeline, limits, args.host, args.port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lrm serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model(parser)
    add_address(parser, 8000)
    group = parser.add_argument_group("limits per request")
    defaults = ServerLimits()
    for name, help_text in (
        ("megabytes", "maximum size of the image file"),
        ("megapixels", "maximum number of pixels of the image"),
        ("seconds", "time limit of the response, including queueing"),
        ("upload_seconds", "time limit of the upload"),
        ("queue", "maximum number of waiting requests"),
        ("resolution", "maximum grid resolution"),
    ):
        default = getattr(defaults, name)
        option = f"--{name.replace('_', '-')}"
        group.add_argument(
            option, type=type(default), default=default, help=f"{help_text} (default: {default:g})"
        )
    add_background(parser)
    return parser
