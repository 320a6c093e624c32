"""``lrm serve``: a network behind HTTP. POST /reconstruct takes an image, and answers with a GLB.

    curl --data-binary @photo.png http://127.0.0.1:8000/reconstruct -o mesh.glb

One image is worked on at a time; others wait in a queue of a bounded length. GET /health says whether it works,
GET /metrics counts for Prometheus, GET /docs describes all of it.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from types import FrameType

from lrm_pl.apps.options import add_address, add_background, add_network, require_free, url_of
from lrm_pl.errors import InputError
from lrm_pl.inference.locate import locate_network
from lrm_pl.inference.mesh_options import MeshOptions

#: Smallest lattice, points along each axis.
LEAST_RESOLUTION = 16

#: Seconds that requests in hand have to finish in once the server is told to stop.
_GRACE_S = 30


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Attributes:
        megabytes: Size of an image's file.
        megapixels: Pixels of an image.
        seconds: From the end of a request's body to the answer's beginning, waiting included; looked at between the
            stages of the work.
        upload_seconds: For the body to arrive.
        queue: Requests that may wait.
        resolution: Largest lattice that may be asked for, points along each axis.
    """

    megabytes: float = 16.0
    megapixels: float = 25.0
    seconds: float = 120.0
    upload_seconds: float = 30.0
    queue: int = 8
    resolution: int = 384

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, low in (("megabytes", 0), ("megapixels", 0), ("seconds", 0), ("upload_seconds", 0)):
            if not low < getattr(self, name) < math.inf:
                raise InputError(expected=f"{name} above {low}", found=f"{getattr(self, name):g}")
        for name, low in (("queue", 0), ("resolution", LEAST_RESOLUTION)):
            if getattr(self, name) < low:
                raise InputError(expected=f"{name} of {low} or more", found=getattr(self, name))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; expected errors end in one message."""
    given = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    try:
        import uvicorn

        from lrm_pl.apps.connections import BoundedProtocol
    except ImportError:
        sys.exit("lrm: expected uvicorn and fastapi to serve with, but found none; pip install -e '.[serve]'")
    try:
        limits = Limits(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Limits)})
        _ = MeshOptions(resolution=limits.resolution)  # says what there may be
        locate_network(given.ckpt)
        require_free(given.host, given.port)
        from lrm_pl.apps.server import make_app
        from lrm_pl.inference.find_model import open_network

        trained = open_network(given)
        trained.model.remover.load()
    except (InputError, OSError) as error:
        sys.exit(f"lrm: {error}")
    address = url_of(given.host, given.port)
    if trained.note:
        print(trained.note)
    print(f"Network: {trained.source}\nTry: curl --data-binary @photo.png {address}/reconstruct -o mesh.glb")
    app = make_app(trained, limits)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.works.ending.set()
            super().handle_exit(sig, frame)

    Server(
        uvicorn.Config(
            app,
            host=given.host,
            port=given.port,
            http=BoundedProtocol,
            h11_max_incomplete_event_size=1 << 16,
            timeout_graceful_shutdown=_GRACE_S,
        )
    ).run()


def _parser() -> argparse.ArgumentParser:
    usual = Limits()
    parser = argparse.ArgumentParser(prog="lrm serve", description=__doc__)
    add_network(parser)
    add_address(parser, 8000)
    limits = parser.add_argument_group("what a request may cost")
    for name, kind, what in (
        ("megabytes", float, "size of an image's file"),
        ("megapixels", float, "pixels of an image"),
        ("seconds", float, "until the answer, waiting included"),
        ("upload_seconds", float, "for the image to arrive"),
        ("queue", int, "requests that may wait"),
        ("resolution", int, "largest lattice, points along each axis"),
    ):
        value = getattr(usual, name)
        option = f"--{name.replace('_', '-')}"
        limits.add_argument(option, dest=name, type=kind, default=value, help=f"{what} ({value:g})")
    add_background(parser)
    return parser
