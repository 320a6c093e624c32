"""Serve reconstructions over HTTP. POST /reconstruct accepts an image and returns a GLB file.

    curl --data-binary @photo.png http://127.0.0.1:8000/reconstruct -o mesh.glb

One image is processed at a time, and other requests wait in a queue of limited length. GET /health returns the status,
GET /metrics returns Prometheus metrics, and GET /docs returns the documentation of the API. Run public services behind
a reverse proxy.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from lrm_pl.apps.options import (
    add_address,
    add_background,
    add_fields,
    add_model,
    format_url,
    load_pipeline,
    require_free,
    require_packages,
)
from lrm_pl.errors import exit_on_error
from lrm_pl.inference.find_model import find_model
from lrm_pl.inference.options import ServerLimits

#: Options that set the limits: flag, field, type and help text.
_LIMITS = (
    ("--megabytes", "megabytes", float, "maximum size of the image file in megabytes"),
    ("--megapixels", "megapixels", float, "maximum number of pixels of the image in millions"),
    ("--seconds", "seconds", float, "time limit of the response in seconds, including the time in the queue"),
    ("--upload-seconds", "upload_seconds", float, "time limit of the upload in seconds"),
    ("--queue", "queue", int, "maximum number of waiting requests"),
    ("--resolution", "resolution", int, "maximum resolution of the density grid"),
)


@exit_on_error
def main(arguments: Sequence[str]) -> None:
    """Run ``lrm serve``."""
    args = _parser().parse_args(arguments)
    require_packages("serve", "uvicorn", "fastapi")
    fields = dataclasses.fields(ServerLimits)
    limits = ServerLimits(**{field.name: getattr(args, field.name) for field in fields})
    find_model(args.ckpt)
    require_free(args.host, args.port)
    from lrm_pl.inference.server import serve

    pipeline = load_pipeline(args)
    pipeline.remover.load()
    url = format_url(args.host, args.port)
    print(
        f"Model: {pipeline.description}\n"
        f"To reconstruct a photo: curl --data-binary @photo.png {url}/reconstruct -o mesh.glb"
    )
    serve(pipeline, limits, args.host, args.port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lrm serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model(parser)
    add_address(parser, 8000)
    add_fields(parser.add_argument_group("limits per request"), ServerLimits(), _LIMITS)
    add_background(parser)
    return parser
