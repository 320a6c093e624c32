"""A network behind HTTP. POST /reconstruct takes an image, and answers with a GLB.

    curl --data-binary @photo.png http://127.0.0.1:8000/reconstruct -o mesh.glb

One image is worked on at a time; others wait in a queue of a bounded length. GET /health says whether it works,
GET /metrics counts for Prometheus, GET /docs describes all of it.
"""

import asyncio
import contextlib
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from lrm_pl import __version__
from lrm_pl.apps.serve import LEAST_RESOLUTION, Limits
from lrm_pl.errors import InputError
from lrm_pl.images import ImageError, ImageTooLargeError, NotAnImageError, open_image
from lrm_pl.inference.find_model import Trained
from lrm_pl.inference.mesh_options import MOST_FACES, MeshOptions
from lrm_pl.inference.reconstruction import make_mesh
from lrm_pl.inference.scene import as_tensor
from lrm_pl.meshing.glb import encode_glb
from lrm_pl.progress import listening, stage

logger = logging.getLogger(__name__)

#: Images that may arrive at a time: a wall for memory; the queue is much shorter.
_UPLOADS = 32


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
    """Makes meshes of images, one at a time, on a thread of its own.

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
        self, content: bytes, wishes: MeshOptions, gone: Callable[[], Awaitable[bool]]
    ) -> tuple[bytes, dict[str, float]]:
        """Reconstruct an encoded image; return the bytes of a GLB file.

        Args:
            content: The image.
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
        self, content: bytes, wishes: MeshOptions, deadline: float, dropped: threading.Event
    ) -> tuple[bytes, dict[str, float]]:
        def watch(name: str) -> None:
            if dropped.is_set():
                raise RefusedError(499, "nobody waits for the answer any more")
            if time.monotonic() > deadline:
                raise RefusedError(504, f"not finished after {self.limits.seconds:g} s, before {name!r}")

        with listening(watch, self.trained.wait) as seconds:
            try:
                with stage("image"):
                    image = open_image(
                        content,
                        "the image",
                        max_bytes=int(self.limits.megabytes * 1e6),
                        max_pixels=int(self.limits.megapixels * 1e6),
                    )
                framed = self.trained.model.preprocess(image)
            except ImageTooLargeError as error:
                raise RefusedError(413, str(error)) from error
            except NotAnImageError as error:
                raise RefusedError(415, str(error)) from error
            except ImageError as error:
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
            raise RefusedError(503, f"{self._arriving} images are arriving already; come back later")
        self._arriving += 1
        try:
            async with asyncio.timeout(self.limits.upload_seconds):
                return await self._read(request)
        except TimeoutError as error:
            raise RefusedError(408, f"expected the image within {self.limits.upload_seconds:g} s") from error
        finally:
            self._arriving -= 1

    async def _read(self, request: Any) -> bytes:  # noqa: ANN401 - a Starlette request
        from starlette.requests import ClientDisconnect

        most = int(self.limits.megabytes * 1e6)
        too_large = RefusedError(413, f"expected at most {self.limits.megabytes:g} MB, but found more")
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
            raise RefusedError(400, "the image was cut off") from error
        return bytes(content)


def what_else(content: bytes, content_type: str) -> str:
    """Name what a body is that is often sent in an image's place; nothing where it may be an image."""
    if content_type.startswith("multipart/"):
        return "a form"
    if not content:
        return "nothing"
    if content[:2] == b"\x1f\x8b":
        return "gzip"
    if content.lstrip()[:1] in (b"{", b"[", b'"'):
        return "JSON"
    if content[:5] == b"data:" or re.fullmatch(rb"[A-Za-z0-9+/=\s]+", content[:4096]):
        return "text, as base64 is"
    # curl -d leaves out line ends and zeros, of which these signatures have some
    if content[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0") and not {10, 0} & set(content[:4096]):
        return "an image without its line ends and zeros, as curl -d sends it"
    return ""


def make_app(trained: Trained, limits: Limits) -> Any:  # noqa: ANN401 - a FastAPI
    """Make the web application."""
    from fastapi import FastAPI, Query, Request, Response
    from fastapi.exception_handlers import request_validation_exception_handler
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, RedirectResponse
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

    app = FastAPI(
        title="lrm", version=__version__, description=__doc__, lifespan=lifespan, redirect_slashes=False
    )
    app.add_middleware(Lingering)
    app.state.works = works

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> Response:
        requests.labels(422).inc()
        return await request_validation_exception_handler(request, error)

    # With a slash after it too: where clients are sent elsewhere, most leave the image behind.
    @app.post("/reconstruct/", include_in_schema=False)
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
        """Turn the image in the body (PNG, JPEG, WebP, BMP, TIFF, AVIF) into a GLB."""
        try:
            if unknown := sorted(set(request.query_params) - _PARAMETERS):
                raise RefusedError(
                    422, f"expected the parameters {', '.join(sorted(_PARAMETERS))}, but found {unknown}"
                )
            if len(request.query_params.multi_items()) > len(request.query_params):
                raise RefusedError(422, f"expected every parameter once, but found {request.query_params}")
            content = await uploads.read(request)
            if found := what_else(content, request.headers.get("content-type", "")):
                raise RefusedError(
                    415,
                    f"expected the bytes of an image as the body, but found {found}; curl --data-binary @photo.png",
                )
            wishes = MeshOptions(
                resolution=resolution, threshold=threshold, floaters=floaters, most_faces=faces
            )
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

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def say_where(request: Request, error: Any) -> Response:  # noqa: ANN401 - Starlette's
        detail = f"{request.method} {request.url.path}: {error.detail}; GET /docs says what there is"
        return JSONResponse({"detail": detail}, error.status_code, error.headers)

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/docs")

    @app.head("/health", include_in_schema=False)
    @app.head("/health/", include_in_schema=False)
    @app.get("/health/", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Say what is served."""
        return {"status": "ok", "network": trained.source, "sha256": trained.sha256, "waiting": works.waiting}

    @app.get("/metrics/", include_in_schema=False)
    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Count, in Prometheus' format."""
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    return app
