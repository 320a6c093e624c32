"""``lrm serve``: a network behind HTTP. POST /reconstruct takes a picture, and answers with a GLB.

    curl --data-binary @photo.png http://127.0.0.1:8000/reconstruct -o mesh.glb

One picture is worked on at a time; others wait in a queue of a bounded length. GET /health says whether it works,
GET /metrics counts for Prometheus, GET /docs describes all of it.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import math
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Annotated, Any

from lrm_pl import __version__
from lrm_pl.apps.options import MOST_FACES, Wishes, add_address, add_background, add_network, require_free
from lrm_pl.apps.reconstruction import make_mesh
from lrm_pl.apps.trained import Trained, open_network
from lrm_pl.errors import InputError
from lrm_pl.inference import as_tensor
from lrm_pl.meshes.glb import encode_glb
from lrm_pl.pictures import NotAPictureError, PictureError, PictureTooLargeError, open_picture
from lrm_pl.stages import listening, stage

logger = logging.getLogger(__name__)

#: Smallest lattice, points along each axis.
LEAST_RESOLUTION = 16

#: Seconds that requests in hand have to finish in once the server is told to stop.
_GRACE_S = 30

#: Pictures that may arrive at a time: a wall for memory; the queue is much shorter.
_UPLOADS = 32


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Attributes:
        megabytes: Size of a picture's file.
        megapixels: Pixels of a picture.
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
                raise InputError(f"expected {name} above {low}, found {getattr(self, name):g}")
        for name, low in (("queue", 0), ("resolution", LEAST_RESOLUTION)):
            if getattr(self, name) < low:
                raise InputError(f"expected {name} of {low} or more, found {getattr(self, name)}")


#: Of ``/reconstruct``.
_PARAMETERS = frozenset({"resolution", "threshold", "floaters", "faces"})

#: Seconds from one look at whether a client still waits to the next.
_LOOK_S = 0.5


class RefusedError(Exception):
    """A request is not served.

    Args:
        status: The HTTP status.
        reason: Why, for the one who asked.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Works:
    """Makes meshes of pictures, one at a time, on a thread of its own.

    Args:
        trained: The network.
        limits: What a request may cost.
    """

    def __init__(self, trained: Trained, limits: Limits) -> None:
        self.trained, self.limits = trained, limits
        self.waiting = 0
        #: Whether the server is ending: what has not begun does not begin any more.
        self.ending = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reconstruct")

    async def make(
        self, content: bytes, wishes: Wishes, gone: Callable[[], Awaitable[bool]]
    ) -> tuple[bytes, dict[str, float]]:
        """Turn a picture's bytes into a GLB's.

        Args:
            content: The picture.
            wishes: What is made of it.
            gone: Says whether nobody waits for the answer any more.

        Returns:
            The GLB, and the seconds of each stage.

        Raises:
            RefusedError: With the status that fits.
        """
        if self.waiting > self.limits.queue or self.ending.is_set():
            raise RefusedError(503, f"{self.waiting} requests are waiting already; come back later")
        self.waiting += 1
        dropped = threading.Event()
        future = self._thread.submit(
            self._make, content, wishes, time.monotonic() + self.limits.seconds, dropped
        )
        answer = asyncio.wrap_future(future)
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=_LOOK_S)
                if not answer.done() and await gone():
                    raise RefusedError(499, "nobody waits for the answer any more")
                if self.ending.is_set() and future.cancel():
                    raise RefusedError(503, "the server is ending; come back later")
            return answer.result()
        except asyncio.CancelledError:
            raise RefusedError(503, "the server has ended; come back later") from None
        finally:
            dropped.set()
            future.cancel()
            self.waiting -= 1

    def _make(
        self, content: bytes, wishes: Wishes, deadline: float, dropped: threading.Event
    ) -> tuple[bytes, dict[str, float]]:
        def watch(name: str) -> None:
            if dropped.is_set():
                raise RefusedError(499, "nobody waits for the answer any more")
            if time.monotonic() > deadline:
                raise RefusedError(504, f"not finished after {self.limits.seconds:g} s, before {name!r}")

        with listening(watch, self.trained.wait) as seconds:
            try:
                with stage("picture"):
                    image = open_picture(
                        content,
                        "the picture",
                        max_bytes=int(self.limits.megabytes * 1e6),
                        max_pixels=int(self.limits.megapixels * 1e6),
                    )
                framed = self.trained.model.picture(image)
            except PictureTooLargeError as error:
                raise RefusedError(413, str(error)) from error
            except NotAPictureError as error:
                raise RefusedError(415, str(error)) from error
            except PictureError as error:
                raise RefusedError(400, str(error)) from error
            try:
                mesh, _ = make_mesh(self.trained.model(as_tensor(framed)), wishes)
            except InputError as error:
                raise RefusedError(422, str(error)) from error
            with stage("files"):
                return encode_glb(mesh), seconds

    def close(self) -> None:
        """Wait for what is in hand."""
        self._thread.shutdown(wait=True)


class Uploads:
    """Reads the bodies of requests: each in a bounded time, and of all together a bounded number of bytes.

    Args:
        limits: What a request may cost.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._arriving = 0

    async def read(self, request: Any) -> bytes:  # noqa: ANN401 - a Starlette request
        """Read a body, but no more of it than is allowed.

        Raises:
            RefusedError: It is too large, too slow, or cut off, or too many arrive at a time.
        """
        if self._arriving >= _UPLOADS:
            raise RefusedError(503, f"{self._arriving} pictures are arriving already; come back later")
        self._arriving += 1
        try:
            async with asyncio.timeout(self.limits.upload_seconds):
                return await self._read(request)
        except TimeoutError as error:
            raise RefusedError(
                408, f"expected the picture within {self.limits.upload_seconds:g} s"
            ) from error
        finally:
            self._arriving -= 1

    async def _read(self, request: Any) -> bytes:  # noqa: ANN401 - a Starlette request
        from starlette.requests import ClientDisconnect

        most = int(self.limits.megabytes * 1e6)
        too_large = RefusedError(413, f"expected at most {self.limits.megabytes:g} MB, found more")
        stated = request.headers.get("content-length", "")
        if stated.isdigit() and int(stated) > most:
            raise too_large
        content = bytearray()
        try:
            async for part in request.stream():
                content += part
                if len(content) > most:
                    raise too_large
        except ClientDisconnect as error:
            raise RefusedError(400, "the picture was cut off") from error
        return bytes(content)


def make_app(trained: Trained, limits: Limits) -> Any:  # noqa: ANN401 - a FastAPI
    """Make the web application."""
    from fastapi import FastAPI, Query, Request, Response
    from fastapi.exception_handlers import request_validation_exception_handler
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

    from lrm_pl.apps.connections import Lingering

    works, uploads, registry = Works(trained, limits), Uploads(limits), CollectorRegistry()
    requests = Counter("lrm_requests", "Requests for a mesh, by status", ["status"], registry=registry)
    waiting = Gauge("lrm_waiting", "Requests that wait or are worked on", registry=registry)
    waiting.set_function(lambda: works.waiting)
    seconds = Histogram(
        "lrm_stage_seconds", "Time of each stage of a mesh", ["stage"], registry=registry,
        buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
    )  # fmt: skip

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        works.close()

    app = FastAPI(title="lrm", version=__version__, description=__doc__, lifespan=lifespan)
    app.add_middleware(Lingering)
    app.state.works = works

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> Response:
        requests.labels(422).inc()
        return await request_validation_exception_handler(request, error)

    @app.post(
        "/reconstruct",
        responses={200: {"content": {"model/gltf-binary": {}}, "description": "The mesh"}},
        response_class=Response,
        openapi_extra={"requestBody": {"required": True, "content": {"image/*": {}}}},
    )
    async def reconstruct(
        request: Request,
        resolution: Annotated[int, Query(ge=LEAST_RESOLUTION, le=limits.resolution)] = min(
            256, limits.resolution
        ),
        threshold: Annotated[float | None, Query(gt=0, allow_inf_nan=False)] = None,
        floaters: Annotated[float, Query(ge=0, le=1)] = 0.0,
        faces: Annotated[int | None, Query(ge=4, le=MOST_FACES)] = None,
    ) -> Response:
        """Turn the picture in the body (PNG, JPEG, WebP, BMP) into a GLB."""
        try:
            if request.headers.get("content-type", "").startswith("multipart/"):
                raise RefusedError(
                    415,
                    "expected the picture itself as the body, found a form; curl --data-binary @photo.png",
                )
            if unknown := sorted(set(request.query_params) - _PARAMETERS):
                raise RefusedError(
                    422, f"expected the parameters {', '.join(sorted(_PARAMETERS))}, found {unknown}"
                )
            content = await uploads.read(request)
            wishes = Wishes(resolution=resolution, threshold=threshold, floaters=floaters, most_faces=faces)
            glb, stages = await works.make(content, wishes, request.is_disconnected)
        except RefusedError as error:
            requests.labels(error.status).inc()
            headers = {"Retry-After": "10"} if error.status == 503 else {}
            return JSONResponse({"detail": error.reason}, error.status, headers)
        except Exception:  # whatever one request does, the next is served
            logger.exception("a request failed")
            requests.labels(500).inc()
            return JSONResponse({"detail": "this request failed; the server's log says why"}, 500)
        requests.labels(200).inc()
        for name, value in stages.items():
            seconds.labels(name).observe(value)
        return Response(glb, media_type="model/gltf-binary")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Say what is served."""
        return {"status": "ok", "network": trained.source, "sha256": trained.sha256, "waiting": works.waiting}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Count, in Prometheus' format."""
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; expected errors end in one message."""
    given = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    try:
        import uvicorn

        from lrm_pl.apps.connections import BoundedProtocol
    except ImportError:
        sys.exit("lrm: expected uvicorn and fastapi to serve with, found none; pip install -e '.[serve]'")
    try:
        limits = Limits(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Limits)})
        _ = Wishes(resolution=limits.resolution)  # says what there may be
        require_free(given.host, given.port)
        trained = open_network(given)
        trained.model.remover.load()
    except (InputError, OSError) as error:
        sys.exit(f"lrm: {error}")
    address = f"http://{given.host}:{given.port}"
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
        ("megabytes", float, "size of a picture's file"),
        ("megapixels", float, "pixels of a picture"),
        ("seconds", float, "until the answer, waiting included"),
        ("upload_seconds", float, "for the picture to arrive"),
        ("queue", int, "requests that may wait"),
        ("resolution", int, "largest lattice, points along each axis"),
    ):
        value = getattr(usual, name)
        option = f"--{name.replace('_', '-')}"
        limits.add_argument(option, dest=name, type=kind, default=value, help=f"{what} ({value:g})")
    add_background(parser)
    return parser
